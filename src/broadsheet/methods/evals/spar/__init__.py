"""SPaR: an answer that fails is repaired by a small tree search, in which one model judges and edits (Cheng et al. 2025,
arXiv 2412.11605).

    SPaR().solve(actor, "Describe a lighthouse in 50 words without the letter z.")     # search when answering
    SPaR().pairs(actor, prompts, refiner)                                              # rows prompt / chosen / rejected
    SPaR().refiner_data(...)                                                           # what the refiner learns from

The search: the refiner judges an answer by several votes, writes ``branch`` refinements of it, judges those, goes on
from the best ``keep``, and stops at the first level with an accepted one. A refined answer differs from the original
in little but what was wrong, which is what makes the pair worth learning from. The refiner's word is not the truth:
report a checker's.
"""

from __future__ import annotations

import random
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, Self

from broadsheet.core.chat import Chat, Message, run
from broadsheet.core.chat.protocol import NOTHING
from broadsheet.core.loops import SEARCHES, Algorithm, Answer, Draft, Found, Judgement, Loop, Node, best_of, keep_best

from ..base import Solver
from ..decrim.prompts import request_text
from .pairs import Caps, Judged, Pairs, build_refiner_sft, edit_similarity
from .prompts import (
    EVOLVE,
    GROUPS,
    judge_messages,
    parse_judgement,
    parse_refined,
    refine_messages,
    vote,
)

#: so many children at most, whatever the tree's shape (the official setting)
BUDGET = 1000


@dataclass(frozen=True)
class SearchResult(Answer):
    """What a search found. ``root`` is the tree of everything tried and ``best`` the chosen node; ``accepted`` is the
    refiner's word. ``stopped``: accepted, depth, budget, or error (no refinement could be used)."""

    prompt: str = ""
    root: Node | None = None
    best: Node | None = None


