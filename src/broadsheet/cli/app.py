"""The commands of ``broadsheet``."""

import json
import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

from broadsheet import catalogue

from .chat import ledger, serve_model
from .common import asked, options_of, print_tables, split, with_progress
from .crash import crash
from .digest import digest
from .flexsp import flexsp
from .hardware import hardware, measure_hardware
from .ingest import ingest
from .instinct import instinct
from .melt import melt
from .mlir_cost import mlir_cost
from .robust import diagnose, robust_run
from .serve import serve
from .study import study
from .train_sim import train_sim
from .weights import bitstack, dfloat11
from .worker import worker

if TYPE_CHECKING:
    from collections.abc import Sequence

    from broadsheet.core.records import Record

app = typer.Typer(
    name="broadsheet",
    help="The daily papers on efficient, instruction-following language models, each one running.\n\n"
    "Start with: broadsheet compare caches",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

JSON = Annotated[str | None, typer.Option("--json", metavar="FILE", help="Write JSON to FILE; - is standard output.")]
CHAT = Annotated[
    str,
    typer.Option("--chat", metavar="URL", help="An OpenAI-compatible endpoint (evals); its key is BROADSHEET_API_KEY's."),
]
MODEL_NAME = Annotated[str, typer.Option("--model-name", help="With --chat: which of the endpoint's models.")]
MODEL = Annotated[str, typer.Option("--model", "-m", help="A built-in model, a folder, or a hub name.")]


# --- the catalogue ----------------------------------------------------------------------------------------------


@app.command()
def papers(
    query: Annotated[str, typer.Argument(help="Words that must all occur.")] = "",
    as_json: Annotated[bool, typer.Option("--json", help="A JSON list on standard output.")] = False,
) -> None:
    """List the papers, or those that match QUERY."""
    found = catalogue.search(query)
    if as_json:
        from broadsheet.lab.claims import statuses

        rows = [
            {
                "slug": p.slug,
                "title": p.title,
                "family": p.family,
                "status": p.status,
                "method": p.method or None,
                "claims": [
                    {"metric": c.metric, "paper": c.paper, "ours": s.ours, "status": s.status}
                    for c, s in zip(p.claims, statuses(p), strict=True)
                ],
            }
            for p in found
        ]
        typer.echo(json.dumps(rows, indent=1, ensure_ascii=False))
        return
    if not found:
        raise ValueError(f"no paper matches '{query}'")
    width = max(len(p.slug) for p in found)
    for paper in found:
        mark = "●" if paper.status == "running" else "○"
        title = paper.title if len(paper.title) <= 80 else paper.title[:79] + "…"
        typer.echo(f"{mark} {paper.slug:<{width}}  {paper.family:<10}  {paper.year}  {title}")
    running = sum(p.status == "running" for p in found)
    typer.echo(f"\n{len(found)} papers, {running} running (●).  broadsheet show SLUG tells more.")


@app.command()
def show(slug: Annotated[str, typer.Argument(help="A paper's slug, as 'papers' lists it.")]) -> None:
    """Show one paper: summary, claims and what we measured."""
    from textwrap import fill

    from broadsheet.lab.claims import statuses

    paper = catalogue.paper(slug)
    typer.echo(f"{paper.title}\n{paper.authors} {paper.year} · {paper.family} · {paper.status}")
    for label, value in (("arXiv", paper.arxiv), ("code", paper.code), ("method", paper.method)):
        if value:
            typer.echo(f"{label}: {value}")
    typer.echo("\n" + fill(" ".join(paper.summary.split()), 100) + "\n")
    for claim, status in zip(paper.claims, statuses(paper), strict=True):
        typer.echo(f"· {claim.metric} ({claim.setting})\n    paper: {claim.paper}\n    here:  {status.ours or '–'}")
        typer.echo(f"    {status.status}" + (f": {claim.reason}" if claim.reason else ""))


# --- comparisons ------------------------------------------------------------------------------------------------


@app.command()
def compare(
    family: Annotated[str, typer.Argument(help="The family of methods, for example caches.")],
    methods: Annotated[str, typer.Option(help="Comma-separated methods; default: all.")] = "",
    model: MODEL = "pocket-2m",
    chat: CHAT = "",
    model_name: MODEL_NAME = "",
    budgets: Annotated[
        str,
        typer.Option(
            help="Fractions of the full cache's bytes, bits a weight or answers a prompt, comma-separated; default: the "
            "family's."
        ),
    ] = "",
    seeds: Annotated[int, typer.Option(min=1, help="Number of seeds.")] = 1,
    tasks: Annotated[str, typer.Option(help="Session tasks, comma-separated; default: the bench's.")] = "",
    modes: Annotated[str, typer.Option(help="multi-turn, multi-request or both.")] = "",
    sessions: Annotated[int | None, typer.Option(help="Sessions a task and mode (or documents of --text).")] = None,
    context: Annotated[int | None, typer.Option(help="Context tokens of a generated session.")] = None,
    turns: Annotated[int | None, typer.Option(help="Questions a session.")] = None,
    text: Annotated[str, typer.Option(help="A text file: measure perplexity and KL instead of sessions.")] = "",
    prefix: Annotated[int | None, typer.Option(help="With --text: tokens that are cached.")] = None,
    continuation: Annotated[int | None, typer.Option(help="With --text: tokens that are scored.")] = None,
    data: Annotated[str, typer.Option(help="Official SCBench records: a file, folder or hub name.")] = "",
    device: Annotated[str, typer.Option(help="cpu, cuda, mps.")] = "cpu",
    timing: Annotated[bool | None, typer.Option(help="Also time prefill and decoding; the default.")] = None,
    option: Annotated[
        list[str] | None, typer.Option("-o", metavar="NAME=VALUE", help="Any other field of the family's workload.")
    ] = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Measure again what is already stored.")] = False,
    as_json: JSON = None,
    as_html: Annotated[str | None, typer.Option("--html", metavar="FILE", help="Write a report with plots.")] = None,
) -> None:
    """Compare a family's methods on the same work at equal real bytes.

    Finished cells are stored under BROADSHEET_HOME: ctrl-C loses at most the cell under way, and the same command goes
    on from there.

    Examples:

      broadsheet compare caches --budgets 0.25 --html out.html

      broadsheet compare caches --model ./my-llama --text wiki.txt --methods full,kivi,gear

      broadsheet compare weights --model ./my-llama --text wiki.txt --budgets 2,3,4

      broadsheet compare evals --chat http://localhost:8000/v1 --model-name qwen3-8b -o limit=100
    """
    from broadsheet.core.records import write_json
    from broadsheet.lab import compare as lab
    from broadsheet.lab.report import write_html
    from broadsheet.lab.run import make_workload

    given = {
        **asked(model, chat, model_name),
        "tasks": split(tasks),
        "modes": split(modes),
        "sessions": sessions,
        "context_tokens": context,
        "turns": turns,
        "text": text,
        "prefix": prefix,
        "continuation": continuation,
        "data": data,
        "device": device,
        "timing": timing,
    }
    module = lab.bench(family)
    given = {name: value for name, value in given.items() if value not in (None, "", ())}
    workload = make_workload(module, {**given, **options_of(option)})
    try:
        wanted = [float(value) for value in split(budgets)]
    except ValueError:
        example = ",".join(f"{budget:g}" for budget in module.VIEW.budgets)
        raise ValueError(f"budgets are numbers such as {example}; got '{budgets}'") from None
    records = with_progress(
        lambda progress, tick: lab.compare(
            family, workload, split(methods) or None, wanted or None, seeds, fresh=fresh, progress=progress, tick=tick
        )
    )
    if as_json:
        write_json(records, as_json)
    if as_html:
        write_html(records, as_html, f"Broadsheet: {family} compared")
    if as_json != "-":
        _print_table(records)
        if as_html:
            typer.echo(f"report with plots: {as_html}")


@app.command()
def run(
    slug: Annotated[str, typer.Argument(help="A running paper (or baseline).")],
    option: Annotated[
        list[str] | None, typer.Option("-o", metavar="NAME=VALUE", help="A parameter of the method or its workload.")
    ] = None,
    model: MODEL = "pocket-2m",
    chat: CHAT = "",
    model_name: MODEL_NAME = "",
    device: Annotated[str, typer.Option(help="cpu, cuda, mps.")] = "cpu",
    hardware: Annotated[str, typer.Option(help="The device that is estimated (estimates): a name or a JSON file.")] = "",
    out: Annotated[
        str,
        typer.Option(
            metavar="DIR",
            help="Keeps the compressed model (weights), transcripts and a log (evals), or plots and a page (estimates).",
        ),
    ] = "",
    as_json: JSON = None,
) -> None:
    """Run one paper's method beside its reference, with its own parameters.

    Estimates need neither weights nor the machine: their --model is also a well-known model's shape, or a config.json.

    Methods of the weights family take -o size=BYTES, and --out keeps the model: a folder that
    AutoModelForCausalLM.from_pretrained loads after ``import broadsheet``.

    Examples:

      broadsheet run gear -o bits=4 -o rank_prefill=2 -o sessions=16

      broadsheet run bitstack --model ./my-llama -o size=120MB -o text=wiki.txt --out ./my-llama-120MB

      broadsheet run decrim --chat http://localhost:8000/v1 --model-name qwen3-8b -o max_rounds=4 --out ./transcripts

      broadsheet run llm-viewer --model meta-llama/Llama-3.1-70B --hardware h100 -o batch=8 -o context=32768 --out ./roofline
    """
    from broadsheet.core.records import write_json
    from broadsheet.lab.run import family_of, run_method

    family = family_of(slug)
    if family == "estimates":
        given = {"model": model if model != "pocket-2m" else "", "hardware": hardware}  # else each method's own default
        _estimate(slug, options_of(option), {name: value for name, value in given.items() if value}, out, as_json)
        return
    if hardware:
        raise ValueError(f"--hardware is for estimates; {slug} runs on --device")
    options = {**options_of(option), **asked(model, chat, model_name)}
    records = with_progress(lambda progress, tick: run_method(family, slug, options, device, progress, out, tick))
    if as_json:
        write_json(records, as_json)
    if as_json != "-":
        _print_table(records)
        if out:
            typer.echo(f"wrote {out}: {_kept(family, out)}")


@app.command()
def claims(
    slug: Annotated[str, typer.Argument(help="One paper; default: all that run.")] = "",
    write: Annotated[bool, typer.Option("--write", help="Also write docs/claims.md (from a checkout).")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="A JSON list on standard output.")] = False,
) -> None:
    """Recompute the papers' claims from the committed records."""
    from broadsheet.lab import claims as lab

    chosen = [catalogue.paper(slug)] if slug else [p for p in catalogue.papers().values() if p.status == "running"]
    if as_json:
        rows = [
            {"slug": p.slug, "id": c.id, "metric": c.metric, "paper": c.paper, "ours": s.ours, "status": s.status}
            for p in chosen
            for c, s in zip(p.claims, lab.statuses(p), strict=True)
        ]
        typer.echo(json.dumps(rows, indent=1, ensure_ascii=False))
        return
    for paper in chosen:
        typer.echo(f"{paper.slug}: {paper.title}")
        for claim, status in zip(paper.claims, lab.statuses(paper), strict=True):
            typer.echo(f"  {status.status:<24} {claim.metric}: paper {claim.paper}; here {status.ours or '–'}")
    if write:
        typer.echo(f"wrote {lab.write_page()}")


