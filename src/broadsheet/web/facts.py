"""What Broadsheet knows of a paper of its catalogue: claims and verdicts, parameters, how to use it, its plot.

Nothing here imports torch: verdicts come from committed records, parameters from the method's source, and plots are drawn by
another process (`plots`).
"""

from __future__ import annotations

import hashlib
import logging
import os
import subprocess
import sys
import threading
from collections import Counter
from functools import cache, cached_property
from pathlib import Path

from broadsheet.catalogue import Claim, papers
from broadsheet.catalogue import Paper as Known
from broadsheet.core.records import results_folder
from broadsheet.lab.claims import Status, statuses

from . import usage

log = logging.getLogger("broadsheet.web")

#: Families whose committed records compare methods at equal price -> the file that is drawn.
COMPARED = {"caches": "caches_sessions", "weights": "weights_sessions"}
#: Seconds that drawing all plots may take.
PATIENCE = 180

_reading = threading.Lock()
_drawing = threading.Lock()
_failed: set[Path] = set()


class Entry:
    """A paper of the catalogue as its page and the list show it."""

    def __init__(self, paper: Known):
        self.paper = paper

    @property
    def claims(self) -> list[tuple[Claim, Status]]:
        return list(zip(self.paper.claims, verdicts(self.paper.slug), strict=True))

    @cached_property
    def tally(self) -> list[tuple[str, int]]:
        """Verdicts and how many claims have them, best first."""
        count = Counter(status.status for status in verdicts(self.paper.slug))
        return [(name, count[name]) for name in MARKS if count[name]]

    @property
    def usage(self) -> usage.Usage | None:
        return usage.usage(self.paper.slug) if self.paper.method else None

    @property
    def has_plot(self) -> bool:
        return self.paper.slug in drawn_papers()

    @property
    def marks(self) -> dict[str, tuple[str, str, str]]:
        return MARKS


#: verdict -> its sign (no colour alone tells one from another), its class in the style sheet, and its name in a count
MARKS = {
    "holds": ("●", "holds", "hold"),
    "holds in direction": ("◐", "partly", "in direction"),
    "does not hold here": ("○", "fails", "not so here"),
    "not measured yet": ("·", "open", "to measure"),
    "not testable here": ("–", "open", "not testable"),
}


@cache
def _verdicts(slug: str) -> tuple[Status, ...]:
    return tuple(statuses(papers()[slug]))


def verdicts(slug: str) -> tuple[Status, ...]:
    """On a paper's claims, in order; computed once a process."""
    with _reading:  # the first reads all records: nobody else needs to do so at the same time
        return _verdicts(slug)


def warm(home: Path) -> None:
    """Computes what the first visitors would wait for."""
    for slug in papers():
        verdicts(slug)
    for slug in sorted(drawn_papers())[:1]:
        plot(slug, home)


@cache
def drawn_papers() -> frozenset[str]:
    """Slugs of the papers that their family's committed comparison holds."""
    from broadsheet.core.records import read_json

    found = set()
    for name in COMPARED.values():
        path = results_folder() / f"{name}.records.json"
        if path.is_file():
            found |= {record.paper for record in read_json(path)}
    return frozenset(slug for slug, paper in papers().items() if slug in found and paper.method)


def plot(slug: str, home: Path) -> str | None:
    """The SVG of a paper's plot, or None. All are drawn together the first time, and kept in ``home/plots``."""
    if slug not in drawn_papers():
        return None
    folder = home / "plots" / _edition()
    path = folder / f"{slug}.svg"
    with _drawing:
        if not path.is_file() and folder not in _failed:
            command = [sys.executable, "-m", "broadsheet.web.plots", str(folder)]
            paths = os.pathsep.join(entry for entry in sys.path if entry)
            try:
                subprocess.run(
                    command, check=True, timeout=PATIENCE, capture_output=True, env={**os.environ, "PYTHONPATH": paths}
                )
            except subprocess.SubprocessError as error:
                _failed.add(folder)  # it would fail again: not at every visit
                said = (getattr(error, "stderr", b"") or b"").decode(errors="replace").strip().rpartition("\n")[2]
                log.error("the plots could not be drawn: %s", said or error)
    return path.read_text(encoding="utf-8") if path.is_file() else None


@cache
def _edition() -> str:
    """Changes with the records."""
    digest = hashlib.sha256(Path(__file__).with_name("plots.py").read_bytes())
    for name in sorted(COMPARED.values()):
        path = results_folder() / f"{name}.records.json"
        if path.is_file():
            digest.update(path.read_bytes())
    return digest.hexdigest()[:12]
