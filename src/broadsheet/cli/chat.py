"""`broadsheet serve-model` and `broadsheet ledger`: a local model for other programs, and what calls to models cost."""

import json
import sys
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from broadsheet.core.chat import Ledger

LEDGER = Annotated[str, typer.Option("--ledger", metavar="FILE", help="Default: ledger.sqlite under BROADSHEET_HOME.")]


def serve_model(
    model: Annotated[str, typer.Option("--model", "-m", help="A built-in model, a folder, or a hub name.")] = "pocket-2m",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one.")] = 8000,
    host: Annotated[str, typer.Option(help="The address to listen on; 0.0.0.0 lets other machines in.")] = "127.0.0.1",
    device: Annotated[str, typer.Option(help="cpu, cuda, mps.")] = "cpu",
    batch: Annotated[int, typer.Option(min=1, help="Answers written together; 1 makes them independent of each other.")] = 8,
    name: Annotated[str, typer.Option(help="What clients call the model; default: as --model.")] = "",
) -> None:
    """Serve a local model over OpenAI's protocol, until ctrl-C.

    Chats go through the model's chat template (a model without one gets "role: text" lines), strings are continued as they
    are. Sampling, n, seed, stop, logprobs and streaming work; tools reach the template, images and JSON schemas do not. It
    is meant for small models and for trying things out: for large ones and many users there is vLLM, which every command
    here takes in the same way.

    Where BROADSHEET_API_KEY is set, clients must send that key.

    Examples:

      broadsheet serve-model --model pocket-2m --port 8000

      curl http://127.0.0.1:8000/v1/chat/completions -H 'content-type: application/json' -d '{"model": "pocket-2m",
      "messages": [{"role": "user", "content": "Give feru foko. What do you give feru?"}], "temperature": 0}'
    """
    import os
    import socket

    try:
        import uvicorn

        from broadsheet.core.chat.server import application
    except ImportError:
        raise ValueError("serving needs starlette and uvicorn: pip install starlette uvicorn") from None
    from broadsheet.core.chat.local import LocalModel

    key = os.environ.get("BROADSHEET_API_KEY", "")
    if host not in ("127.0.0.1", "localhost", "::1") and not key:
        typer.echo("warning: other machines can use this model; set BROADSHEET_API_KEY to ask for a key", err=True)
    try:
        listening = socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except OSError as error:
        raise ValueError(f"cannot listen on {host}:{port}: {error.strerror}; give another --port (0: a free one)") from None
    with listening:
        backend = LocalModel(model, name=name, device=device, batch=batch)
        shown = f"[{host}]" if ":" in host else host
        typer.echo(f"{backend.name} at http://{shown}:{listening.getsockname()[1]}/v1 (ctrl-C stops)")
        sys.stdout.flush()
        uvicorn.Server(uvicorn.Config(application(backend, key=key), log_level="warning")).run([listening])


ledger = typer.Typer(help="The ledger: every call to a model that was paid for, and its answer.", no_args_is_help=True)


@ledger.command(name="list")
def list_calls(
    file: LEDGER = "",
    as_json: Annotated[bool, typer.Option("--json", help="A JSON list on standard output.")] = False,
) -> None:
    """Calls, tokens and money by model and tag (the stage that asked).

    One call may bring several answers. ~ marks tokens that the server did not count, so that they are estimated. Answers of
    models whose names begin with sim: are SIMULATED.

    Example: broadsheet ledger list
    """
    from dataclasses import asdict

    totals = _open(file).totals()
    if as_json:
        rows = [{"model": model, "tag": tag, "answers": count, **asdict(used)} for model, tag, count, used in totals]
        typer.echo(json.dumps(rows, indent=1, ensure_ascii=False))
        return
    if not totals:
        typer.echo("the ledger is empty")
        return
    cells = [("model", "tag", "answers", "calls", "prompt tokens", "completion tokens", "USD", "seconds")]
    for model, tag, count, used in totals:
        about = "~" if used.estimated else ""
        cells.append(
            (
                _plain(model) + (" SIMULATED" if model.startswith("sim:") else ""), _plain(tag) or "–", f"{count:,}",
                f"{used.calls:,}", f"{about}{used.prompt_tokens:,}", f"{about}{used.completion_tokens:,}",
                f"{used.money:.4f}", f"{used.seconds:,.1f}",
            )
        )  # fmt: skip
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    for row in cells:
        left = [f"{text:<{width}}" for text, width in zip(row[:2], widths[:2], strict=True)]
        right = [f"{text:>{width}}" for text, width in zip(row[2:], widths[2:], strict=True)]
        typer.echo("  ".join(left + right))


@ledger.command(name="export")
def export(
    out: Annotated[str, typer.Argument(metavar="FILE", help="Where the JSON lines go; - is standard output.")] = "-",
    file: LEDGER = "",
    model: Annotated[str, typer.Option(help="Only this model's.")] = "",
    tag: Annotated[str, typer.Option(help="Only this tag's.")] = "",
) -> None:
    """Write every answer as a line of JSON: what was asked, what came back, what it cost.

    Example: broadsheet ledger export calls.jsonl --tag longproc
    """
    from contextlib import ExitStack

    from broadsheet.core.records import StorageError

    count, calls = 0, _open(file)
    try:
        with ExitStack() as stack:
            target = sys.stdout if out == "-" else stack.enter_context(open(out, "w", encoding="utf-8"))
            for row in calls:
                if (not model or row["model"] == model) and (not tag or row["tag"] == tag):
                    target.write(json.dumps(row) + "\n")  # escaped: lone surrogates survive
                    count += 1
    except OSError as error:
        if isinstance(error, BrokenPipeError):  # whoever read has enough
            raise
        raise StorageError(f"cannot write {out}: {error.strerror}") from None
    if out != "-":
        typer.echo(f"wrote {count} answers to {out}")


def _open(file: str) -> "Ledger":
    from pathlib import Path

    from broadsheet.core.chat import Ledger
    from broadsheet.core.records import home

    path = Path(file) if file else home() / "ledger.sqlite"
    if not path.is_file():
        raise ValueError(f"there is no ledger at {path}; calls to models make one, or give --ledger FILE")
    return Ledger(path)


def _plain(text: str) -> str:
    """Without what would move a terminal's cursor."""
    return "".join(character if character.isprintable() else "?" for character in text)
