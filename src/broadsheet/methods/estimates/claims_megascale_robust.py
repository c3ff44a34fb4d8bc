"""The checks behind MegaScale's claims that its driver and diagnosis are measured on: real processes, real faults."""

from __future__ import annotations

from collections.abc import Sequence

from broadsheet.core.records import Record
from broadsheet.core.verdicts import Verdict, find, graded

from . import claims_megascale_sim

BENCH = "megascale-faults"
#: faults that the paper's list has as well; "silent" is our own negative control
KINDS = (
    "kill", "exit", "stop", "hang", "heartbeat", "checkpoint", "write", "gradient", "replica", "nan", "disk", "slow", "link",
    "two",
)  # fmt: skip


def _value(records: Sequence[Record], metric: str, kind: str) -> Record | None:
    found = find(records, bench=BENCH, metric=metric, kind=kind)
    return found[0] if found else None


def automatic_recovery(records: Sequence[Record]) -> Verdict:
    """Over 90 % of faults end without a person, in the bits of the unbroken run; a kill is found within three heartbeats."""
    shares = {name: _value(records, name, "all but silent") for name in ("automatic", "named", "identical")}
    kill, hang, again = (
        _value(records, "detect_s", "kill"),
        _value(records, "detect_s", "hang"),
        _value(records, "recover_s", "kill"),
    )
    if kill is None or hang is None or again is None or not all(shares.values()):
        return None
    automatic, named, identical = (record.value if record else 0.0 for record in shares.values())
    heartbeats = kill.setting["most"] / kill.parameters["heartbeat"]
    count = sum(record.n for name in KINDS if (record := _value(records, "automatic", name)))
    text = (
        f"{count} faults in 4 local ranks: {automatic:.0%} recovered without a person, {named:.0%} named rightly, "
        f"{identical:.0%} to the bit; a kill is found in {kill.value:.2f} s (at most {heartbeats:.1f} heartbeats), "
        f"a hang in {hang.value:.1f} s, and training goes on {again.value:.1f} s later"
    )
    certain = [automatic > 0.9, heartbeats < 3, identical == 1.0]
    return graded(certain, [automatic > 0.9, identical > 0.9]), text


def stragglers(records: Sequence[Record]) -> Verdict:
    """A rank that is 10 % slow is named within 50 steps and at most 1 % of others; what removing them gains is simulated."""
    simulated = claims_megascale_sim.straggler_gain(records)
    named, steps = _value(records, "named", "slow"), _value(records, "detect_steps", "slow")
    clean = _value(records, "stragglers", "all but slow")
    if simulated is None or named is None or steps is None or clean is None:
        return simulated
    wrong = clean.value / clean.parameters["ranks"]
    text = (
        f"real: a rank 10 % slow is named in {named.value:.0%} of {named.n} runs after {steps.value:.0f} steps (at most "
        f"{steps.setting['most']:.0f}), {wrong:.1%} of ranks wrongly in {clean.n} other runs; {simulated[1]}"
    )
    good = [named.value == 1.0, steps.setting["most"] <= 50, wrong <= 0.01]
    return graded(
        [simulated[0] == "holds", *good], [named.value > 0.5, wrong <= 0.05, simulated[0] != "does not hold here"]
    ), text
