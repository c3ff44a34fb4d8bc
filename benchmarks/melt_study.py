"""MELT on this machine: what formats of weights cost and give, on PyTorch, llama.cpp and ONNX Runtime.

    python benchmarks/melt_study.py [--public MELT-public] [--llama-bench llama-bench] [--llama-server llama-server]
        [--parts ops,speed,...]

- ops: shares of operators in the public llama.cpp log (needs a checkout of brave-experiments/MELT-public).
- published: the paper's own accuracies with error bars (needs the checkout too).
- speed: fixed-length prefill and decode of a model of 219 million random weights, whose every format exceeds the caches,
  with one thread; contenders take turns. The clock is CPU time of the process, so what else runs does not count (its memory
  traffic does). ``slope``: of log decode rate over log bytes read a token.
- operators: where the CPU time of a decoded token goes on PyTorch, products of weights and the rest, beside the rate at
  which this core reads an array; and the slope of the products alone.
- threads: the same model with one and two threads by the wall clock, which take turns; ``busy`` says how much else ran.
- memory: peak of a process of its own that loads that model and decodes.
- turns: time to first token by turn of a conversation, with and without the prefix cache, on the built-in model; variation
  of repetitions.
- accuracy, accuracy-llama, accuracy-onnx: of the built-in model by format, with standard errors, each against its runtime's
  32 bits.
- peer: the same GGUF file through our llama.cpp runtime and through llama-bench, in CPU time a token.
- server: conversations through llama-server over HTTP and through llama.cpp in this process, of the same GGUF file.
- experience: latency of a small periodic job while a model writes.
- device: SIMULATED sustained runs of models of devices.

Parts that are in the result file are not measured again (--fresh: those of --parts are); a kill loses at most the part
under way.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import importlib.util
import json
import math
import random
import resource
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from broadsheet.core.records import Record, home, now, provenance, read_json, write_results
from broadsheet.core.stats import bootstrap_ci, paired_difference
from broadsheet.methods.estimates.melt import accuracy as acc
from broadsheet.methods.estimates.melt import machine
from broadsheet.methods.estimates.melt import runtime as melt_runtime
from broadsheet.methods.estimates.melt.clock import Clock
from broadsheet.methods.estimates.melt.config import ModelConfig, RunSettings, Sampling
from broadsheet.methods.estimates.melt.conversations import draw_conversations, microworld_starters
from broadsheet.methods.estimates.melt.device import device, devices, sustain
from broadsheet.methods.estimates.melt.fixed import run_fixed
from broadsheet.methods.estimates.melt.llamacpp import wait_for_server
from broadsheet.methods.estimates.melt.meters import Meter
from broadsheet.methods.estimates.melt.metrics import stability
from broadsheet.methods.estimates.melt.opslog import parse_ops
from broadsheet.methods.estimates.melt.profile import profile
from broadsheet.methods.estimates.melt.qoe import job_latency
from broadsheet.methods.estimates.melt.runtimes import StepRuntime, TorchRuntime
from broadsheet.methods.estimates.melt.session import run_session

OUT = Path(__file__).parent / "results" / "melt_study.records.json"
#: runtime -> formats, from large to small; gains are of the last over bf16, or over the first where there is none
FORMATS = {
    "torch": ("fp32", "fp16", "bf16", "int8", "int4"),
    "llama.cpp": ("f32", "f16", "bf16", "q8_0", "q4_0"),
    "onnxruntime": ("fp32", "int8", "int4"),
}
GREEDY = Sampling(temperature=0)
MODEL = "random-219m"


class Study:
    def __init__(self, arguments: argparse.Namespace):
        self.arguments, self.path = arguments, Path(arguments.out)
        self.records = list(read_json(self.path)) if self.path.is_file() else []
        if arguments.fresh:
            self.records = [one for one in self.records if one.setting["part"] not in arguments.parts.split(",")]
        self.part = ""

    def add(
        self, method: str, metric: str, value: float, unit: str = "", ci: tuple[float, float] | None = None, n: int = 1,
        model: str = "", **setting: Any,
    ) -> None:  # fmt: skip
        self.records.append(
            Record(
                paper="melt", method=method, bench="melt-study", metric=metric, value=float(value), unit=unit, ci=ci, n=n,
                model=model, setting={"part": self.part, **setting}, time=now(), **provenance(),
            )
        )  # fmt: skip
        shown = f" [{ci[0]:.4g}, {ci[1]:.4g}]" if ci else ""
        print(f"{self.part:<9} {method:<10} {metric:<18} {value:12.5g}{shown} {unit} {setting or ''}", flush=True)

    def run(self, part: str, work: Callable[[Study], None]) -> None:
        if any(record.setting["part"] == part for record in self.records):
            print(f"{part}: in {self.path.name} already", flush=True)
            return
        self.part = part
        work(self)
        write_results(self.records, self.path)


# --- the large model ----------------------------------------------------------------------------------------------------


def large() -> Path:
    """One layer of Llama-2-7B with random weights (with embeddings 219 million, 877 MB in 32 bits) and the built-in
    tokenizer: for speed alone."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from broadsheet.core.models import load

    folder = home() / "melt" / MODEL
    if not (folder / "model.safetensors").is_file():
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=2048, hidden_size=4096, intermediate_size=11008, num_hidden_layers=1, num_attention_heads=32,
            num_key_value_heads=32, max_position_embeddings=4096, tie_word_embeddings=False, bos_token_id=1, eos_token_id=2,
        )  # fmt: skip
        LlamaForCausalLM(config).save_pretrained(folder)
        load("pocket-2m")[1].save_pretrained(folder)
    return folder


