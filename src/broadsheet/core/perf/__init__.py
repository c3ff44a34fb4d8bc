"""Performance without the machine: operator tables, device descriptions, discrete events, planners, an alternating timer."""
