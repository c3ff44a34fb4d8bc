"""`broadsheet robust-run` and `broadsheet diagnose`: training that survives failures, and who is to blame (MegaScale)."""

import json
from typing import Annotated, Any

import typer

from .common import options_of, print_tables


def robust_run(
    command: Annotated[list[str], typer.Argument(metavar="-- COMMAND", help="A torchrun-style script and its arguments.")],
    folder: Annotated[str, typer.Option("--folder", metavar="DIR", help="Logs, incidents, checkpoints.")] = "robust-run",
    nodes: Annotated[int, typer.Option(min=1, help="Nodes of this machine to run on.")] = 2,
    ranks: Annotated[int, typer.Option(min=1, help="Ranks a node.")] = 2,
    spares: Annotated[int, typer.Option(min=0, help="Nodes that replace blocked ones.")] = 1,
    restarts: Annotated[int, typer.Option(min=0, help="Give up after so many.")] = 10,
    option: Annotated[
        list[str] | None,
        typer.Option("-o", metavar="NAME=VALUE", help="A threshold: heartbeat=1, patience=60, evict=true ..."),
    ] = None,
    warm: Annotated[
        bool, typer.Option("--warm", help="Load torch and transformers once and fork ranks: restarts take milliseconds.")
    ] = False,
    as_json: Annotated[
        str | None, typer.Option("--json", metavar="FILE", help="Write JSON to FILE; - is standard output.")
    ] = None,
) -> None:
    """Run a training script and keep it running: kills, hangs, lost and slow nodes are found, named and replaced.

    RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT are set, as torchrun does. The script must go on from its
    own last checkpoint when it is started again. Exits, log lines and lost nodes are seen for any script; progress,
    hangs and slow ranks for one that times itself (broadsheet.methods.estimates.megascale.timer).

    Examples:

      broadsheet robust-run --nodes 2 --ranks 2 -- python train.py --epochs 3

      broadsheet robust-run --folder demo --warm -- demo        (the built-in tiny Llama)
    """
    import sys
    from dataclasses import asdict
    from pathlib import Path

    from broadsheet.core.records import write_text
    from broadsheet.methods.estimates.megascale.driver import Driver, LocalNodes
    from broadsheet.methods.estimates.megascale.rules import Rules

    rules, words = _rules(Rules, options_of(option)), list(command)
    target = Path(folder).resolve()
    if words[0] == "demo":
        from broadsheet.methods.estimates.megascale.job import Job

        target.mkdir(parents=True, exist_ok=True)
        (target / "job.json").write_text(json.dumps(Job(str(target), 200).to_json()), encoding="utf-8")
        words = ["python", "-m", "broadsheet.methods.estimates.megascale.job", str(target / "job.json")]
    if Path(words[0]).name in ("python", "python3"):
        words[0] = sys.executable  # the one that has this package
    preload = ("torch", "transformers.models.llama.modeling_llama") if warm else ()
    manager = LocalNodes(nodes + spares, warm, preload)

    def say(text: str) -> None:
        typer.echo(text, err=True)

    driver = Driver(words, target, manager, nodes, ranks, rules, max_restarts=restarts, say=say)
    try:
        outcome = driver.run()
    except KeyboardInterrupt:
        raise ValueError(f"stopped; checkpoints are kept, and the same command goes on in {folder}") from None
    if as_json:
        out: dict[str, Any] = {
            "finished": outcome.finished, "reason": outcome.reason, "seconds": outcome.seconds, "attempts": outcome.attempts,
            "incidents": [asdict(one) for one in outcome.incidents], "warnings": [asdict(one) for one in outcome.warnings],
        }  # fmt: skip
        write_text(json.dumps(out, indent=1), as_json)
    if as_json != "-":
        for one in outcome.incidents:
            who = f"rank {', '.join(map(str, one.ranks))}" if one.ranks else ", ".join(one.nodes) or "nobody"
            typer.echo(
                f"{one.rule:<10} step {one.step:>5}  {who}: {one.evidence}; blocked {', '.join(one.blocked) or 'no node'}"
            )
        typer.echo(f"{'done' if outcome.finished else 'gave up'} after {outcome.attempts} attempts, {outcome.seconds:.1f} s")
    if not outcome.finished:
        raise ValueError(f"{outcome.reason}; logs are in {folder}/logs")


def _rules(kind: Any, given: dict[str, Any]) -> Any:
    """`Rules` from options. Raises ValueError for a name that is none of its fields."""
    from dataclasses import fields

    known = [field.name for field in fields(kind)]
    if unknown := sorted(set(given) - set(known)):
        raise ValueError(f"unknown threshold {', '.join(unknown)}; known: {', '.join(known)}")
    return kind(**given)


def diagnose(
    folder: Annotated[str, typer.Argument(metavar="DIR", help="What robust-run wrote.")],
    attempt: Annotated[int | None, typer.Option(help="Which attempt; default: the last.")] = None,
    grid: Annotated[
        str, typer.Option(metavar="TPxPPxDP", help="Layout of the ranks in a hang's picture, for example 2x2x2.")
    ] = "",
    option: Annotated[
        list[str] | None,
        typer.Option("-o", metavar="NAME=VALUE", help="window=15, sustained=2, threshold=3, signal=wall ..."),
    ] = None,
    out: Annotated[str, typer.Option(metavar="DIR", help="Write heat map, ring, hang views (SVG) and a Chrome trace.")] = "",
    as_json: Annotated[
        str | None, typer.Option("--json", metavar="FILE", help="Write JSON to FILE; - is standard output.")
    ] = None,
) -> None:
    """Say which rank of a run is slow, which one hung, and who waits for whom.

    Example: broadsheet diagnose robust-run --out pictures, then open pictures/trace.json in ui.perfetto.dev
    """
    from broadsheet.core.records import write_text
    from broadsheet.methods.estimates.megascale.diagnosis import Stragglers
    from broadsheet.methods.estimates.megascale.hang import Grid
    from broadsheet.methods.estimates.megascale.report import diagnose as look

    layout = None
    if grid:
        try:
            tp, pp, dp = (int(part) for part in grid.split("x"))
        except ValueError:
            raise ValueError(f"--grid takes TPxPPxDP such as 2x2x2, got '{grid}'") from None
        layout = Grid(tp, pp, dp)
    report = look(folder, attempt, _rules(Stragglers, options_of(option)), layout)
    if as_json:
        write_text(json.dumps(report.to_json(), indent=1), as_json)
    if as_json != "-":
        print_tables(report.tables())
    if out:
        for path in report.save(out):
            typer.echo(str(path), err=True)
