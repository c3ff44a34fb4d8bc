"""What runs say: tables, CSV, Markdown, and rows that llama-bench's readers take.

A number that a model of a device computed is printed with the word "simulated" behind it, in every table and file.
"""

from __future__ import annotations

import csv
import io
import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from broadsheet.methods.estimates.base import Cell, Report, Table

from .metrics import STABLE, Energy, Spread, Turn, over_time, row, stability
from .records import Run

SIMULATED = "simulated"
#: what is read comfortably, in tokens a second (section 4.4: about a reader's pace)
READING = 5.0


def shown(value: Spread | float | None, simulated: bool = False) -> Cell:
    """A cell: four digits, the quartiles of a spread behind it, and the tag of what was not measured."""
    if value is None:
        return None
    text = str(value) if isinstance(value, Spread) else f"{value:.4g}"
    return f"{text} {SIMULATED}" if simulated else text


@dataclass(frozen=True)
class MeltReport(Report):
    """Runs beside each other; ``folders`` are those they were read from."""

    runs: tuple[Run, ...]

    def tables(self) -> list[Table]:
        found = [self.summary(), self.memory(), self.by_turn()]
        found += [self.sustained()] if any(_setting(run, "sustain") for run in self.runs) else []
        return found + ([self.energy()] if any(run.trace for run in self.runs) else [])

    def summary(self) -> Table:
        columns = (
            "run", "threads", "turns", "load s", "TTFT s", "prefill tokens/s", "decode tokens/s", "reads along",
            "variation", "repetitions",
        )  # fmt: skip
        rows, notes = list[tuple[Cell, ...]](), list[str]()
        for run in self.runs:
            loads = Spread.of([load.window.seconds for load in run.loads if load.window.seconds])
            decode = _spread(run.turns, "decode_tps")
            spread, stable = stability(run.turns)
            repeated = len({turn.iteration for turn in run.turns}) > 1
            verdict = "one only" if not repeated else "stable" if stable else "unstable"
            rows.append(
                (
                    run.label, _setting(run, "threads"), len(run.turns), shown(loads), shown(_spread(run.turns, "ttft")),
                    shown(_spread(run.turns, "prefill_tps")), shown(decode),
                    None if decode is None else decode.median >= READING,
                    shown(spread) if repeated else None, verdict,
                )
            )  # fmt: skip
            notes += _warnings(run)
        note = (
            f"Medians over turns, quartiles in brackets. Reads along: at least {READING:g} tokens/s. Variation: standard "
            f"deviation over mean of the repetitions' decode rates; stable below {STABLE:g}."
        )
        return Table("MELT", columns, tuple(rows), " ".join([note, *dict.fromkeys(notes)]))

    def memory(self) -> Table:
        rows = []
        for run in self.runs:
            used = run.configuration.get("memory") or {}
            held = (run.configuration.get("nbytes"), *(used.get(name) for name in ("peak_rss", "pss", "anonymous")))
            rows.append((run.label, *map(_megabytes, held)))
        note = "MB (10⁶ bytes). Peak RSS counts mapped files, PSS divides shared pages; no file is behind anonymous pages."
        return Table("Memory", ("run", "weights", "peak RSS", "PSS", "anonymous"), tuple(rows), note)

    def by_turn(self) -> Table:
        """How the context grows: what a turn waits for its first token."""
        rows = list[tuple[Cell, ...]]()
        for run in self.runs:
            for prompt in sorted({turn.prompt for turn in run.turns}):
                turns = [turn for turn in run.turns if turn.prompt == prompt]
                held, new = (statistics.median(getattr(t, f"{name}_tokens") for t in turns) for name in ("session", "input"))
                times = (shown(_spread(turns, name)) for name in ("ttft", "decode_tps"))
                rows.append((run.label, prompt, len(turns), shown(held), shown(new), *times))
        columns = ("run", "turn", "n", "tokens held", "tokens prefilled", "TTFT s", "decode tokens/s")
        return Table("By turn of the conversation", columns, tuple(rows))

    def sustained(self) -> Table:
        """Does it keep its rate? By minutes, against the first."""
        rows = list[tuple[Cell, ...]]()
        for run in self.runs:
            spans = over_time(run.turns)
            heat = run.configuration.get("temperatures") or []
            for span in spans:
                near = [c for time, c in heat if c is not None and span.start <= time < span.start + 60]
                share = f"{100 * span.rate / spans[0].rate:.0f} %"
                rows.append(
                    (run.label, round(span.start / 60), span.turns, shown(span.rate), share, max(near, default=None))
                )
        columns = ("run", "minute", "turns", "decode tokens/s", "of the first", "hottest °C")
        return Table("Sustained", columns, tuple(rows), "The decode rate is all tokens over all seconds of decoding.")

    def energy(self) -> Table:
        columns = (
            "run", "meter", "energy a token mWh", "decode alone mWh", "discharge a token mAh", "all turns mWh",
            "above idle mWh", "idle mW",
        )  # fmt: skip
        rows = list[tuple[Cell, ...]]()
        for run in self.runs:
            if run.trace is None:
                continue
            known, tag = [energy for energy in run.energies() if energy], run.trace.simulated
            spreads = [_spread(known, name) for name in ("per_token", "decode_per_token", "discharge_per_token")]
            net = [energy.net for energy in known if energy.net is not None]
            sums = (sum(energy.total for energy in known), sum(net) if net else None, run.idle_power)
            rows.append((run.label, run.trace.source, *(shown(value, tag) for value in (*spreads, *sums))))
        note = "Energy a token: a turn's whole energy, its prefill too, over its output tokens (the authors' energy_pt)."
        return Table("Energy", columns, tuple(rows), note)

    def turns(self) -> Table:
        """A row a turn, in the columns of the authors' ``results_model_inference_measurements.csv``."""
        rows, names = [], ("run", *row(self.runs[0].turns[0]))
        for run in self.runs:
            tag = bool(run.trace and run.trace.simulated)
            for turn, energy in zip(run.turns, run.energies()):
                cells = {name: _tagged(name, value, tag) for name, value in row(turn, energy).items()}
                rows.append((run.label, *cells.values()))
        return Table("Turns", names, tuple(rows))

    def to_json(self) -> dict[str, Any]:
        return {"runs": [_run_json(run) for run in self.runs]}

    def files(self) -> Mapping[str, str]:
        return {
            "report.md": "\n".join(markdown(table) for table in self.tables()),
            "report.csv": as_csv(self.summary()),
            "turns.csv": as_csv(self.turns()),
            "llama-bench.json": json.dumps([one for run in self.runs for one in llama_bench(run)], indent=1),
        }


