"""`LocalModel`: a transformers model in this process, asked as an endpoint is.

Good for models that fit this machine and for the built-in ones; a server such as vLLM serves many users of one large model
better (and is an `endpoint`).
"""

from __future__ import annotations

import asyncio
import hashlib
import math
import threading
from collections import deque
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from .protocol import NOTHING, ChatError, Choice, Request, RequestRefused, Usage, best_first

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from ..sampling import Noise


@dataclass
class _Job:
    """A request under way: its prompt's tokens, the samples, and where the answers go."""

    request: Request
    samples: Sequence[int]
    prompt: list[int]
    stops: tuple[str, ...]
    future: Future[list[Choice]] = field(default_factory=Future)


class LocalModel:
    """A model and its tokenizer as a backend. Runs in one thread of its own.

    ``model``: a built-in one, a folder or a hub name (what `core.models.load` takes, with ``device`` and ``dtype``), or a
    loaded one with its ``tokenizer``. ``batch``: so many samples are written together, those of one request and of requests
    that wait. The randomness of a sample is a function of the request and of seed + sample number alone; what else is in the
    batch can change the last bits of the logits, and with them an answer where two tokens are all but equally likely (in
    float32 that is rare, in bfloat16 it is not): ``batch=1`` rules it out.

    Chats go through the model's chat template. One without gets a line ``role: text`` a message and then ``assistant:``, and
    its answer ends before the next line ``user:``. One leading space, which belongs to the template, is dropped from answers
    to chats. Strings are continued as they are. Log-probabilities are the model's, before temperature and ``top_p``.

    `RequestRefused` ("context") where the prompt leaves no position for an answer. ChatError for what a local model cannot
    do: images, a ``response_format``, ``extra`` fields, messages that its template refuses.
    """

    def __init__(
        self,
        model: str | PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase | None = None,
        *,
        name: str = "",
        device: str = "cpu",
        dtype: torch.dtype | None = None,
        batch: int = 8,
    ):
        from ..models import fingerprint, load

        if batch < 1:
            raise ChatError(f"batch must be at least 1, got {batch}")
        if isinstance(model, str):
            name, (model, tokenizer) = name or model, load(model, dtype, device)
        elif tokenizer is None:
            raise ChatError("a loaded model needs its tokenizer")
        assert tokenizer is not None
        self.name = name or type(model).__name__
        self.model, self.tokenizer, self.batch = model, tokenizer, batch
        template = hashlib.blake2b(repr(tokenizer.chat_template or "").encode(), digest_size=4).hexdigest()
        self.identity = f"{fingerprint(model)} {str(model.dtype).removeprefix('torch.')} template {template}"
        self._waiting: deque[_Job] = deque()
        self._taking = threading.Lock()
        self._thread = ThreadPoolExecutor(1, "broadsheet-model")

    async def send(self, request: Request, samples: Sequence[int]) -> list[Choice]:
        prompt, stops = self._prompt(request)
        job = _Job(request, samples[: self.batch], prompt, stops)  # the rest is asked for again
        self._waiting.append(job)
        self._thread.submit(self._work)
        return await asyncio.wrap_future(job.future)

    async def close(self) -> None:
        self._thread.shutdown(wait=False, cancel_futures=True)

    def _prompt(self, request: Request) -> tuple[list[int], tuple[str, ...]]:
        """The tokens that are continued, and what ends the answer."""
        from ..sampling import positions

        if request.extra or (request.response_format or {}).get("type", "text") != "text":
            unknown = sorted(request.extra) or ["response_format"]
            raise ChatError(f"a local model knows no {', '.join(unknown)}; serve it with vLLM or llama.cpp for that")
        stops = request.stop
        if isinstance(request.messages, str):
            ids = self.tokenizer(request.messages)["input_ids"]
        else:
            messages = [{**message, "content": _text(message.get("content"))} for message in request.messages]
            if self.tokenizer.chat_template:
                ids = self._templated(messages, request)
            else:
                lines = [f"{message['role']}: {message['content']}\n" for message in messages]
                ids, stops = self.tokenizer("".join(lines) + "assistant:")["input_ids"], (*stops, "\nuser:")
        most = positions(self.model)
        if most is not None and len(ids) >= most:
            raise RequestRefused("context", f"the prompt has {len(ids)} tokens, {self.name} {most} positions")
        if not ids:
            raise ChatError(f"{self.name}'s tokenizer makes no token of the prompt")
        return list(ids), stops

    def _templated(self, messages: list[dict[str, Any]], request: Request) -> list[int]:
        from jinja2 import TemplateError

        try:
            made: Any = self.tokenizer.apply_chat_template(
                messages, tools=list(map(dict, request.tools)) or None, add_generation_prompt=True, return_dict=True
            )
        except (TemplateError, TypeError, KeyError) as error:
            raise ChatError(
                f"the chat template of {self.name} refuses the messages: {' '.join(str(error).split())}"
            ) from None
        return list(made["input_ids"])

    # --- in the model's thread ---

    def _work(self) -> None:
        """Takes what waits, as much as fits into a batch, and answers it."""
        jobs: list[_Job] = []
        with self._taking:
            while self._waiting and sum(len(job.samples) for job in [*jobs, self._waiting[0]]) <= self.batch:
                job = self._waiting.popleft()
                if job.future.set_running_or_notify_cancel():
                    jobs.append(job)
        if not jobs:
            return  # somebody's batch had room for it
        try:
            for job, choices in zip(jobs, self._answers(jobs), strict=True):
                job.future.set_result(choices)
        except BaseException as error:
            for job in jobs:
                if not job.future.done():
                    job.future.set_exception(_explained(error))

    def _answers(self, jobs: Sequence[_Job]) -> list[list[Choice]]:
        from ..sampling import Noise, decode

        rows = [place for place, job in enumerate(jobs) for _ in job.samples]
        asked = [jobs[place].request for place in rows]
        noises = [
            Noise(f"{(job.request.seed or 0) + sample}\0{unseeded}", 1) if job.request.temperature > 0 else None
            for job in jobs
            for unseeded in [replace(job.request, seed=None).content]
            for sample in job.samples
        ]
        told: list[list[dict[str, Any]]] = [[] for _ in rows]

        def choose(live: list[int], logits: torch.Tensor) -> torch.Tensor:
            scores = _drawn_from(logits, [asked[row] for row in live], [noises[row] for row in live])
            chosen = scores.argmax(-1)
            wanted = [place for place, row in enumerate(live) if asked[row].logprobs is not None]
            if wanted:
                logprobs = logits[wanted].log_softmax(-1)
                for place, found in zip(wanted, logprobs, strict=True):
                    row, token = live[place], int(chosen[place])
                    top = found.topk(min(asked[row].logprobs or 0, len(found)))
                    alternatives = list(zip(top.indices.tolist(), top.values.tolist(), strict=True))
                    told[row].append({"token": token, "logprob": float(found[token]), "top": alternatives})
            return chosen

        limits = [request.max_tokens for request in asked]
        stops = [jobs[place].stops for place in rows]
        written = decode(self.model, self.tokenizer, [job.prompt for job in jobs], rows, limits, stops, choose)
        answers: list[list[Choice]] = [[] for _ in jobs]
        for place, tokens, logprobs in zip(rows, written, told, strict=True):
            answers[place].append(self._choice(jobs[place], tokens, logprobs, first=not answers[place]))
        return answers

    def _choice(self, job: _Job, tokens: list[int], told: list[dict[str, Any]], first: bool) -> Choice:
        from ..codetasks import first_stop
        from ..sampling import end_of, text_of

        def text_up_to(end: int) -> str:
            return text_of(self.tokenizer, job.prompt, tokens[:end], skip_special_tokens=True)

        end = end_of(self.model, self.tokenizer, tokens)
        used, reason = min(end + 1, len(tokens)), "stop" if end < len(tokens) else "length"  # the end token counts
        text = text_up_to(end)
        cut = first_stop(text, job.stops)
        if cut < len(text):
            used, reason = end, "stop"
            while first_stop(shorter := text_up_to(used - 1), job.stops) < len(shorter):
                used -= 1
            text = text[:cut]
        if not isinstance(job.request.messages, str):
            text = text.removeprefix(" ")
        logprobs = None
        if job.request.logprobs is not None:
            logprobs = tuple(
                {
                    "token": self.tokenizer.decode([one["token"]]),
                    "logprob": one["logprob"],
                    "top": best_first((str(self.tokenizer.decode([token])), value) for token, value in one["top"]),
                }
                for one in told[:used]
            )
        usage = Usage(1, len(job.prompt), used) if first else replace(NOTHING, completion_tokens=used)
        return Choice(text, reason, usage, logprobs)


