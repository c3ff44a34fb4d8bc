"""Commands of both sides of offsite tuning: ``broadsheet crash ...``."""

from typing import Annotated

import typer

crash = typer.Typer(
    help="Fine-tuning where the owner of the model and the owner of the data keep both (CRaSh).", no_args_is_help=True
)
MODEL = Annotated[str, typer.Option("--model", "-m", help="The full model: built-in, a folder, or a hub name.")]


@crash.command()
def emulate(
    out: Annotated[str, typer.Option(metavar="DIR", help="Where the emulator goes: what is sent to the client.")],
    model: MODEL = "pocket-2m-mha",
    text: Annotated[str, typer.Option(help="A text file that the layers are compared on; default: built-in sessions.")] = "",
    keep: Annotated[int, typer.Option(min=1, help="Layers that are kept.")] = 5,
    adapters: Annotated[int, typer.Option(min=1, help="Of these, layers that the client tunes.")] = 2,
    select: Annotated[str, typer.Option(help="crash, uniform, cka_drop or random.")] = "crash",
    share: Annotated[str, typer.Option(help="How the depth is restored: nearest, nearest_frozen or none.")] = "nearest",
    samples: Annotated[int, typer.Option(min=2, help="Pieces of text to compare the layers on.")] = 256,
    tokens: Annotated[int, typer.Option(min=2, help="Tokens of each.")] = 128,
) -> None:
    """The owner's first step: choose the layers, and write the emulator.

    The client loads it with ``broadsheet.methods.weights.crash.load_emulator(DIR)``, tunes it with any trainer (all but the
    adapters is frozen), and writes what comes back with ``extract_adapters``.

    Example: broadsheet crash emulate --model ./my-llama --text wiki.txt --keep 12 --adapters 4 --out ./to-the-client
    """
    from pathlib import Path

    from transformers.utils.logging import disable_progress_bar

    from broadsheet.core.models import load, load_config
    from broadsheet.methods.weights.bench import Workload, calibration
    from broadsheet.methods.weights.crash import CRaSh
    from broadsheet.methods.weights.quantiser import check_target

    disable_progress_bar()
    check_target(Path(out))
    method = CRaSh(n_keep=keep, n_adapters=adapters, select=select, share=share)  # type: ignore[arg-type]  # it checks them
    full, tokenizer = load(model, dtype=getattr(load_config(model), "dtype", None))
    ids = calibration(Workload(model=model, text=text, samples=samples, tokens=tokens, sessions=1), tokenizer)
    plan = method.plan(full, ids)
    plan.save(full, out, tokenizer)
    size = sum(file.stat().st_size for file in Path(out).glob("*.safetensors"))
    groups = " | ".join(" ".join(map(str, group)) for group in plan.clusters)
    typer.echo(f"layers  {groups or ' '.join(map(str, range(plan.layers)))}")
    typer.echo(f"kept    {' '.join(map(str, plan.kept))}; tuned {' '.join(map(str, plan.adapters))}")
    typer.echo(f"wrote   {out}, {size / 1e6:.2f} MB, for model {plan.base}")


@crash.command(name="plug-in")
def plug_in(
    adapters: Annotated[str, typer.Argument(help="The file that the client sent back.")],
    out: Annotated[str, typer.Option(metavar="DIR", help="Where the tuned model goes.")],
    model: MODEL = "pocket-2m-mha",
    cast: Annotated[bool, typer.Option("--cast", help="Keep the model's own dtype, and round the layers.")] = False,
) -> None:
    """The owner's last step: put the tuned layers into the full model.

    Example: broadsheet crash plug-in adapters.safetensors --model ./my-llama --out ./my-llama-tuned
    """
    from pathlib import Path

    from transformers.utils.logging import disable_progress_bar

    from broadsheet.core.models import load, load_config
    from broadsheet.methods.weights.crash import plug_in
    from broadsheet.methods.weights.quantiser import check_target, save

    disable_progress_bar()
    check_target(Path(out))
    full, tokenizer = load(model, dtype=getattr(load_config(model), "dtype", None) if cast else None)
    save(plug_in(full, adapters, cast), out, tokenizer)
    typer.echo(f"wrote {out}")
