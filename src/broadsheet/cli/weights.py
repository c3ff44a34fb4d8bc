"""Commands on compressed folders: ``broadsheet dfloat11 ...`` and ``broadsheet bitstack ...``."""

from typing import Annotated, Any

import typer

FOLDER = Annotated[str, typer.Argument(help="A folder with config.json and safetensors files.")]

dfloat11 = typer.Typer(help="Folders in the DFloat11 format, ours or the official package's.", no_args_is_help=True)
bitstack = typer.Typer(help="Folders with a BitStack: one compressed model, any size.", no_args_is_help=True)


@dfloat11.command()
def inspect(folder: FOLDER) -> None:
    """Entropy, code lengths and size of every unit; of a folder that is not compressed what they would be.

    To compress one: broadsheet run dfloat11 --model FOLDER --out SMALLER
    """
    from broadsheet.methods.weights.dfloat11 import inspect

    typer.echo(str(inspect(folder)))


@dfloat11.command()
def verify(
    folder: FOLDER,
    original: Annotated[str, typer.Option(help="The bfloat16 model's folder, to compare with bit by bit.")] = "",
) -> None:
    """Decode every unit and check all that a decoder relies on."""
    from broadsheet.methods.weights.dfloat11 import verify

    typer.echo(str(verify(folder, original or None)))


@bitstack.command()
def sizes(
    folder: FOLDER,
    every: Annotated[int, typer.Option(min=1, help="Print every so-manieth size.")] = 16,
) -> None:
    """The sizes that the model of FOLDER can be loaded at, and what each step adds.

    To make such a folder: broadsheet run bitstack --model MODEL --out FOLDER
    """
    from broadsheet.methods.weights.bitstack import size_table

    steps = size_table(_load(folder))
    typer.echo(f"{len(steps)} sizes, {steps[0].bytes / 1e6:.3f} to {steps[-1].bytes / 1e6:.3f} MB")
    for number, step in enumerate(steps):
        if number % every == 0 or number == len(steps) - 1:
            what = "one block in every layer" if number == 0 else f"block {step.blocks} of {step.layer}"
            typer.echo(f"{step.bytes / 1e6:>12.3f} MB  {what}")


@bitstack.command()
def resize(
    folder: FOLDER,
    max_memory_mb: Annotated[float, typer.Option(help="MiB for all tensors of the model.")],
) -> None:
    """Set how much of its stack the model of FOLDER loads; nothing is compressed again and nothing is lost."""
    from pathlib import Path

    from broadsheet.methods.weights.bitstack import BitStack, set_size

    model = _load(folder)
    moved = set_size(model, int(max_memory_mb * 2**20))
    BitStack.save_beside(model, Path(folder))  # the index alone: the stack is there already
    held = model.get_memory_footprint() / 1e6
    typer.echo(f"{folder} now loads as {held:.3f} MB ({moved['blocks']} blocks, {moved['moved_bytes'] / 1e6:.3f} MB moved)")


def _load(folder: str) -> Any:
    from pathlib import Path

    from transformers import AutoModelForCausalLM
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    if not (Path(folder) / "bitstack.safetensors").is_file():
        raise ValueError(f"{folder} holds no bitstack.safetensors; broadsheet run bitstack --out {folder} makes it")
    return AutoModelForCausalLM.from_pretrained(folder)
