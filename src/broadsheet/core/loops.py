"""Policies that make an answer better: chain, best of n, breadth-first and depth-first search, on one allowance.

A policy knows three asynchronous functions and nothing of prompts or models:

    generate(number) -> Draft                    a fresh answer, the ``number``-th
    judge(text) -> Judgement                     how good it is and what is wrong
    refine(text, judgement, number) -> Draft     a better one, the ``number``-th attempt from this text

`Loop` calls them: it counts, keeps within the allowance, judges no text twice and writes down every call in an order
that does not depend on which reply came first. A policy never sees whether an answer is right; ``accepted`` is the
judge's word.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from .chat.protocol import NOTHING, Usage


@dataclass(frozen=True)
class Step:
    """One step of a loop: what it was (generate, judge, refine, ...), what came back, and what it cost."""

    kind: str
    text: str
    detail: Mapping[str, Any] = field(default_factory=dict)
    usage: Usage = NOTHING


@dataclass(frozen=True)
class Answer:
    """A loop's answer. ``stopped``: why it ended (accepted, budget, no_change, error, ...); ``accepted``: whether its own
    judge was satisfied, which is never the same as being right."""

    text: str
    accepted: bool
    stopped: str
    steps: tuple[Step, ...] = ()

    @property
    def usage(self) -> Usage:
        return sum((step.usage for step in self.steps), NOTHING)

    @property
    def generations(self) -> int:
        """How many answers were asked for (the first one and every rewriting, those that came back empty too)."""
        return sum(step.kind in ("generate", "refine") for step in self.steps)

    @property
    def judgements(self) -> int:
        """How many times the judge was asked."""
        return sum(step.kind == "judge" for step in self.steps)


@dataclass(frozen=True)
class Draft:
    """An answer as it was written. ``text`` is empty where nothing usable came back; ``raw`` the whole reply where the
    answer is a part of it."""

    text: str
    usage: Usage = NOTHING
    raw: str = ""
    detail: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Judgement:
    """What a judge said of a text. ``value``: higher is better; ``feedback``: what the refiner is told. ``decided``: False
    where it could not be read or the votes were even, so that there is nothing to go by."""

    value: float
    accepted: bool
    feedback: str = ""
    usage: Usage = NOTHING
    detail: Mapping[str, Any] = field(default_factory=dict)
    decided: bool = True


@dataclass(eq=False)
class Node:
    """A text, what the judge said of it (None before it was asked) and where it came from."""

    text: str
    judgement: Judgement | None
    parent: Node | None = None
    raw: str = ""
    children: list[Node] = field(default_factory=list)

    @property
    def value(self) -> float:
        return self.judgement.value if self.judgement else float("-inf")

    @property
    def accepted(self) -> bool:
        return self.judgement is not None and self.judgement.accepted

    @property
    def depth(self) -> int:
        return 0 if self.parent is None else self.parent.depth + 1

    def walk(self) -> Iterator[Node]:
        """The node and all below it, parents first, children in the order in which they were written."""
        yield self
        for child in self.children:
            yield from child.walk()


@dataclass(frozen=True)
class Found:
    """What a policy ends with: the chosen node, why it stopped, and the root of everything that it tried."""

    best: Node
    stopped: str
    root: Node

    @property
    def accepted(self) -> bool:
        return self.best.accepted


Generate = Callable[[int], Awaitable[Draft]]
Judge = Callable[[str], Awaitable[Judgement]]
Refine = Callable[[str, Judgement, int], Awaitable[Draft]]


class Loop:
    """The three functions, what they may still be called, and what they were called.

    ``generations``: how many answers may be asked for in all (fresh and refined, failed ones too), ``judgements``: how often
    the judge; None is no limit. ``steps`` is the log: one step a call, none for what the cache of judgements answered.
    """

    def __init__(
        self,
        judge: Judge,
        generate: Generate | None = None,
        refine: Refine | None = None,
        generations: int | None = None,
        judgements: int | None = None,
    ):
        for name, limit in (("generations", generations), ("judgements", judgements)):
            if limit is not None and limit < 0:
                raise ValueError(f"a budget of {name} is at least 0, got {limit}")
        self._judge, self._generate, self._refine = judge, generate, refine
        self._left = {"generations": generations, "judgements": judgements}
        self._judged: dict[str, Judgement] = {}
        self._refined: Counter[str] = Counter()
        self.steps: list[Step] = []
        self.short = False  #: whether a call was not made for want of budget

    def _take(self, what: str) -> bool:
        left = self._left[what]
        if left == 0:
            self.short = True
            return False
        if left is not None:
            self._left[what] = left - 1
        return True

    @property
    def spent(self) -> bool:
        """Whether no answer may be asked for any more."""
        return self._left["generations"] == 0

    def log(self, step: Step) -> None:
        """Adds a step that is no call of the three functions."""
        self.steps.append(step)

    def know(self, text: str, judgement: Judgement) -> None:
        """A judgement that is there already, so that the text is not judged again."""
        self._judged[text] = judgement

    async def generate(self, number: int) -> Draft | None:
        """A fresh answer, or None where the budget is spent."""
        if self._generate is None:
            raise ValueError("this loop has no generate function")
        if not self._take("generations"):
            return None
        draft = await self._generate(number)
        self.steps.append(Step("generate", draft.text, {"number": number, **draft.detail}, draft.usage))
        return draft

    async def refine(self, nodes: Sequence[Node]) -> list[Draft | None]:
        """A refinement of each node, all at once; None for those that the budget does not reach, which are the last. A text
        that is refined again, in this call or a later one, gets the next number."""
        if self._refine is None:
            raise ValueError("this loop has no refine function")
        refine = self._refine

        async def one(node: Node, number: int) -> Draft:
            assert node.judgement is not None
            return await refine(node.text, node.judgement, number)

        paid: list[tuple[Node, int]] = []
        for node in nodes:
            if self._take("generations"):
                paid.append((node, self._refined[node.text]))
                self._refined[node.text] += 1
        drafts = await asyncio.gather(*(one(*pair) for pair in paid))
        for (node, number), draft in zip(paid, drafts, strict=True):
            detail = {"number": number, "of": _name(node.text), **draft.detail}
            self.steps.append(Step("refine", draft.text, detail, draft.usage))
        return [*drafts, *[None] * (len(nodes) - len(paid))]

    async def judge(self, texts: Sequence[str]) -> list[Judgement | None]:
        """The judgement of each text, all at once; each distinct text is judged once. None where the budget is spent."""
        new = [text for text in dict.fromkeys(texts) if text not in self._judged]
        paid = [text for text in new if self._take("judgements")]
        for text, said in zip(paid, await asyncio.gather(*(self._judge(text) for text in paid)), strict=True):
            self._judged[text] = said
            detail = {"of": _name(text), "value": said.value, "accepted": said.accepted, **said.detail}
            self.steps.append(Step("judge", said.feedback, detail, said.usage))
        return [self._judged.get(text) for text in texts]

    def answer(self, found: Found) -> Answer:
        """The policy's result as an `Answer`, with every call so far."""
        return Answer(found.best.text, found.accepted, found.stopped, tuple(self.steps))


