"""Travel planning: order cities under fixed dates and direct flights by a search that is written out (paper section 3)."""

from __future__ import annotations

import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from broadsheet.core.replies import answer_part

from .common import Item, Score, compare, lines_of, section

CITIES = (
    "Lisbon Porto Madrid Seville Valencia Lyon Nice Paris Geneva Zurich Milan Rome Naples Vienna Prague Berlin Hamburg "
    "Munich Oslo Stockholm Helsinki Tallinn Riga Vilnius Warsaw Krakow Budapest Split Athens Dublin London Edinburgh"
).split()
_HEADING = "Solving Procedure"
_START = "the starting point"

#: How it is done: what `LongProc(procedure=False)` leaves out of the prompt.
PROCEDURE = """\
Search from day 1. If a city's fixed stay begins on the current day, it is the only option, else go through the cities \
that are to be arranged, in order. Check the direct flight from the city before, then that the stay ends no later than \
the next fixed stay begins. Drop what fails; go on with what holds; go back where nothing is left.

"""
_PROMPT = """\
Make a travel plan from the number of days in every city, the dates that are fixed for some of them, and the direct flights.

Flights go one way only; the first city can always be reached. The day of a flight counts for both cities: who arrives on \
day x and stays y days leaves on day x + y - 1. On the day of a flight two stays may meet, so a stay may end on the day \
on which a fixed one begins, and not later.

{procedure}Write the search between <Solving Procedure> and </Solving Procedure> and the plan between <Plan> and </Plan>, \
exactly as in this example:

{problem0}

{answer0}

Now make this plan:

{problem}
"""


@dataclass(frozen=True)
class _Stay:
    city: str
    start: int
    days: int

    @property
    def end(self) -> int:
        return self.start + self.days - 1


class _Searcher:
    """The depth-first search, every step of which is a line."""

    def __init__(self, count: int, fixed: Sequence[_Stay], flights: set[tuple[str, str]]):
        self.count, self.fixed, self.flights = count, fixed, flights
        self.lines: list[str] = []

    def say(self, depth: int, text: str) -> None:
        self.lines.append(f"{' ' * depth + '|- ' if depth else ''}{text}")

    def plan(self, day: int, plan: list[_Stay], free: Mapping[str, int]) -> list[_Stay] | None:
        depth = 2 * len(plan)
        self.say(depth, f"Current day: {day}. Current plan: [{', '.join(stay.city for stay in plan)}].")
        if len(plan) == self.count:
            self.say(depth, f"All {self.count} cities are arranged. Complete plan is found!")
            return plan
        self.say(depth, f"Check whether the city with an arrival day of Day {day} - is fixed.")
        now = next((stay for stay in self.fixed if stay.start == day), None)
        if now:
            self.say(depth, f"Yes. The city with an arrival day of Day {day} - is fixed: {now.city}.")
            choices = [now]
        else:
            cities = ", ".join(free)
            self.say(
                depth,
                f"No. Consider possible options from cities needing arrangement: [{cities}] and explore these options in "
                "order.",
            )
            choices = [_Stay(city, day, days) for city, days in free.items()]
        after = next((stay for stay in self.fixed if stay.start > day), None)
        for stay in choices:
            if self._fits(depth + 1, stay, plan[-1].city if plan else _START, after):
                rest = {city: days for city, days in free.items() if city != stay.city}
                found = self.plan(stay.end, [*plan, stay], rest)
                if found is not None:
                    return found
        self.say(depth + 1, f"Fail to arrange any option on day {day} in the current arrangement. Drop this branch.")
        return None

    def _fits(self, depth: int, stay: _Stay, last: str, after: _Stay | None) -> bool:
        span = f"Day {stay.start} - {stay.end}"
        self.say(
            depth, f"Try arranging to visit {stay.city} from Day {stay.start}. Duration: {stay.days} days. Schedule: {span}."
        )
        self.say(depth, f"Check for direct flight from {last} to {stay.city}.")
        if last != _START and (last, stay.city) not in self.flights:
            self.say(depth, "No. Drop this branch.")
            return False
        self.say(depth, "Yes.")
        compatible = f"Check whether this arrangement is compatible with the next fixed schedule after Day {stay.start}:"
        if after is None:
            self.say(depth, f"{compatible} None.")
            self.say(depth, "No following fixed schedules. This arrangement is compatible.")
        else:
            self.say(depth, f"{compatible} {after.city} (Day {after.start} - {after.end}).")
            late = stay.end > after.start
            self.say(
                depth,
                f"The departure day of {stay.city} is Day {stay.end}. The arrival day of {after.city} is Day {after.start}. "
                f"Day {stay.end} is {'later than (>)' if late else 'not later than (<=)'} Day {after.start}. "
                f"This arrangement is {'incompatible. Drop this branch.' if late else 'compatible.'}",
            )
            if late:
                return False
        self.say(depth, "This arrangement is feasible for now. Continue to arrange the rest of the plan.")
        return True