# --- what a step costs under secret sharing -----------------------------------------------------------------------

mpc = typer.Typer(help="What a decode step costs when the cache is secret-shared (MPCache).", no_args_is_help=True)
app.add_typer(mpc, name="mpc")


@mpc.command()
def cost(
    tokens: Annotated[int, typer.Option(min=1, help="Tokens seen so far.")] = 1024,
    protocol: Annotated[str, typer.Option(help="aby3, semi2k, cheetah.")] = "aby3",
    bandwidth: Annotated[float, typer.Option(help="Gbit/s of each party, each way.")] = 3.0,
    rtt: Annotated[float, typer.Option(help="Round-trip time in milliseconds.")] = 0.8,
    option: Annotated[list[str] | None, typer.Option("-o", metavar="NAME=VALUE", help="A parameter of MPCache.")] = None,
    model: MODEL = "pocket-2m",
    source: Annotated[str, typer.Option(help="model: fitted prices; spu: measure now.")] = "model",
    ladder: Annotated[bool, typer.Option("--ladder", help="Switch MPCache's parts on one after the other.")] = False,
) -> None:
    """Bytes, rounds and seconds of one decode step: the attention of all layers, per party.

    Example: broadsheet mpc cost --tokens 2048 --ladder -o clusters=[32,16] -o ratios=[0.5,0.2]
    """
    from broadsheet.core.models import load_config
    from broadsheet.lab.run import configured
    from broadsheet.methods.caches.mpc_cost import Network, cost_ladder, mpc_cost
    from broadsheet.methods.caches.mpcache import MPCache

    policy, config = configured("mpcache", MPCache(), options_of(option)), load_config(model).get_text_config()
    arguments: Any = (policy, config, tokens, protocol, Network(bandwidth, rtt), source)
    try:
        tables = cost_ladder(*arguments) if ladder else {"": mpc_cost(*arguments)}
    except RuntimeError as error:  # no SPU environment, or it failed
        raise ValueError(str(error)) from None
    for name, table in tables.items():
        if ladder:
            megabytes = f"{table.bytes / 1e6:>10.3f} MB {table.rounds:>8.0f} rounds {table.seconds:>9.3f} s"
            typer.echo(f"{name:<22} {table.attended:>6} tokens attended {megabytes}")
        else:
            typer.echo(str(table))
    typer.echo("Semi-honest parties; rounds as if the heads shared one call; linear layers are not counted.")


