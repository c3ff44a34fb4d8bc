"""The checks behind ENAMEL's claims, see `core.verdicts`."""

from __future__ import annotations

from collections.abc import Sequence

from broadsheet.core.records import Record
from broadsheet.core.verdicts import DIRECTION, FAILS, HOLDS, Verdict, find, graded


def _row(records: Sequence[Record], name: str, eff: float, passed: float, more: str = "") -> Verdict:
    """A canonical set's eff@1 and pass@1 within 0.03 and 0.01 of the paper's, on a machine whose references score 0.9."""
    found = {
        metric: find(records, bench="enamel-study", part="official", set=name, metric=metric)
        for metric in ("eff@1", "pass@1", "reference_self_score")
    }
    if not all(found.values()):
        return None
    e, p, itself = (some[0].value for some in found.values())
    text = f"{e:.3f} and {p:.3f} (n={found['eff@1'][0].n}; references {itself:.3f}){more}"
    if itself < 0.9:
        return FAILS, f"{text}: too noisy to publish"
    near = abs(e - eff) <= 0.03, abs(p - passed) <= 0.01
    return graded(near, (abs(e - eff) <= 0.06, abs(p - passed) <= 0.02)), text


def canonical(records: Sequence[Record]) -> Verdict:
    """HumanEval's canonical solutions: 0.458 and 0.908."""
    return _row(records, "humaneval-canonical", 0.458, 0.908)


def canonical_plus(records: Sequence[Record]) -> Verdict:
    """HumanEval+'s: 0.517 and 0.958; with the rank correlation of two clocks where it was measured."""
    ranks = find(records, bench="enamel-study", part="clocks", metric="spearman")
    more = f"; Spearman {ranks[0].value:.2f} between CPU time and instructions ({ranks[0].n} problems)" if ranks else ""
    return _row(records, "humanevalplus-canonical", 0.517, 0.958, more)


def ranks_differ(records: Sequence[Record]) -> Verdict:
    """SIMULATED: eff@1 moves as the closed form says, within 2 standard errors, and pass@1 does not."""
    found = {
        name: find(records, bench="enamel-study", part="coder", metric=name)
        for name in ("eff@1_shift", "eff@1_shift_se", "eff@1_shift_expected", "pass@1_shift", "pass@1_shift_se")
    }
    if not all(found.values()):
        return None
    eff, eff_error, expected, passed, pass_error = (some[0].value for some in found.values())
    text = f"SIMULATED: eff@1 {eff:+.3f} (closed form {expected:+.3f}), pass@1 {passed:+.3f}"
    right = abs(eff - expected) <= 2 * eff_error, abs(passed) <= 2 * pass_error
    return (HOLDS if all(right) else DIRECTION if eff > 2 * abs(passed) else FAILS), text


def estimator(records: Sequence[Record]) -> Verdict:
    """No bias beyond 2 standard errors, and at most k/n of the variance of one subset."""
    bias = find(records, bench="enamel-study", part="estimator", metric="bias_in_standard_errors")
    spread = {
        of: find(records, bench="enamel-study", part="estimator", metric="deviation", of=of) for of in ("ours", "one subset")
    }
    if not bias or not all(spread.values()):
        return None
    ours, one = spread["ours"][0].value, spread["one subset"][0].value
    text = f"bias {bias[0].value:+.2f} standard errors, deviation {ours:.3f} against {one:.3f} of one subset"
    return graded((abs(bias[0].value) < 2, ours**2 <= 0.1 * one**2), (abs(bias[0].value) < 3, ours < one)), text