def runtime(model: str | Path, name: str, form: str, threads: int = 1, **settings: Any) -> StepRuntime:
    """Loaded; ``name``: of `FORMATS`."""
    wanted = RunSettings(**{"context": 1024, "threads": threads, "max_busy": 1.0, **settings})
    made = melt_runtime(name.replace(".", ""), str(model), form, ModelConfig(str(model), sampling=GREEDY), wanted)
    assert isinstance(made, StepRuntime)
    made.load()
    return made


def installed(name: str) -> bool:
    """Is a runtime there?"""
    return importlib.util.find_spec(name.replace(".", "_")) is not None


# --- parts --------------------------------------------------------------------------------------------------------------


def ops(study: Study) -> None:
    log = parse_ops(Path(study.arguments.public) / "src" / "parsers" / "test_files" / "dummy_file.llamacpp.log")
    model = "llama-2-7b q4_0, Android (public log)"
    study.add("llama.cpp", "evaluations", log.evaluations, model=model)
    study.add("llama.cpp", "nodes", len(log.nodes) / log.evaluations, model=model)
    for share in log.printed()[:3]:
        study.add("llama.cpp", "op_share", share.share, n=log.evaluations, model=model, op=share.name, clock="wall")
    cpu = {share.name: share.cpu_ms or 0.0 for share in log.merged("per_op")}
    study.add(
        "llama.cpp",
        "op_share",
        cpu["MUL_MAT"] / sum(cpu.values()),
        n=log.evaluations,
        model=model,
        op="MUL_MAT",
        clock="cpu",
    )
    for share in log.merged("per_module"):
        study.add("llama.cpp", "module_share", share.share, n=log.evaluations, model=model, module=share.name, clock="wall")


def published(study: Study) -> None:
    """The authors' own accuracies, read again with error bars: how many differences to 16 bits are below two standard errors
    of a difference (of independent samples: theirs are of the same items, which would be narrower)."""
    path = Path(study.arguments.public) / "src" / "model_evaluation" / "results" / "results.csv"
    with open(path, encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if row["framework"] == "llamacpp"]
    base = {(row["model"], row["dataset"]): float(row["accuracy"]) for row in rows if row["quantization"] == "None"}
    for form in ("q4_k", "q4_0", "q3_k"):
        gaps = [
            (float(row["accuracy"]) - base[row["model"], row["dataset"]], math.sqrt(2) * float(row["std_err"]))
            for row in rows
            if row["quantization"] == form and row["std_err"] != "None" and (row["model"], row["dataset"]) in base
        ]
        small = [abs(gap) < 2 * error for gap, error in gaps]
        about = {"format": form, "runtime": "llama.cpp"}
        study.add(
            "llama.cpp", "published_no_difference", statistics.fmean(small), n=len(small), model="the paper's", **about
        )
        mean = statistics.fmean(gap for gap, _ in gaps)
        study.add("llama.cpp", "published_difference", mean, n=len(gaps), model="the paper's", **about)


def contenders() -> list[tuple[str, str]]:
    """(runtime, format)."""
    return [(name, form) for name, forms in FORMATS.items() if installed(name) for form in forms]


