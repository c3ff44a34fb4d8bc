"""A code study in a terminal and as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.table import Table

from broadsheet.methods.weights.quantizing_code_llms import BASELINE, Comparison, Results

from .plots import new_figure, style_of


def tables(results: Results) -> list[Table]:
    """The arms, and the comparisons that the design allows."""
    made = [arms_table(results)]
    reached = [result.arm for result in results.arms if result.reached]
    if any(arm.method != BASELINE for arm in reached):
        made.append(comparison_table(results.compare(BASELINE), "against the 16-bit model of the same weights"))
    for factor in ("calibration", "method", "model"):
        if pairs := results.pairwise(factor):
            made.append(comparison_table(pairs, f"{factor}s against one another"))
    return made


def arms_table(results: Results) -> Table:
    """An arm a line: what it stores, what it passes, how well it predicts."""
    texts = list(dict.fromkeys(name for result in results.arms for name in result.facts.get("perplexity", {})))
    table = Table(title=f"pass@1 of {len(results.tasks)} tasks × {results.n_samples} samples at T = {results.temperature:g}")
    for heading in ("model", "method", "calibrated on"):
        table.add_column(heading)
    for heading in (
        "asked",
        "bits",
        "MB",
        *(f"pass@1 {name}" for name in results.languages),
        *(f"ppl {name}" for name in texts),
    ):
        table.add_column(heading, justify="right")
    for result in results.arms:
        arm, facts = result.arm, result.facts
        asked = "–" if arm.precision is None else f"{arm.precision:g}"
        names = (arm.model, arm.method, arm.calibration or "–", asked)
        if not result.reached:
            table.add_row(*names, f"cannot go below {facts['least']:.2f}", *[""] * (1 + len(results.languages) + len(texts)))
            continue
        passed = []
        for language in results.languages:
            value, (low, high) = results.pass_at_1(result, language)
            passed.append(f"{value:.1%} [{low:.1%}–{high:.1%}]".replace("%", ""))
        perplexities = [f"{facts['perplexity'][name]:.3f}" for name in texts]
        table.add_row(*names, f"{facts['bits']:.2f}", f"{facts['disk_bytes'] / 1e6:.2f}", *passed, *perplexities)
    return table


def comparison_table(comparisons: Sequence[Comparison], title: str) -> Table:
    """A comparison a line, the two tests beside one another."""
    table = Table(title=title)
    for heading in ("arm", "against"):
        table.add_column(heading)
    for heading in ("bits", "pass@1 difference", "lost:won", "odds ratio", "McNemar p", "by task p", "verdict"):
        table.add_column(heading, justify="right")
    for one in comparisons:
        low, high = one.interval
        table.add_row(
            one.arm.label,
            one.baseline.label,
            f"{one.bits:.2f}",
            f"{100 * one.difference:+.1f} [{100 * low:+.1f}, {100 * high:+.1f}]",
            f"{one.only_baseline}:{one.only_arm}",
            f"{one.odds_ratio:.2f}",
            _p(one.p_adjusted),
            _p(one.p_tasks_adjusted),
            verdict(one),
        )
    return table


def _p(value: float) -> str:
    return f"{value:.2g}" if value >= 1e-99 else "<1e-99"


def verdict(one: Comparison) -> str:
    """In words, by the task-level test, and whether McNemar's says otherwise."""
    word = ("better" if one.difference > 0 else "worse") if one.significant_by_task else "no difference shown"
    return word + (" (McNemar disagrees)" if one.disagree else "")


def picture(results: Results, language: str) -> Any:
    """Pass@1 against the bits that are really stored: a line a method and calibration, the uncompressed model as a level."""
    drawn, axes = new_figure()
    lines: dict[tuple[str, str, str], list[Any]] = {}
    for result in results.arms:
        if result.reached:
            lines.setdefault((result.arm.model, result.arm.method, result.arm.calibration), []).append(result)
    several = len({model for model, _, _ in lines}) > 1
    looks = style_of([str(key) for key in lines if key[1] != BASELINE], BASELINE)
    for (model, method, calibration), arms in lines.items():
        points = sorted((arm.facts["bits"], *results.pass_at_1(arm, language)) for arm in arms)
        name = " ".join(filter(None, (model if several else "", method, f"({calibration})" if calibration else "")))
        if method == BASELINE:
            axes.axhline(points[0][1], color="black", linewidth=1, linestyle="--", label=f"{name}, 16 bits")
            continue
        y = [value for _, value, _ in points]
        error = [[v - low for _, v, (low, _) in points], [high - v for _, v, (_, high) in points]]
        look = looks[str((model, method, calibration))]
        axes.errorbar([bits for bits, *_ in points], y, yerr=error, label=name, markersize=5, elinewidth=0.7, **look)
    axes.set_xlabel("bits a weight of the linear layers, everything stored counted")
    axes.set_ylabel(f"pass@1 ({language})")
    axes.set_ylim(-0.02, 1.02)
    axes.legend(fontsize=7, frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    return drawn
