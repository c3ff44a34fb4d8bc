"""`broadsheet instinct`: the instruction that a chat model follows best (INSTINCT)."""

import json
from typing import Annotated, Any

import typer

from .common import asked, options_of, split, working


def instinct(
    task: Annotated[
        str,
        typer.Argument(
            help='JSON lines with "input" and "output", or with --data the name of an instruction-induction task.'
        ),
    ],
    data: Annotated[
        str, typer.Option(metavar="DIR", help="The folder of instruction-induction's data (raw/ is in it).")
    ] = "",
    model: Annotated[
        str, typer.Option("--model", "-m", help="The white box that writes candidates: built-in, a folder or a hub name.")
    ] = "pocket-2m",
    chat: Annotated[
        str, typer.Option(metavar="URL", help="The black box: an OpenAI-compatible endpoint; default: --model itself.")
    ] = "",
    model_name: Annotated[str, typer.Option("--model-name", help="With --chat: which of the endpoint's models.")] = "",
    metric: Annotated[str, typer.Option(help="For a file of your own: em, f1, set or contains.")] = "em",
    rivals: Annotated[
        str, typer.Option(help="Run on the same budget: random, gp, evolution, neural_z ...; empty: none.")
    ] = "random,gp",
    option: Annotated[
        list[str] | None, typer.Option("-o", metavar="NAME=VALUE", help="A parameter of INSTINCT or calls=, money= limits.")
    ] = None,
    samples: Annotated[int, typer.Option(min=1, help="Examples that an instruction is scored on.")] = 20,
    seed: int = 0,
    device: Annotated[str, typer.Option(help="cpu, cuda, mps: the white box's.")] = "cpu",
    concurrency: Annotated[int, typer.Option(min=1, help="Calls under way at once.")] = 16,
    as_json: Annotated[
        str | None, typer.Option("--json", metavar="FILE", help="Write JSON to FILE; - is standard output.")
    ] = None,
) -> None:
    """Find the instruction with which a chat model solves a task best.

    An open model writes candidates from a few of the examples, a neural bandit chooses which to try, and every try is
    scored by the chat model. The best few are scored again on fresh examples, so that luck is not taken for skill; the
    table shows what the search believed, what fresh examples said, and rivals at the same number of rounds. Answers are in
    the ledger: a run that was stopped goes on and pays for nothing twice.

    Examples:

      broadsheet instinct reviews.jsonl --model ./qwen3-0.6b --chat http://localhost:8000/v1 --model-name qwen3-8b

      broadsheet instinct antonyms --data ./instruction-induction/data --model ./qwen3-0.6b -o budget=60 -o n_init=20
    """
    from dataclasses import asdict, fields

    from broadsheet.core.chat import Budget, Price, connect
    from broadsheet.core.models import load
    from broadsheet.core.records import write_text
    from broadsheet.lab.run import configured
    from broadsheet.methods.evals.instinct import INSTINCT, load_task, own_task

    given = options_of(option)
    limits = {name: given.pop(name) for name in [field.name for field in fields(Budget)] if name in given}
    price = Price(given.pop("prompt_price", 0.0), given.pop("completion_price", 0.0))
    method = configured("instinct", INSTINCT(), given)
    work = load_task(data, task, seed) if data else own_task(task, metric)  # type: ignore[arg-type]  # Scorer checks it
    target = asked(model, chat, model_name)
    with working() as bar:
        line = bar.add_task(f"points of {model}", total=None)
        box = connect(
            target["model"], target.get("name", ""), concurrency=concurrency, budget=Budget(**limits),
            price=price if any(asdict(price).values()) else None, **({} if chat else {"device": device}),
        )  # fmt: skip
        white, tokenizer = load(model, device=device)

        def tick(name: str, done: int, of: int) -> None:
            bar.update(line, description=name, completed=done, total=of)

        found = method.solve(box, work, white, tokenizer, seed, split(rivals), tick, samples=samples)
    spent = {"calls": box.spent.calls, "tokens": box.spent.tokens, "money": box.spent.money}
    if as_json:
        rows: list[dict[str, Any]] = [asdict(row) | {"optimism": row.optimism} for row in found.table]
        out = {"task": work.name, "model": box.backend.name, "tested": found.tested, "spent": spent, "table": rows}
        write_text(json.dumps(out, indent=1, ensure_ascii=False), as_json)
    if as_json != "-":
        typer.echo(f"{work.name} on {box.backend.name}; {spent['calls']} calls")
        typer.echo(str(found))
        typer.echo(f"on {len(work.test[:100])} test examples: {found.tested:.3f}")
