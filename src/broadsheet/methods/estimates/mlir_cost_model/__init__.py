"""Costs of a tensor program from its text, before it is lowered.

Das and Mannarswamy 2023, "ML-driven Hardware Cost Model for MLIR", arXiv 2302.11405.

The paper reads the text of one MLIR function as language: tokens (`tokens`), an embedding, a stack of one-dimensional
convolutions and dense layers (`networks.Network`). Its labels come from the compiler of an accelerator; here they come from
XLA's CPU compiler, the object code it makes and the clock (`labels`). What is shipped (`cost_model`) goes beyond it: a
network on the program's graph (`nodes`) beside trees on its counts (`forest`), intervals and abstention. Compilers ask it
which of several programs is cheaper: `fusion`, `unroll`, `recompute`, `xdsl_pass`. The paper gives no sizes of layers and no
data; those here are ours.

Peak live bytes follow from the text alone and are given exactly beside the prediction.
"""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from broadsheet.methods.estimates.base import Report, Table

from .capture import capture as capture
from .cost_model import Answer, CostModel
from .cost_model import Prediction as Prediction
from .features import flops, interface
from .labels import TARGETS, compile_text, measure_net, peak_live_bytes
from .stablehlo import parse


@dataclass(frozen=True)
class CostReport(Report):
    """``measured``: the labels of the same program, compiled and run here; empty unless asked for. ``milliseconds``: reading
    and predicting."""

    program: str
    operations: int
    answer: Answer
    exact: dict[str, float]
    measured: dict[str, float | None]
    milliseconds: float
    notes: tuple[str, ...]

    def tables(self) -> list[Table]:
        rows = []
        for name, one in self.answer.predictions.items():
            known = self.exact.get(name, self.measured.get(name))
            rows.append((name, TARGETS[name], _round(one.value), _round(one.low), _round(one.high), _round(known)))
        notes = [f"Predicted in {self.milliseconds:.1f} ms; peak_bytes is exact in the last column, from the text."]
        if self.answer.abstain:
            notes.insert(0, f"Do not trust these: {self.answer.abstain}.")
        column = "measured" if self.measured else "exact"
        title = f"{self.program}: {self.operations} operations, {self.exact['flops']:.3g} FLOPs"
        columns = ("target", "unit", "predicted", "low (90 %)", "high", column)
        return [Table(title, columns, tuple(rows), " ".join([*notes, *self.notes]))]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def _round(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.3g}")


@dataclass(frozen=True)
class MLIRCostModel:
    """A cost model that was trained before.

    Attributes:
        weights: a shipped model ("stablehlo-cpu": XLA on a CPU, one thread) or a file that `CostModel.save` wrote.
        targets: comma-separated, of those that the model was trained on; all where empty.
    """

    weights: str = "stablehlo-cpu"
    targets: str = ""

    def __post_init__(self) -> None:
        if unknown := set(self._targets()) - set(TARGETS):
            raise ValueError(f"no target {', '.join(sorted(unknown))}; there are {', '.join(TARGETS)}")

    def _targets(self) -> tuple[str, ...]:
        return tuple(name.strip() for name in self.targets.split(",") if name.strip())

    def estimate(self, program: str, measure: bool = False) -> CostReport:
        """``program``: StableHLO text, or the file it stands in. ``measure``: also compile it here with XLA and time it.

        Raises ValueError for a file that is not there, text that cannot be read (with its line), dynamic shapes, a target
        that the weights do not have.
        """
        model = CostModel.load(self.weights)
        if missing := set(self._targets()) - set(model.targets):
            raise ValueError(f"{self.weights} has no target {', '.join(sorted(missing))}; it has {', '.join(model.targets)}")
        name, text = _text(program)
        model.answer(text)  # the first forward pass of a process sets torch up
        began = time.perf_counter()
        function = parse(text)
        answer = model.answer(function)
        milliseconds = (time.perf_counter() - began) * 1e3
        chosen = {target: answer.predictions[target] for target in self._targets() or model.targets}
        answer = Answer(chosen, answer.abstain, answer.unknown, answer.spread, answer.tokens)
        exact = {
            "peak_bytes": float(peak_live_bytes(function)), "flops": flops(function), "interface_bytes": interface(function)
        }  # fmt: skip
        notes = [note] if (note := model.mismatch()) else []
        measured: dict[str, float | None] = {}
        if measure:
            compiled = compile_text(text)
            measured = compiled.labels() | {"time": measure_net([compiled])[0][0].time}
        return CostReport(name, len(function), answer, exact, measured, milliseconds, tuple(notes))


def _text(program: str) -> tuple[str, str]:
    """(name, text) of a program that is given as text or as a file."""
    if "\n" in program or "{" in program:
        return "the program", program
    path = Path(program)
    try:
        return path.name, path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise ValueError(f"{program} is no text; give MLIR text (mlir-opt, or jax.jit(f).lower(...).as_text())") from None
    except OSError as error:
        raise ValueError(f"cannot read {program}: {error.strerror}; give a file of MLIR text") from None