def _written(plan: Sequence[_Stay]) -> str:
    lines = []
    for number, stay in enumerate(plan):
        arriving = f"Arriving in {stay.city} and visit" if number == 0 else "Visit"
        lines.append(f"**Day {stay.start}-{stay.end}:** {arriving} {stay.city} for {stay.days} days.")
        if number + 1 < len(plan):
            lines.append(f"**Day {stay.end}:** Fly from {stay.city} to {plan[number + 1].city}.")
    return "\n".join(lines)


def trace(problem: Mapping[str, Any]) -> str:
    """The reference answer to a problem with the official fields ``num_cities``, ``constraints`` and ``connected_cities``.
    Raises ValueError when there is no plan."""
    constraints = problem["constraints"]
    fixed = {
        c["city"]: _Stay(c["city"], c["start_day"], c["end_day"] - c["start_day"] + 1)
        for c in constraints
        if c["type"] == "fixed"
    }
    stays = [(c["city"], c["num_days"]) for c in constraints if c["type"] == "duration"]
    order = sorted(fixed.values(), key=lambda stay: stay.start)
    free = {city: days for city, days in stays if city not in fixed}

    def windowed(city: str, label: str = "Fixed Schedule") -> str:
        return f", {label}: Day {fixed[city].start} - {fixed[city].end}." if city in fixed else "."

    lines = [
        "Read the requirements and identify the cities that have fixed schedules and the cities that need to be arranged."
    ]
    lines += [f"* City: {city}, Duration: {days} days{windowed(city)}" for city, days in stays]
    lines += ["", f"Cities that have fixed schedules{' (sorted by their arrival days):' if fixed else ': None.'}"]
    lines += [f"* City: {stay.city}{windowed(stay.city)}" for stay in order]
    lines += ["", f"Cities needing arrangement:{'' if free else ' None.'}"]
    lines += [f"* City: {city}, Duration: {days} days." for city, days in free.items()]
    searcher = _Searcher(problem["num_cities"], order, {(a, b) for a, b in problem["connected_cities"]})
    plan = searcher.plan(1, [], free)
    if plan is None:
        raise ValueError("the problem has no plan")
    search = "\n".join([*lines, "", *searcher.lines])
    written = f"<Plan>\n{_written(plan)}\n</Plan>"
    return f"<{_HEADING}>\n{search}\n</{_HEADING}>\n\nOutput the plan in the required format:\n{written}"


def plans(problem: Mapping[str, Any], most: int = 2) -> list[list[str]]:
    """Up to ``most`` orders of the cities that keep all rules: not the search above, but a count of solutions."""
    days = {c["city"]: c["num_days"] for c in problem["constraints"] if c["type"] == "duration"}
    starts = {c["city"]: c["start_day"] for c in problem["constraints"] if c["type"] == "fixed"}
    flights = {(a, b) for a, b in problem["connected_cities"]}
    found: list[list[str]] = []

    def extend(order: list[str], day: int) -> None:
        if len(found) >= most:
            return
        if len(order) == len(days):
            found.append(order)
        for city in days:
            meets = starts.get(city, day) == day
            flies = not order or (order[-1], city) in flights
            # A fixed stay whose day has passed can no longer be kept; one that begins today must be taken today.
            missed = any(start < day + days[city] - 1 for other, start in starts.items() if other not in (*order, city))
            if city not in order and meets and flies and not missed:
                extend([*order, city], day + days[city] - 1)

    extend([], 1)
    return found


def _asked(problem: Mapping[str, Any]) -> str:
    fixed = {c["city"]: c for c in problem["constraints"] if c["type"] == "fixed"}
    wishes = []
    for c in problem["constraints"]:
        if c["type"] == "duration":
            wishes.append(f"You would like to visit {c['city']} for {c['num_days']} days.")
            if c["city"] in fixed:
                window = fixed[c["city"]]
                wishes.append(
                    f"You have to be in {c['city']} between day {window['start_day']} and day {window['end_day']}."
                )
    flights = ", ".join(f"from {a} to {b}" for a, b in problem["connected_cities"])
    total = problem["total_days"]
    return (
        f"You plan to visit {problem['num_cities']} cities for {total} days in total, by direct flights only. "
        f"{' '.join(wishes)}\n\nHere are the cities that have direct flights:\n{flights}.\n\n"
        f"Find a trip plan of visiting the cities for {total} days."
    )


