"""`broadsheet flexsp`: plans of sequence parallelism for one's own sequence lengths (FlexSP)."""

import json
from typing import Annotated

import typer

from .common import options_of, print_tables, split, working


def flexsp(
    lengths: Annotated[
        str, typer.Argument(help="A file with one sequence length a line, or wikipedia: lengths drawn like those.")
    ],
    devices: Annotated[int, typer.Option(min=1, help="How many devices; a power of two.")] = 64,
    memory: Annotated[float, typer.Option(help="GiB of memory a device.")] = 30.0,
    cost: Annotated[
        str, typer.Option(help="gpt-7b-a100, gpt-13b-a100, gpt-30b-a100, or the JSON file of a fitted cost model.")
    ] = "gpt-7b-a100",
    context: Annotated[int, typer.Option(min=1, help="The longest sequence that the run accepts, in tokens.")] = 192_000,
    batch: Annotated[int, typer.Option(min=1, help="Sequences a global batch.")] = 512,
    batches: Annotated[int, typer.Option(min=1, help="How many batches to plan.")] = 5,
    planners: Annotated[
        str, typer.Option(help="Compare with: static, adaptive, balanced, greedy, milp.")
    ] = "static,adaptive,balanced,greedy",
    option: Annotated[
        list[str] | None,
        typer.Option("-o", metavar="NAME=VALUE", help="A parameter of FlexSP, such as smallest=2 or time_limit=10."),
    ] = None,
    out: Annotated[str, typer.Option(metavar="DIR", help="Keep a picture of the first batch's plans in DIR.")] = "",
    as_json: Annotated[
        str | None, typer.Option("--json", metavar="FILE", help="Write all plans as JSON to FILE; - is standard output.")
    ] = None,
) -> None:
    """Plan which devices compute which sequences together, and what a training step would take.

    Every planner gets the same batches; the last one in the table is ours. Times of steps are predicted by the cost model
    (simulated), those of planning are measured. A plan's gap says how far a lower bound is below it.

    Examples:

      broadsheet flexsp lengths.txt --devices 64

      broadsheet flexsp lengths.txt --cost mine.json --devices 32 --memory 70 --planners adaptive,milp --json plans.json
    """
    from broadsheet.core.records import write_text
    from broadsheet.lab.run import configured
    from broadsheet.methods.estimates.flexsp import FlexSP

    given = {"devices": devices, "memory_gb": memory, "cost": cost, "context": context} | options_of(option)
    method = configured("flexsp", FlexSP(), given)
    with working() as bar:
        line = bar.add_task("batches", total=None)

        def tick(planner: str, done: int, of: int) -> None:
            bar.update(line, description=planner, completed=done, total=of)

        report = method.estimate(lengths, batch, batches, split(planners), tick)
    if as_json:
        write_text(json.dumps(report.to_json()), as_json)
    if as_json != "-":
        print_tables(report.tables())
    if out:
        typer.echo(f"wrote {', '.join(str(path) for path in report.save(out))}", err=as_json == "-")
