"""MELT (Laskaridis et al., MobiCom 2024, arXiv 2403.12844): what a language model really costs on a device.

Models in formats of weights, on runtimes, answer a fixed set of conversations; out come load time, time to first token,
rates of prefill and decode, energy, memory, and how all that changes as a conversation grows. Runs are repeated, resumed
and kept in the authors' file layout.

    report = MELT(formats=("fp32", "int4"), threads=1, meter="rapl").estimate("pocket-2m", out="./runs")
    report.tables()

The parts: `config` (the public YAML), `conversations`, `session` (the protocol), `runtimes`, `llamacpp`, `gguf_file`,
`onnx_runtime`, `meters`, `metrics`, `records`, `opslog` (time an operator), `device` (a phone as a model: simulated), `adb`,
`qoe`, `accuracy`, `report`.

Deviations: a model is loaded once an iteration, not once a conversation; a conversation that outgrows the context starts
anew, where llama.cpp shifts it; what the authors' scripts do wrong is said in `metrics`, `opslog` and `adb`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

from broadsheet.core.records import cell_key, home

from .clock import Clock
from .config import ModelConfig, RunSettings, read_config
from .conversations import Conversation, draw_conversations, microworld_starters, read_conversations
from .meters import meter
from .records import Run, read_run
from .report import MeltReport
from .runtimes import Runtime, TorchRuntime
from .session import run_session

__all__ = ["MELT", "MeltReport", "Run", "read_config", "read_conversations", "read_run"]

RUNTIMES = ("torch", "llamacpp", "llama-server", "onnxruntime")


@dataclass(frozen=True)
class MELT(RunSettings):
    """A run's settings, with the authors' defaults; see `RunSettings` for what they mean.

    ``formats``: of the weights, one run each. ``runtime``: torch, llamacpp (a GGUF file), llama-server (an
    address) or onnxruntime.
    ``meter``: none, rapl, nvml, csv:PATH or model:DEVICE. Raises ValueError for settings out of range.
    """

    formats: tuple[str, ...] = ("fp32",)
    runtime: str = "torch"
    meter: str = "none"

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.formats, str):  # -o formats=int4
            object.__setattr__(self, "formats", tuple(part.strip() for part in self.formats.split(",") if part.strip()))
        if not self.formats:
            raise ValueError("formats names at least one format of weights, such as fp32 or int4")
        if self.runtime not in RUNTIMES:
            raise ValueError(f"runtime is one of {', '.join(RUNTIMES)}; got '{self.runtime}'")

    @property
    def settings(self) -> RunSettings:
        """What the runs of all formats share."""
        return RunSettings(**{one.name: getattr(self, one.name) for one in fields(RunSettings)})

    def estimate(
        self,
        model: str = "pocket-2m",
        config: str = "",
        prompts: str = "",
        out: str = "",
        progress: Callable[[int, int], None] | None = None,
    ) -> MeltReport:
        """Runs ``model`` in every format.

        ``model``: a built-in one, a folder, a hub name, a GGUF file or a server's address, as the runtime takes it.
        ``config``: a YAML model config; ``prompts``: a file of conversations, else the microworld's. ``out``: the folder
        that gets a folder a format; the same call goes on in it. Raises ValueError.
        """
        settings = self.settings
        chosen = read_config(config) if config else ModelConfig(model)
        conversations = read_conversations(prompts) if prompts else drawn(settings.conversations)
        folder = (
            Path(out)
            if out
            else home() / "melt" / cell_key(model=model, config=chosen.to_json(), settings=settings, prompts=prompts)
        )
        runs = []
        for number, form in enumerate(self.formats):
            running = runtime(self.runtime, model, form, chosen, settings)

            def tick(done: int, total: int, before: int = number) -> None:
                if progress:
                    progress(before * total + done, len(self.formats) * total)

            where = folder / f"{Path(model).stem}-{form}-{self.runtime}-t{settings.threads}"
            runs.append(run_session(running, conversations, meter(self.meter), where, tick))
        return MeltReport(tuple(runs))


def drawn(count: int) -> list[Conversation]:
    """The microworld's conversations, by the authors' rule and seed."""
    return draw_conversations(microworld_starters(), max(count, 1))


def runtime(name: str, model: str, form: str, config: ModelConfig, settings: RunSettings) -> Runtime:
    """A runtime by name. Raises ValueError where it is not installed."""
    clock = Clock()
    if name == "torch":
        return TorchRuntime(model, form, config, settings, clock)
    if name == "llamacpp":
        from .llamacpp import LlamaCppRuntime

        return LlamaCppRuntime(model, form, config, settings, clock)
    if name == "llama-server":
        from .llamacpp import LlamaServerRuntime

        return LlamaServerRuntime(model, form, config, settings, clock)
    if name == "onnxruntime":
        from .onnx_runtime import OnnxRuntime

        return OnnxRuntime(model, form, config, settings, clock)
    raise ValueError(f"runtime is one of {', '.join(RUNTIMES)}; got '{name}'")


def read_report(folders: Sequence[str | Path]) -> MeltReport:
    """Of folders that runs left, or that hold such folders. Raises ValueError."""
    found: list[Path] = []
    for folder in map(Path, folders):
        if (folder / "configuration.json").is_file():
            found.append(folder)
        else:
            inside = sorted(path.parent for path in folder.glob("*/configuration.json"))
            if not inside:
                raise ValueError(f"{folder} holds no run: there is no configuration.json in it or one level below")
            found += inside
    if not found:
        raise ValueError("give at least one folder of a run")
    return MeltReport(tuple(read_run(folder) for folder in found))
