"""The checks behind INSTINCT's claims, see `core.verdicts`. All numbers are from an instrument: SIMULATED."""

from __future__ import annotations

from collections.abc import Sequence

from broadsheet.core.records import Record
from broadsheet.core.verdicts import Verdict, find, graded

#: multiples of random search's mean reward that must be reached
_WANTED = {"easy": 3.0, "hard": 2.0}


def _one(records: Sequence[Record], method: str, metric: str, world: str, **setting: object) -> Record | None:
    """The record of the main comparison: without a swept setting, unless it is asked for."""
    found = find(records, bench="instinct-study", method=method, metric=metric, world=world, **setting)
    swept = {"nu", "samples", "round"} - setting.keys()
    found = [record for record in found if not swept & record.setting.keys()]
    return found[0] if found else None


def average_rank(records: Sequence[Record]) -> Verdict:
    """The scaled network's mean reward over random search's, and what it chose in the end is truly better too: a rank is of
    what was found, and a bandit may earn well with an instruction that chance finds as well."""
    parts, certain, likely = [], [], []
    for world, wanted in _WANTED.items():
        ratio = _one(records, "instinct", "ratio", world)
        if not ratio or not ratio.ci:
            return None
        certain.append(ratio.ci[0] >= wanted and ratio.setting["p"] < 0.01)
        likely.append(ratio.ci[0] > 1)
        shown = []
        for method in ("instinct", "random", "gp", "evolution"):
            score = _one(records, method, "true_score", world)
            if score:
                shown.append(f"{method} {score.value:.2f}")
        ours, chance = (_one(records, method, "true_score", world) for method in ("instinct", "random"))
        certain.append(bool(ours and chance and ours.ci and ours.ci[0] > chance.value))
        parts.append(f"{world}: {ratio.value:.1f}x random in mean reward; chosen instruction {', '.join(shown)}")
    return graded(certain, likely), "SIMULATED: " + "; ".join(parts)


def hidden_state_features(records: Sequence[Record]) -> Verdict:
    """In the hard world the Gaussian process on hidden states at least matches the one on coordinates."""
    gp, net = _one(records, "gp", "gain", "hard"), _one(records, "instinct", "gain", "hard", against="neural_z")
    if not gp or not gp.ci or not net:
        return None
    text = f"SIMULATED: mean reward on hidden states over coordinates: {gp.value:+.3f} (process), {net.value:+.3f} (network)"
    return graded([gp.ci[0] >= 0], [gp.value >= 0]), text
