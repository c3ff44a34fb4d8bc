"""Theory-of-mind tracking: where is the agent, where is the object, what does the agent believe (paper section 3)."""

from __future__ import annotations

import random
import re
from dataclasses import dataclass

from broadsheet.core.replies import answer_part

from .common import Item, Score, compare, plain

AGENTS = "Alice Boris Clara David Elena Frank Greta Harry Irene Jonas Karin Louis".split()
OBJECTS = "the key;the pen;the red cup;the coin;the map;the torch;the stapler;the chess piece".split(";")
ROOMS = "kitchen;hall;study;cellar;attic;library;guest room;garage".split(";")
CONTAINERS = "shelf;table;drawer;basket;cupboard;chest".split(";")

#: How it is done: what `LongProc(procedure=False)` leaves out of the prompt.
PROCEDURE = """\
The rules: an agent who moves to or enters a room is in that room; one who left and has not entered another is nowhere \
(None). Agent and object in the same room means that the agent sees the object and believes it to be where it is. Else \
the belief stays as it was; before the object was ever seen it is None.

"""
_PROMPT = """\
You read a story about agents who move themselves and objects between rooms, and track for one agent and one object, step \
by step, where the agent is, where the object is, whether the agent sees it, and where the agent believes it to be.

{procedure}For the story
{story0}
and the question "{question0}" the answer is
{answer0}

Answer in exactly this format, with a line for every step.

The story:
{story}

The question: {question}
"""


@dataclass
class _State:
    """Where the agent and the object are (room; container, which names its room), and what the agent believes."""

    agent: str | None
    thing: str
    belief: str | None = None

    @property
    def sees(self) -> bool:
        return self.agent is not None and self.thing.startswith(f"{self.agent}'s ")

    def look(self) -> None:
        if self.sees:
            self.belief = self.thing


def track(story: str, question: str) -> str:
    """The reference answer to a story in the official grammar. Raises ValueError for what it does not understand."""
    asked = re.fullmatch(r"Where does (\w+) believe (the .+) is\?", question.strip())
    steps = story.strip().splitlines()
    if asked is None or not steps:
        raise ValueError(f"cannot read the question '{question}'")
    agent, thing = asked[1], asked[2]
    name = thing.removeprefix("the ")
    placed = dict(re.findall(r"(?:: |; )((?:the )?[^;]+?) is (?:in|on) the ([^;]+?)(?=;|\.$)", steps[0]))
    if agent not in placed or thing not in placed:
        raise ValueError(f"the story does not say where {agent} and {thing} are at first")
    state = _State(placed[agent], placed[thing])
    state.look()
    lines = [f"{agent}'s belief on {thing}:"]

    def line(number: int, change: str) -> str:
        held = (
            f"{agent} location: {state.agent}; {name} location: {state.thing}; "
            f"{agent} sees {name}: {state.sees}; {agent}'s belief on {name}: {state.belief}"
        )
        return f"- Step {number}: ({change}) {{{held}}}"

    lines.append(line(0, "initial state"))
    for number, step in enumerate(steps[1:], 1):
        before = (state.agent, state.thing)
        read = re.fullmatch(r"Step \d+: (\w+) (.+)\.", step.strip())
        if read is None:
            raise ValueError(f"cannot read the step '{step}'")
        for action in read[2].split(", and "):
            if moved := re.fullmatch(r"moves (the .+?) to the (.+'s .+)", action):
                if moved[1] == thing:
                    state.thing = moved[2]
            elif went := re.fullmatch(r"(?:moves to|enters) the (.+)", action):
                if read[1] == agent:
                    state.agent = went[1]
            elif action.startswith("leaves"):
                if read[1] == agent:
                    state.agent = None
            else:
                raise ValueError(f"cannot read the step '{step}'")
        state.look()
        changed = [
            "changed" if old != new else "unchanged" for old, new in zip(before, (state.agent, state.thing), strict=True)
        ]
        lines.append(line(number, f"{agent} location {changed[0]}; {name} location {changed[1]}"))
    lines.append(f"Final Answer: {'None' if state.belief is None else 'the ' + state.belief}")
    return "\n".join(lines)


