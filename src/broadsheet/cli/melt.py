"""``broadsheet melt``: measure models on this machine (MELT), read the records of runs, read logs of timed operators."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from .common import options_of, print_tables, split, working

melt = typer.Typer(help="What a model costs on a device: rates, latency, energy, memory (MELT).", no_args_is_help=True)

OUT = Annotated[str, typer.Option("-o", "--out", metavar="FILE", help="Write it to a .md, .csv or .json file.")]


@melt.command()
def run(
    model: Annotated[
        str,
        typer.Option(
            "--model", "-m", help="A built-in model, folder, hub name, GGUF file, server's address or YAML model config."
        ),
    ] = "pocket-2m",
    formats: Annotated[str, typer.Option(help="Of the weights, comma-separated: fp32, fp16, bf16, int8 to int2.")] = "fp32",
    runtime: Annotated[str, typer.Option(help="torch, llamacpp, llama-server or onnxruntime.")] = "torch",
    conversations: Annotated[str, typer.Option(help="A JSON file of them; default: the microworld's.")] = "",
    count: Annotated[int, typer.Option(help="How many conversations.")] = 5,
    repetitions: Annotated[int, typer.Option(help="How often all of them.")] = 3,
    context: Annotated[int, typer.Option(help="Tokens that the cache holds.")] = 2048,
    max_gen: Annotated[int, typer.Option(help="Tokens of a reply at most.")] = 256,
    threads: Annotated[int, typer.Option(help="CPU threads.")] = 1,
    meter: Annotated[str, typer.Option(help="none, rapl, nvml, csv:PATH or model:DEVICE (simulated).")] = "none",
    option: Annotated[
        list[str] | None, typer.Option("--set", metavar="NAME=VALUE", help="Any other setting, for example ignore_eos=true.")
    ] = None,
    out: Annotated[str, typer.Option("-o", "--out", metavar="DIR", help="Where the runs go, and go on.")] = "",
) -> None:
    """Run MODEL through the conversations and print what it costs.

    With a meter, 60 idle seconds are measured before a run and 10 after it, as in the paper; --set idle=10 changes that.

    Examples:

      broadsheet melt run --model pocket-2m --formats fp32,int4

      broadsheet melt run --model ./tinyllama --conversations conversations.json --meter rapl -o ./runs
    """
    from broadsheet.lab.run import configured
    from broadsheet.methods.estimates.melt import MELT, read_config

    config = ""
    if model.endswith((".yaml", ".yml")):
        config, model = model, read_config(model).model
    parts = tuple(part.strip() for part in formats.split(",") if part.strip())
    method = MELT(context, max_gen, repetitions, count, threads, formats=parts, runtime=runtime, meter=meter)
    method = configured("melt", method, options_of(option))
    with working() as bar:
        line = bar.add_task(model, total=None)
        report = method.estimate(
            model, config, conversations, out, lambda done, total: bar.update(line, completed=done, total=total)
        )
    print_tables(report.tables())
    typer.echo("runs: " + ", ".join(str(one.folder) for one in report.runs))


@melt.command()
def phone(
    model: Annotated[str, typer.Option("--model", "-m", help="A GGUF file.")],
    server: Annotated[str, typer.Option(help="llama.cpp's llama-server, built for the phone.")],
    serial: Annotated[str, typer.Option(help="The device, as 'adb devices' names it; default: the only one.")] = "",
    config: Annotated[str, typer.Option(help="A YAML model config.")] = "",
    conversations: Annotated[str, typer.Option(help="A JSON file of them; default: the microworld's.")] = "",
    count: Annotated[int, typer.Option(help="How many conversations.")] = 5,
    repetitions: Annotated[int, typer.Option(help="How often all of them.")] = 3,
    context: Annotated[int, typer.Option(help="Tokens that the cache holds.")] = 2048,
    max_gen: Annotated[int, typer.Option(help="Tokens of a reply at most.")] = 256,
    threads: Annotated[int, typer.Option(help="Threads on the phone.")] = 4,
    meter: Annotated[str, typer.Option(help="adb (the phone's own gauge), csv:PATH or none.")] = "adb",
    stop: Annotated[str, typer.Option(help="Packages to stop before, comma-separated.")] = "",
    out: Annotated[str, typer.Option("-o", "--out", metavar="DIR", help="Where the run goes, and goes on.")] = "phone-run",
) -> None:
    """Run the conversations on an Android phone, over adb.

    Example: broadsheet melt phone -m tinyllama-q4_0.gguf --server build-android/bin/llama-server --serial 192.168.1.7:5555
    """
    from broadsheet.methods.estimates.melt import drawn, read_config, read_conversations
    from broadsheet.methods.estimates.melt.adb import Adb, AdbMeter, run_phone
    from broadsheet.methods.estimates.melt.config import ModelConfig, RunSettings
    from broadsheet.methods.estimates.melt.meters import meter as meter_of
    from broadsheet.methods.estimates.melt.report import MeltReport

    device = Adb(serial)
    chosen = read_config(config) if config else ModelConfig(Path(model).stem)
    settings = RunSettings(context, max_gen, repetitions, count, threads)
    work = read_conversations(conversations) if conversations else drawn(count)
    with working() as bar:
        line = bar.add_task(model, total=None)
        found = run_phone(
            device, Path(server), Path(model), chosen, settings, work, out,
            AdbMeter(device) if meter == "adb" else meter_of(meter), split(stop),
            lambda done, total: bar.update(line, completed=done, total=total),
        )  # fmt: skip
    print_tables(MeltReport((found,)).tables())


@melt.command()
def accuracy(
    model: Annotated[
        str, typer.Option("--model", "-m", help="What the runtime takes; for all formats alike.")
    ] = "pocket-2m",
    formats: Annotated[str, typer.Option(help="Of the weights, comma-separated; the first is the reference.")] = "fp32,int4",
    runtime: Annotated[str, typer.Option(help="torch, llamacpp or onnxruntime.")] = "torch",
    items: Annotated[str, typer.Option(help="JSON lines of query, choices, gold; default: tasks of the microworld.")] = "",
    count: Annotated[int, typer.Option(help="Items of a task.")] = 100,
    out: OUT = "",
) -> None:
    """What formats of weights cost in accuracy, with standard errors over the same items.

    Example: broadsheet melt accuracy -m ./tinyllama --formats fp32,int4 --items arc_easy.jsonl
    """
    from broadsheet.core.records import write_text
    from broadsheet.methods.estimates.melt import accuracy as lib
    from broadsheet.methods.estimates.melt import runtime as runtime_of
    from broadsheet.methods.estimates.melt.config import ModelConfig, RunSettings, Sampling
    from broadsheet.methods.estimates.melt.report import as_csv, markdown
    from broadsheet.methods.estimates.melt.runtimes import StepRuntime

    chosen = {Path(items).stem: lib.read_items(items)[:count]} if items else lib.chosen_items(count)
    written = () if items else lib.WRITTEN
    found: dict[str, list[lib.Accuracy]] = {}
    with working() as bar:
        for form in split(formats):
            config = ModelConfig(model, sampling=Sampling(temperature=0))
            running = runtime_of(runtime, model, form, config, RunSettings(context=1024, max_gen=32))
            if not isinstance(running, StepRuntime):
                raise ValueError(f"the runtime {runtime} gives no log-probabilities; use torch, llamacpp or onnxruntime")
            running.load()
            for task in (*chosen, *written):
                line = bar.add_task(f"{form} {task}", total=count)

                def tick(done: int, total: int, line: Any = line) -> None:
                    bar.update(line, completed=done, total=total)

                some = chosen.get(task)
                got = (
                    lib.measure_written(running, task, count, tick=tick)
                    if some is None
                    else lib.measure_accuracy(running, task, some, tick)
                )
                found.setdefault(task, []).append(got)
                bar.remove_task(line)
            running.unload()
    table = lib.accuracy_table(found)
    if out.endswith(".md"):
        write_text(markdown(table).rstrip(), out)
    elif out.endswith(".csv"):
        write_text(as_csv(table).rstrip(), out)
    elif out:
        raise ValueError(f"--out is a .md or .csv file, got '{out}'")
    else:
        print_tables([table])


@melt.command()
def device(
    names: Annotated[str, typer.Argument(help="Devices, comma-separated, or JSON files; default: all that ship.")] = "",
    model: Annotated[str, typer.Option("--model", "-m", help="A model's name, shape or config.json.")] = "llama-2-7b",
    formats: Annotated[str, typer.Option(help="Of the weights: fp16, int8, int4, q8_0, q4_0, ...")] = "fp16,q4_0",
    held: Annotated[int, typer.Option(help="Tokens in the cache.")] = 1024,
    seconds: Annotated[float, typer.Option(help="How long it decodes.")] = 3600.0,
) -> None:
    """SIMULATED: how long a device keeps its rate, how hot it gets, what a token costs its battery.

    Example: broadsheet melt device galaxy-s23,pixel-6a -m llama-2-7b --formats q4_0
    """
    from broadsheet.methods.estimates.melt import device as lib

    chosen = [lib.device(name) for name in split(names) or lib.devices()]
    forms = split(formats)
    runs = [(form, lib.sustain(one, model, form, held, seconds)) for one in chosen for form in forms]
    print_tables([lib.sustained_table(runs)])


@melt.command()
def report(
    folders: Annotated[list[str], typer.Argument(help="Folders of runs, ours or the authors'.")],
    out: OUT = "",
    turns: Annotated[bool, typer.Option("--turns", help="A row a turn instead of a row a run.")] = False,
) -> None:
    """Compute what runs cost from their records.

    A .json file gets llama-bench's rows.

    Example: broadsheet melt report ./runs -o runs.md
    """
    from broadsheet.core.records import write_text
    from broadsheet.methods.estimates.melt import read_report
    from broadsheet.methods.estimates.melt.report import as_csv, markdown

    found = read_report(folders)
    tables = [found.turns()] if turns else found.tables()
    kind = Path(out).suffix
    if kind == ".md":
        write_text("\n".join(markdown(table) for table in tables).rstrip(), out)
    elif kind == ".csv":
        write_text(as_csv(tables[0]).rstrip(), out)
    elif kind == ".json":
        write_text(found.files()["llama-bench.json"], out)
    elif out:
        raise ValueError(f"--out is a .md, .csv or .json file, got '{out}'")
    else:
        print_tables(tables)


@melt.command()
def profile(
    model: Annotated[str, typer.Option("--model", "-m", help="A built-in model, a folder or a hub name.")] = "pocket-2m",
    form: Annotated[str, typer.Option("--format", help="Of the weights: fp32, fp16, bf16, int8 to int2.")] = "fp32",
    tokens: Annotated[int, typer.Option(help="Tokens to decode.")] = 16,
    threads: Annotated[int, typer.Option(help="CPU threads.")] = 1,
    merge: Annotated[str, typer.Option(help="per_op, per_module or per_node.")] = "per_op",
) -> None:
    """Where a decoded token's time goes, on PyTorch.

    Example: broadsheet melt profile --format int4 --merge per_module
    """
    from broadsheet.methods.estimates.melt.clock import Clock
    from broadsheet.methods.estimates.melt.config import ModelConfig, RunSettings
    from broadsheet.methods.estimates.melt.profile import profile as measure
    from broadsheet.methods.estimates.melt.runtimes import TorchRuntime

    with working() as bar:
        bar.add_task(model, total=None)
        runtime = TorchRuntime(model, form, ModelConfig(model), RunSettings(context=1024, threads=threads), Clock())
        runtime.load()
        table = measure(runtime, tokens).table(merge)  # type: ignore[arg-type]  # it is checked
    print_tables([table])


@melt.command(name="parse-ops")
def parse_ops(
    log: Annotated[str, typer.Argument(help="A log of llama.cpp or MLC, built to time operators.")],
    merge: Annotated[str, typer.Option(help="per_op, per_module or per_node.")] = "per_op",
    out: OUT = "",
) -> None:
    """Where the time goes: operators, or the modules they belong to, from a runtime's log.

    Example: broadsheet melt parse-ops dummy_file.llamacpp.log --merge per_op
    """
    from broadsheet.core.records import write_text
    from broadsheet.methods.estimates.melt.opslog import parse_ops as parse
    from broadsheet.methods.estimates.melt.report import as_csv, markdown

    table = parse(log).table(merge)  # type: ignore[arg-type]  # it is checked
    if out.endswith(".md"):
        write_text(markdown(table).rstrip(), out)
    elif out.endswith(".csv"):
        write_text(as_csv(table).rstrip(), out)
    elif out:
        raise ValueError(f"--out is a .md or .csv file, got '{out}'")
    else:
        print_tables([table])
