"""Making the data with a model (paper section 3.2): expansion, conflict detection, rewriting, solved examples.

Every step's reply is checked: a reply that lacks a field, lists other constraints than it was asked for, or answers a check
with anything but yes or no, is a rejection. All choices are drawn from the seed and the question, so the same seed gives the
same data, whatever else is asked at the same time.
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, Literal

from broadsheet.core.chat import Chat, run
from broadsheet.core.replies import json_of, yes_no

from .items import Item, Triple, listed, shown, woven
from .taxonomy import TAXONOMY, category

Pattern = Literal["Example", "Listing", "Incorporation"]

_EXPAND = """You write instructions whose fulfilment a program can check.

Add {count} new to the constraints of the question below, from the main category "{main}" and these subcategories:
{subs}

- The new constraint must not contradict the others, and must be concrete: say which keyword, how many words.
- Rewrite the question so that it states every constraint of the updated list in plain words.

Reply with one JSON object: {{"reasoning": "...", "constraints": [["main category", "subcategory", "constraint"], ...],
"question": "..."}}, in which "constraints" is the whole updated list.

DATA
{data}"""

_CHECK = """Check the question and its constraints below. Think first, then answer with these two lines:
Conflict: yes or no (can no answer satisfy all the constraints at once?)
Complete: yes or no (does the question state every constraint of the list?)

DATA
{data}"""

_REWRITE = """Rewrite the question below so that its constraints are woven into its wording as running text, without a list.
Do not change what is asked, and do not apply the constraints to the question itself. Reply with one JSON object:
{{"question": "..."}}

DATA
{data}"""

_COVERS = """Does the question below state every constraint of the list? Think first, then answer with this line:
Covers: yes or no

