"""`broadsheet run` for the estimates family: a method's fields and the arguments of its verb, by name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from inspect import Parameter, signature
from typing import TYPE_CHECKING, Any

import broadsheet

if TYPE_CHECKING:
    from broadsheet.methods.estimates.base import Report


def estimate(slug: str, options: Mapping[str, Any], usual: Mapping[str, Any] | None = None) -> Report:
    """What ``slug`` estimates. ``options`` that name a field configure the method, the others go to ``estimate``; ``usual``
    are taken where the method knows the name. Raises ValueError for a name that it does not know."""
    method = broadsheet.method(slug)
    of_method = [field.name for field in fields(method) if field.init]
    verb = signature(method.estimate).parameters
    of_verb = [name for name, one in verb.items() if name != "self" and one.kind is not Parameter.VAR_KEYWORD]
    given = {name: value for name, value in (usual or {}).items() if name in (*of_method, *of_verb)} | dict(options)
    for unknown in sorted(set(given) - {*of_method, *of_verb}):
        raise ValueError(f"{slug} has no option '{unknown}'; it has {', '.join((*of_verb, *of_method))}")
    for name in of_verb:
        if verb[name].default is Parameter.empty and name not in given:
            others = ", ".join(other for other in (*of_verb, *of_method) if other != name)
            raise ValueError(f"{slug} needs -o {name}=...; it also takes {others}")
    configured = method(**{name: value for name, value in given.items() if name in of_method})
    return configured.estimate(**{name: value for name, value in given.items() if name in of_verb})