def _story(draw: random.Random, steps: int, agents: int, objects: int, rooms: int, containers: int) -> tuple[str, str]:
    """A story and a question about it."""
    people, things = draw.sample(AGENTS, agents), draw.sample(OBJECTS, objects)
    places, kinds = draw.sample(ROOMS, rooms), draw.sample(CONTAINERS, containers)
    where: dict[str, str | None] = {person: draw.choice(places) for person in people}
    put = {thing: (draw.choice(places), draw.choice(kinds)) for thing in things}
    first = [f"{person} is in the {where[person]}" for person in people]
    first += [f"{thing} is on the {room}'s {kind}" for thing, (room, kind) in put.items()]
    lines = [f"Step 0: {'; '.join(first)}."]
    for number in range(1, steps + 1):
        person = draw.choice(people)
        here = where[person]
        if here is None:
            where[person] = draw.choice(places)
            action = f"enters the {where[person]}"
        else:
            near = [thing for thing in things if put[thing][0] == here]
            kind = draw.choice(["go", "go", "leave", *["put", "carry"] * bool(near)])
            there = draw.choice([place for place in places if place != here])
            if kind == "leave":
                where[person] = None
                action = "leaves the room he was in"
            elif kind == "put":
                thing = draw.choice(near)
                put[thing] = (here, draw.choice([k for k in kinds if k != put[thing][1]]))
                action = f"moves {thing} to the {here}'s {put[thing][1]}"
            else:
                where[person] = there
                action = f"moves to the {there}"
                if kind == "carry":
                    thing = draw.choice(near)
                    put[thing] = (there, draw.choice(kinds))
                    action += f", and moves {thing} to the {there}'s {put[thing][1]}"
        lines.append(f"Step {number}: {person} {action}.")
    return "\n".join(lines), f"Where does {draw.choice(people)} believe {draw.choice(things)} is?"


def make_tom(steps: int, agents: int = 2, objects: int = 2, rooms: int = 2, containers: int = 2, seed: int = 0) -> Item:
    """A story of ``steps`` steps (official: 10 at 0.5k, 40 at 2k, with two of everything) and the trace that answers it."""
    limits = {
        "agents": (agents, 1, len(AGENTS)),
        "objects": (objects, 1, len(OBJECTS)),
        "rooms": (rooms, 2, len(ROOMS)),
        "containers": (containers, 2, len(CONTAINERS)),
        "steps": (steps, 1, 10**6),
    }
    for name, (value, low, high) in limits.items():
        if not low <= value <= high:
            raise ValueError(f"{name} must be in [{low}, {high}], got {value}")
    story0, question0 = _story(random.Random("tom example"), 8, 2, 2, 2, 2)
    story, question = _story(random.Random(f"tom {seed}"), steps, agents, objects, rooms, containers)
    prompt = _PROMPT.format(
        procedure=PROCEDURE,
        story0=story0,
        question0=question0,
        answer0=track(story0, question0),
        story=story,
        question=question,
    )
    return Item(prompt, track(story, question), {"story": story, "question": question, "steps": steps})


#: words that make no difference, beside articles, as in the official evaluator
_FILLERS = re.compile(r"\b(a|an|the|on|in|at|step|thinks|think|believes|believe|is|are|of|location|know|knows|belief)\b")
_STEP = re.compile(r"^\s*[-*•]?\s*Step\s+(\d+)\s*:", re.I)


def _steps(text: str) -> list[str]:
    """The lines of the last trace: from the last "Step 0:", since models write drafts."""
    found: list[str] = []
    for line in text.splitlines():
        read = _STEP.match(line)
        if read:
            if int(read[1][:9]) == 0:
                found = []
            found.append(plain(line, _FILLERS))
    return found


def parts(item: Item) -> tuple[str, list[str], str]:
    lines = item.reference.splitlines()
    steps = [line for line in lines if _STEP.match(line)]
    place = lines.index(steps[0])
    head, tail = lines[:place], lines[place + len(steps) :]
    return "".join(f"{line}\n" for line in head), steps, "".join(f"\n{line}" for line in tail)


def score(item: Item, text: str) -> Score:
    """All step lines equal, up to case, punctuation and filler words."""
    found, wanted = _steps(answer_part(text)), _steps(item.reference)
    prefix, partial, difference = compare(found, wanted)
    return Score(float(partial == 1), partial, prefix, len(wanted), bool(found), evidence=difference)