def rates_of(one: StepRuntime, threads: int, clock: str) -> tuple[float, float]:
    """Of decoding and of prefill, once."""
    torch.set_num_threads(threads)
    tests = run_fixed(one, n_gen=8, repetitions=1, warmup=0), run_fixed(one, n_prompt=64, repetitions=1, warmup=0)
    return tests[0].median(clock), tests[1].median(clock)


def add_rates(study: Study, key: tuple[str, str], pairs: list[tuple[float, float]], **about: Any) -> None:
    """Median and quartiles of the rates of a runtime and format."""
    for metric, rates in zip(("decode_tps", "prefill_tps"), zip(*pairs, strict=True), strict=True):
        low, high = (float(value) for value in np.quantile(rates, [0.25, 0.75]))
        about |= {"format": key[1], "q1": low, "q3": high}
        study.add(key[0], metric, statistics.median(rates), "tokens/s", n=len(rates), model=MODEL, **about)


def speed(study: Study) -> None:
    repeats, busy = study.arguments.repeats, machine.busy()
    running = {key: runtime(large(), *key) for key in contenders()}
    found: dict[tuple[str, str], list[tuple[float, float]]] = {key: [] for key in running}
    for repeat in range(-1, repeats):  # they take turns; the first is not counted
        for key, one in running.items():
            rates = rates_of(one, 1, "cpu")
            if repeat >= 0:
                found[key].append(rates)
        print(f"speed: repeat {repeat + 1} of {repeats}", flush=True)
    shared: dict[str, Any] = {"threads": 1, "clock": "cpu"}
    for key, one in running.items():
        study.add(key[0], "pass_bytes", one.pass_bytes, "B", model=MODEL, **shared, format=key[1])
        study.add(key[0], "nbytes", one.nbytes, "B", model=MODEL, **shared, format=key[1])
        add_rates(study, key, found[key], **shared, busy=busy)
    for name, forms in FORMATS.items():
        if not installed(name):
            continue
        sizes = [running[name, form].pass_bytes for form in forms]
        value, ci = slope([[decode for decode, _ in found[name, form]] for form in forms], sizes)
        study.add(name, "slope", value, ci=ci, n=repeats, model=MODEL, **shared)
        small, base = forms[-1], "bf16" if "bf16" in forms else forms[0]
        for place, metric in enumerate(("decode_gain", "prefill_gain")):
            gains = [b[place] / a[place] for a, b in zip(found[name, base], found[name, small], strict=True)]
            about = {**shared, "of": small, "over": base}
            study.add(name, metric, statistics.median(gains), ci=median_ci(gains), n=repeats, model=MODEL, **about)
    for one in running.values():
        one.unload()


def operators(study: Study) -> None:
    repeats, tokens, about = study.arguments.repeats, 4, {"threads": 1, "clock": "cpu"}
    running = {form: runtime(large(), "torch", form) for form in FORMATS["torch"]}
    found: dict[str, list[dict[str, float]]] = {form: [] for form in running}
    array, read = torch.ones(10**8), list[float]()
    for _ in range(repeats):
        began = time.process_time()
        array.sum()
        read.append(array.nbytes / (time.process_time() - began))
        for form, one in running.items():
            shares = profile(one, tokens).merged("per_op")
            found[form].append({share.name: (share.cpu_ms or 0.0) / tokens / 1000 for share in shares})
    study.add("torch", "read_rate", statistics.median(read), "B/s", median_ci(read), repeats, **about)
    products = []
    for form, one in running.items():
        times = [row["MUL_MAT"] for row in found[form]]
        rest = [sum(row.values()) - row["MUL_MAT"] for row in found[form]]
        products.append([1 / seconds for seconds in times])
        for metric, values in (("product_seconds", times), ("other_seconds", rest)):
            study.add(
                "torch", metric, statistics.median(values), "s", median_ci(values), repeats, MODEL, **about, format=form
            )
        rate = [one.pass_bytes / seconds for seconds in times]
        study.add(
            "torch", "product_rate", statistics.median(rate), "B/s", median_ci(rate), repeats, MODEL, **about, format=form
        )
    value, ci = slope(products, [one.pass_bytes for one in running.values()])
    study.add("torch", "product_slope", value, ci=ci, n=repeats, model=MODEL, **about)