def _spread(rows: Sequence[Any], name: str) -> Spread | None:
    return Spread.of([getattr(row, name) for row in rows])


def _setting(run: Run, name: str) -> Cell:
    return (run.configuration.get("settings") or {}).get(name)


def _warnings(run: Run) -> list[str]:
    """What a reader must know of a run."""
    found = []
    busy, most = run.configuration.get("busy"), 0.1
    if busy is not None and busy > most:
        found.append(f"{run.label}: other processes took {100 * busy:.0f} % of the CPUs, so times are too long.")
    if silent := sum(turn.output_tokens == 0 for turn in run.turns):
        found.append(f"{run.label}: {silent} turns without an output token have no rate and no energy a token.")
    if lost := sum(turn.unaccounted > 0.02 for turn in run.turns):
        found.append(f"{run.label}: in {lost} turns prefill, decode and overhead differ from the duration by more than 2 %.")
    return found


def _megabytes(value: Any) -> Cell:
    return None if value is None else f"{value / 1e6:.1f}"


def _tagged(name: str, value: Any, simulated: bool) -> Cell:
    if simulated and value is not None and ("mWh" in name or "mAh" in name):
        return f"{value:.6g} {SIMULATED}"
    return value


def _run_json(run: Run) -> dict[str, Any]:
    energies: Sequence[Energy | None] = run.energies()
    power = None
    if run.trace is not None:
        power = {"source": run.trace.source, SIMULATED: run.trace.simulated, "idle_mw": run.idle_power}
    return {
        "folder": str(run.folder), "configuration": run.configuration, "power": power,
        "loads": [asdict(load) for load in run.loads],
        "turns": [row(turn, energy) for turn, energy in zip(run.turns, energies)],
    }  # fmt: skip


