"""The checks behind LLM-Viewer's claims, see `core.verdicts`."""

from __future__ import annotations

from collections.abc import Sequence

from broadsheet.core.records import Record
from broadsheet.core.verdicts import Verdict, find, graded


def _rows(records: Sequence[Record], prefix: str, **setting: object) -> list[Record]:
    found = find(records, bench="estimates-published", paper="llm-viewer", **setting)
    return [record for record in found if record.metric.startswith(prefix)]


def _exact(rows: Sequence[Record], digits: int) -> Verdict:
    """Holds where all rows agree with what was published to as many digits as that has."""
    if not rows:
        return None
    same = [abs(r.value / r.setting["published"] - 1) < 0.5 * 10 ** (1 - digits) for r in rows]
    worst = max(abs(r.value / r.setting["published"] - 1) for r in rows)
    text = ", ".join(f"{r.value:.4g}" for r in rows)
    return graded(same, same), f"counted as the official code does: {text} (worst difference {worst:.2%})"


def prefill_row(records: Sequence[Record]) -> Verdict:
    return _exact(_rows(records, "q_proj_", stage="prefill"), 4)


def decode_row(records: Sequence[Record]) -> Verdict:
    return _exact(_rows(records, "q_proj_", stage="decode"), 4)


def decode_step(records: Sequence[Record]) -> Verdict:
    return _exact([r for r in _rows(records, "step_") if "batch" not in r.setting], 3)


def weight_only(records: Sequence[Record]) -> Verdict:
    """The published times to their digits, and predictions of real passes that rank as the measured ones do."""
    rows = [r for r in _rows(records, "step_seconds") if "batch" in r.setting]
    rank = find(records, bench="estimates", method="llm-viewer", metric="spearman")
    error = find(records, bench="estimates", method="llm-viewer", metric="median_error")
    if not rows or not rank:
        return None
    same = [abs(r.value - r.setting["published"]) < 0.51e-4 for r in rows]
    times = ", ".join(f"{r.value * 1e3:.1f}" for r in rows)
    text = (
        f"{times} ms; {rank[0].n} measured passes on a CPU: Spearman {rank[0].value:.3f}, median error {error[0].value:.0%}"
    )
    return graded([*same, rank[0].value >= 0.95], same), text
