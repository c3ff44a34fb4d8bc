"""The checks behind MELT's claims, see `core.verdicts`; the records are ``benchmarks/melt_study.py``'s."""

from __future__ import annotations

from collections.abc import Sequence

from broadsheet.core.records import Record
from broadsheet.core.verdicts import Verdict, find, graded, percent

#: what a check asks of the slope of log rate over log bytes
_SLOPE, _WITHIN = -1.0, 0.2


def _one(records: Sequence[Record], **wanted: object) -> Record | None:
    found = find(records, bench="melt-study", **wanted)
    return found[0] if found else None


def matmul_dominates(records: Sequence[Record]) -> Verdict:
    """The public log, read by our parser: 29 evaluations of 1124 nodes, and the share of wall time; of CPU time too."""
    evaluations, nodes = _one(records, metric="evaluations"), _one(records, metric="nodes")
    wall, cpu = (_one(records, metric="op_share", op="MUL_MAT", clock=clock) for clock in ("wall", "cpu"))
    if not (evaluations and nodes and wall and cpu):
        return None
    text = (
        f"{percent(wall.value)} of wall time over {evaluations.value:.0f} evaluations of {nodes.value:.0f} nodes; of CPU "
        f"time, which the runtime counts over all of its threads, {percent(cpu.value)}"
    )
    whole = (evaluations.value, nodes.value) == (29, 1124)
    return graded([whole, abs(wall.value - 0.974) <= 0.001], [wall.value > 0.9]), text


def size_decides_speed(records: Sequence[Record]) -> Verdict:
    """Slope of log decode rate over log bytes read a token, by runtime, one thread; gains of the fewest bits; memory."""
    parts, certain, likely = [], [], []
    for runtime in ("llama.cpp", "torch", "onnxruntime"):
        slope = _one(records, method=runtime, metric="slope", threads=1)
        decode, prefill = (_one(records, method=runtime, metric=f"{what}_gain", threads=1) for what in ("decode", "prefill"))
        if not slope or not slope.ci:
            if runtime == "torch":
                return None
            continue
        certain.append(abs(slope.value - _SLOPE) <= _WITHIN)
        likely.append(slope.ci[1] < 0)
        shown = f"{runtime} slope {slope.value:.2f} [{slope.ci[0]:.2f}, {slope.ci[1]:.2f}]"
        if decode and prefill:
            of, over = decode.setting["of"], decode.setting["over"]
            shown += f", {of} over {over}: decode x{decode.value:.2f}, prefill x{prefill.value:.2f}"
        parts.append(shown)
    peaks = {
        form: found
        for form in ("f32", "f16", "q8_0", "q4_0")
        if (found := _one(records, method="llama.cpp", metric="peak_rss", format=form))
    }
    if peaks:
        shown = ", ".join(f"{form} {_mega(found.value)}" for form, found in peaks.items())
        before = max(found.setting["before"] for found in peaks.values())
        parts.append(f"peak RSS (llama.cpp) {shown}, of which {_mega(before)} before loading")
    return graded(certain, likely), "a layer of Llama-2-7B, random weights, one thread: " + "; ".join(parts)


def _mega(value: float) -> str:
    return f"{value / 1e6:.0f} MB"


def accuracy_falls(records: Sequence[Record]) -> Verdict:
    """Accuracy over five tasks by format, on the same items; the loss must show at two or three bits."""
    base = _one(records, method="torch", metric="accuracy", task="all", format="fp32")
    if not base:
        return None
    parts, gaps = [f"fp32 {base.value:.3f}"], {}
    for form in ("int8", "int4", "int3", "int2"):
        gap = _one(records, method="torch", metric="difference", task="all", format=form)
        if not gap or not gap.ci:
            return None
        gaps[form] = gap
        certain = gap.ci[1] < 0 or gap.ci[0] > 0
        parts.append(f"{form} {gap.value:+.3f}" if certain else f"{form} no difference")
    low = [gaps[form] for form in ("int3", "int2")]
    seen = any(gap.ci is not None and gap.ci[1] < 0 for gap in low)
    text = f"pocket-2m, {base.n} items of five tasks: {', '.join(parts)}"
    return graded([seen], [any(gap.value < 0 for gap in low)]), text
