"""The checks behind sequential monitors' claims, see `core.verdicts`. All numbers are from an instrument: SIMULATED."""

from __future__ import annotations

from collections.abc import Sequence

from broadsheet.core.records import Record
from broadsheet.core.verdicts import Verdict, find, graded


def _one(records: Sequence[Record], method: str, metric: str, **setting: object) -> Record | None:
    found = find(records, bench="sequential-monitors-study", method=method, metric=metric, **setting)
    return found[0] if found else None


def _low(record: Record) -> float:
    return record.ci[0] if record.ci else float("-inf")


def sequential_gain(records: Sequence[Record]) -> Verdict:
    """F1 at least .08 and recall at 5 % false alarms at least .25 above the single-request monitor's."""
    f1 = _one(records, "cumulative", "f1_gain", part="table")
    recall = _one(records, "cumulative", "recall@fpr=0.05_gain", part="table")
    if not f1 or not recall:
        return None
    equal = _one(records, "cumulative", "recall@fpr=0.05_equal_at", part="noise", sweep="noise")
    text = f"SIMULATED: F1 {f1.value:+.3f}, recall at 5 % false alarms {recall.value:+.3f} over {f1.n} seeds"
    if equal:
        text += f"; none at a reading noise of {equal.value:.1f} (the single monitor's: 0.3)"
    return graded([_low(f1) >= 0.08, _low(recall) >= 0.25], [f1.value > 0, recall.value > 0]), text


def optimised_prompt(records: Sequence[Record]) -> Verdict:
    """The best of six prompts is picked in nine of ten searches; what validation promises above the test is shown."""
    picked, gain, optimism = (
        _one(records, "selection", metric, part="prompts", six="clear") for metric in ("picked_best", "f1_gain", "optimism")
    )
    if not picked or not gain or not optimism:
        return None
    text = (
        f"SIMULATED: best of six picked in {picked.value:.0%} of {picked.n} searches, test F1 {gain.value:+.3f} above their "
    )
    text += f"mean, validation {optimism.value:+.3f} above test"
    close = _one(records, "selection", "picked_best", part="prompts", six="close")
    lost = _one(records, "selection", "f1_lost", part="prompts", six="close")
    if close and lost:
        text += f"; of six that hardly differ in {close.value:.0%}, at a loss of {lost.value:.3f}"
    return graded([picked.value >= 0.9, _low(gain) > 0], [gain.value > 0]), text


def injection_robustness(records: Sequence[Record]) -> Verdict:
    """F1 falls when as many unrelated requests are mixed in, and weighing them by relevance repairs a part of it."""
    fall = _one(records, "cumulative", "injection_fall", part="table")
    repair = _one(records, "relevance", "injection_repair", part="table")
    if not fall or not repair:
        return None
    text = f"SIMULATED: F1 falls by {fall.value:.3f} at 100 %; weights by relevance win back {repair.value:.3f}"
    certain = [_low(fall) > 0, _low(repair) > 0, repair.value < fall.value]
    return graded(certain, [fall.value > 0, repair.value > 0]), text
