"""The verdicts of the cost model's claims follow the records."""

from dataclasses import replace

from broadsheet.core.records import Record
from broadsheet.methods.estimates.claims_mlir_cost_model import fast_inference, low_error, operands_help, sequence_over_bag


def record(method, metric, value, ci=None, **setting):
    return Record("mlir-cost-model", method, "mlir-cost-study", metric, value, ci=ci, setting=setting)


def test_nothing_measured_is_no_verdict():
    assert [check([]) for check in (low_error, sequence_over_bag, operands_help, fast_inference)] == [None] * 4


def test_low_error_wants_rank_and_rmse():
    def verdict(rank, error):
        where = {"split": "template", "target": "time"}
        return low_error([
            record("flops", "spearman", 0.80, **where), record("flops", "rmse", 0.8, **where),
            record("trees", "spearman", rank, **where), record("trees", "rmse", error, **where),
        ])[0]  # fmt: skip

    assert verdict(0.86, 0.5) == "holds"
    assert verdict(0.82, 0.5) == verdict(0.86, 0.7) == "holds in direction"
    assert verdict(0.79, 0.5) == "does not hold here"


def test_operands_must_know_and_names_must_not():
    def records(ops, operands):
        return [
            one
            for pairs in ("operands", "order")
            for one in (
                record("conv_ops" if pairs == "operands" else "bag_ops", "order_accuracy", ops, pairs=pairs),
                record("conv", "order_accuracy", operands, (operands - 0.02, operands + 0.02), pairs=pairs),
            )
        ]

    assert operands_help(records(0.5, 0.95))[0] == "holds"
    assert operands_help(records(0.5, 0.85))[0] == "holds in direction"
    assert operands_help(records(0.6, 0.6))[0] == "does not hold here"


def test_speed_counts_the_reading():
    values = {"operations": 200, "network": 1.0, "answer": 1.5, "parse": 0.4, "compile_and_measure": 800}
    records = [record("model", f"speed_{name}", value) for name, value in values.items()]
    assert fast_inference(records)[0] == "holds"
    slow = [replace(one, value=6.0) if one.metric == "speed_parse" else one for one in records]
    assert fast_inference(slow)[0] == "holds in direction"
    assert "107x" in fast_inference(slow)[1]


def test_bag_and_sequence_over_all_targets():
    targets = ("time", "peak_bytes", "temp_bytes", "kernels", "fusions", "spills", "vector_util", "instructions")

    def verdict(worse):
        records = [
            record(name, "rmse", 1.0 if name == "bag" else 1.1 if n < worse else 0.9, split="template-0", target=target)
            for n, target in enumerate(targets)
            for name in ("bag", "conv", "lstm", "transformer")
        ]
        return sequence_over_bag(records)[0]

    assert [verdict(worse) for worse in (0, 2, 6)] == ["holds", "holds in direction", "does not hold here"]
