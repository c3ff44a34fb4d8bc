"""MELT on this machine: what formats of weights cost and give, on PyTorch and on llama.cpp.

    python benchmarks/melt_study.py [--public MELT-public] [--llama-bench llama-bench] [--parts ops,speed,...]

- ops: shares of operators in the public llama.cpp log (needs a checkout of brave-experiments/MELT-public).
- published: the paper's own accuracies with error bars (needs the checkout too).
- speed, threads: fixed-length prefill and decode of a model of 219 million random weights, whose every format exceeds the
  caches, with one and two threads; contenders take turns. With one thread the clock is CPU time of the process, so what
  else runs does not count (its memory traffic does); with two it is the wall clock, and ``busy`` says how much else ran.
  ``slope``: of log decode rate over log bytes read a token.
- memory: peak of a process of its own that loads that model and decodes.
- turns: time to first token by turn of a conversation, with and without the prefix cache, on the built-in model; variation
  of repetitions.
- accuracy, accuracy-llama: of the built-in model by format, with standard errors, each against its runtime's 32 bits.
- peer: the same GGUF file through our llama.cpp runtime and through llama-bench, in CPU time a token.
- experience: latency of a small periodic job while a model writes.
- device: SIMULATED sustained runs of models of devices.

Parts that are in the result file are not measured again (--fresh: those of --parts are); a kill loses at most the part
under way.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import random
import resource
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from broadsheet.core.records import Record, home, now, provenance, read_json, write_results
from broadsheet.core.stats import bootstrap_ci, paired_difference
from broadsheet.methods.estimates.melt import accuracy as acc
from broadsheet.methods.estimates.melt import machine
from broadsheet.methods.estimates.melt.clock import Clock
from broadsheet.methods.estimates.melt.config import ModelConfig, RunSettings, Sampling
from broadsheet.methods.estimates.melt.conversations import draw_conversations, microworld_starters
from broadsheet.methods.estimates.melt.device import device, devices, sustain
from broadsheet.methods.estimates.melt.fixed import run_fixed
from broadsheet.methods.estimates.melt.meters import Meter
from broadsheet.methods.estimates.melt.metrics import stability
from broadsheet.methods.estimates.melt.opslog import parse_ops
from broadsheet.methods.estimates.melt.qoe import job_latency
from broadsheet.methods.estimates.melt.runtimes import StepRuntime, TorchRuntime
from broadsheet.methods.estimates.melt.session import run_session

OUT = Path(__file__).parent / "results" / "melt_study.records.json"
TORCH = ("fp32", "fp16", "bf16", "int8", "int4")
LLAMA = ("f32", "f16", "bf16", "q8_0", "q4_0")
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
    """Loaded: "torch" or "llama.cpp"."""
    wanted = RunSettings(**{"context": 1024, "threads": threads, "max_busy": 1.0, **settings})
    config = ModelConfig(str(model), sampling=GREEDY)
    if name == "llama.cpp":
        from broadsheet.methods.estimates.melt.llamacpp import LlamaCppRuntime

        made: StepRuntime = LlamaCppRuntime(str(model), form, config, wanted, Clock())
    else:
        made = TorchRuntime(str(model), form, config, wanted, Clock())
    made.load()
    return made


def has_llama() -> bool:
    try:
        import llama_cpp  # noqa: F401
    except ImportError:
        return False
    return True


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
    return [("torch", form) for form in TORCH] + [("llama.cpp", form) for form in LLAMA if has_llama()]


def speed(study: Study, threads: int, repeats: int) -> None:
    clock, busy = ("cpu" if threads == 1 else "wall"), machine.busy()
    running = {key: runtime(large(), *key, threads) for key in contenders()}
    found: dict[tuple[str, str], tuple[list[float], list[float]]] = {key: ([], []) for key in running}
    for repeat in range(-1, repeats):  # they take turns; the first is not counted
        for key, one in running.items():
            torch.set_num_threads(threads)
            decode = run_fixed(one, n_gen=8, repetitions=1, warmup=0)
            prefill = run_fixed(one, n_prompt=64, repetitions=1, warmup=0)
            if repeat >= 0:
                found[key][0].extend(decode.rates(clock))
                found[key][1].extend(prefill.rates(clock))
        print(f"speed: {threads} threads, repeat {repeat + 1} of {repeats}", flush=True)
    shared: dict[str, Any] = {"threads": threads, "clock": clock}
    for key, one in running.items():
        about = {**shared, "format": key[1]}
        study.add(key[0], "pass_bytes", one.pass_bytes, "B", model=MODEL, **about)
        study.add(key[0], "nbytes", one.nbytes, "B", model=MODEL, **about)
        for metric, rates in zip(("decode_tps", "prefill_tps"), found[key], strict=True):
            low, high = (float(value) for value in np.quantile(rates, [0.25, 0.75]))
            about = {**about, "busy": busy, "q1": low, "q3": high}
            study.add(key[0], metric, statistics.median(rates), "tokens/s", n=len(rates), model=MODEL, **about)
    for name, forms in (("torch", TORCH), ("llama.cpp", LLAMA)):
        keys = [(name, form) for form in forms if (name, form) in found]
        if not keys:
            continue
        value, ci = slope([found[key][0] for key in keys], [running[key].pass_bytes for key in keys])
        study.add(name, "slope", value, ci=ci, n=repeats, model=MODEL, **shared)
        half, small = found[name, forms[2]], found[name, forms[4]]
        for metric, place in (("decode_gain", 0), ("prefill_gain", 1)):
            gains = [b / a for a, b in zip(half[place], small[place], strict=True)]
            about = {**shared, "of": forms[4], "over": forms[2]}
            study.add(name, metric, statistics.median(gains), ci=bootstrap_ci(gains), n=repeats, model=MODEL, **about)
    for one in running.values():
        one.unload()


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
                bootstrap_ci(waits),
                len(some),
                "pocket-2m",
                tokens=held,
                **about,
            )
            study.add("torch", "prefill_cpu", statistics.median(cpu), "s", bootstrap_ci(cpu), len(cpu), "pocket-2m", **about)
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
            value, ci = statistics.median(rates), bootstrap_ci(rates)
            study.add(name, "tg_tps", value, "tokens/s", ci, len(rates), MODEL, **about)
        ratios = [a / b for a, b in zip(own, bench, strict=True)]
        study.add(
            "llama.cpp",
            "ratio_to_llama_bench",
            statistics.median(ratios),
            "",
            bootstrap_ci(ratios),
            len(ratios),
            MODEL,
            **about,
        )


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
    "ops": ops, "published": published, "device": simulated, "speed": lambda study: speed(study, 1, study.arguments.repeats),
    "threads": lambda study: speed(study, 2, max(3, study.arguments.repeats // 3)), "memory": memory, "peer": peer,
    "turns": turns, "experience": experience,
    "accuracy": lambda study: accuracy(study, "torch", ("fp32", "int8", "int4", "int3", "int2")),
    "accuracy-llama": lambda study: accuracy(study, "llama.cpp", ("f32", "q8_0", "q4_0", "q2_k")),
}  # fmt: skip


def missing(part: str, arguments: argparse.Namespace) -> str:
    """What a part needs and does not have."""
    if part in ("ops", "published") and not arguments.public:
        return "--public"
    if part in ("peer", "accuracy-llama") and not has_llama():
        return "llama-cpp-python"
    return "--llama-bench" if part == "peer" and not arguments.llama_bench else ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--public", default="", help="a checkout of brave-experiments/MELT-public")
    parser.add_argument("--llama-bench", default="", help="llama.cpp's llama-bench")
    parser.add_argument("--parts", default=",".join(PARTS))
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--rounds", type=int, default=5)
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
