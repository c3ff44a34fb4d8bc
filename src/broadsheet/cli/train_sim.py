"""`broadsheet train-sim`: what a training step on thousands of GPUs would take (MegaScale's simulator)."""

import json
from dataclasses import fields
from typing import Annotated

import typer

from .common import options_of, print_tables


def train_sim(
    model: Annotated[str, typer.Option(help="A built-in model (gpt-175b, gpt-530b ...) or a JSON file.")] = "gpt-175b",
    system: Annotated[str, typer.Option(help="A built-in cluster (a100-200g, h100-400g) or a JSON file.")] = "a100-200g",
    execution: Annotated[str, typer.Option(help="A built-in plan or a JSON file; default: from the options below.")] = "",
    gpus: Annotated[int, typer.Option(min=1)] = 12_288,
    batch: Annotated[int, typer.Option(min=1, help="Sequences of a step.")] = 6144,
    tensor: Annotated[int, typer.Option("--tp", min=1, help="Tensor-parallel size.")] = 8,
    pipeline: Annotated[int, typer.Option("--pp", min=1, help="Pipeline-parallel size.")] = 8,
    interleaving: Annotated[int, typer.Option(min=1, help="Model chunks a pipeline stage.")] = 6,
    levers: Annotated[str, typer.Option(help="all, none, or names: tp_overlap,pp_overlap,lamb=3 ...")] = "all",
    faults: Annotated[
        str, typer.Option(metavar="CSV", help="A fault trace of a real run, instead of simulated failures.")
    ] = "",
    option: Annotated[
        list[str] | None,
        typer.Option("-o", metavar="NAME=VALUE", help="window, node_mtbf_days; days, interval, save, seed, wall_seconds."),
    ] = None,
    out: Annotated[
        str, typer.Option(metavar="DIR", help="Write the pipeline as a Chrome trace, and the failures as CSV.")
    ] = "",
    as_json: Annotated[
        str | None, typer.Option("--json", metavar="FILE", help="Write JSON to FILE; - is standard output.")
    ] = None,
) -> None:
    """Simulate a training step, its levers, memory, slow machines and weeks of failures.

    Model, cluster and plan are JSON files with calculon's names. Numbers are simulated, with constants that were fitted to
    MegaScale's runs at 256 to 1,024 A100; a fault trace has the columns failed_at, detected_at, resumed_at (seconds) and
    lost_steps.

    Examples:

      broadsheet train-sim --gpus 1024 --batch 768 --levers tp_overlap,pp_overlap

      broadsheet train-sim --model my.json --system h100-400g --execution plan.json -o days=7 --out ./sim
    """
    from broadsheet.core.records import write_text
    from broadsheet.methods.estimates.megascale import MegaScale

    given = options_of(option)
    of_job = {field.name for field in fields(MegaScale)}
    job = MegaScale(
        model, system, execution, gpus, batch, tensor, pipeline, interleaving, levers,
        **{name: given.pop(name) for name in list(given) if name in of_job},
    )  # fmt: skip
    known = ("days", "interval", "wall_seconds", "save", "seed", "check")
    if unknown := [name for name in given if name not in known]:
        raise ValueError(f"unknown option '{unknown[0]}'; known: window, node_mtbf_days, {', '.join(known)}")
    report = job.estimate(faults=faults, **given)
    if as_json:
        write_text(json.dumps(report.to_json(), indent=1, ensure_ascii=False), as_json)
    if as_json != "-":
        print_tables(report.tables())
    if out:
        for path in report.save(out):
            typer.echo(f"wrote {path}", err=as_json == "-")
