"""The papers' claims, recomputed from committed records; no status is typed by hand."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from broadsheet import resolve
from broadsheet.catalogue import Claim, Paper, papers
from broadsheet.core.records import Record, committed

#: What a claim is called that no check judges: there can be none here, or nothing was measured yet.
UNTESTABLE = "not testable here"
OPEN = "not measured yet"


@dataclass(frozen=True)
class Status:
    """A verdict, and our number as text."""

    status: str
    ours: str = ""


def status(claim: Claim, records: tuple[Record, ...]) -> Status:
    """The verdict on one claim."""
    if claim.reason:
        return Status(UNTESTABLE)
    if not claim.check:
        return Status(OPEN)
    verdict = resolve(claim.check)(records)
    return Status(OPEN) if verdict is None else Status(*verdict)


def statuses(paper: Paper) -> list[Status]:
    """The verdicts on a paper's claims, in order. Papers without checks are answered without reading records."""
    checked = any(claim.check for claim in paper.claims)
    records = committed() if checked else ()
    return [status(claim, records) for claim in paper.claims]


def page() -> str:
    """The claims page: what the papers say and what was measured here, one table a running paper."""
    lines = [
        "# Claims",
        "",
        "What the papers say and what Broadsheet measured, recomputed from "
        "`benchmarks/results` by `broadsheet claims --write`.",
        "",
    ]
    for paper in papers().values():
        if paper.status != "running":
            continue
        lines += [f"## {paper.title}", "", "| claim | setting | paper | here | status |", "|---|---|---|---|---|"]
        for claim, found in zip(paper.claims, statuses(paper), strict=True):
            here = found.ours or (claim.reason.removeprefix("why not testable here: ") if claim.reason else "–")
            cells = (claim.metric, claim.setting, claim.paper, here, found.status)
            lines.append("| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |")
        lines.append("")
    return "\n".join(lines)


def write_page() -> Path:
    """Writes ``docs/claims.md`` of the checkout."""
    target = Path(__file__).parent.parent.parent.parent / "docs" / "claims.md"
    if not target.parent.is_dir():
        raise ValueError("the claims page is written from a checkout (no docs folder here)")
    target.write_text(page(), encoding="utf-8")
    return target
