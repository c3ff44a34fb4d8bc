"""`broadsheet study`: experiments that cross methods, precisions and data."""

import sys
from typing import TYPE_CHECKING, Annotated

import typer

from .common import split, working

if TYPE_CHECKING:
    from broadsheet.methods.weights.quantizing_code_llms import Arm, Results, Study

study = typer.Typer(help="Experiments that cross methods, precisions and data, with paired tests.", no_args_is_help=True)


@study.callback()
def _studies() -> None:
    """Experiments that cross methods, precisions and data, with paired tests."""


@study.command(name="code")
def code(
    model: Annotated[
        str, typer.Option("--model", "-m", help="Built-in models, folders or hub names, comma-separated.")
    ] = "pocket-code",
    methods: Annotated[
        str, typer.Option(help="Methods of the weights family ('broadsheet papers' lists them), or module:Class.")
    ] = "rtn,gptq,hqq",
    bits: Annotated[str, typer.Option(help="Bits a weight; a quarter of a bit more is allowed for scales.")] = "8,4,3,2",
    calibration: Annotated[
        str, typer.Option(help="Texts to calibrate on: code, mixed, random (built-in), or NAME=FILE for your own.")
    ] = "code",
    tasks: Annotated[
        str,
        typer.Option(
            help="A JSON-lines file (MultiPL-E, HumanEval, McEval) or OWNER/NAME:CONFIGURATION; default: built-in tasks."
        ),
    ] = "",
    limit: Annotated[int, typer.Option(min=1, help="How many tasks.")] = 200,
    samples: Annotated[int, typer.Option(min=1, help="Completions a task.")] = 20,
    temperature: Annotated[float, typer.Option(min=0, help="0 takes the likeliest token.")] = 0.2,
    seed: Annotated[int, typer.Option(help="Draws the completions and the calibration set.")] = 0,
    max_new_tokens: Annotated[
        int | None, typer.Option(min=1, help="Longest completion; default: 1024, 96 for built-in tasks.")
    ] = None,
    calibration_samples: Annotated[int, typer.Option(min=1, help="Pieces of text to calibrate on.")] = 128,
    calibration_tokens: Annotated[int, typer.Option(min=2, help="Tokens of each.")] = 256,
    perplexity: Annotated[
        str, typer.Option(help="NAME=FILE texts to take perplexity on; default: built-in code and text.")
    ] = "",
    seconds: Annotated[float, typer.Option(help="Time limit of one program.")] = 2.0,
    device: Annotated[str, typer.Option(help="cpu, cuda, mps.")] = "cpu",
    fresh: Annotated[bool, typer.Option("--fresh", help="Measure again what is already stored.")] = False,
    as_json: Annotated[
        str | None, typer.Option("--json", metavar="FILE", help="Write JSON to FILE; - is standard output.")
    ] = None,
    out: Annotated[
        str | None, typer.Option(help="Write a row a sample to FILE.csv or FILE.parquet.", metavar="FILE")
    ] = None,
    plot: Annotated[str | None, typer.Option(help="Draw pass@1 against true bits into FILE.svg.", metavar="FILE")] = None,
) -> None:
    """How few bits can a code model have, and does calibrating on code help? (quantizing-code-llms)

    Every arm of the design (model x method x bits x calibration) completes the same tasks with the same random numbers. A
    completion is cut after its function and run with the task's tests in a sandbox without network; what does not pass its
    tests in time fails. Arms are labelled by the bits a weight that they really store.

    Two tests stand beside one another. McNemar's exact test takes every sample as a witness; as the samples of one task
    agree, it is too sure. Wilcoxon's test takes one number a task. Both are adjusted by Benjamini-Hochberg; the verdict is
    the second's, and it is said where the first disagrees. The intervals of pass@1 are over tasks, too.

    Finished batches are stored under BROADSHEET_HOME: ctrl-C loses one batch, and the same command goes on from there.

    Examples:

      broadsheet study code --methods rtn,gptq,hqq --bits 8,4,3,2 --plot bits.svg

      broadsheet study code --methods gptq --bits 3,2 --calibration code,mixed,random

      broadsheet study code --model deepseek-ai/deepseek-coder-1.3b-base --tasks nuprl/MultiPL-E:humaneval-py \
          --methods gptq --bits 4,3,2 --calibration code=my_code.txt,text=wiki.txt --device cuda
    """
    from broadsheet.core.codetasks import load_tasks
    from broadsheet.core.microworld.code import CALIBRATIONS, make_tasks
    from broadsheet.core.records import write_json
    from broadsheet.methods.weights.quantizing_code_llms import Study

    try:
        precisions = [float(value) for value in split(bits)]
    except ValueError:
        raise ValueError(f"--bits takes numbers such as 8,4,3,2; got '{bits}'") from None
    given = [part.partition("=") for part in split(calibration)]
    made = Study(
        factors={
            "model": split(model),
            "method": split(methods),
            "precision": precisions,
            "calibration": [name for name, _, _ in given] or list(CALIBRATIONS[:1]),
        },
        tasks=load_tasks(tasks)[:limit] if tasks else make_tasks(limit),
        n_samples=samples,
        temperature=temperature,
        seed=seed,
        max_new_tokens=max_new_tokens or (1024 if tasks else 96),
        samples=calibration_samples,
        tokens=calibration_tokens,
        texts={name: path for name, _, path in given if path},
        perplexity={name: path for name, _, path in (part.partition("=") for part in split(perplexity))},
        seconds=seconds,
        device=device,
    )
    results = _run(made, fresh)
    if as_json:
        write_json(results.records(), as_json)
    if out:
        results.write(out)
    if plot:
        _plot(results, plot)
    if as_json != "-":
        _print(results)


def _run(made: "Study", fresh: bool) -> "Results":
    """Runs a study under a bar that counts the tasks of all arms."""
    with working() as bar:
        line = bar.add_task("loading", total=None)

        def progress(arm: "Arm", done: int, of: int, number: int, total: int) -> None:
            bar.update(line, completed=number * of + done, total=total * of, description=arm.label)

        return made.run(progress=progress, fresh=fresh)


def _print(results: "Results") -> None:
    from rich.console import Console

    from broadsheet.lab.code_study import tables

    console = Console(width=None if sys.stdout.isatty() else 160)
    for table in tables(results):
        console.print(table)


def _plot(results: "Results", path: str) -> None:
    from pathlib import Path

    from broadsheet.lab.code_study import picture
    from broadsheet.lab.plots import svg

    try:
        Path(path).write_text(svg(picture(results, results.languages[0])), encoding="utf-8")
    except OSError as error:
        raise ValueError(f"cannot write {path}: {error.strerror}") from None
