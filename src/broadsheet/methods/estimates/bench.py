"""The bench of the estimates family: predicted against measured times of the same forward passes on this machine.

Models with random weights (speed does not ask what weights are) and a built-in one prefill and decode in several dtypes;
passes of another random model are what predictors may be fitted on. ``data`` names a checkout of microsoft/vidur instead:
its profiles of GPU kernels are then what is predicted. A predictor's price is how many measured passes it was fitted on.
"""

from __future__ import annotations

import statistics
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from scipy.stats import spearmanr

from broadsheet.core.perf.architecture import architecture
from broadsheet.core.perf.calibration import Sample, fit
from broadsheet.core.perf.hardware import Device, device
from broadsheet.core.perf.ops import Setting, operators
from broadsheet.core.perf.storage import GroupedWeight, plain
from broadsheet.core.records import Record, now, provenance
from broadsheet.core.stats import bootstrap_ci
from broadsheet.core.view import Quality, View

BENCH = "estimates"

VIEW = View(
    reference="measured again",
    reference_name="the same passes, measured again",
    qualities=(Quality("median_error", "median error", more_is_better=False),),
    columns=(
        ("median error", "median_error"),
        ("mean", "mean_error"),
        ("worst", "worst_error"),
        ("Spearman", "spearman"),
        ("too fast", "below_measured"),
        ("passes", "passes"),
    ),
    price="fitted_on",
    price_head="fitted on",
    price_label="measured passes that it was fitted on",
    price_digits=0,
    ticks=((1.0, "1"), (10.0, "10"), (100.0, "100")),
    least="needs at least {} passes",
    budgets=(1.0,),
    top=1e6,
    budget_name="measured passes",
    unbudgeted="–",
    note="Errors are |predicted / measured - 1| over passes; 'too fast' is the part of passes that a predictor promises to "
    "be faster than they were. Times are medians of repeats on pinned threads; 'measured again' is how well a second "
    "measurement predicts the first. Intervals are 95 % bootstrap intervals over passes.",
)

#: random models, by hidden width and layers; every fourth of the heads has keys and values of its own
RANDOM = {"random-512x4": (512, 4), "random-768x4": (768, 4), "random-1024x8": (1024, 8)}
#: (model, batch, context) of what is predicted, and of what predictors are fitted on
PASSES = (
    ("pocket-2m", 1, 128), ("pocket-2m", 8, 256), ("random-512x4", 1, 512), ("random-512x4", 4, 512),
    ("random-1024x8", 1, 128), ("random-1024x8", 1, 256),
)  # fmt: skip
FITTED = (("random-768x4", 1, 64), ("random-768x4", 1, 256), ("random-768x4", 4, 128))
#: what vidur's profiles are fitted on, by the folder of a device
TRACES = {"a100-80g": "a100", "h100": "h100", "a40": "a40"}
TRACE_FITTED = "meta-llama/Llama-2-7b-hf"


@dataclass(frozen=True)
class Workload:
    """What is predicted.

    ``dtypes``: of fp32, bf16, fp16. ``threads``: of the CPU. ``repeats``: timed passes, of which the median counts.
    ``data``: a checkout of microsoft/vidur, for ``hardware`` a100, h100 or a40; else this machine is measured.
    """

    model: str = ""
    dtypes: tuple[str, ...] = ("fp32", "bf16", "fp16")
    threads: int = 1
    repeats: int = 5
    seed: int = 0
    data: str = ""
    hardware: str = "a100"
    device: str = "cpu"

    def __post_init__(self) -> None:
        unknown = set(self.dtypes) - {"fp32", "bf16", "fp16"}
        if unknown or not self.dtypes:
            raise ValueError(f"dtypes are of fp32, bf16, fp16; got {', '.join(self.dtypes) or 'none'}")
        if self.threads < 1 or self.repeats < 3:
            raise ValueError("threads is at least 1, repeats at least 3")
        if self.data and device(self.hardware).name not in TRACES:
            raise ValueError(f"vidur's profiles are of {', '.join(TRACES)}; got {self.hardware}")


def workload_key(workload: Workload) -> dict[str, Any]:
    """What identifies a workload in stored cells."""
    return asdict(workload)


@dataclass(frozen=True)
class Case:
    """A pass: its name, its operators with the measured seconds, and the seconds when it was measured again."""

    name: str
    sample: Sample
    again: float


@dataclass(frozen=True)
class Cases:
    """What was measured: a device, the passes to fit on and those to predict."""

    device: Device
    fitted: tuple[Case, ...]
    asked: tuple[Case, ...]


