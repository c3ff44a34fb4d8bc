"""The papers as data: one TOML file a paper, read with the standard library alone.

``status`` is not stored: a paper runs when it names a method. ``broadsheet.catalogue`` never imports torch.
"""

from __future__ import annotations

import tomllib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")

FAMILIES = (
    "caches",
    "weights",
    "decoding",
    "selection",
    "synthesis",
    "tuning",
    "agents",
    "evals",
    "estimates",
    "hardware",
    "programs",
    "reasoning",
    "robotics",
)


@dataclass(frozen=True)
class Claim:
    """A headline claim: what the paper says, and how it is tested here.

    ``check`` names a function ``module:function`` from records to a verdict; ``reason`` says why there can be none here.
    """

    id: str
    metric: str
    setting: str
    paper: str
    test: str = ""
    reason: str = ""
    check: str = ""


@dataclass(frozen=True)
class Paper:
    """One paper of the catalogue."""

    slug: str
    title: str
    authors: str
    year: int
    family: str
    kind: str
    summary: str
    tags: tuple[str, ...]
    path: Path
    arxiv: str = ""
    code: str = ""
    method: str = ""

    @cached_property
    def claims(self) -> tuple[Claim, ...]:
        """Read when asked for: they are most of an entry, and a list of papers needs none of them."""
        return tuple(
            _checked(self.path, lambda row: Claim(**row), row) for row in tomllib.loads(_text(self.path)[1])["claims"]
        )

    @property
    def status(self) -> str:
        """Where it stands: "running" when a method of ours implements it, else "planned"."""
        return "running" if self.method else "planned"

    @property
    def text(self) -> str:
        """What a search looks at, lower case."""
        parts = (self.slug, self.title, self.authors, self.family, " ".join(self.tags), self.summary)
        return " ".join(parts).lower()


def _text(path: Path) -> tuple[str, str]:
    """An entry's head and its claims, each TOML."""
    head, mark, claims = path.read_text(encoding="utf-8").partition("[[claims]]")
    return head, mark + claims


def _checked(path: Path, make: Callable[[dict[str, Any]], T], row: dict[str, Any]) -> T:
    try:
        return make(row)
    except (TypeError, KeyError) as error:
        raise ValueError(f"catalogue entry {path.name}: {error}") from None


def _read(path: Path) -> Paper:
    row = tomllib.loads(_text(path)[0])
    paper = _checked(
        path, lambda r: Paper(**{**r, "tags": tuple(r["tags"]), "summary": r["summary"].strip(), "path": path}), row
    )
    if paper.slug != path.stem or paper.family not in FAMILIES:
        raise ValueError(f"catalogue entry {path.name}: slug or family does not fit")
    return paper


@cache
def papers() -> dict[str, Paper]:
    """All papers by slug, in alphabetical order."""
    found = (_read(path) for path in sorted(Path(__file__).parent.glob("*.toml")))
    return {paper.slug: paper for paper in found}


def paper(slug: str) -> Paper:
    """The paper of that slug; raises ValueError with the nearest slugs when there is none."""
    known = papers()
    if slug not in known:
        from difflib import get_close_matches

        near = get_close_matches(slug, known, n=3, cutoff=0.5)
        hint = f"; did you mean {' or '.join(near)}?" if near else "; 'broadsheet papers' lists them"
        raise ValueError(f"no paper '{slug}' in the catalogue{hint}")
    return known[slug]


def search(query: str = "") -> list[Paper]:
    """Papers in which every word of the query occurs; those with a hit in slug, title or tags come first."""
    words = query.lower().split()
    hits = [paper for paper in papers().values() if all(word in paper.text for word in words)]

    def rank(paper: Paper) -> int:
        head = f"{paper.slug} {paper.title} {' '.join(paper.tags)}".lower()
        return -sum(word in head for word in words)

    return sorted(hits, key=rank)