def _drawn_from(logits: torch.Tensor, asked: Sequence[Request], noises: Sequence[Noise | None]) -> torch.Tensor:
    """Scores whose argmax is a draw: logits / temperature in the nucleus, plus Gumbel noise; where greedy, the logits."""
    import torch

    drawn = [place for place, noise in enumerate(noises) if noise is not None]
    if not drawn:
        return logits
    scores = logits.clone()
    noise = torch.cat([one.next(logits.shape[-1]) for one in noises if one is not None]).to(logits.device)
    heat = logits.new_tensor([asked[place].temperature for place in drawn])[:, None]
    some = logits[drawn] / heat
    nucleus = logits.new_tensor([asked[place].top_p for place in drawn])[:, None]
    if bool((nucleus < 1).any()):
        ordered, order = some.softmax(-1).sort(-1, descending=True)
        outside = (ordered.cumsum(-1) - ordered >= nucleus) & (nucleus < 1)  # those before it already have the mass
        some = some.masked_fill(outside.scatter(-1, order, outside), -math.inf)
    scores[drawn] = some + noise
    return scores


def _text(content: Any) -> str:
    """A message's text; parts are put together."""
    if content is None or isinstance(content, str):
        return content or ""
    if not all(isinstance(part, Mapping) and isinstance(part.get("text"), str) for part in content):
        raise ChatError("a local model reads text only; serve it with vLLM for images")
    return "".join(part["text"] for part in content)


def _explained(error: BaseException) -> BaseException:
    if type(error).__name__ == "OutOfMemoryError":
        return ChatError("the device has no memory left for this: ask for fewer tokens, or take batch=1")
    return error
