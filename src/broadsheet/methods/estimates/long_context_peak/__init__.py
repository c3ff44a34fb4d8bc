"""Long-context peak: how many users a machine serves, and which reduction of the cache changes that.

Fu 2024, "Challenges in Deploying Long-Context Transformers: A Theoretical Peak Performance Analysis", arXiv 2405.08944.

Every extra cost of a long context comes from one source, the size of the cache (section 2): how many users fit (memory), how
long prefill takes (operations), how long a token takes (bandwidth), how long it takes to swap a user out and in (the host
link). Sessions an hour, with reading time between rounds, is what a machine is bought for; tokens a second miss the swaps.
The closed forms are in `sessions`; an event simulation (`simulate`) stands beside them, and `loop` is the same work done for
real on this machine.

The paper rounds sizes in binary and decimal units by turns; here all GB are 1e9 bytes.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property, reduce
from typing import Any, Literal

from broadsheet.core.perf.hardware import device
from broadsheet.core.perf.storage import CacheFormat
from broadsheet.core.records import committed

from ..base import Report, Table
from .sessions import NONE, REDUCTIONS, KVReduction, Measured, SessionModel, measured_reductions
from .simulate import Policy, Service, Session, SimReport, read_trace, service_of, simulate

__all__ = [
    "KVReduction", "LongContextPeak", "Measured", "PeakReport", "Service", "Session", "SessionModel", "SimReport",
    "read_trace", "service_of", "simulate",
]  # fmt: skip


@dataclass(frozen=True)
class LongContextPeak:
    """Concurrency, prefill, decode, context switch and sessions an hour.

    Attributes:
        hardware: a device's name or JSON file; tp: how many of them share the model.
        cache: how many bits its numbers have, or a format, "kivi:bits=2,group_size=32,residual=128" (`core.perf.storage`),
            with all the bytes that the method of that name holds. reserve_gb: kept free for activations.
        rounds, answer, think_s: of a session: questions, tokens an answer, mean seconds of reading. The paper's answer is
            250 tokens, one screen.
        attention: the part of prefill's quadratic operations that is counted: causal, full or none.
        reduce: names of `REDUCTIONS` (comma-separated) that are all applied.
        target: cost that a long context may have over one of 4,096 tokens; says what reduction would do it.
        policy: what happens to readers' caches when room is short: lru (swap), recompute, none. simulated: run it, too.
        calibrated: with the device's fitted efficiencies, else its rated peak (as the paper).
    """

    hardware: str = "a100-80g"
    tp: int = 2
    cache: float | str | CacheFormat = 16
    reserve_gb: float = 0.0
    rounds: int = 5
    answer: int = 250
    think_s: float = 60.0
    attention: Literal["causal", "full", "none"] = "causal"
    reduce: str | Sequence[str] = ""
    target: float = 2.0
    policy: Policy = "lru"
    simulated: bool = True
    calibrated: bool = False
    seed: int = 0

    def model(self, config: Any, reduction: KVReduction | None = None) -> SessionModel:
        """The closed forms for a decoder; raises ValueError where its weights do not fit."""
        on = device(self.hardware)
        on = on if self.calibrated else on.rated()
        given = self._reduction() if reduction is None else reduction
        return SessionModel(config, on, self.tp, self.cache, self.reserve_gb, given, attention=self.attention)

    def estimate(self, model: Any = "yi-34b-200k", context: int = 50_000, users: int = 0) -> PeakReport:
        """The four numbers at 4,096 tokens and at ``context``; sessions an hour of up to twice the users that fit, or of
        ``users``; what each reduction changes. Raises ValueError."""
        peak = self.model(model)
        if self.target <= 1:
            raise ValueError(f"target is a cost over that of 4,096 tokens, above 1; got {self.target}")
        if peak.concurrency(context) < 1:
            need = next(
                (t for t in range(self.tp + 1, 65) if replace(self, tp=t).model(model).concurrency(context) >= 1), None
            )
            way = f"tp={need} holds one" if need else "no 64 devices hold one"
            size, room = peak.cache_bytes(context) / 1e9, peak.room() / 1e9
            raise ValueError(
                f"no user of {context} tokens fits: a cache takes {size:.1f} GB of {room:.1f} that the weights leave; {way},"
                " or reduce=4-bit cache, or a shorter context"
            )
        measured = tuple(measured_reductions(committed()))
        return PeakReport(self, peak, context, users, tuple(self._what_if(model, context)), measured)

    def _reduction(self) -> KVReduction:
        names = self.reduce.split(",") if isinstance(self.reduce, str) else self.reduce
        wanted = [name.strip() for name in names if name.strip()]
        for name in wanted:
            if name not in REDUCTIONS:
                raise ValueError(f"no reduction '{name}'; there is {', '.join(REDUCTIONS)}")
        return reduce(lambda a, b: a | b, (REDUCTIONS[name] for name in wanted), NONE)

    def _what_if(self, config: Any, context: int) -> list[tuple[str, SessionModel]]:
        """Every single reduction on top of those that were asked for."""
        base = self._reduction()
        return [(name, self.model(config, base | one)) for name, one in REDUCTIONS.items()]

    def curve(
        self, peak: SessionModel, context: int, users: Sequence[int]
    ) -> list[tuple[int, float, float, SimReport | None]]:
        """For each number of users: the two bounds of sessions an hour, and the simulation."""
        session = Session(context, self.rounds, self.answer, self.think_s)
        rows = []
        for count in users:
            bounds = peak.sessions_per_hour(context, count, self.rounds, self.think_s, self.answer)
            run = simulate(service_of(peak), session, count, 6, self.policy, seed=self.seed) if self.simulated else None
            rows.append((count, *bounds, run))
        return rows


@dataclass(frozen=True)
class PeakReport(Report):
    """What a context costs; ``what_if``: the same model under each reduction; ``measured``: of the caches family."""

    peak: LongContextPeak
    model: SessionModel
    context: int
    users: int
    what_if: tuple[tuple[str, SessionModel], ...]
    measured: tuple[Measured, ...]

    def tables(self) -> list[Table]:
        return [self._four(), self._curve(), self._reductions(), self._found()]

    def to_json(self) -> dict[str, Any]:
        return {
            "model": self.model.arch.name, "hardware": self.model.on.name, "options": asdict(self.peak),
            "context": self.context, "four": {str(tokens): self.four(tokens) for tokens in (4096, self.context)},
            "tables": {table.title: table.records() for table in self.tables()},
        }  # fmt: skip

    def four(self, tokens: int) -> dict[str, float]:
        """Concurrency; seconds of prefill, of an answer for one user and for all that fit, and of one way of a switch."""
        held = max(self.model.concurrency(tokens), 1)
        return {
            "cache_gb": self.model.cache_bytes(tokens) / 1e9,
            "concurrency": self.model.concurrency(tokens),
            "prefill_s": self.model.prefill_s(tokens),
            "decode_s": self.model.decode_s(tokens, 1, self.peak.answer),
            "decode_all_s": self.model.decode_s(tokens, held, self.peak.answer),
            "switch_s": self.model.switch_s(tokens),
        }

    def files(self) -> dict[str, str]:
        session = Session(self.context, self.peak.rounds, self.peak.answer, self.peak.think_s)
        users = self.users or self.model.concurrency(self.context) + 1
        run = simulate(service_of(self.model), session, users, 2, self.peak.policy, seed=self.peak.seed, trace=True)
        return {"sessions.svg": self.plot(), "trace.json": run.trace.to_json()}

    def plot(self) -> str:
        """SVG: sessions an hour against users, simulated and between their bounds; where caches stop fitting."""
        from matplotlib.backends.backend_svg import FigureCanvasSVG
        from matplotlib.figure import Figure

        figure = Figure(figsize=(7.2, 4.2), layout="constrained")
        FigureCanvasSVG(figure)
        axes = figure.add_subplot(xlabel="users", ylabel="sessions an hour")
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25, linewidth=0.6)
        rows = self._rows
        counts = [row[0] for row in rows]
        axes.plot(counts, [row[1] for row in rows], "--", color="#D55E00", label="a machine that is always busy")
        axes.plot(counts, [row[2] for row in rows], ":", color="#7F7F7F", label="users who never wait")
        if any(row[3] for row in rows):
            simulated = [row[3].sessions_per_hour for row in rows if row[3]]
            axes.plot(counts, simulated, "o-", color="#0072B2", label="simulated")
        axes.axvline(self.model.concurrency(self.context), color="black", linewidth=0.8)
        axes.annotate(
            "caches that fit",
            (self.model.concurrency(self.context), 0),
            fontsize=8,
            xytext=(3, 3),
            textcoords="offset points",
        )
        axes.set_ylim(0)
        axes.legend(fontsize=8, frameon=False)
        axes.set_title(
            f"{self.model.arch.name}, {self.model.tp} x {self.model.on.title}, {self.context} tokens", fontsize=9, loc="left"
        )
        out = io.StringIO()
        figure.savefig(out, format="svg", metadata={"Date": None})
        return out.getvalue()

    # --- tables ---------------------------------------------------------------------------------------------------

    def _four(self) -> Table:
        short, long = self.four(4096), self.four(self.context)
        answer = f"answer of {self.peak.answer} tokens"
        words = {
            "cache_gb": "cache of one user, GB",
            "concurrency": "users whose caches fit",
            "prefill_s": f"prefill ({self.model.attention}), s",
            "decode_s": f"{answer}, one user, s",
            "decode_all_s": f"{answer}, all that fit together, s",
            "switch_s": "one way of a switch, s",
        }
        rows = [(word, short[name], long[name], long[name] / short[name]) for name, word in words.items() if short[name]]
        model, on = self.model, self.model.on
        note = (
            f"{model.count / 1e9:.4g} B parameters, {model.weight_bytes / 1e9:.4g} GB; prompts above "
            f"{model.critical_intensity:.0f} tokens are bound by compute. Peak {on.peak('bf16') / 1e12:.4g} Top/s, "
            f"{on.bandwidth / 1e12:.4g} TB/s, {on.memory / 1e9:.4g} GB, host link {on.host_link / 1e9:.4g} GB/s "
            f"({on.origins.get('host_link', ('assumed', ''))[0]}). "
            + ("Calibrated." if self.peak.calibrated else "Rated numbers: a peak, not a promise.")
        )
        heads = ("", "4,096 tokens", f"{self.context:,} tokens", "ratio")
        return Table(f"{model.arch.name} on {model.tp} x {on.title}", heads, tuple(rows), note)

    @cached_property
    def _rows(self) -> list[tuple[int, float, float, SimReport | None]]:
        fit = self.model.concurrency(self.context)
        some = sorted({1, max(1, round(fit / 2)), fit, fit + 1, 2 * fit, 3 * fit})
        return self.peak.curve(self.model, self.context, [self.users] if self.users else some)

    def _curve(self) -> Table:
        rows = []
        for count, busy, patient, run in self._rows:
            cells: tuple[Any, ...] = (count, min(busy, patient))
            if run:
                (first, late), (token, _) = run.quantiles().values()
                cells += (run.sessions_per_hour, first, late, token * 1e3, run.swaps / max(run.sessions, 1))
                cells += tuple(f"{run.shares[what]:.0%}" for what in ("prefill", "decode", "switch"))
            rows.append(cells)
        heads: tuple[str, ...] = ("users", "bound, sessions/h")
        if self.peak.simulated:
            heads += ("simulated", "first token, s", "95 %", "ms a token", "swaps a session", "prefill", "decode", "switch")
        seconds, way = self.model.swap_s(self.context)
        faster = "swapping a user back in" if way == "swap" else "prefilling a user anew"
        note = (
            f"{self.peak.rounds} rounds, {self.peak.think_s:g} s of reading each, policy {self.peak.policy}; {faster} is the"
            f" faster way back ({seconds:.3g} s). SIMULATED event by event."
        )
        return Table("sessions an hour", heads, tuple(rows), note)

    def _reductions(self) -> Table:
        def busy(model: SessionModel) -> float:
            users = 2 * max(model.concurrency(self.context), 1)
            return model.sessions_per_hour(self.context, users, self.peak.rounds, 0.0, self.peak.answer)[0]

        rows = []
        for name, model in self.what_if:
            seconds = (
                model.prefill_s(self.context),
                model.decode_s(self.context, 1, self.peak.answer),
                model.switch_s(self.context),
            )
            rows.append((name, model.concurrency(self.context), *seconds, busy(model) / busy(self.what_if[0][1])))
        note = (
            "Sessions: of a busy machine with twice the users that fit, over those without the reduction. To cost at most "
            f"{self.peak.target:g} times what 4,096 tokens do, {self._needed()}."
        )
        heads = ("reduction", "users", "prefill, s", "answer, s", "switch, s", "sessions")
        return Table("what a reduction changes", heads, tuple(rows), note)

    def _needed(self) -> str:
        """The largest part of the cache that meets the target cost a session (equal-cost solver), by bisection."""

        def cost(part: float, at: tuple[Any, ...]) -> float:
            model = replace(self.model, reduction=self.model.reduction | KVReduction(hidden=part, at=at))
            held = max(model.concurrency(self.context), 1)
            return model.demand_s(self.context, held, self.peak.rounds, self.peak.answer)

        held = max(self.model.concurrency(4096), 1)
        allowed = self.peak.target * self.model.demand_s(4096, held, self.peak.rounds, self.peak.answer)
        phases = ("rest", "decode", "prefill")
        if cost(1.0, phases) <= allowed:
            return "nothing has to be reduced"
        if cost(1e-6, phases) > allowed:
            return "no reduction of the cache is enough: prefill's linear part alone costs more"
        low, high = 1e-6, 1.0
        for _ in range(60):
            middle = (low * high) ** 0.5
            low, high = (middle, high) if cost(middle, phases) <= allowed else (low, middle)
        return f"the product of all parts, acting in every phase, is at most {low:.3g}"

    def _found(self) -> Table:
        rows = []
        for one in self.measured[:24]:
            model = replace(self.model, reduction=self.model.reduction | one.reduction)
            rows.append(
                (
                    one.method, f"{one.left:.3f}", f"{one.accuracy:.1%}", f"{one.worst_drop * 100:.1f}", one.lossless,
                    model.concurrency(self.context), model.decode_s(self.context, 1, self.peak.answer),
                )
            )  # fmt: skip
        heads = (
            "cache method, measured",
            "bytes left",
            "accuracy",
            "worst retrieval drop, points",
            "lossless",
            "users",
            "answer, s",
        )
        full = f"{self.measured[0].full:.1%}" if self.measured else "–"
        note = (
            f"Bytes and accuracy as measured on the built-in model (its full cache: {full}) by 'broadsheet compare caches'; "
            "prefill is left as it is. Lossless: within a point of the full cache on every retrieval task, mode and turn."
        )
        return Table("measured reductions", heads, tuple(rows), note)
