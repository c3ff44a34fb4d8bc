"""`broadsheet measure-hardware` and `broadsheet hardware`: devices that estimates are made for."""

import json
from typing import Annotated

import typer

from .common import print_tables, working


def measure_hardware(
    name: Annotated[str, typer.Argument(help="What to call this machine in --hardware.")] = "here",
    threads: Annotated[int, typer.Option(min=1, help="CPU threads that a model will have.")] = 1,
    out: Annotated[str, typer.Option(metavar="FILE", help="Default: BROADSHEET_HOME/devices/NAME.json.")] = "",
) -> None:
    """Measure this machine's rooflines, so that estimates can be made for it (about half a minute).

    Bandwidth by a triad, peaks by matrix products in each dtype, the overhead of a call, copies to a file, an all-reduce of
    two processes; then what of these linear layers reach. Quiet machines give better numbers.

    Example: broadsheet measure-hardware && broadsheet run llm-viewer --hardware here --model pocket-2m -o context=512
    """
    from pathlib import Path

    from broadsheet.core.perf.hardware import FOLDER
    from broadsheet.core.perf.measure import measure_hardware as measure
    from broadsheet.core.records import home, write_text

    if not name.replace("-", "").isalnum() or (FOLDER / f"{name}.json").exists():
        raise ValueError(f"'{name}' cannot be this machine's name: letters, digits and dashes, and no device that ships")
    with working() as bar:
        line = bar.add_task("bandwidth", total=1)
        found = measure(name, threads, lambda what, done, of: bar.update(line, description=what, completed=done, total=of))
    path = Path(out) if out else home() / "devices" / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(json.dumps(found.to_json(), indent=1) + "\n", str(path))
    e = found.efficiency
    typer.echo(f"{found.title}, {threads} thread{'s' * (threads > 1)}")
    rates = {"memory": found.bandwidth, "to a file": found.host_link, "all-reduce": found.link}
    typer.echo(", ".join(f"{what} {rate / 1e9:.1f} GB/s" for what, rate in rates.items()))
    typer.echo(", ".join(f"{dtype} {value / 1e9:.0f} Gop/s" for dtype, value in found.peaks.items()))
    cost = f"{e.overhead * 1e6:.1f} µs a call"
    typer.echo(f"operators reach {e.compute:.0%} of the peaks, {e.memory:.0%} of the bandwidth, and cost {cost}")
    typer.echo(f"wrote {path}: --hardware {name}")


def hardware(
    name: Annotated[str, typer.Argument(help="One device: every number with its origin. Default: all devices.")] = "",
) -> None:
    """List the devices that estimates know."""
    from broadsheet.core.perf.hardware import device, devices
    from broadsheet.methods.estimates.base import Table

    if name:
        one = device(name)
        numbers = {"bandwidth": one.bandwidth, "memory": one.memory, "onchip": one.onchip, "link": one.link}
        numbers |= {"host_link": one.host_link, **{f"peaks.{dtype}": value for dtype, value in one.peaks.items()}}
        rows = [(what, value, *one.origins[what]) for what, value in numbers.items() if what in one.origins]
        e = one.efficiency
        rows += [(f"efficiency.{what}", getattr(e, what), e.origin, e.source) for what in ("compute", "memory", "overhead")]
        note = "Bytes, bytes a second, dense operations a second, seconds; decimal."
        print_tables([Table(f"{one.name}: {one.title}", ("number", "value", "origin", "source"), tuple(rows), note)])
        return
    listed = [device(known) for known in devices()]
    rows_of_all = tuple(
        (
            one.name, one.title, round(one.memory / 1e9, 1), round(one.bandwidth / 1e9, 1),
            round(max(one.peaks.get("bf16", 0), one.peaks.get("fp16", 0)) / 1e12, 1), one.efficiency.origin == "measured",
        )
        for one in listed
    )  # fmt: skip
    heads = ("name", "device", "GB", "GB/s", "16-bit Top/s", "calibrated")
    print_tables([Table("devices", heads, rows_of_all, "broadsheet hardware NAME shows the origin of every number.")])