DATA
{data}"""


def _data(question: str, constraints: Sequence[Triple], **more: Any) -> str:
    return json.dumps({"question": question, "constraints": [list(one) for one in constraints], **more}, ensure_ascii=False)


@dataclass(frozen=True)
class Grown:
    """A question with its constraints. ``versions``: every accepted version, the bare question first; ``rejected``: why
    others were not; ``complete``: whether it got as far as it should."""

    question: str
    constraints: tuple[Triple, ...]
    versions: tuple[tuple[str, tuple[Triple, ...]], ...]
    rejected: tuple[str, ...]
    complete: bool


@dataclass(frozen=True)
class Pipeline:
    """Grows a question to ``level`` main categories, one or two constraints at a time.

    ``check``: the two questions after every expansion (what the paper's conflict detection is); off, everything well-formed
    is kept. ``tries``: expansions tried for one category before it fails. Temperature 0.7 as in the repository.
    """

    level: int = 4
    check: bool = True
    tries: int = 3
    seed: int = 0
    temperature: float = 0.7

    def __post_init__(self) -> None:
        if not 1 <= self.level <= len(TAXONOMY) or self.tries < 1:
            raise ValueError(f"level is 1 to {len(TAXONOMY)} and tries at least 1, got {self.level} and {self.tries}")

    def grow(self, chat: Chat, question: str) -> Grown:
        return run(self.agrow(chat, question))

    async def agrow(self, chat: Chat, question: str) -> Grown:
        roll = random.Random(f"{self.seed}/{question}")
        versions: list[tuple[str, tuple[Triple, ...]]] = [(question, ())]
        rejected: list[str] = []
        unused = list(TAXONOMY)
        while len(TAXONOMY) - len(unused) < self.level:
            main = roll.choice(unused)
            count = 1 if main == "Language" else roll.choice((1, 2))
            for attempt in range(self.tries):
                made = await self.expand(chat, *versions[-1], main, count, attempt)
                if isinstance(made, str):
                    rejected.append(made)
                    continue
                versions.append(made)
                reason = await self.conflict(chat, *made) if self.check else ""
                if not reason:
                    break
                versions.pop()
                rejected.append(reason)
            else:
                return Grown(*versions[-1], tuple(versions), tuple(rejected), False)
            unused.remove(main)
        return Grown(*versions[-1], tuple(versions), tuple(rejected), True)

    async def expand(
        self, chat: Chat, question: str, constraints: Sequence[Triple], main: str, count: int, attempt: int = 0
    ) -> tuple[str, tuple[Triple, ...]] | str:
        """The question with ``count`` more constraints of the main category, or why the reply was rejected."""
        subs = "\n".join(f"- {second}: {', '.join(thirds)}" for second, thirds in TAXONOMY[main].items())
        asked = _EXPAND.format(
            count=f"{count} constraint{'s' if count > 1 else ''}", main=main, subs=subs,
            data=_data(question, constraints, main=main, count=count),
        )  # fmt: skip
        text = await self._ask(chat, asked, "expand", attempt)
        reply = json_of(text)
        if not isinstance(reply, dict) or not {"reasoning", "constraints", "question"} <= set(reply):
            return "a field is missing"
        listed_ = reply["constraints"]
        if not isinstance(listed_, list) or not all(
            isinstance(one, list) and len(one) == 3 and all(isinstance(part, str) and part.strip() for part in one)
            for one in listed_
        ):
            return "the constraints are no list of triples"
        triples = tuple((one[0], one[1], one[2]) for one in listed_)
        if triples[: len(constraints)] != tuple(constraints) or len(triples) != len(constraints) + count:
            return "the constraints are not the old ones and the new"
        try:
            if any(category(*triple[:2])[0] != main for triple in triples[len(constraints) :]):
                return "a new constraint is of another category"
        except ValueError:
            return "a new constraint is of no category"
        if not isinstance(reply["question"], str) or not reply["question"].strip():
            return "the question is missing"
        return reply["question"].strip(), triples

    async def conflict(self, chat: Chat, question: str, constraints: Sequence[Triple]) -> str:
        """Why a version is rejected by the two questions, or ""."""
        text = await self._ask(chat, _CHECK.format(data=_data(question, constraints)), "check")
        conflict, complete = yes_no(text, "Conflict"), yes_no(text, "Complete")
        if conflict is None or complete is None:
            return "the check cannot be read"
        if conflict:
            return "constraints conflict"
        return "" if complete else "the question lacks a constraint"

    async def arewrite(
        self, chat: Chat, question: str, grown: Grown, pattern: Pattern, pool: Sequence[tuple[Item, str]] = ()
    ) -> str | None:
        """The final prompt in a pattern, or None where the model's wording does not cover the constraints, or the pool has
        fewer than three examples. ``question``: the bare one; ``pool``: items with answers that satisfy them."""
        texts = [text for *_, text in grown.constraints]
        if pattern == "Example":
            item = Item("", grown.question, grown.constraints, question=question)
            shots = choose_shots(item, pool, self.seed)
            return shown([(one.prompt, answer) for one, answer in shots], grown.question) if shots else None
        if pattern == "Listing":
            prompt = listed(question, texts)
        else:
            asked = _REWRITE.format(data=_data(question, grown.constraints))
            reply = json_of(await self._ask(chat, asked, "rewrite"))
            if not isinstance(reply, dict) or not isinstance(reply.get("question"), str):
                return None
            prompt = reply["question"].strip()
        covers = yes_no(await self._ask(chat, _COVERS.format(data=_data(prompt, grown.constraints)), "covers"), "Covers")
        return prompt if covers else None

    def rewrite(
        self, chat: Chat, question: str, grown: Grown, pattern: Pattern, pool: Sequence[tuple[Item, str]] = ()
    ) -> str | None:
        return run(self.arewrite(chat, question, grown, pattern, pool))

    async def _ask(self, chat: Chat, text: str, stage: str, sample: int = 0) -> str:
        messages = [{"role": "user", "content": text}]
        choices = await chat.acomplete(
            messages, n=1, first=sample, tag=f"muldimif/{stage}", temperature=self.temperature, max_tokens=2048
        )
        return choices[0].text if choices[0].ok else ""


# --- solved examples ----------------------------------------------------------------------------------------------------


def _signatures(item: Item) -> tuple[object, ...]:
    """What an example must share with an item, from strict to loose (paper section 3.2, the Example pattern): the second
    levels in order; their multiset before the last main category's part, and that part; the main categories in order before
    it, and that part; the same without repetitions."""
    seconds = [second for _, second in item.categories]
    parts = [(main, [second for _, second in group]) for main, group in groupby(item.categories, key=lambda pair: pair[0])]
    last = (parts[-1][0], tuple(sorted(parts[-1][1])))
    before = [(main, second) for main, some in parts[:-1] for second in some]
    mains = [main for main, _ in before]
    return (
        tuple(seconds), (tuple(sorted(before)), last), (tuple(mains), last), (tuple(dict.fromkeys(mains)), last),
    )  # fmt: skip


def choose_shots(
    item: Item, pool: Sequence[tuple[Item, str]], seed: int = 0, count: int = 3
) -> list[tuple[Item, str]] | None:
    """``count`` solved examples for an item, or None where the pool has too few.

    Levels of likeness are relaxed until there are enough. Never the item itself, its question under another id, or one
    question twice.
    """
    roll = random.Random(f"{seed}/{item.id}/{item.prompt}")
    wanted = _signatures(item)
    chosen: list[tuple[Item, str]] = []
    used = {_bare(item)}
    for place, signature in enumerate(wanted):
        alike = [pair for pair in pool if pair[0].id != item.id and _signatures(pair[0])[place] == signature]
        roll.shuffle(alike)
        for pair in alike:
            if _bare(pair[0]) not in used and len(chosen) < count:
                used.add(_bare(pair[0]))
                chosen.append(pair)
        if len(chosen) == count:
            return chosen
    return None


def _bare(item: Item) -> str:
    """What makes two items one question."""
    return " ".join((item.question or item.prompt).lower().split())


__all__ = ["Grown", "Pipeline", "choose_shots", "listed", "shown", "woven"]
