"""The cost model as an xDSL pass."""

import pytest

pytest.importorskip("xdsl", reason="xDSL is not installed")

from xdsl.context import Context
from xdsl.dialects.builtin import Builtin
from xdsl.dialects.func import Func
from xdsl.parser import Parser
from xdsl.passes import PassPipeline

from broadsheet.methods.estimates.mlir_cost_model import CostModel
from broadsheet.methods.estimates.mlir_cost_model.xdsl_pass import EstimateCost

TEXT = """builtin.module {
  func.func @main(%x: tensor<16x32xf32>, %y: tensor<16x32xf32>) -> tensor<16x32xf32> {
    %0 = "stablehlo.add"(%x, %y) : (tensor<16x32xf32>, tensor<16x32xf32>) -> tensor<16x32xf32>
    %1 = "stablehlo.tanh"(%0) : (tensor<16x32xf32>) -> tensor<16x32xf32>
    func.return %1 : tensor<16x32xf32>
  }
}"""


def read(text):
    context = Context(allow_unregistered=True)
    for dialect in (Builtin, Func):
        context.load_dialect(dialect)
    return context, Parser(context, text).parse_module()


def test_a_pass_writes_what_the_model_says():
    context, module = read(TEXT)
    PassPipeline((EstimateCost(targets=("time", "kernels")),)).apply(context, module)
    module.verify()
    (main,) = module.body.block.ops
    expected = CostModel.load().answer(TEXT).predictions
    assert set(main.attributes) - {"cost.abstain"} == {"cost.time", "cost.kernels"}
    assert [one.value.data for one in main.attributes["cost.time"].data] == pytest.approx(list(expected["time"]))
    again = CostModel.load().answer(str(module))  # what it wrote changes no prediction
    assert again.predictions == expected


def test_it_refuses_what_it_does_not_know():
    with pytest.raises(ValueError, match="no target heat"):
        EstimateCost(targets=("heat",))
    context, module = read(TEXT.replace("16x32", "?x32"))
    with pytest.raises(ValueError, match="dynamic shape"):
        EstimateCost().apply(context, module)
