"""DeCRIM: decompose a request into constraints, criticise an answer by them, refine what fails (Palmeira Ferraz et al.
2024, arXiv 2410.06458).

    answer = DeCRIM().solve(chat, "Write a haiku about rain, without the word 'rain', in capitals.", critic=other)
    answer.text, answer.accepted, answer.stopped, answer.verdicts, answer.rounds, answer.usage

One loop: the answer is written (the prompt is sent as it is, so that a baseline is the same prompt), the request is
split into constraints once, a critic judges each constraint, and only those that fail go back to the writer with the
reasons. An answer that the critic accepts is returned untouched. The gain is the critic's: see `markov` for what to
expect of which, and the number of right verdicts below which the loop does harm.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from inspect import isawaitable
from typing import Any, ClassVar, Literal, Self

from broadsheet.core.chat import Chat, Message, run
from broadsheet.core.chat.protocol import NOTHING, Usage
from broadsheet.core.loops import Answer, Draft, Found, Judgement, Loop, Step, best_of, chain

from ..base import Solver
from . import prompts

#: A checker in the role of the critic: (text, constraints) -> a verdict each. A verdict is True, False, None (cannot say) or
#: anything with ``ok`` and ``evidence``.
Checker = Callable[[str, Sequence[str]], Any]
Critic = Chat | Checker | None
Decomposer = Literal["self"] | Callable[[str], Any] | Sequence[str]


@dataclass(frozen=True)
class Round:
    """An answer and what the critic said of it: a verdict a constraint (None: could not be read) with its reason; no
    verdicts where the critic was not asked."""

    text: str
    verdicts: tuple[bool | None, ...] = ()
    reasons: tuple[str, ...] = ()
    usage: Usage = NOTHING


@dataclass(frozen=True)
class Corrected(Answer):
    """An answer of a loop over constraints. ``stopped``: accepted, budget, no_change, unparsed (no verdict says no, but not
    all could be read), no_constraints or error (an empty text)."""

    task: str = ""
    constraints: tuple[str, ...] = ()

    @property
    def rounds(self) -> list[Round]:
        """Every answer in order."""
        found: list[Round] = []
        for step in self.steps:
            if step.kind in ("generate", "refine"):
                found.append(Round(step.text, usage=step.usage))
            elif step.kind == "judge" and found:
                said = step.detail.get("verdicts", ()), step.detail.get("reasons", ())
                found[-1] = Round(found[-1].text, *said, usage=found[-1].usage + step.usage)
        return found

    @property
    def verdicts(self) -> tuple[bool | None, ...]:
        """The critic's word on the answer that is returned."""
        return next((one.verdicts for one in reversed(self.rounds) if one.text == self.text), ())