@dataclass(frozen=True)
class TreeRefiner:
    """The search alone.

    Parameters (paper's defaults): ``algorithm`` "bfs" or "dfs"; ``branch`` refinements of a node (3), ``keep`` nodes gone on
    from (2), ``depth`` levels (3); ``votes`` of the judge (5; an even number can tie) and the share of yes above which an
    answer is accepted (0.5); ``budget`` refinements in all, failed ones counted; ``select`` "greedy" or "sample" (by value;
    drawn with ``seed``); ``tries`` at an empty refinement or a tied judgement (3). ``branch=1, keep=1`` is a greedy chain.

    Two deviations from the official code: the root has its judged value and not 0, so that a search that fails returns the
    original where nothing better was found; and a refinement that was cut off before [[end]] is none. Raises ValueError.
    """

    algorithm: Algorithm = "bfs"
    branch: int = 3
    keep: int = 2
    depth: int = 3
    votes: int = 5
    accept: float = 0.5
    budget: int = BUDGET
    select: Literal["greedy", "sample"] = "greedy"
    tries: int = 3
    temperature: float = 0.7
    judge_tokens: int = 2048
    refine_tokens: int = 3072
    compat: bool = False  #: read judgements as the official code does
    seed: int = 0

    def __post_init__(self) -> None:
        if self.algorithm not in SEARCHES or self.select not in ("greedy", "sample"):
            raise ValueError(f"algorithm is bfs or dfs and select greedy or sample, got {self.algorithm}, {self.select}")
        for name in ("branch", "keep", "depth", "votes", "tries", "budget"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not 0 <= self.accept < 1:
            raise ValueError(f"accept is a share of votes in [0, 1), got {self.accept}")
        if self.votes % 2 == 0:
            warnings.warn(f"{self.votes} votes can tie, and tied judgements are dropped: take an odd number", stacklevel=3)

    async def judge(self, refiner: Chat, prompt: str, text: str, tries: int | None = None) -> Judgement:
        """The judgement by votes. ``value``: share of yes among those that can be read; the feedback is the first reply that
        agrees with the majority. Undecided after ``tries`` ties."""
        usage = NOTHING
        read: tuple[bool | None, ...] = ()
        for attempt in range(tries or self.tries):
            choices = await refiner.acomplete(
                judge_messages(prompt, text), n=self.votes, first=attempt * self.votes, tag="spar.judge",
                temperature=self.temperature, max_tokens=self.judge_tokens,
            )  # fmt: skip
            usage = sum((choice.usage for choice in choices), usage)
            read = tuple(parse_judgement(c.text, self.compat) if c.ok else None for c in choices)
            if found := vote(read):
                value, majority = found
                said = choices[read.index(majority)].text
                return Judgement(value, value > self.accept, said, usage, {"votes": read})
        return Judgement(0.0, False, "", usage, {"votes": read}, decided=False)

    def search(self, refiner: Chat, prompt: str, text: str, judged: Judgement | None = None) -> SearchResult:
        """Repairs ``text``, an answer to ``prompt``; ``judged`` is its judgement where there is one already. A text that the
        refiner accepts is returned untouched."""
        return run(self.asearch(refiner, prompt, text, judged))

    async def asearch(self, refiner: Chat, prompt: str, text: str, judged: Judgement | None = None) -> SearchResult:
        """`search`, awaited."""
        return await self._search(self._loop(refiner, prompt), prompt, text, judged)

    def _loop(self, refiner: Chat, prompt: str, **functions: Any) -> Loop:
        async def judge(text: str) -> Judgement:
            return await self.judge(refiner, prompt, text)

        async def refine(text: str, said: Judgement, number: int) -> Draft:
            [choice] = await refiner.acomplete(
                refine_messages(prompt, text, said.feedback), first=number, tag="spar.refine",
                temperature=self.temperature, max_tokens=self.refine_tokens,
            )  # fmt: skip
            return Draft(parse_refined(choice.text) if choice.ok else "", choice.usage, choice.text)

        return Loop(judge, refine=refine, generations=self.budget, **functions)

    async def _search(self, loop: Loop, prompt: str, text: str, judged: Judgement | None) -> SearchResult:
        if judged is not None:
            loop.know(text, judged)
        [said] = await loop.judge([text])
        root = Node(text, said)
        if root.accepted or said is None or not said.decided:
            found = Found(root, "accepted" if root.accepted else "unparsed", root)
        else:
            found = await SEARCHES[self.algorithm](
                loop, root, branch=self.branch, keep=self.keep, depth=self.depth, tries=self.tries,
                select=keep_best if self.select == "greedy" else self._drawn(prompt),
            )  # fmt: skip
        return SearchResult(
            found.best.text, found.accepted, found.stopped, tuple(loop.steps), prompt=prompt, root=root, best=found.best
        )

    def _drawn(self, prompt: str) -> Any:
        """Draws ``keep`` times by value, with replacement (as the official code does); all values 0 are equal."""
        rng = random.Random(f"{self.seed}\0{prompt}")

        def select(ranked: Sequence[Node], keep: int) -> Sequence[Node]:
            weights = [node.value for node in ranked]
            drawn = rng.choices(ranked, weights if any(weights) else None, k=keep)
            return [node for node in ranked if any(node is one for one in drawn)]

        return select


@dataclass(frozen=True)
class SPaR(TreeRefiner, Solver):
    """The method: actor, search, pairs and what the refiner learns from; training by them is another matter.

    Parameters beside the search's: ``samples`` answers of the actor a prompt (5), at ``actor_temperature`` and
    ``actor_top_p`` (0.9, 0.9); ``refined`` False takes an accepted sample for the chosen answer and not a repaired one (the
    ablation: independent pairs); ``min_similarity`` drops pairs that differ more (0: none; the paper drops none).
    """

    slug: ClassVar[str] = "spar"

    samples: int = 5
    actor_temperature: float = 0.9
    actor_top_p: float = 0.9
    actor_tokens: int = 2048
    refined: bool = True
    min_similarity: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.samples < 1 or not 0 <= self.min_similarity <= 1:
            raise ValueError(f"samples >= 1 and min_similarity in [0, 1], got {self.samples}, {self.min_similarity}")

    def at_budget(self, answers: int) -> Self:
        return replace(self, budget=answers)

    async def _sample(self, actor: Chat, messages: Sequence[Message] | str, first: int, n: int = 1) -> list[Draft]:
        asked = [{"role": "user", "content": messages}] if isinstance(messages, str) else messages
        choices = await actor.acomplete(
            asked, n=n, first=first, tag="spar.sample",
            temperature=self.actor_temperature, top_p=self.actor_top_p, max_tokens=self.actor_tokens,
        )  # fmt: skip
        return [Draft(choice.text.strip(), choice.usage) for choice in choices]

    def solve(self, chat: Chat, messages: Sequence[Message] | str, refiner: Chat | None = None) -> SearchResult:
        """One answer of ``chat``, repaired by ``refiner`` (None: the same model) where it finds fault."""
        return run(self.asolve(chat, messages, refiner))

    async def asolve(self, chat: Chat, messages: Sequence[Message] | str, refiner: Chat | None = None) -> SearchResult:
        """`solve`, awaited."""
        prompt = request_text(messages)

        async def generate(number: int) -> Draft:
            return (await self._sample(chat, messages, number))[0]

        loop = self._loop(refiner or chat, prompt, generate=generate)
        draft = await loop.generate(0)
        if draft is None or not draft.text:
            return SearchResult("", False, "error", tuple(loop.steps), prompt=prompt)
        return await self._search(loop, prompt, draft.text, None)

    async def abest_of(
        self, chat: Chat, messages: Sequence[Message] | str, refiner: Chat | None, n: int, first: int = 0
    ) -> Answer:
        """The rival: fresh answers, from sample ``first`` on, until the refiner accepts one, ``n`` at most."""
        prompt = request_text(messages)

        async def generate(number: int) -> Draft:
            return (await self._sample(chat, messages, first + number))[0]

        loop = self._loop(refiner or chat, prompt, generate=generate)
        return loop.answer(await best_of(loop, n))

    # --- data ---------------------------------------------------------------------------------------------------------

    def evolve(self, chat: Chat, seeds: Sequence[str]) -> list[dict[str, str]]:
        """Prompts with constraints from plain ones: rows ``seed``, ``group`` (drawn from the fourteen), ``prompt``.
        Seeds for which the model declines (mathematics, programming) or gives nothing that can be read are left out."""
        rng = random.Random(self.seed)
        drawn = [(seed, rng.choice(list(GROUPS))) for seed in seeds]

        async def one(pair: tuple[str, str]) -> dict[str, str] | None:
            seed, group = pair
            asked = EVOLVE.format(prompt=seed, group=group, kinds=GROUPS[group], groups=", ".join(GROUPS))
            [choice] = await chat.acomplete(
                [{"role": "user", "content": asked}], tag="spar.evolve", temperature=self.temperature,
                max_tokens=self.actor_tokens,
            )  # fmt: skip
            text = parse_refined(choice.text) if choice.ok else ""
            return None if text.strip(" .\"'").lower() in ("", "none") else {"seed": seed, "group": group, "prompt": text}

        return [row for row in chat.map(one, drawn) if row]

    def pairs(self, actor: Chat, prompts: Sequence[str], refiner: Chat | None = None) -> Pairs:
        """Preference pairs: a negative answer of the actor (one a prompt, drawn from those that the majority rejects) and
        its accepted repair. Also holds every tree and judgement, for `refiner_data`. Raises ValueError without prompts."""
        if not prompts:
            raise ValueError("there are no prompts to build pairs from")
        judge_by = refiner or actor

        async def one(place: int) -> tuple[list[Judged], SearchResult | None, str]:
            prompt = prompts[place]
            if not prompt.strip():
                raise ValueError(f"prompt {place} is empty")
            drafts = await self._sample(actor, prompt, 0, self.samples)
            judged = []
            for text in dict.fromkeys(draft.text for draft in drafts if draft.text):
                said = await self.judge(judge_by, prompt, text, tries=1)
                if said.decided:
                    judged.append(Judged(prompt, text, said))
            rng = random.Random(f"{self.seed}\0{prompt}")
            negative = [one for one in judged if one.judgement.value < 0.5]
            if not negative:
                return judged, None, ""
            root = rng.choice(negative)
            if not self.refined:
                positive = [one.text for one in judged if one.judgement.accepted]
                node = Node(root.text, root.judgement)
                result = SearchResult(root.text, False, "sampled", prompt=prompt, root=node, best=node)
                return judged, result, rng.choice(positive) if positive else ""
            # The critique of the root is the one that rejected it.
            result = await self.asearch(judge_by, prompt, root.text, root.judgement)
            return judged, result, result.text if result.accepted else ""

        found = actor.map(one, range(len(prompts)))
        return Pairs.of(found, self.min_similarity)

    def refiner_data(self, pairs: Pairs, caps: Caps | None = None) -> list[dict[str, Any]]:
        """Rows ``messages`` (and their ``kind``) that the next refiner is tuned on, see `pairs.build_refiner_sft`."""
        return build_refiner_sft(pairs.trees, pairs.judged, caps or Caps(), self.seed)


def build_pairs(prompts: Sequence[str], actor: Chat, refiner: Chat | None = None, **settings: Any) -> Any:
    """`SPaR(**settings).pairs(...)` as a `datasets.Dataset` where that is installed, else a list of rows."""
    return SPaR(**settings).pairs(actor, prompts, refiner).dataset()


__all__ = [
    "Caps", "Judged", "Pairs", "SPaR", "SearchResult", "TreeRefiner", "build_pairs", "build_refiner_sft", "edit_similarity",
]  # fmt: skip
