"""Path traversal: follow one-way connections from city to city (paper section 3)."""

from __future__ import annotations

import random
from itertools import pairwise

from .common import Item, Score, compare, lines_of, section

TRANSIT = ("bus", "train", "plane", "ferry")
_PLACES = (
    "Ash Brack Carl Dun East Fair Gold Hart Ives Kings Lang Mill Nor Oak Pem Quarr Red Shef Thorn Up Vale West York "
    "Alder Birch Cran Dart Elm Fern Glen Hazel Iron Jun Kel Lin Maple New Otter Pine Rose Stone Tam Under Wind Yar"
).split()
_SIDES = ("", "North ", "South ", "Great ", "Little ")
_ENDINGS = "ford ton ham bury field wick stead mouth dale bridge port worth cliffe mere combe hurst".split()

#: How it is done: what `LongProc(procedure=False)` leaves out of the prompt.
PROCEDURE = """\
Starting from the first city there is one possible route: look up where the city leads to, go there, and repeat until you \
reach the destination.

"""
_PROMPT = """\
In an invented world every city is connected, one way, to a single other city by bus, train, plane or ferry. A connection \
from A to B lets you travel from A to B and not back.

{procedure}Write the route between <Route> and </Route>, one step a line, exactly in this format:
<Route>
From CITY, take a TRANSIT to CITY.
...
From CITY, take a TRANSIT to CITY.
</Route>

For example, with
{example}
the route from Corby to Arlen is
<Route>
From Corby, take a train to Malden.
From Malden, take a ferry to Tressel.
From Tressel, take a bus to Arlen.
</Route>

These are the connections:
{context}

Now write the route from {source} to {target}.
"""
_EXAMPLE = (
    ("Malden", "Tressel", "ferry"),
    ("Corby", "Malden", "train"),
    ("Tressel", "Arlen", "bus"),
    ("Pym", "Corby", "bus"),
)


def _listed(edges: list[tuple[str, str, str]] | tuple[tuple[str, str, str], ...]) -> str:
    return "\n".join(f"{a} is a lively city. You can travel from {a} to {b} by {by}." for a, b, by in edges)


def make_path_traversal(n_hops: int, n_cities: int | None = None, seed: int = 0, compact: bool = False) -> Item:
    """A route of ``n_hops`` steps among ``n_cities`` cities that lead on (half as many again as there are hops).

    The cities beyond the route are distractors: each leads to some other city, on the route or not, as in the official files
    (49 cities, 24 to 39 hops). ``n_cities`` fixes the length of the input whatever the length of the output. ``compact``
    names cities c0, c1, ..., for models with small vocabularies. Raises ValueError when the route does not fit.
    """
    cities = n_hops + max(n_hops // 2, 1) if n_cities is None else n_cities
    if n_hops < 1 or cities < n_hops:
        raise ValueError(f"a route of at least one hop needs a city a hop, got {n_hops} hops and {cities} cities")
    named = [side + place + end for side in _SIDES for place in _PLACES for end in _ENDINGS]
    pool = [f"c{i}" for i in range(cities + 1)] if compact else named
    if cities >= len(pool):
        raise ValueError(f"there are names for {len(pool) - 1} cities, got {cities}: use compact=True")
    draw = random.Random(f"path {seed}")
    names = draw.sample(pool, cities + 1)
    route, others = names[: n_hops + 1], names[n_hops + 1 :]
    leads = dict(pairwise(route))
    for city in others:
        leads[city] = draw.choice([name for name in names if name != city])
    edges = [(a, b, draw.choice(TRANSIT)) for a, b in leads.items()]
    steps = "\n".join(f"From {a}, take a {by} to {b}." for a, b, by in edges[:n_hops])
    shuffled = draw.sample(edges, len(edges))
    prompt = _PROMPT.format(
        procedure=PROCEDURE, example=_listed(_EXAMPLE), context=_listed(shuffled), source=route[0], target=route[-1]
    )
    data = {"edges": [list(edge) for edge in shuffled], "source": route[0], "target": route[-1], "steps": n_hops}
    return Item(prompt, f"<Route>\n{steps}\n</Route>", data)


def _route(reference: str) -> list[str]:
    found = section(reference, "Route")  # references of the official files stand without their tags
    return lines_of(found[0] if found else reference)


def parts(item: Item) -> tuple[str, list[str], str]:
    return "<Route>\n", _route(item.reference), "\n</Route>"


def score(item: Item, text: str) -> Score:
    """Exact match of the route's lines inside the last <Route> tags."""
    found, wanted = section(text, "Route"), _route(item.reference)
    if found is None:
        return Score(0.0, 0.0, 0, len(wanted), False, evidence="no <Route>")
    prefix, partial, difference = compare([line.strip() for line in lines_of(found[0])], wanted, whole=found[1])
    return Score(float(partial == 1), partial, prefix, len(wanted), found[1], evidence=difference)