@dataclass(frozen=True)
class _Corrector(Solver):
    """What DeCRIM and the baselines share: sampling, the writer, the critic."""

    temperature: float = 0.0
    max_tokens: int = 1024

    async def _write(
        self, chat: Chat, messages: Sequence[Message] | str, kind: str, number: int = 0, **options: Any
    ) -> Draft:
        asked = {"temperature": self.temperature, "max_tokens": self.max_tokens, **options}
        asked_messages = _user(messages) if isinstance(messages, str) else messages
        [choice] = await chat.acomplete(asked_messages, first=number, tag=f"decrim.{kind}", **asked)
        detail = {} if choice.ok else {"finish_reason": choice.finish_reason}
        return Draft(choice.text.strip() and choice.text, choice.usage, detail=detail)

    async def _split(self, chat: Chat, request: str, loop: Loop) -> tuple[str, list[str]]:
        """The task and the constraints that the writer sees in a request."""
        [choice] = await chat.acomplete(
            _user(prompts.DECOMPOSE.format(request=request)), tag="decrim.decompose", max_tokens=self.max_tokens
        )
        task, constraints = prompts.parse_decomposition(choice.text if choice.ok else "")
        loop.log(Step("decompose", choice.text, {"task": task, "constraints": tuple(constraints)}, choice.usage))
        return task, constraints

    async def _judge(self, critic: Chat | Checker, request: str, constraints: Sequence[str], text: str) -> Judgement:
        """A verdict a constraint."""
        usage = NOTHING
        if isinstance(critic, Chat):
            asked = prompts.CRITIQUE.format(request=request, response=text, constraints=prompts.numbered_list(constraints))
            [choice] = await critic.acomplete(_user(asked), tag="decrim.critique", max_tokens=self.max_tokens)
            verdicts, reasons = prompts.parse_verdicts(choice.text if choice.ok else "", len(constraints))
            usage = choice.usage
        else:
            verdicts, reasons = await _checked(critic, text, constraints)
        failed = [place for place, verdict in enumerate(verdicts) if verdict is False]
        unknown = sum(verdict is None for verdict in verdicts)
        count = len(constraints)
        feedback = prompts.numbered_list([constraints[place] for place in failed], [reasons[place] for place in failed])
        return Judgement(
            value=1 - (len(failed) + unknown / (count + 1)) / count,  # an unread verdict weighs less than any failed one
            accepted=not failed and not unknown,
            feedback=feedback,
            usage=usage,
            detail={"verdicts": tuple(verdicts), "reasons": tuple(reasons), "failed": tuple(failed), "unknown": unknown},
            decided=bool(failed) or not unknown,
        )

    async def _judge_whole(self, critic: Chat, request: str, text: str) -> Judgement:
        """One verdict on everything, with whatever the critic says for feedback."""
        asked = prompts.CRITIQUE_WHOLE.format(request=request, response=text)
        [choice] = await critic.acomplete(_user(asked), tag="decrim.critique", max_tokens=self.max_tokens)
        said = _verdict_of_whole(choice.text if choice.ok else "")
        detail = {"verdicts": (said,), "reasons": (choice.text,), "unknown": int(said is None)}
        return Judgement(float(said is True), said is True, choice.text, choice.usage, detail, decided=said is not None)


def _user(text: str) -> list[Message]:
    return [{"role": "user", "content": text}]


def _verdict_of_whole(reply: str) -> bool | None:
    from broadsheet.core import replies

    said = replies.after_label(replies.answer_part(reply), "Verdict:")
    return None if said is None else replies.verdict(said)


async def _checked(checker: Checker, text: str, constraints: Sequence[str]) -> tuple[list[bool | None], list[str]]:
    found = checker(text, constraints)
    found = list(await found if isawaitable(found) else found)
    if len(found) != len(constraints):
        raise ValueError(f"the critic gave {len(found)} verdicts on {len(constraints)} constraints; it must give one each")
    verdicts = [None if one is None else bool(getattr(one, "ok", one)) for one in found]
    return verdicts, [str(getattr(one, "evidence", "") or "") for one in found]