@mpc.command()
def calibrate(
    results: Annotated[str, typer.Argument(help="What benchmarks/mpc/measure.py wrote; default: the checkout's.")] = "",
    out: Annotated[str, typer.Option(help="Where the fit goes; default: the one that ships.")] = "",
) -> None:
    """Refit the price list from measured operators and print its errors on held-out sizes."""
    from broadsheet.methods.caches import mpc_prices

    try:
        fitted = mpc_prices.calibrate(results or mpc_prices.RESULTS, out or mpc_prices.FITTED)
    except (OSError, KeyError, json.JSONDecodeError) as error:
        raise ValueError(f"cannot refit: {error}") from None
    typer.echo("largest relative error on sizes that were not fitted")
    for protocol, fits in fitted["protocols"].items():
        for op, fit in fits["ops"].items():
            errors = "  ".join(f"{name} {e['held_out']:6.1%}" for name, e in fit["max_relative_error"].items())
            typer.echo(f"{protocol:<8} {op:<20} {errors}")


app.add_typer(dfloat11, name="dfloat11")
app.add_typer(bitstack, name="bitstack")
app.add_typer(crash, name="crash")
app.add_typer(study, name="study")
app.add_typer(ledger, name="ledger")
app.add_typer(melt, name="melt")
app.command(name="serve-model")(serve_model)
app.command()(instinct)
app.command()(flexsp)
app.command(name="robust-run")(robust_run)
app.command()(diagnose)
app.command(name="measure-hardware")(measure_hardware)
app.command()(hardware)
app.command(name="train-sim")(train_sim)
app.command("mlir-cost")(mlir_cost)
app.command()(worker)
app.command()(ingest)
app.add_typer(digest, name="digest")
app.command()(serve)


