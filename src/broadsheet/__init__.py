"""Broadsheet: the daily papers on efficient, instruction-following language models, each one running.

``broadsheet.method("gear")`` imports a paper's method on demand; nothing heavy is imported before that.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

__version__ = "0.1.0"


def method(slug: str) -> Any:
    """The class that implements a paper; raises ValueError when the paper is unknown or does not run yet."""
    from broadsheet.catalogue import paper

    entry = paper(slug)
    if not entry.method:
        raise ValueError(f"'{slug}' is on the page but does not run yet; 'broadsheet papers' shows which do")
    return resolve(entry.method)


def resolve(name: str) -> Any:
    """The object that ``module:attribute`` names."""
    module, _, attribute = name.partition(":")
    return getattr(import_module(module), attribute)