@dataclass(frozen=True)
class DeCRIM(_Corrector):
    """Decompose, critique, refine.

    Parameters: ``decomposer``: "self" (the writer splits the request), a list of constraints that are known, or a function
    from the request's text to such a list; ``max_rounds`` refinements at most (10), so that writer and critic are called at
    most 1 + max_rounds times each, besides the decomposition; ``return_best`` gives back the answer with the fewest flagged
    constraints (the earliest of equals) and not the last; ``judge_each`` False asks for one verdict on the whole answer (the
    ablation of the decomposition; its critic is a model); ``reasons`` hands the critic's reasons to the writer; ``strict``
    makes a request without constraints an error.

    The critic is the writer itself, another model, or a checker, see `solve`. A verdict that cannot be read is neither met
    nor failed: it forbids acceptance and is not refined by. Raises ValueError for fewer than one round.
    """

    slug: ClassVar[str] = "decrim"

    decomposer: Decomposer = "self"
    max_rounds: int = 10
    return_best: bool = False
    judge_each: bool = True
    reasons: bool = True
    strict: bool = False

    def __post_init__(self) -> None:
        if self.max_rounds < 1:
            raise ValueError(f"max_rounds must be at least 1, got {self.max_rounds}")

    def at_budget(self, answers: int) -> Self:
        return replace(self, max_rounds=answers - 1)

    def solve(self, chat: Chat, messages: Sequence[Message] | str, critic: Critic = None) -> Corrected:
        """The corrected answer to ``messages``. ``critic``: None for ``chat`` itself, another chat, or a function from
        a text and the list of constraints to a verdict each. Raises ChatError where a model cannot be reached."""
        return run(self.asolve(chat, messages, critic))

    async def asolve(self, chat: Chat, messages: Sequence[Message] | str, critic: Critic = None) -> Corrected:
        """`solve`, awaited."""
        judge_by = chat if critic is None else critic
        if not self.judge_each and not isinstance(judge_by, Chat):
            raise ValueError("judge_each=False asks a model: give a chat as the critic, or none")
        request = prompts.request_text(messages)

        async def generate(number: int) -> Draft:
            return await self._write(chat, messages, "generate", number)

        async def judge(text: str) -> Judgement:
            if self.judge_each:
                return await self._judge(judge_by, request, constraints, text)
            return await self._judge_whole(judge_by, request, text)  # type: ignore[arg-type]  # checked above

        async def refine(text: str, said: Judgement, number: int) -> Draft:
            return await self._write(chat, self._refine_prompt(request, constraints, text, said), "refine", number)

        loop = Loop(judge, generate, refine)
        task, constraints = await self._decompose(chat, request, loop)
        if not constraints and self.judge_each:
            message = "the decomposer found no constraints, so that there is nothing to criticise by"
            if self.strict:
                raise ValueError(f"{message}; give them with decomposer=[...]")
            warnings.warn(f"{message}: the first answer is returned", stacklevel=2)
            return _uncorrected(await loop.generate(0), loop, task)
        found = await chain(loop, self.max_rounds, self.return_best)
        return _corrected(loop, found, task, constraints)

    def _refine_prompt(self, request: str, constraints: Sequence[str], text: str, said: Judgement) -> str:
        if not self.judge_each:
            return prompts.REFINE_WHOLE.format(request=request, response=text, feedback=said.feedback)
        failed = [constraints[place] for place in said.detail["failed"]]
        return prompts.REFINE.format(
            request=request,
            response=text,
            constraints=prompts.numbered_list(constraints),
            failed=said.feedback if self.reasons else prompts.numbered_list(failed),
        )

    async def _decompose(self, chat: Chat, request: str, loop: Loop) -> tuple[str, list[str]]:
        if not self.judge_each:
            return "", []
        if callable(self.decomposer):
            found = self.decomposer(request)
            return "", list(await found if isawaitable(found) else found)
        if self.decomposer != "self":
            return "", list(self.decomposer)
        return await self._split(chat, request, loop)


def _corrected(loop: Loop, found: Found, task: str = "", constraints: Sequence[str] = ()) -> Corrected:
    return Corrected(found.best.text, found.accepted, found.stopped, tuple(loop.steps), task, tuple(constraints))


def _uncorrected(draft: Draft | None, loop: Loop, task: str = "") -> Corrected:
    """The first answer, where there is nothing to criticise it by."""
    text = draft.text if draft else ""
    return Corrected(text, False, "no_constraints" if text else "error", tuple(loop.steps), task)


# --- what it is compared with -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class BestOf(_Corrector):
    """Fresh answers until the critic accepts one, ``n`` at most (11 writer calls are what DeCRIM has with ten rounds); else
    the one with the fewest flagged constraints, the earliest of equals. Same prompt, same critic, no refinement."""

    slug: ClassVar[str] = "best-of-n"

    n: int = 11
    temperature: float = 1.0

    def __post_init__(self) -> None:
        if self.n < 1 or (self.n > 1 and self.temperature == 0):
            raise ValueError(
                f"best of n needs n >= 1, and a temperature above 0 beyond one, got {self.n}, {self.temperature}"
            )

    def at_budget(self, answers: int) -> Self:
        return replace(self, n=answers)

    def solve(
        self, chat: Chat, messages: Sequence[Message] | str, critic: Critic = None, *, constraints: Sequence[str] = ()
    ) -> Corrected:
        """``constraints``: what the critic judges by; without any, those that the writer sees in the request."""
        return run(self.asolve(chat, messages, critic, constraints=constraints))

    async def asolve(
        self, chat: Chat, messages: Sequence[Message] | str, critic: Critic = None, *, constraints: Sequence[str] = ()
    ) -> Corrected:
        """`solve`, awaited."""
        request, judge_by = prompts.request_text(messages), chat if critic is None else critic

        async def generate(number: int) -> Draft:
            return await self._write(chat, messages, "generate", number)

        async def judge(text: str) -> Judgement:
            return await self._judge(judge_by, request, constraints, text)

        loop = Loop(judge, generate)
        if not constraints:
            _, constraints = await self._split(chat, request, loop)
        if not constraints:
            return _uncorrected(await loop.generate(0), loop)
        return _corrected(loop, await best_of(loop, self.n), constraints=constraints)