# --- predictors ---------------------------------------------------------------------------------------------------


class Predictor(ABC):
    """Seconds of every asked pass, and how many measured passes they rest on."""

    budgeted: ClassVar[bool] = False
    parameters: ClassVar[dict[str, Any]] = {}

    @abstractmethod
    def predict(self, cases: Cases) -> tuple[np.ndarray, int]: ...


@dataclass(frozen=True)
class Again(Predictor):
    """The reference: the same passes, measured once more."""

    def predict(self, cases: Cases) -> tuple[np.ndarray, int]:
        return np.array([case.again for case in cases.asked]), len(cases.asked)


@dataclass(frozen=True)
class Calibrated(Predictor):
    """LLM-Viewer's roofline with three scalars fitted on the passes of another model."""

    def predict(self, cases: Cases) -> tuple[np.ndarray, int]:
        rated = cases.device.rated()
        fitted = replace(rated, efficiency=fit(rated, [case.sample for case in cases.fitted]))
        return np.array([case.sample.rated(fitted) for case in cases.asked]), len(cases.fitted)


@dataclass(frozen=True)
class Roofline(Predictor):
    """LLM-Viewer's roofline of the rated or measured peaks and bandwidth, as the paper has it: a lower bound."""

    def predict(self, cases: Cases) -> tuple[np.ndarray, int]:
        return np.array([case.sample.rated(cases.device.rated()) for case in cases.asked]), 0


@dataclass(frozen=True)
class Operations(Predictor):
    """The obvious cheap way: operations over the peak."""

    def predict(self, cases: Cases) -> tuple[np.ndarray, int]:
        on = cases.device
        seconds = [sum(f / on.peak(dtype) * count for f, _, dtype, count in case.sample.operators) for case in cases.asked]
        return np.array(seconds), 0


@dataclass(frozen=True)
class Nearest(Predictor):
    """The time of the nearest measured pass in the logarithms of operations and bytes, scaled by the mean of both."""

    def predict(self, cases: Cases) -> tuple[np.ndarray, int]:
        def place(case: Case) -> np.ndarray:
            return np.log([case.sample.operations, case.sample.nbytes])

        known = np.array([place(case) for case in cases.fitted])
        found = []
        for case in cases.asked:
            gaps = place(case) - known
            at = int((gaps**2).sum(axis=1).argmin())
            found.append(cases.fitted[at].sample.seconds * float(np.exp(gaps[at].mean())))
        return np.array(found), len(cases.fitted)


def methods() -> dict[str, Predictor]:
    """Predictors by name."""
    return {
        "measured again": Again(),
        "llm-viewer": Calibrated(),
        "roofline": Roofline(),
        "nearest": Nearest(),
        "operations / peak": Operations(),
    }


def measure(
    name: str,
    method: Predictor,
    workload: Workload,
    budget: float | None = None,
    tick: Callable[[int, int], None] | None = None,
) -> list[Record]:
    """Errors of one predictor over all passes, and each pass with its two times."""
    cases = _cases(workload, tick)
    predicted, fitted_on = method.predict(cases)
    measured = np.array([case.sample.seconds for case in cases.asked])
    wrong = np.abs(predicted / measured - 1)
    shared = {
        "paper": name if name == "llm-viewer" else "", "method": name, "bench": BENCH, "seed": workload.seed, "time": now(),
        "device": workload.hardware if workload.data else workload.device, **provenance(),
    }  # fmt: skip
    values = {
        "median_error": float(np.median(wrong)), "mean_error": float(wrong.mean()), "worst_error": float(wrong.max()),
        "spearman": float(spearmanr(predicted, measured).statistic), "below_measured": float((predicted < measured).mean()),
        "passes": len(cases.asked), "fitted_on": fitted_on,
    }  # fmt: skip
    intervals = {"mean_error": bootstrap_ci(list(wrong))}
    records = [
        Record(metric=metric, value=float(value), n=len(cases.asked), ci=intervals.get(metric), **shared)
        for metric, value in values.items()
    ]
    if not workload.data:
        for case, one, error in zip(cases.asked, predicted, wrong, strict=True):
            setting = {"pass": case.name, "measured": case.sample.seconds, "error": float(error)}
            records.append(Record(metric="predicted", value=float(one), unit="s", setting=setting, **shared))
    return records


# --- what is measured ---------------------------------------------------------------------------------------------