def threads(study: Study) -> None:
    """One contender after the other, with one and two threads in turn."""
    repeats, busy = study.arguments.repeats, machine.busy()
    for key in contenders():
        running = [runtime(large(), *key, count) for count in (1, 2)]
        found: list[list[tuple[float, float]]] = [[], []]
        for repeat in range(-1, repeats):
            for count, one in enumerate(running, 1):
                rates = rates_of(one, count, "wall")
                if repeat >= 0:
                    found[count - 1].append(rates)
        for count, pairs in enumerate(found, 1):
            add_rates(study, key, pairs, threads=count, clock="wall", busy=busy)
        gains = [two[0] / one[0] for one, two in zip(*found, strict=True)]
        about = {"format": key[1], "of": 2, "over": 1, "clock": "wall", "busy": busy}
        study.add(key[0], "thread_gain", statistics.median(gains), ci=median_ci(gains), n=repeats, model=MODEL, **about)
        for one in running:
            one.unload()


def median_ci(values: Sequence[float]) -> tuple[float, float]:
    """Percentile interval of the median, by bootstrap."""
    table = np.asarray(values)
    picks = np.random.default_rng(0).integers(0, len(table), (2000, len(table)))
    low, high = np.quantile(np.median(table[picks], axis=1), [0.025, 0.975])
    return float(low), float(high)


def slope(rates: list[list[float]], sizes: list[int]) -> tuple[float, tuple[float, float]]:
    """Least squares of log median rate on log bytes, with its interval over repeats."""
    x, table = np.log(sizes), np.array(rates)

    def fit(columns: np.ndarray) -> float:
        return float(np.polyfit(x, np.log(np.median(table[:, columns], axis=1)), 1)[0])

    draw, repeats = np.random.default_rng(0), table.shape[1]
    fits = [fit(draw.integers(0, repeats, repeats)) for _ in range(1000)]
    return fit(np.arange(repeats)), (float(np.quantile(fits, 0.025)), float(np.quantile(fits, 0.975)))


def memory(study: Study) -> None:
    folder = large()
    for name, form in contenders():
        command = [sys.executable, __file__, "--one", form, "--runtime", name, "--model", str(folder)]
        row = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[-1])
        for metric in ("peak_rss", "pss", "anonymous"):
            study.add(name, metric, row[metric], "B", model=MODEL, format=form, before=row["before"])


def one(model: str, name: str, form: str) -> None:
    """In a process of its own: what it holds after loading and four tokens. Prints JSON."""
    import transformers  # noqa: F401  # its memory is not the model's

    before = machine.memory()
    machine.reset_peak()
    running = runtime(model, name, form)
    run_fixed(running, n_gen=4, repetitions=1, warmup=0)
    used = machine.memory()
    if before is None or used is None:
        raise ValueError("memory is measured on Linux alone")
    print(json.dumps({**used.to_json(), "before": before.peak_rss}))


def turns(study: Study) -> None:
    # kept short, so that eight turns fit the cache
    conversations = [one[:8] for one in draw_conversations(microworld_starters(), 20) if len(one) >= 8][:3]
    for keep in (True, False):
        settings = RunSettings(
            context=1024, max_gen=24, repetitions=3, conversations=3, ignore_eos=True, keep_cache=keep, max_busy=1.0
        )
        running = TorchRuntime("pocket-2m", "fp32", ModelConfig("pocket-2m", sampling=GREEDY), settings, Clock())
        with tempfile.TemporaryDirectory() as folder:
            run = run_session(running, conversations, Meter(), folder)
        cache, busy = ("kept" if keep else "dropped"), run.configuration["busy"]
        for prompt in range(8):
            some = [turn for turn in run.turns if turn.prompt == prompt]
            about = {"turn": prompt, "cache": cache, "busy": busy}
            held = statistics.median(turn.session_tokens + turn.input_tokens for turn in some)
            waits, cpu = [t.ttft or math.nan for t in some], [t.cpu_seconds[0] for t in some if t.cpu_seconds]
            study.add(
                "torch",
                "ttft",
                statistics.median(waits),
                "s",
                median_ci(waits),
                len(some),
                "pocket-2m",
                tokens=held,
                **about,
            )
            study.add("torch", "prefill_cpu", statistics.median(cpu), "s", median_ci(cpu), len(cpu), "pocket-2m", **about)
        spread, stable = stability(run.turns)
        study.add("torch", "variation", spread, n=3, model="pocket-2m", cache=cache, stable=stable, busy=busy)
        worst = max(turn.unaccounted for turn in run.turns)
        study.add("torch", "unaccounted", worst, n=len(run.turns), model="pocket-2m", cache=cache)