@dataclass(frozen=True)
class SelfRefine(_Corrector):
    """Vague self-refinement: the critic is asked for feedback on the whole answer, and the answer is rewritten by it, round
    for round, whatever the feedback says (``accept`` True stops at "Verdict: met")."""

    slug: ClassVar[str] = "self-refine"

    rounds: int = 10
    accept: bool = False

    def __post_init__(self) -> None:
        if self.rounds < 1:
            raise ValueError(f"rounds must be at least 1, got {self.rounds}")

    def at_budget(self, answers: int) -> Self:
        return replace(self, rounds=answers - 1)

    def solve(self, chat: Chat, messages: Sequence[Message] | str, critic: Chat | None = None) -> Corrected:
        """The answer after the last round."""
        return run(self.asolve(chat, messages, critic))

    async def asolve(self, chat: Chat, messages: Sequence[Message] | str, critic: Chat | None = None) -> Corrected:
        """`solve`, awaited."""
        request = prompts.request_text(messages)

        async def generate(number: int) -> Draft:
            return await self._write(chat, messages, "generate", number)

        async def judge(text: str) -> Judgement:
            said = await self._judge_whole(critic or chat, request, text)
            return said if self.accept else replace(said, accepted=False, decided=True)

        async def refine(text: str, said: Judgement, number: int) -> Draft:
            asked = prompts.REFINE_WHOLE.format(request=request, response=text, feedback=said.feedback)
            return await self._write(chat, asked, "refine", number)

        loop = Loop(judge, generate, refine, judgements=self.rounds)
        return _corrected(loop, await chain(loop, self.rounds))


@dataclass(frozen=True)
class Plain(_Corrector):
    """One answer to the prompt as it is."""

    slug: ClassVar[str] = "plain"
    budgeted: ClassVar[bool] = False

    def at_budget(self, answers: int) -> Self:
        return self

    def solve(self, chat: Chat, messages: Sequence[Message] | str) -> Corrected:
        """One answer."""
        return run(self.asolve(chat, messages))

    async def asolve(self, chat: Chat, messages: Sequence[Message] | str) -> Corrected:
        """`solve`, awaited."""
        return self._once(await self._write(chat, messages, "generate"), ())

    @staticmethod
    def _once(draft: Draft, constraints: Sequence[str], *before: Step) -> Corrected:
        steps = (*before, Step("generate", draft.text, draft.detail, draft.usage))
        return Corrected(draft.text, False, "done" if draft.text else "error", steps, constraints=tuple(constraints))


@dataclass(frozen=True)
class RepeatConstraints(Plain):
    """No loop: the constraints are written out once more below the request."""

    slug: ClassVar[str] = "repeat-constraints"

    def solve(self, chat: Chat, messages: Sequence[Message] | str, *, constraints: Sequence[str] = ()) -> Corrected:
        """One answer. ``constraints``: without any, those that the writer sees in the request."""
        return run(self.asolve(chat, messages, constraints=constraints))

    async def asolve(self, chat: Chat, messages: Sequence[Message] | str, *, constraints: Sequence[str] = ()) -> Corrected:
        """`solve`, awaited."""
        request, log = prompts.request_text(messages), Loop(_nobody)
        if not constraints:
            _, constraints = await self._split(chat, request, log)
        asked = prompts.REPEAT.format(request=request, constraints=prompts.numbered_list(constraints))
        return self._once(await self._write(chat, asked if constraints else messages, "generate"), constraints, *log.steps)


async def _nobody(text: str) -> Judgement:
    raise AssertionError("nobody is asked to judge")


__all__ = ["BestOf", "Checker", "Corrected", "Critic", "DeCRIM", "Plain", "RepeatConstraints", "Round", "SelfRefine"]