def _name(text: str) -> str:
    """What steps call a text that another step holds in full."""
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=4).hexdigest()


def best_node(nodes: Sequence[Node], later: bool = False) -> Node:
    """The node of the highest value; of equals the first, or with ``later`` the last."""
    best = nodes[0]
    for node in nodes[1:]:
        if node.value > best.value or (later and node.value == best.value):
            best = node
    return best


# --- policies -------------------------------------------------------------------------------------------------------------


async def chain(loop: Loop, rounds: int, return_best: bool = False, start: str | None = None) -> Found:
    """Refines one answer until the judge accepts it or ``rounds`` refinements are made; the last one is judged too.

    Begins with ``start``, or with a fresh answer. Each refinement sees only the last text (the loop is Markov), so a text
    that comes back a second time would come back for ever: stopped, "no_change". Other reasons: "accepted", "budget",
    "error" (an empty text), "unparsed" (an undecided judgement). Returned is the last
    text, or with ``return_best`` the one of the highest value, the earliest of equals.
    """
    if start is None:
        draft = await loop.generate(0)
        if draft is None or not draft.text:
            nothing = Node("", None)
            return Found(nothing, "error" if draft else "budget", nothing)
        start = draft.text
    node = root = Node(start, None)
    nodes, stopped = [root], "budget"
    for number in range(rounds + 1):
        [node.judgement] = await loop.judge([node.text])
        if node.accepted:
            return Found(node, "accepted", root)
        if node.judgement and not node.judgement.decided:
            stopped = "unparsed"
            break
        if node.judgement is None or number == rounds:
            break
        [draft] = await loop.refine([node])
        if draft is None:
            break
        if not draft.text:
            stopped = "error"
            break
        if any(draft.text == earlier.text for earlier in nodes):
            stopped = "no_change"
            break
        child = Node(draft.text, None, node, draft.raw)
        node.children.append(child)
        nodes.append(child)
        node = child
    return Found(best_node(nodes) if return_best else node, stopped, root)


