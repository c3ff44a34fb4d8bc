"""From prompts to tokens, turn by turn, and from logits to the next token: the same for every runtime in this process."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch

from .config import Prompt, Sampling

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Messages = list[dict[str, str]]

#: stands for a reply whose tokens are known; a letter that no template changes
_HOLE = "\u2063"


class Dialogue:
    """The tokens of a conversation, in the order in which a cache sees them: what the model wrote is never tokenised again.

    ``render``: messages -> the text of a chat that waits for a reply (a chat template). ``tokenize(text)``: token ids,
    special tokens of the text included. ``prompt``: a config's own format, which goes before the template.
    """

    def __init__(
        self,
        tokenize: Callable[[str], list[int]],
        render: Callable[[Messages], str] | None = None,
        prompt: Prompt | None = None,
        begin: Sequence[int] = (),
    ):
        plain = prompt.plain if prompt else Prompt()
        own = bool(plain.text or plain.in_prefix or plain.in_suffix)
        self.prompt = plain if own else Prompt(in_prefix="user: ", in_suffix="\nassistant:", reverse="\nuser:")
        self.render = None if own else render
        self.tokenize, self.begin = tokenize, list(begin)

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase, prompt: Prompt | None = None) -> Dialogue:
        """Of a transformers tokenizer."""

        def render(messages: Messages) -> str:
            return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))

        def tokenize(text: str) -> list[int]:
            return list(tokenizer(text, add_special_tokens=False)["input_ids"])

        begin = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
        return cls(tokenize, render if tokenizer.chat_template else None, prompt, begin)

    def opening(self, prompt: str) -> list[int]:
        """Tokens of the first turn, until the reply begins."""
        if self.render:
            return self.tokenize(self.render([{"role": "user", "content": prompt}]))
        ids = self.tokenize(self.prompt.text + self.prompt.in_prefix + prompt + self.prompt.in_suffix)
        return ids if ids[: len(self.begin)] == self.begin else self.begin + ids

    def following(self, prompt: str, last: int | None = None) -> list[int]:
        """Tokens from the end of a reply to the beginning of the next; ``last``: the reply's last token, which may have
        closed it already."""
        if self.render:
            chat = [
                {"role": "user", "content": "?"},
                {"role": "assistant", "content": _HOLE},
                {"role": "user", "content": prompt},
            ]
            ids = self.tokenize(self.render(chat).split(_HOLE, 1)[1])
        else:
            ids = self.tokenize(
                ("\n" if not self.prompt.text else "") + self.prompt.in_prefix + prompt + self.prompt.in_suffix
            )
        return ids[1:] if ids and ids[0] == last else ids


class Sampler:
    """Draws tokens as llama.cpp's default chain does: penalty, top_k, top_p, temperature; ``key`` fixes the randomness."""

    def __init__(self, sampling: Sampling, key: int, banned: Sequence[int] = ()):
        self.sampling, self.banned = sampling, list(banned)
        self.generator = torch.Generator().manual_seed(key)

    def draw(self, logits: Any, before: Sequence[int]) -> int:
        """The next token, of ``logits`` [vocabulary] and the tokens before it."""
        s = self.sampling
        scores = torch.as_tensor(logits).detach().float().cpu()
        if self.banned or s.repetition_penalty != 1:
            scores = scores.clone()
        if self.banned:  # ends, where a reply must have its full length
            scores[self.banned] = -torch.inf
        recent = list(set(before[len(before) - s.repeat_last_n :])) if s.repeat_last_n else []
        if s.repetition_penalty != 1 and recent:
            some = scores[recent]
            scores[recent] = torch.where(some > 0, some / s.repetition_penalty, some * s.repetition_penalty)
        if s.temperature == 0:
            return int(scores.argmax())
        values, tokens = scores.topk(min(s.top_k or len(scores), len(scores)))  # sorted
        if s.top_p < 1:
            mass = values.softmax(0).cumsum(0)
            kept = int((mass < s.top_p).sum()) + 1
            values, tokens = values[:kept], tokens[:kept]
        place = torch.multinomial((values / s.temperature).softmax(0), 1, generator=self.generator)
        return int(tokens[place])
