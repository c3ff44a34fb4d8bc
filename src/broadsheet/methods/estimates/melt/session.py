"""The protocol of a run (section 3.4): idle, load, all prompts of all conversations, tail; repeated, resumable."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from itertools import count
from pathlib import Path
from typing import Any

from broadsheet.core.records import now as written_now
from broadsheet.core.records import provenance

from . import machine
from .clock import check_clocks
from .conversations import Conversation
from .device import ModelMeter
from .meters import Meter
from .metrics import PowerTrace, Turn, Window
from .records import (
    Load,
    Reply,
    Run,
    Stage,
    finished,
    read_power,
    read_run,
    stages_of,
    write_configuration,
    write_iteration,
    write_power,
    write_stages,
)
from .runtimes import Runtime, drop_page_cache

#: what decides whether a folder holds the same run
SAME = ("model", "format", "runtime", "settings", "config", "conversations")
Progress = Callable[[int, int], None]


def run_session(
    runtime: Runtime,
    conversations: Sequence[Conversation],
    meter: Meter,
    folder: str | Path,
    progress: Progress | None = None,
    about: Mapping[str, Any] | None = None,
) -> Run:
    """Runs all conversations ``settings.repetitions`` times into ``folder`` and reads them back.

    ``progress(done, total)`` after every turn; ``about`` goes into the configuration. An iteration is on disk when its last
    turn is over: a kill loses at most the one under way, and the same call goes on behind the last one that is there.
    Raises ValueError for a busy machine, a folder of another run, a prompt that does not fit, clocks that moved apart.
    """
    settings, folder = runtime.settings, Path(folder)
    chosen = list(conversations)[: settings.conversations]
    if not chosen:
        raise ValueError("there is no conversation to run")
    text = json.dumps(chosen).encode()
    configuration: dict[str, Any] = {
        "model": runtime.model, "format": runtime.format, "runtime": runtime.name, "settings": asdict(settings),
        "config": runtime.config.to_json(), "conversations": hashlib.sha256(text).hexdigest()[:16],
        "meter": meter.to_json(), "machine": machine.describe(), **provenance(), "time": written_now(),
        **(about or {}),
    }  # fmt: skip
    done = _resumed(folder, configuration)
    if len(done) >= (1 if settings.sustain else settings.repetitions):
        return _read_back(folder, meter)
    todo = count() if settings.sustain else (one for one in range(settings.repetitions) if one not in done)
    if isinstance(meter, ModelMeter):
        meter.check(runtime.model, runtime.format)
    configuration["busy"] = _quiet(settings.max_busy)
    write_configuration(folder, configuration)
    log = _Log(folder / "output.txt")
    log(f"{runtime.name} {runtime.format} {runtime.model}: {len(chosen)} conversations, {len(done)} iterations are here")

    _warm_up(runtime, chosen, settings.warmup)
    clock, stages = runtime.clock, stages_of(folder)
    turns_each = sum(len(one) for one in chosen)
    meter.start(clock)
    try:
        if meter.source != "none":
            stages.append(_waited("idle", settings.idle, clock.now))
        began = clock.now()
        for iteration in todo:
            if settings.sustain and iteration and clock.now() - began >= settings.sustain:
                break
            tick = _part(progress, turns_each, iteration, settings.repetitions)
            facts = _iteration(runtime, chosen, iteration, folder, log, tick)
            configuration.update(facts)
            configuration.setdefault("temperatures", []).append((clock.now() - began, machine.temperature()))
            write_configuration(folder, configuration)
        stages.append(Stage("run", Window(began, clock.now())))
        if meter.source != "none":
            stages.append(_waited("tail", settings.tail, clock.now))
    finally:
        meter.stop()
        write_stages(folder, stages)
        _keep_power(folder, meter)
        runtime.unload()
    configuration["clock_drift"] = clock.drift
    write_configuration(folder, configuration)
    check_clocks(clock.drift, "this machine, which was set during the run,")
    return _read_back(folder, meter)


def _part(progress: Progress | None, turns: int, iteration: int, repetitions: int) -> Callable[[int], None]:
    """Tells the turns of one iteration as turns of all."""

    def tick(done: int) -> None:
        if progress:
            progress(iteration * turns + done, turns * max(repetitions, iteration + 1))

    return tick


def _resumed(folder: Path, configuration: dict[str, Any]) -> list[int]:
    """The iterations that are there, of the same run. Raises ValueError for a folder of another one."""
    path = folder / "configuration.json"
    if not path.is_file():
        return []
    before = json.loads(path.read_text(encoding="utf-8"))
    fresh = json.loads(json.dumps(configuration))
    if changed := [name for name in SAME if before.get(name) != fresh[name]]:
        raise ValueError(f"{folder} holds another run (its {', '.join(changed)} differ); give another --out")
    return finished(folder)


def _quiet(most: float) -> float | None:
    share = machine.busy()
    if share is not None and share > most:
        raise ValueError(
            f"other processes take {100 * share:.0f} % of the CPUs: stop them, or allow it with max_busy=1 "
            "(the report will say so)"
        )
    return share


def _warm_up(runtime: Runtime, conversations: Sequence[Conversation], turns: int) -> None:
    if turns:
        runtime.load()
        runtime.begin(0)
        for number in range(turns):
            runtime.answer(conversations[0][number % len(conversations[0])])
        runtime.unload()


def _waited(name: str, seconds: float, now: Callable[[], float]) -> Stage:
    start = now()
    time.sleep(seconds)
    return Stage(name, Window(start, now()))


def _iteration(
    runtime: Runtime,
    conversations: Sequence[Conversation],
    iteration: int,
    folder: Path,
    log: _Log,
    tick: Callable[[int], Any],
) -> dict[str, Any]:
    """One repetition; what it says of the model and the memory."""
    if runtime.settings.cold:
        drop_page_cache(runtime.files())
    own_peak = machine.reset_peak()
    window = runtime.load()
    # a load is an iteration's; the conversations after the first begin with the model in memory
    loads = [Load(iteration, 0, window, not runtime.settings.cold)]
    turns, replies = list[Turn](), list[Reply]()
    for number, conversation in enumerate(conversations):
        if number:
            loads.append(Load(iteration, number, Window(window.end, window.end), True))
        runtime.begin(number)
        for prompt, question in enumerate(conversation):
            a = runtime.answer(question)
            turns.append(
                Turn(
                    iteration, number, prompt, a.whole, a.prefill, a.decode, a.overhead, a.input_tokens, a.output_tokens,
                    a.session_tokens, a.first_token, a.cpu_seconds,
                )
            )  # fmt: skip
            replies.append(Reply(question, a.text))
            tick(len(turns))
    used = machine.memory()
    write_iteration(folder, iteration, loads, turns, replies)
    rate = sum(turn.output_tokens for turn in turns) / max(sum(turn.decode.seconds for turn in turns), 1e-9)
    log(f"iteration {iteration}: loaded in {window.seconds:.3f} s, {len(turns)} turns, {rate:.2f} tokens/s decoded")
    facts = {"nbytes": runtime.nbytes, "pass_bytes": runtime.pass_bytes}
    if used:
        facts["memory"] = {**used.to_json(), "peak_of": "iteration" if own_peak else "process"}  # type: ignore[assignment]
    return facts


def _keep_power(folder: Path, meter: Meter) -> None:
    """What the meter saw, behind what it saw before the run was interrupted."""
    try:
        seen: PowerTrace | None = meter.trace()
    except ValueError:  # another instrument's file may come later: the report will say what is wrong with it
        return
    if seen is None:
        return
    before = read_power(folder, meter.to_json())
    if before is not None and before.time[-1] < seen.time[0]:
        seen = before.joined(seen)
    write_power(folder, seen)


def _read_back(folder: Path, meter: Meter) -> Run:
    """The folder's run; a model of a device computes its power from that."""
    if isinstance(meter, ModelMeter):
        (folder / "measurements_power.csv").unlink(missing_ok=True)
        write_power(folder, meter.of_run(read_run(folder)))
    return read_run(folder)


class _Log:
    """``output.txt``: a line at a time, with the time."""

    def __init__(self, path: Path):
        self.path = path

    def __call__(self, text: str) -> None:
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(f"{written_now()} {text}\n")