# --- formats ------------------------------------------------------------------------------------------------------------


def markdown(table: Table) -> str:
    """A table with its title above and its note below."""

    def line(cells: Sequence[Any]) -> str:
        return "| " + " | ".join(_text(cell).replace("|", "\\|") for cell in cells) + " |"

    lines = [f"## {table.title}", "", line(table.columns), "|" + "---|" * len(table.columns)]
    lines += [line(cells) for cells in table.rows]
    return "\n".join([*lines, *(["", table.note] if table.note else []), ""])


def as_csv(table: Table) -> str:
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(table.columns)
    writer.writerows([_text(cell, "") for cell in cells] for cells in table.rows)
    return out.getvalue()


def _text(cell: Any, nothing: str = "–") -> str:
    if cell is None:
        return nothing
    if isinstance(cell, bool):
        return "yes" if cell else "no"
    return f"{cell:.6g}" if isinstance(cell, float) else str(cell)


def llama_bench(run: Run) -> list[dict[str, Any]]:
    """Prefill and decode of a run as two of llama-bench's rows (``-o json``): a sample a turn, of the median length."""
    found = []
    for prefill in (True, False):
        parts = [(turn.prefill if prefill else turn.decode, _tokens(turn, prefill)) for turn in run.turns]
        known = [(window.seconds, tokens) for window, tokens in parts if tokens and window.seconds > 0]
        if known:
            length = round(statistics.median(tokens for _, tokens in known))
            depth = round(statistics.median(turn.session_tokens for turn in run.turns))
            shape = (length, 0, depth) if prefill else (0, length, depth)
            found.append(bench_row(run.configuration, *shape, [s for s, _ in known], [t / s for s, t in known]))
    return found


def _tokens(turn: Turn, prefill: bool) -> int:
    return turn.input_tokens if prefill else turn.output_tokens


def bench_row(
    configuration: Mapping[str, Any],
    n_prompt: int,
    n_gen: int,
    n_depth: int,
    seconds: Sequence[float],
    rates: Sequence[float],
) -> dict[str, Any]:
    """One of llama-bench's JSON rows, with the fields that its compare script and others read."""
    settings, sampling = configuration.get("settings") or {}, (configuration.get("config") or {}).get("sampling") or {}
    nanoseconds = [round(1e9 * value) for value in seconds]
    many = len(seconds) > 1
    return {
        "build_commit": configuration.get("revision", ""), "build_number": 0,
        "cpu_info": (configuration.get("machine") or {}).get("cpu", ""), "gpu_info": "",
        "backends": str(configuration.get("runtime", "")), "model_filename": str(configuration.get("model", "")),
        "model_type": str(configuration.get("format", "")), "model_size": configuration.get("nbytes", 0),
        "model_n_params": 0, "n_batch": sampling.get("n_batch", 512), "n_ubatch": sampling.get("n_batch", 512),
        "n_threads": settings.get("threads", 1), "n_prompt": n_prompt, "n_gen": n_gen, "n_depth": n_depth,
        "test_time": configuration.get("time", ""), "avg_ns": round(statistics.fmean(nanoseconds)),
        "stddev_ns": round(statistics.stdev(nanoseconds)) if many else 0,
        "avg_ts": statistics.fmean(rates), "stddev_ts": statistics.stdev(rates) if many else 0.0,
        "samples_ns": nanoseconds, "samples_ts": list(rates),
    }  # fmt: skip