def accuracy(study: Study, name: str, forms: Sequence[str]) -> None:
    """Of formats on one runtime; the first is the reference."""
    n, items = study.arguments.items, acc.chosen_items(study.arguments.items)
    found: dict[str, list[acc.Accuracy]] = {}
    for form in forms:
        running = runtime("pocket-2m", name, form, max_gen=32)
        for task in (*items, *acc.WRITTEN):
            some = items.get(task)
            got = acc.measure_written(running, task, n) if some is None else acc.measure_accuracy(running, task, some)
            found.setdefault(task, []).append(got)
            about = {"task": task, "format": form, "se": got.error, "held": running.nbytes}
            study.add(name, "accuracy", got.value, n=got.n, model="pocket-2m", **about)
            if form != forms[0]:
                mean, error, verdict = acc.difference(got, found[task][0])
                about = {"task": task, "format": form, "against": forms[0], "se": error, "verdict": verdict}
                study.add(name, "difference", mean, n=got.n, model="pocket-2m", **about)
        whole, base = ([float(right) for some in found.values() for right in some[place].right] for place in (-1, 0))
        about = {"task": "all", "format": form}
        study.add(name, "accuracy", statistics.fmean(whole), "", bootstrap_ci(whole), len(whole), "pocket-2m", **about)
        if form != forms[0]:
            gap, ci = paired_difference(whole, base)
            study.add(name, "difference", gap, "", ci, len(whole), "pocket-2m", **about, against=forms[0])
        running.unload()


