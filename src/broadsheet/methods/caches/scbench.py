"""SCBench: a cache is judged over its whole life (Li et al. 2024, arXiv 2412.10319; ICLR 2025).

One context, several questions. ``multi-turn``: the first question is part of the one prefill, so a method may see it; later
turns run on whatever survived, after the gold answer (or the model's own) of the turn before. ``multi-request``: the context
alone is prefilled and compressed, then every question gets a fork of that cache.

`SessionRunner` needs nothing of a method but its ``cache``. Context tokens are forwarded exactly once a session;
``SessionRunner.forwarded`` counts them, so that a test can prove it. Follow-up questions attend densely to the surviving
slots.

Deviations: the official harness feeds follow-up questions token by token, because its masks are wrong for several tokens
after an eviction; here they go in one pass, which gives the same result. RepoQA is scored by normalised equality, not by
BLEU with tree-sitter. Questions whose gold answer was cut away by the middle truncation are counted and not scored.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any, cast

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from broadsheet.core.microworld.checkers import check, gold_answers, strict
from broadsheet.core.microworld.sessions import Session, Turn, read_sessions
from broadsheet.core.microworld.tasks import SCBENCH_MINI, make_sessions
from broadsheet.core.models import with_cache

from .base import CacheMethod, MethodCache

MODES = ("multi-turn", "multi-request")

#: Official tasks: the scorer, the cap on new tokens, and the group of the paper's table 1.
OFFICIAL: dict[str, tuple[str, int, str]] = {
    "scbench_kv": ("contains", 150, "string"),
    "scbench_prefix_suffix": ("contains", 150, "string"),
    "scbench_vt": ("contains_all", 30, "string"),
    "scbench_repoqa": ("strict", 1024, "semantic"),
    "scbench_qa_eng": ("contains", 40, "semantic"),
    "scbench_qa_chn": ("f1_characters", 40, "semantic"),
    "scbench_choice_eng": ("option_letter", 40, "semantic"),
    "scbench_mf": ("first_number", 5, "global"),
    "scbench_many_shot": ("contains", 10, "global"),
    "scbench_summary": ("rouge_lsum", 200, "global"),
    "scbench_summary_with_needles": ("rouge_lsum", 800, "multi-task"),
    "scbench_repoqa_and_kv": ("contains", 1024, "multi-task"),
}

#: Groups of the scbench-mini tasks.
GROUPS: dict[str, str] = {
    "kv": "string",
    "prefix_suffix": "string",
    "vt": "string",
    "needle": "string",
    "repoqa": "semantic",
    "mf": "global",
    "many_shot": "global",
    "copy": "global",
    "kv_and_rules": "multi-task",
    **{name: group for name, (_, _, group) in OFFICIAL.items()},
}


def load_sessions(
    task: str, sessions: int, context_tokens: int = 1024, turns: int = 5, seed: int = 0, data: str | None = None
) -> list[Session]:
    """Sessions of one task: generated ones, or the first ``sessions`` of the official data.

    ``data``: a JSON-lines file, a folder with ``<task>.jsonl``, or the hub name ``microsoft/SCBench`` (needs the
    ``datasets`` package and a network). Raises ValueError for an unknown task, naming the nearest.
    """
    if data is None:
        if task not in SCBENCH_MINI:
            known = [*SCBENCH_MINI, *OFFICIAL]
            near = get_close_matches(task, known, n=2, cutoff=0.4)
            raise ValueError(f"unknown task '{task}'" + (f"; did you mean {' or '.join(near)}?" if near else ""))
        return make_sessions(task, sessions, context_tokens, turns, seed)
    path = Path(data)
    if path.is_dir():
        path = path / f"{task}.jsonl"
    if path.suffix in {".jsonl", ".json"} or path.exists():
        rows: Iterator[Session] = read_sessions(path, task)
    else:
        rows = _from_hub(data, task)
    found: list[Session] = []
    for row in rows:
        if len(found) == sessions:
            break
        found.append(_official(row, task, turns))
    return found


def _from_hub(name: str, task: str) -> Iterator[Session]:
    try:
        from datasets import load_dataset
    except ImportError:
        raise ValueError("loading from a hub needs the 'datasets' package: pip install 'broadsheet[data]'") from None
    for row in load_dataset(name, task, split="test"):
        yield Session.from_json(json.loads(json.dumps(row, default=str)), task)


def _official(session: Session, task: str, turns: int) -> Session:
    """Gives the turns of an official record their task's scorer and cap; a row's own fields win."""
    if task not in OFFICIAL:
        return replace(session, turns=session.turns[:turns])
    checker, cap, _ = OFFICIAL[task]
    fixed = []
    for turn in session.turns[:turns]:
        rule = "first_number" if turn.extra.get("task") == "scbench_passkey" else checker
        fixed.append(replace(turn, checker=rule, max_new_tokens=cap))
    return replace(session, turns=tuple(fixed))


@dataclass(frozen=True)
class Prompt:
    """A session as tokens: the context, and for every turn its question (with what the chat template puts around it)."""

    context: tuple[int, ...]
    questions: tuple[tuple[int, ...], ...]
    answers: tuple[tuple[int, ...], ...]  #: gold, with the end token
    session: Session
    lost: tuple[bool, ...]  #: turns whose gold answer stood in the context and was cut away


@dataclass(frozen=True)
class TurnResult:
    """What happened in one turn."""

    session: str
    task: str
    mode: str
    turn: int
    answer: str
    score: float
    strict: float
    new_tokens: int
    gold_nll: float | None  #: mean negative log-likelihood of the gold answer's tokens, nats
    kl: float | None  #: mean KL(full cache || this one) over the gold answer's tokens, nats
    cache_bytes: int  #: bytes a row held when the prompt had been compressed
    prompt_tokens: int  #: tokens of that prompt: the context and, multi-turn, the first question

    def to_json(self) -> dict[str, Any]:
        return vars(self).copy()


def encode(session: Session, tokenizer: PreTrainedTokenizerBase, limit: int | None = None) -> Prompt:
    """Cuts the rendered conversation around the context, so that the shared part is the same tokens in both modes.

    ``limit``: context tokens above it are cut from the middle (the first and the last half stay).
    """
    separator = " " if session.context else ""
    mark = uuid.uuid4().hex
    history: list[dict[str, str]] = []
    pieces: list[str] = []
    rendered = ""
    for number, turn in enumerate(session.turns):
        content = f"{session.context}{mark}{separator}{turn.input}" if number == 0 else turn.input
        history.append({"role": "user", "content": content})
        text = _render(tokenizer, history)
        if not text.startswith(rendered):
            raise ValueError("this chat template rewrites earlier turns; sessions cannot share a cache with it")
        pieces.append(text[len(rendered) :])
        history.append({"role": "assistant", "content": _gold(turn)})
        rendered = text

    def tokens(text: str) -> tuple[int, ...]:
        return tuple(tokenizer(text, add_special_tokens=False)["input_ids"])

    opening, first = pieces[0].split(mark)
    context = tokens(opening)
    lost = [False] * len(session.turns)
    if limit is not None and len(context) > limit:
        head = limit // 2
        parts = context[:head], context[len(context) - (limit - head) :]
        context = parts[0] + parts[1]
        left = " ".join(cast(str, tokenizer.decode(list(part))) for part in parts)
        lost = [any(gold in session.context and gold not in left for gold in gold_answers(turn)) for turn in session.turns]
    # A later piece opens with the gold answer of the turn before: split it off, it is fed or replaced separately.
    questions, answers = [tokens(first)], []
    for number, piece in enumerate(pieces[1:], 1):
        gold = _gold(session.turns[number - 1])
        place = piece.find(gold)
        if place < 0:
            raise ValueError("this chat template alters the answers; sessions cannot share a cache with it")
        answers.append(tokens(piece[: place + len(gold)]) + _end(tokenizer))
        rest = piece[place + len(gold) :]
        end = tokenizer.eos_token or ""
        questions.append(tokens(rest.removeprefix(end)))
    lead = " " if getattr(tokenizer, "chat_template", None) and "<|assistant|> " in tokenizer.chat_template else ""
    answers.append(tokens(lead + _gold(session.turns[-1])) + _end(tokenizer))
    return Prompt(context, tuple(questions), tuple(answers), session, tuple(lost))


def _gold(turn: Turn) -> str:
    if "reference" in turn.extra:
        return turn.extra["reference"]
    return turn.answer if isinstance(turn.answer, str) else " ".join(turn.answer[:1])


def _end(tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    return () if tokenizer.eos_token_id is None else (int(tokenizer.eos_token_id),)


def _render(tokenizer: PreTrainedTokenizerBase, history: list[dict[str, str]]) -> str:
    if tokenizer.chat_template:
        return cast(str, tokenizer.apply_chat_template(history, tokenize=False, add_generation_prompt=True))
    parts = [tokenizer.bos_token or ""]
    for message in history:
        parts.append(message["content"] + ("\nAnswer:" if message["role"] == "user" else "\n"))
    return "".join(parts)


@dataclass
class SessionRunner:
    """Runs batches of sessions with one method.

    ``golden``: later turns see the gold answers of the earlier ones (SCBench's default), not the model's own. ``dtype``:
    what exact parts of a cache are stored in. ``limit``: context tokens, by default what the model's positions allow.
    ``reference``: a second method that reads along, and to whose predictions on the gold answers the KL is taken.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    method: CacheMethod
    golden: bool = True
    dtype: torch.dtype | None = torch.bfloat16
    limit: int | None = None
    reference: CacheMethod | None = None
    forwarded: int = field(default=0, init=False)  #: context tokens forwarded so far
    unanswerable: int = field(default=0, init=False)  #: questions not scored because truncation removed their answer

    def run(self, sessions: Session | Sequence[Session], mode: str = "multi-turn") -> list[TurnResult]:
        """Plays all turns of the sessions (as one left-padded batch) and scores every answer."""
        if mode not in MODES:
            raise ValueError(f"unknown mode '{mode}'; choose {' or '.join(MODES)}")
        batch = [sessions] if isinstance(sessions, Session) else list(sessions)
        if not batch:
            return []
        prompts = [encode(session, self.tokenizer, self._limit(session)) for session in batch]
        self.unanswerable += sum(sum(prompt.lost) for prompt in prompts)
        play = self._multi_turn if mode == "multi-turn" else self._multi_request
        with torch.inference_mode():
            return play(prompts)

    def _limit(self, session: Session) -> int:
        if self.limit is not None:
            return self.limit
        positions = getattr(self.model.config.get_text_config(), "max_position_embeddings", 1 << 20)
        reserve = sum(turn.max_new_tokens + len(self.tokenizer(turn.input)["input_ids"]) + 16 for turn in session.turns)
        if reserve >= positions:
            raise ValueError(f"the model has {positions} positions, too few for {len(session.turns)} turns")
        return positions - reserve

    # --- the two modes ------------------------------------------------------------------------------------------

    def _multi_turn(self, prompts: list[Prompt]) -> list[TurnResult]:
        stream = _Stream(self, len(prompts))
        shadow = _Stream(self, len(prompts), self.reference) if self.reference else None
        results: list[TurnResult] = []
        own: list[tuple[int, ...]] = []
        turns = max(len(prompt.questions) for prompt in prompts)
        for turn in range(turns):
            chunk: list[tuple[int, ...]] = []
            for row, prompt in enumerate(prompts):
                question = prompt.questions[turn] if turn < len(prompt.questions) else ()
                if turn == 0:
                    chunk.append(prompt.context + question)
                else:
                    before = prompt.answers[turn - 1] if self.golden and turn <= len(prompt.answers) else own[row]
                    chunk.append(before + question)
            logits = stream.feed(chunk)
            expected = shadow.feed(chunk) if shadow else None
            if turn == 0:
                self.forwarded += sum(len(prompt.context) for prompt in prompts)
                sizes = stream.bytes_by_row()
            active = [turn < len(prompt.questions) for prompt in prompts]
            caps = [p.session.turns[turn].max_new_tokens if a else 0 for p, a in zip(prompts, active, strict=True)]
            own = stream.fork().decode(logits, caps)
            gold = [p.answers[turn] if a else () for p, a in zip(prompts, active, strict=True)]
            ours = stream.fork().predict(logits, gold)
            theirs = shadow.fork().predict(expected, gold) if shadow and expected is not None else None
            for row, prompt in enumerate(prompts):
                if active[row] and not prompt.lost[turn]:
                    losses = _losses(ours[row], theirs[row] if theirs else None, gold[row])
                    results.append(self._result(prompt, turn, "multi-turn", own[row], losses, sizes[row]))
            if not self.golden:  # an answer that was cut gets its end token
                end = _end(self.tokenizer)
                own = [ids if ids[-len(end) :] == end else ids + end for ids in own]
        return results

    def _multi_request(self, prompts: list[Prompt]) -> list[TurnResult]:
        shared = _Stream(self, len(prompts))
        shared.feed([prompt.context for prompt in prompts])
        shadow = _Stream(self, len(prompts), self.reference) if self.reference else None
        if shadow:
            shadow.feed([prompt.context for prompt in prompts])
        self.forwarded += sum(len(prompt.context) for prompt in prompts)
        sizes = shared.bytes_by_row()
        results: list[TurnResult] = []
        opening = [prompt.session.turns for prompt in prompts]
        for turn in range(max(map(len, opening))):
            active = [turn < len(turns) for turns in opening]
            request = shared.fork()
            chunk = [self._request(p, turn) if a else () for p, a in zip(prompts, active, strict=True)]
            logits = request.feed(chunk)
            caps = [p.session.turns[turn].max_new_tokens if a else 0 for p, a in zip(prompts, active, strict=True)]
            own = request.fork().decode(logits, caps)
            gold = [p.answers[turn] if a else () for p, a in zip(prompts, active, strict=True)]
            ours = request.predict(logits, gold)
            theirs = None
            if shadow:
                other = shadow.fork()
                theirs = other.predict(other.feed(chunk), gold)
            for row, prompt in enumerate(prompts):
                if active[row] and not prompt.lost[turn]:
                    losses = _losses(ours[row], theirs[row] if theirs else None, gold[row])
                    results.append(self._result(prompt, turn, "multi-request", own[row], losses, sizes[row]))
        return results

    def _request(self, prompt: Prompt, turn: int) -> tuple[int, ...]:
        """The tokens that follow the context when this turn's question is the first."""
        if turn == 0:
            return prompt.questions[0]
        alone = replace(prompt.session, context="", turns=(prompt.session.turns[turn],))
        mark = uuid.uuid4().hex
        separator = " " if prompt.session.context else ""
        text = _render(self.tokenizer, [{"role": "user", "content": f"{mark}{separator}{alone.turns[0].input}"}])
        return tuple(self.tokenizer(text.split(mark)[1], add_special_tokens=False)["input_ids"])

    def _result(
        self,
        prompt: Prompt,
        turn: int,
        mode: str,
        ids: tuple[int, ...],
        losses: tuple[float | None, float | None],
        size: int,
    ) -> TurnResult:
        asked = prompt.session.turns[turn]
        text = cast(str, self.tokenizer.decode(list(ids), skip_special_tokens=True))
        return TurnResult(
            session=prompt.session.id,
            task=prompt.session.task,
            mode=mode,
            turn=turn + 1,
            answer=text,
            score=check(text, asked),
            strict=strict(text, asked),
            new_tokens=len(ids),
            gold_nll=losses[0],
            kl=losses[1],
            cache_bytes=size,
            prompt_tokens=len(prompt.context) + (len(prompt.questions[0]) if mode == "multi-turn" else 0),
        )


class _Stream:
    """A batch of token streams on one cache: padding, positions and validity are kept here."""

    def __init__(self, runner: SessionRunner, rows: int, method: CacheMethod | None = None):
        self.runner = runner
        self.cache: MethodCache = (method or runner.method).cache(runner.model, dtype=runner.dtype)
        device = runner.model.device
        self.mask = torch.zeros(rows, 0, dtype=torch.long, device=device)

    def fork(self) -> _Stream:
        twin = object.__new__(_Stream)
        twin.runner, twin.cache, twin.mask = self.runner, self.cache.fork(), self.mask
        return twin

    def feed(self, chunk: list[tuple[int, ...]]) -> torch.Tensor:
        """Forwards one chunk a row, padded on the left; returns the last logits [rows, vocabulary]."""
        return self._forward(chunk)[:, -1]

    def _forward(self, chunk: list[tuple[int, ...]]) -> torch.Tensor:
        tokenizer, model = self.runner.tokenizer, self.runner.model
        width = max(1, max(map(len, chunk)))
        pad = int(tokenizer.pad_token_id)
        ids = torch.tensor([[pad] * (width - len(row)) + list(row) for row in chunk], device=model.device)
        new = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in chunk], device=model.device)
        self.mask = torch.cat([self.mask, new], 1)
        positions = (self.mask.cumsum(1) - 1).clamp(min=0)[:, -width:]
        return model(
            ids, attention_mask=self.mask, position_ids=positions, **with_cache(self.cache), use_cache=True
        ).logits.float()

    def decode(self, logits: torch.Tensor, caps: list[int]) -> list[tuple[int, ...]]:
        """Greedy tokens of every row until its end token or cap."""
        end = set(_end(self.runner.tokenizer)) | set(_stops(self.runner.model))
        rows: list[list[int]] = [[] for _ in caps]
        going = [cap > 0 for cap in caps]
        while any(going):
            chosen = logits.argmax(-1).tolist()
            for row, token in enumerate(chosen):
                if going[row]:
                    rows[row].append(token)
                    going[row] = token not in end and len(rows[row]) < caps[row]
            if any(going):
                logits = self.feed([(chosen[row],) if going[row] else () for row in range(len(caps))])
        return [tuple(row) for row in rows]

    def predict(self, logits: torch.Tensor, gold: list[tuple[int, ...]]) -> list[torch.Tensor]:
        """Teacher-forced log-probabilities at the gold tokens of every row: [tokens, vocabulary] each."""
        width = max(map(len, gold))
        after = self._forward([ids[:-1] for ids in gold]) if width > 1 else None
        found = []
        for row, ids in enumerate(gold):
            steps = logits[row : row + 1, :][: len(ids)]
            if after is not None and len(ids) > 1:
                steps = torch.cat([steps, after[row, after.shape[1] - (len(ids) - 1) :]])
            found.append(steps.log_softmax(-1))
        return found

    def bytes_by_row(self) -> list[int]:
        """Bytes a row holds: its share of the batch by real tokens."""
        real = self.mask.sum(1).tolist()
        return [round(self.cache.nbytes * count / sum(real)) for count in real]


def _losses(ours: torch.Tensor, theirs: torch.Tensor | None, gold: tuple[int, ...]) -> tuple[float | None, float | None]:
    """Mean negative log-likelihood of the gold tokens, and mean KL(theirs || ours) where there is a reference."""
    if not gold:
        return None, None
    nll = -float(ours[torch.arange(len(gold)), torch.tensor(gold)].mean())
    return nll, None if theirs is None else float((theirs.exp() * (theirs - ours)).sum(-1).mean())


def _stops(model: PreTrainedModel) -> list[int]:
    stops = model.generation_config.eos_token_id if model.generation_config is not None else None
    return stops if isinstance(stops, list) else ([] if stops is None else [stops])
