"""The checks behind the cost model's claims, see `core.verdicts`. All from XLA's CPU compiler, on templates held out."""

from __future__ import annotations

from collections.abc import Sequence

from broadsheet.core.records import Record
from broadsheet.core.verdicts import Verdict, find, graded

#: what can fall out of counts least: register pressure and vector use, the paper's targets, and their nearest kin
_PRESSURE = ("spills", "vector_util", "instructions")


def _one(records: Sequence[Record], method: str, metric: str, **setting: object) -> Record | None:
    found = find(records, bench="mlir-cost-study", method=method, metric=metric, **setting)
    return found[0] if found else None


def low_error(records: Sequence[Record]) -> Verdict:
    """The best model against the line in log FLOPs on time, by at least 0.05 in rank correlation and a quarter in RMSE."""
    line = [_one(records, "flops", metric, split="template", target="time") for metric in ("spearman", "rmse")]
    best: tuple[str, Record, Record] | None = None
    for name in ("model", "trees", "additive"):
        rank, error = (_one(records, name, metric, split="template", target="time") for metric in ("spearman", "rmse"))
        if rank and error and (best is None or error.value < best[2].value):
            best = (name, rank, error)
    if best is None or line[0] is None or line[1] is None:
        return None
    name, rank, error = best
    gain, cut = rank.value - line[0].value, 1 - error.value / line[1].value
    ranges = []
    for target in ("spills", "vector_util", "time"):
        share = _one(records, "model", "rmse_of_range", split="template", target=target)
        mean = _one(records, "mean", "rmse_of_range", split="template", target=target)
        if share and mean:
            ranges.append(f"{target} {100 * share.value:.0f} % (the mean alone {100 * mean.value:.0f} %)")
    text = (
        f"time on held-out templates: {name} Spearman {rank.value:.2f} against {line[0].value:.2f} of the FLOPs line, "
        f"RMSE {100 * cut:.0f} % lower; RMSE of the log range with the cost model: {', '.join(ranges)}"
    )
    return graded([gain >= 0.05, cut >= 0.25], [gain > 0, cut > 0]), text


def sequence_over_bag(records: Sequence[Record]) -> Verdict:
    """Convolutions, the LSTM and (beside the paper) a transformer against a bag of the same tokens, over all targets."""
    better: dict[str, list[bool]] = {"conv": [], "lstm": [], "transformer": []}
    parts = list[str]()
    for target in ("time", "peak_bytes", "temp_bytes", "kernels", "fusions", *_PRESSURE):
        bag = _one(records, "bag", "rmse", split="template-0", target=target)
        found = [_one(records, name, "rmse", split="template-0", target=target) for name in better]
        values = [record.value for record in found if record]
        if bag is None or len(values) < len(better):
            return None
        for name, value in zip(better, values, strict=True):
            better[name].append(value < bag.value)
        parts.append(f"{target} {'/'.join(f'{value:.2f}' for value in (*values, bag.value))}")
    shuffled = _one(records, "bag", "r2", split="shuffled-0", target="time")
    control = f"; shuffled labels R² {shuffled.value:.2f}" if shuffled else ""
    count = ", ".join(f"{name} better in {sum(wins)}" for name, wins in better.items())
    errors = f"RMSE of conv/LSTM/transformer/bag on held-out templates: {', '.join(parts)}"
    text = f"{errors}; {count} of {len(parts)} targets{control}"
    papers = [better["conv"], better["lstm"]]
    return graded([all(wins) for wins in papers], [sum(wins) > len(wins) / 2 for wins in papers]), text


def operands_help(records: Sequence[Record]) -> Verdict:
    """Which of two programs of the same operations has more bytes live: names alone must not know, operands must.

    In "operands" pairs the names stand in the same order, and no model of names can tell them apart. In "order" pairs they
    do not, and what sees the order of names may know a little (the record of "conv_ops" says how much); there names alone
    are a bag.
    """
    certain, likely, parts = [], [], []
    for pairs, names in (("operands", "conv_ops"), ("order", "bag_ops")):
        ops, operands = (_one(records, name, "order_accuracy", pairs=pairs) for name in (names, "conv"))
        if not ops or not operands or not operands.ci:
            return None
        certain.append(ops.value <= 0.55 and operands.value >= 0.9)
        likely.append(operands.ci[0] > ops.value)
        parts.append(f"{pairs} pairs {100 * ops.value:.0f} % by names, {100 * operands.value:.0f} % with operands")
    return graded(certain, likely), f"the larger peak of live bytes: {'; '.join(parts)}"


def fast_inference(records: Sequence[Record]) -> Verdict:
    """Milliseconds of a prediction, and how many go into compiling and measuring; reading the text counts."""
    found = {
        name: _one(records, "model", f"speed_{name}")
        for name in ("operations", "network", "answer", "parse", "compile_and_measure")
    }
    if not all(found.values()):
        return None
    value = {name: record.value for name, record in found.items() if record}
    whole = value["answer"] + value["parse"]
    ratio = value["compile_and_measure"] / whole
    text = (
        f"{value['operations']:.0f} operations: one network {value['network']:.1f} ms, the whole model from parsed text "
        f"{value['answer']:.1f} ms, with parsing {whole:.1f} ms; compiling and measuring takes {ratio:.0f}x as long"
    )
    return graded([whole <= 2, ratio >= 50], [ratio >= 50]), text