@app.command(name="lm-eval")
def lm_eval() -> None:
    """Print the folder of the benchmarks' lm-eval tasks, for its --include_path.

    Example: lm_eval --include_path "$(broadsheet lm-eval)" --tasks broadsheet_ifeval --model hf --model_args pretrained=...
    """
    from importlib.resources import files

    typer.echo(str(files("broadsheet") / "methods" / "evals" / "lm_eval"))


# --- data, models, machine --------------------------------------------------------------------------------------


@app.command()
def sessions(
    task: Annotated[str, typer.Argument(help="A microworld task, for example kv.")],
    count: Annotated[int, typer.Option("--sessions", min=1)] = 100,
    context: Annotated[int, typer.Option(min=32, help="Context tokens.")] = 1024,
    turns: Annotated[int, typer.Option(min=1)] = 5,
    seed: int = 0,
) -> None:
    """Write generated sessions as JSON lines (the SCBench schema) to standard output."""
    from broadsheet.core.microworld.tasks import make_sessions

    for session in make_sessions(task, count, context, turns, seed):
        typer.echo(json.dumps(session.to_json(), ensure_ascii=False))


@app.command(name="train-pocket")
def train_pocket(
    folder: Annotated[str, typer.Argument(help="Where checkpoints and the model go.")],
    recipe: Annotated[str, typer.Option(help="The recipe's name.")] = "pocket-2m",
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    threads: Annotated[int, typer.Option(help="CPU threads; 0 leaves torch's choice.")] = 0,
) -> None:
    """Train a pocket model from scratch, or go on from FOLDER's checkpoint."""
    import torch

    from broadsheet.core.microworld.train import RECIPES, train

    if recipe not in RECIPES:
        raise ValueError(f"unknown recipe '{recipe}'; known: {', '.join(RECIPES)}")
    if threads:
        torch.set_num_threads(threads)
    for row in train(RECIPES[recipe], folder, device, every=20):
        typer.echo(
            f"{row['step']:>6}/{row['of']} {row['stage']:<10} loss {row['loss']:.3f}  "
            f"answer tokens right {row['accuracy']:.3f}  {row['tokens_per_s']:.0f} tokens/s"
        )


@app.command()
def doctor() -> None:
    """Say what this machine and installation have, and what is missing for what."""
    from broadsheet.lab.doctor import examine

    for name, state, note in examine():
        typer.echo(f"{state:<8} {name:<14} {note}")


# --- helpers ----------------------------------------------------------------------------------------------------


def _estimate(slug: str, options: dict[str, Any], usual: dict[str, Any], out: str, as_json: str | None) -> None:
    from broadsheet.core.records import write_text
    from broadsheet.lab.estimate import estimate

    report = estimate(slug, options, usual)
    if as_json:
        write_text(json.dumps(report.to_json(), indent=1, ensure_ascii=False, default=str), as_json)
    if as_json != "-":
        print_tables(report.tables())
        if out:
            typer.echo(f"wrote {', '.join(str(path) for path in report.save(out))}")


def _kept(family: str, out: str) -> str:
    if family == "evals":
        return f"transcripts as JSON lines, and logs for inspect view --log-dir {out}"
    return f"import broadsheet, then AutoModelForCausalLM.from_pretrained({out!r}) loads it"


def _print_table(records: "Sequence[Record]") -> None:
    from rich.console import Console

    from broadsheet.lab.terminal import terminal_table

    Console(width=None if sys.stdout.isatty() else 160).print(terminal_table(records))