#: what this process measured: all predictors predict the same passes
_MEASURED: dict[Workload, Cases] = {}


def _cases(workload: Workload, tick: Callable[[int, int], None] | None) -> Cases:
    if workload not in _MEASURED:
        _MEASURED[workload] = _traces(workload) if workload.data else _here(workload, tick)
    return _MEASURED[workload]


def _traces(workload: Workload) -> Cases:
    from .llm_viewer.traces import read_vidur

    on = device(workload.hardware)
    root = Path(workload.data) / "data" / "profiling" / "compute" / TRACES[on.name]
    if not (root / TRACE_FITTED / "mlp.csv").is_file():
        raise ValueError(f"{workload.data} is no checkout of microsoft/vidur: it lacks {root / TRACE_FITTED}/mlp.csv")
    fitted = [Case(TRACE_FITTED, sample, sample.seconds) for sample in read_vidur(root / TRACE_FITTED / "mlp.csv")]
    asked = [
        Case(str(path.parent.relative_to(root)), sample, sample.seconds)
        for path in sorted(root.glob("*/*/mlp.csv"))
        for sample in read_vidur(path)
        if str(path.parent.relative_to(root)) != TRACE_FITTED
    ]
    return Cases(on, tuple(fitted), tuple(asked))


def _here(workload: Workload, tick: Callable[[int, int], None] | None) -> Cases:
    """Measures this machine, then every pass twice, in turns."""
    from broadsheet.core.perf.measure import DTYPES, bandwidth, peak
    from broadsheet.core.perf.timing import pinned

    wanted = [(*one, dtype) for dtype in workload.dtypes for one in (*FITTED, *PASSES)]
    with pinned(workload.threads):
        peaks = {dtype: peak(DTYPES[dtype]).value for dtype in workload.dtypes}
        on = Device("here", "this machine", bandwidth().value, peaks)
        found: dict[tuple[str, int, int], list[Case]] = {}
        for number, (model, batch, context, dtype) in enumerate(wanted):
            found.setdefault((model, batch, context), []).extend(_passes(model, batch, context, dtype, workload))
            if tick:
                tick(number + 1, len(wanted))
    fitted = [case for key, cases in found.items() if key in FITTED for case in cases]
    asked = [case for key, cases in found.items() if key in PASSES for case in cases]
    return Cases(on, tuple(fitted), tuple(asked))


def _passes(name: str, batch: int, context: int, dtype: str, workload: Workload) -> Iterator[Case]:
    """Prefill and a decode step of one model."""
    import torch
    from transformers import DynamicCache

    from broadsheet.core.models import with_cache
    from broadsheet.core.perf.measure import DTYPES
    from broadsheet.core.perf.timing import alternately

    model = _model(name, workload.seed).to(DTYPES[dtype])
    generator = torch.Generator().manual_seed(workload.seed)
    ids = torch.randint(1, model.config.vocab_size, (batch, context), generator=generator)
    bits = DTYPES[dtype].itemsize * 8
    made = architecture(model.config)
    filled = DynamicCache(config=model.config)

    @torch.inference_mode()
    def forward(tokens: torch.Tensor, cache: DynamicCache) -> None:
        model(tokens, **with_cache(cache), use_cache=True, logits_to_keep=1)

    forward(ids, filled)
    runs = {
        "prefill": lambda: forward(ids, DynamicCache(config=model.config)),
        "decode": lambda: forward(ids[:, -1:], filled),
    }
    for stage, run in runs.items():
        times = alternately({"once": run, "again": run}, workload.repeats)
        once, again = (statistics.median(times[which]) for which in ("once", "again"))
        # a decode step leaves the cache a token longer: at the median step it holds about `repeats` more
        length = context if stage == "prefill" else context + workload.repeats + 1
        setting = Setting(batch, length, None if stage == "prefill" else 1, GroupedWeight(plain(bits)), bits, bits)
        table = [replace(op, dtype=dtype) for op in operators(made, setting)]
        yield Case(f"{name} {dtype} {stage} {batch}x{context}", Sample.of(table, once), again)


@lru_cache(maxsize=1)
def _model(name: str, seed: int) -> Any:
    """A built-in model or one with random weights, in fp32."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    if name not in RANDOM:
        from broadsheet.core.models import load

        return load(name)[0]
    width, layers = RANDOM[name]
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=4096, hidden_size=width, intermediate_size=int(2.75 * width), num_hidden_layers=layers,
        num_attention_heads=width // 64, num_key_value_heads=width // 256, max_position_embeddings=4096,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()