def _drawn(draw: random.Random, cities: int, fixed: int, extra: int) -> dict[str, Any]:
    """A problem with at least one plan: the plan, its flights, and ``extra`` flights that lead astray."""
    route = draw.sample(CITIES, cities)
    day, stays = 1, []
    for city in route:
        stay = _Stay(city, day, draw.randint(2, 6))
        stays.append(stay)
        day = stay.end
    windows = set(draw.sample(route, fixed))
    flights = list(pairwise(route))
    others = [(a, b) for a in route for b in route if a != b and (a, b) not in flights]
    flights += draw.sample(others, min(extra, len(others)))
    constraints: list[dict[str, Any]] = []
    for stay in draw.sample(stays, cities):
        constraints.append({"type": "duration", "city": stay.city, "num_days": stay.days})
        if stay.city in windows:
            constraints.append({"type": "fixed", "city": stay.city, "start_day": stay.start, "end_day": stay.end})
    return {
        "num_cities": cities, "total_days": day, "constraints": constraints,
        "connected_cities": [list(flight) for flight in draw.sample(flights, len(flights))],
        "ground_truth_cities": "**".join(route), "ground_truth_durations": "**".join(str(stay.days) for stay in stays),
    }  # fmt: skip


#: how many cities, fixed stays and misleading flights make traces of the length wanted; found by trying
def _shape(draw: random.Random, steps: int) -> tuple[int, int, int]:
    cities = 3 if steps < 50 else 4 if steps < 80 else draw.randint(5, 6) if steps < 150 else draw.randint(6, 10)
    return cities, draw.randint(0, 1 + cities // 4), draw.randint(cities - 1, 4 * cities)


def make_travel(steps: int, seed: int = 0, tolerance: float = 0.25) -> Item:
    """A problem with exactly one plan whose trace has about ``steps`` lines (3 cities: 38 or more; 10 cities: hundreds).

    Raises ValueError when none within ``tolerance`` of ``steps`` is found.
    """
    if steps < 38:
        raise ValueError(f"the trace of the smallest problem has 38 lines, got {steps}")
    draw = random.Random(f"travel {seed} {steps}")
    example = _drawn(random.Random("travel example"), 3, 1, 1)
    for _ in range(4000):
        problem = _drawn(draw, *_shape(draw, steps))
        if len(plans(problem)) != 1:
            continue
        reference = trace(problem)
        lines = len(lines_of(reference.partition(f"</{_HEADING}>")[0])) - 1
        if abs(lines - steps) <= tolerance * steps:
            prompt = _PROMPT.format(
                procedure=PROCEDURE, problem0=_asked(example), answer0=trace(example), problem=_asked(problem)
            )
            return Item(prompt, reference, {**problem, "steps": lines})
    raise ValueError(f"no plan with a trace of about {steps} lines was found: ask for 38 to 2000")


# --- scoring ------------------------------------------------------------------------------------------------------------

_VISIT = re.compile(r"Day\s+(\d{1,6})\s*-\s*(\d{1,6})\b.*?\bvisit\s+(.+?)\s+for\s+\d+\s+days?\b", re.I)


def visits(text: str) -> list[tuple[str, int, int]]:
    """(city, first day, last day) of every line of a plan that names a stay."""
    return [(read[3], int(read[1]), int(read[2])) for line in text.splitlines() if (read := _VISIT.search(line))]


def _truth(item: Item) -> list[tuple[str, int, int]]:
    cities = [city for city in item.data["ground_truth_cities"].split("**") if city]
    day, found = 1, []
    for city, days in zip(cities, item.data["ground_truth_durations"].split("**"), strict=False):
        found.append((city, day, day + int(days) - 1))
        day += int(days) - 1
    return found


def _search(text: str) -> list[str]:
    found = section(text, _HEADING)
    return lines_of(found[0].partition("<Plan>")[0]) if found else []


def parts(item: Item) -> tuple[str, list[str], str]:
    head, _, tail = item.reference.partition(f"\n</{_HEADING}>")
    return f"<{_HEADING}>\n", head.split("\n")[1:], f"\n</{_HEADING}>{tail}"


def score(item: Item, text: str) -> Score:
    """Accuracy: the stays of the plan are those of the only plan, with their days, no more and no fewer. Partial: of the
    search."""
    prefix, partial, difference = compare(_search(answer_part(text)), wanted := _search(item.reference))
    found = section(text, "Plan")
    if found is None or not found[1]:
        return Score(0.0, partial, prefix, len(wanted), False, evidence=difference or "no closed <Plan>")
    right = visits(found[0]) == _truth(item)
    return Score(float(right), partial, prefix, len(wanted), True, evidence=difference or ("" if right else "another plan"))