def peer(study: Study) -> None:
    """CPU time a token: what llama-bench takes for 144 tokens less what it takes for 16, which leaves loading and warm-up
    out. Both have one thread and take turns."""

    def theirs(path: Path, tokens: int) -> float:
        command = [study.arguments.llama_bench, "-m", str(path), "-p", "0", "-n", str(tokens), "-r", "1", "-t", "1"]
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([*command, "-o", "json"], capture_output=True, check=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    for form in ("q4_0", "q8_0"):
        running = runtime(large(), "llama.cpp", form)
        path, own, bench = running.files()[0], list[float](), list[float]()
        for number in range(study.arguments.rounds):
            own += run_fixed(running, n_gen=128, repetitions=1, warmup=int(number == 0)).rates("cpu")
            bench.append(128 / (theirs(path, 144) - theirs(path, 16)))
        running.unload()
        about = {"format": form, "test": "tg128", "threads": 1, "clock": "cpu"}
        for name, rates in (("llama.cpp", own), ("llama-bench", bench)):
            value, ci = statistics.median(rates), median_ci(rates)
            study.add(name, "tg_tps", value, "tokens/s", ci, len(rates), MODEL, **about)
        ratios = [a / b for a, b in zip(own, bench, strict=True)]
        study.add(
            "llama.cpp",
            "ratio_to_llama_bench",
            statistics.median(ratios),
            "",
            median_ci(ratios),
            len(ratios),
            MODEL,
            **about,
        )


def server(study: Study) -> None:
    """The texts of the built-in model's conversations, which must be the same; the rate of the large one, pass for pass."""
    for model, form, length in (("pocket-2m", "f32", 32), (str(large()), "q8_0", 48)):
        built_in = model == "pocket-2m"
        path = runtime(model, "llama.cpp", form).files()[0]
        settings = RunSettings(context=1024, max_gen=length, max_busy=1.0, ignore_eos=not built_in)
        config = ModelConfig(Path(model).name, sampling=GREEDY)
        own = melt_runtime("llamacpp", str(path), "file", config, settings)
        with llama_server(study.arguments.llama_server, path, 1024) as address:
            theirs = melt_runtime("llama-server", address, "server", config, settings)
            own.load()
            theirs.load()
            same, ratios = list[float](), list[float]()
            for number, conversation in enumerate(draw_conversations(microworld_starters(), 5 if built_in else 1)):
                for one in (own, theirs):
                    one.begin(number)
                for question in conversation:
                    ours, other = own.answer(question), theirs.answer(question)
                    same.append(ours.text == other.text)
                    # a reply of n tokens takes the server n - 1 passes
                    passes = max(other.output_tokens - 1, 1) / other.decode.seconds
                    ratios.append(ours.output_tokens / ours.decode.seconds / passes)
        about = {"format": form, "clock": "wall", "busy": machine.busy()}
        if built_in:
            study.add("llama-server", "same_text", statistics.fmean(same), n=len(same), model=model, **about)
        else:
            value, ci = statistics.median(ratios), median_ci(ratios)
            study.add("llama.cpp", "ratio_to_llama_server", value, ci=ci, n=len(ratios), model=MODEL, **about)
        own.unload()


@contextlib.contextmanager
def llama_server(program: str, model: Path, context: int) -> Iterator[str]:
    """A server of one slot and one thread that serves a file; its address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [program, "-m", str(model), "-c", str(context), "-t", "1", "-fa", "on", "--parallel", "1", "--port", str(port)]
    running = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        wait_for_server(f"http://127.0.0.1:{port}")
        yield f"http://127.0.0.1:{port}"
    finally:
        running.terminate()
        running.wait()


def experience(study: Study) -> None:
    running, busy = runtime("pocket-2m", "torch", "fp32"), machine.busy()
    idle = job_latency()
    rng = random.Random(0)
    meanwhile = job_latency(lambda: run_fixed(running, n_gen=rng.randint(16, 48), repetitions=1, warmup=0))
    for name, latency in (("idle", idle), ("generating", meanwhile)):
        study.add(
            "torch", "job_latency", latency.median, "s", n=len(latency.values), model="pocket-2m", while_=name, busy=busy
        )
        study.add(
            "torch", "job_latency_p95", latency.p95, "s", n=len(latency.values), model="pocket-2m", while_=name, busy=busy
        )


def simulated(study: Study) -> None:
    for name in devices():
        for form in ("fp16", "q4_0"):
            run = sustain(device(name), "llama-2-7b", form, held=1024, seconds=3600, step=1.0)
            about = {"simulated": True, "device": name, "format": form}
            after = math.nan if run.throttled_after is None else run.throttled_after
            for metric, value, unit in (
                ("first_minute", run.first_minute, "tokens/s"), ("steady", run.steady, "tokens/s"),
                ("hottest", run.hottest, "°C"), ("throttled_after", after, "s"),
                ("energy_per_token", run.energy_per_token, "mWh"),
            ):  # fmt: skip
                if not math.isnan(value):
                    study.add("device", metric, value, unit, model="llama-2-7b", **about)


PARTS: dict[str, Callable[[Study], None]] = {
    "ops": ops, "published": published, "device": simulated, "speed": speed, "operators": operators, "threads": threads,
    "memory": memory, "peer": peer, "server": server, "turns": turns, "experience": experience,
    "accuracy": lambda study: accuracy(study, "torch", ("fp32", "int8", "int4", "int3", "int2")),
    "accuracy-llama": lambda study: accuracy(study, "llama.cpp", ("f32", "q8_0", "q4_0", "q2_k")),
    "accuracy-onnx": lambda study: accuracy(study, "onnxruntime", FORMATS["onnxruntime"]),
}  # fmt: skip
#: what a part needs: options, and runtimes
NEEDS = {
    "ops": ("public",), "published": ("public",), "peer": ("llama_bench", "llama.cpp"),
    "server": ("llama_server", "llama.cpp"), "accuracy-llama": ("llama.cpp",), "accuracy-onnx": ("onnxruntime",),
}  # fmt: skip


def missing(part: str, arguments: argparse.Namespace) -> str:
    """What a part needs and does not have."""
    lacking = [
        need if need in FORMATS else "--" + need.replace("_", "-")
        for need in NEEDS.get(part, ())
        if not (installed(need) if need in FORMATS else getattr(arguments, need))
    ]
    return ", ".join(lacking)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--public", default="", help="a checkout of brave-experiments/MELT-public")
    parser.add_argument("--llama-bench", default="", help="llama.cpp's llama-bench")
    parser.add_argument("--llama-server", default="", help="llama.cpp's llama-server")
    parser.add_argument("--parts", default=",".join(PARTS))
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--items", type=int, default=100)
    parser.add_argument("--fresh", action="store_true")
    parser.add_argument("--out", default=str(OUT))
    parser.add_argument("--one", default="", help=argparse.SUPPRESS)
    parser.add_argument("--runtime", default="torch", help=argparse.SUPPRESS)
    parser.add_argument("--model", default="", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.one:
        one(arguments.model, arguments.runtime, arguments.one)
        return
    study = Study(arguments)
    for part in arguments.parts.split(","):
        if part not in PARTS:
            raise SystemExit(f"no part '{part}'; there are {', '.join(PARTS)}")
        if lacking := missing(part, arguments):
            print(f"{part}: left out, it needs {lacking}", flush=True)
            continue
        study.run(part, PARTS[part])


if __name__ == "__main__":
    main()
