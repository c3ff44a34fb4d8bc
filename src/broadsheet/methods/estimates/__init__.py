"""Performance models, cluster simulators and device harnesses: what a run would cost, before it is paid for."""