async def best_of(loop: Loop, n: int) -> Found:
    """Fresh answers until the judge accepts one, ``n`` at most; without one the answer of the highest value, the earliest of
    equals. One call at a time, so that nothing is paid for after the first accepted answer."""
    nodes: list[Node] = []
    root = Node("", None)
    for number in range(n):
        draft = await loop.generate(number)
        if draft is None:
            break
        if not draft.text:
            continue
        [judgement] = await loop.judge([draft.text])
        node = Node(draft.text, judgement, root, draft.raw)
        root.children.append(node)
        nodes.append(node)
        if node.accepted:
            return Found(node, "accepted", root)
    return Found(best_node(nodes) if nodes else root, "budget" if nodes or loop.short else "error", root)


#: which of the ranked children are gone on from
Select = Callable[[Sequence[Node], int], Sequence[Node]]


def keep_best(ranked: Sequence[Node], keep: int) -> Sequence[Node]:
    return ranked[:keep]


async def _expand(loop: Loop, nodes: Sequence[Node], branch: int, tries: int) -> list[Node]:
    """``branch`` judged children of every node, ranked by value (of equals the first written first).

    An empty refinement is tried again, ``tries`` times in all; a child that the judge cannot decide on is dropped.
    """
    places = [node for node in nodes for _ in range(branch)]
    drafts: list[Draft | None] = [None] * len(places)
    for _ in range(tries):
        missing = [place for place, draft in enumerate(drafts) if draft is None or not draft.text]
        if not missing or loop.spent:
            break
        for place, draft in zip(missing, await loop.refine([places[place] for place in missing]), strict=True):
            drafts[place] = draft
    written = [Node(d.text, None, node, d.raw) for node, d in zip(places, drafts, strict=True) if d and d.text]
    for child, judgement in zip(written, await loop.judge([child.text for child in written]), strict=True):
        child.judgement = judgement
    judged = [child for child in written if child.judgement and child.judgement.decided]
    for child in judged:
        assert child.parent is not None
        child.parent.children.append(child)
    return sorted(judged, key=lambda child: -child.value)


async def bfs(
    loop: Loop, root: Node, *, branch: int, keep: int, depth: int, tries: int = 1, select: Select = keep_best
) -> Found:
    """Breadth-first search: ``branch`` refinements of each kept node, a level at a time, which is completed before it is
    looked at; ends at a level whose best child is accepted, at ``depth``, or with the budget. Without an accepted one the
    node of the highest value, the latest of equals (in the order of `Node.walk`). ``root`` is judged."""
    nodes: Sequence[Node] = [root]
    stopped = "depth"
    for _ in range(depth):
        ranked = await _expand(loop, nodes, branch, tries)
        if ranked and ranked[0].accepted:
            return Found(ranked[0], "accepted", root)
        if loop.spent or loop.short:
            stopped = "budget"
            break
        if not ranked:
            stopped = "error"
            break
        nodes = select(ranked, min(keep, branch))
    return Found(best_node(list(root.walk()), later=True), stopped, root)


async def dfs(
    loop: Loop, root: Node, *, branch: int, keep: int, depth: int, tries: int = 1, select: Select = keep_best
) -> Found:
    """Depth-first search: as `bfs`, but the kept children of a node are gone into one after the other."""

    async def below(node: Node) -> Node | None:
        if node.depth >= depth or loop.spent:
            return None
        ranked = await _expand(loop, [node], branch, tries)
        if ranked and ranked[0].accepted:
            return ranked[0]
        for child in select(ranked, min(keep, branch)) if ranked else ():
            if found := await below(child):
                return found
        return None

    if found := await below(root):
        return Found(found, "accepted", root)
    stopped = "budget" if loop.spent or loop.short else "depth" if root.children else "error"
    return Found(best_node(list(root.walk()), later=True), stopped, root)


Algorithm = Literal["bfs", "dfs"]
SEARCHES: Mapping[Algorithm, Any] = {"bfs": bfs, "dfs": dfs}
