"""``broadsheet mlir-cost``: what a program costs, from its text."""

from typing import Annotated

import typer

from .common import print_tables


def mlir_cost(
    program: Annotated[str, typer.Argument(help="A file of StableHLO text; - is standard input.")],
    targets: Annotated[str, typer.Option(help="Comma-separated: time, spills, peak_bytes, ...; default: all.")] = "",
    weights: Annotated[str, typer.Option(help="A shipped model, or a file that CostModel.save wrote.")] = "stablehlo-cpu",
    measure: Annotated[bool, typer.Option("--measure", help="Also compile the program with XLA and time it here.")] = False,
    as_json: Annotated[
        str | None, typer.Option("--json", metavar="FILE", help="Write JSON to FILE; - is standard output.")
    ] = None,
) -> None:
    """Predict time, bytes, kernels, instructions, spills and vector share of a program, with intervals.

    Example: broadsheet mlir-cost model.mlir --targets time,spills
    """
    import json
    import sys

    from broadsheet.core.records import write_text
    from broadsheet.methods.estimates.mlir_cost_model import MLIRCostModel

    text = sys.stdin.read() + "\n" if program == "-" else program
    report = MLIRCostModel(weights, targets).estimate(text, measure)
    if as_json:
        write_text(json.dumps(report.to_json(), indent=1, ensure_ascii=False), as_json)
    if as_json != "-":
        print_tables(report.tables())
