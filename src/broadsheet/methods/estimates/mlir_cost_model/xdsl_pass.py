"""The cost model as a pass of xDSL: a pipeline asks it without leaving the compiler.

    xdsl.passes.PassPipeline((EstimateCost(),)).apply(context, module)

Needs `pip install 'broadsheet[mlir]'`. xDSL knows no StableHLO of its own: allow unregistered operations in its context.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from xdsl.context import Context
from xdsl.dialects.builtin import ArrayAttr, FloatAttr, ModuleOp, StringAttr, f64
from xdsl.dialects.func import FuncOp
from xdsl.passes import ModulePass

from .cost_model import CostModel
from .labels import TARGETS


@dataclass(frozen=True)
class EstimateCost(ModulePass):
    """Writes ``cost.<target> = [value, low, high]`` on the module's function, and ``cost.abstain = "why"`` where the values
    should not be trusted.

    ``weights``: a shipped model or a file; ``targets``: names of `TARGETS`, all where empty. Raises ValueError for an
    unknown target, weights that are no model, and modules that the reader refuses (dynamic shapes, several functions).
    """

    name: ClassVar[str] = "estimate-cost"
    weights: str = "stablehlo-cpu"
    targets: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if unknown := set(self.targets) - set(TARGETS):
            raise ValueError(f"no target {', '.join(sorted(unknown))}; there are {', '.join(TARGETS)}")

    def apply(self, ctx: Context, op: ModuleOp) -> None:
        answer = CostModel.load(self.weights).answer(str(op))
        functions = [one for one in op.walk() if isinstance(one, FuncOp)]
        main = next((one for one in functions if one.sym_name.data == "main"), functions[0])
        for target in self.targets or answer.predictions:
            main.attributes[f"cost.{target}"] = ArrayAttr(FloatAttr(value, f64) for value in answer.predictions[target])
        if answer.abstain:
            main.attributes["cost.abstain"] = StringAttr(answer.abstain)
