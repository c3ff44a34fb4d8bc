"""Completions drawn with the same randomness whatever the model, so that two models can be compared sample by sample.

The token of sample i of a prompt at step t is the argmax of logits / temperature + noise[i, t], where the noise is Gumbel's
and a function of (seed, prompt's name, i, t) alone: this draws from the model's distribution, and two models that nearly
agree draw nearly the same completions (common random numbers).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .codetasks import first_stop
from .models import cache_of, with_cache

#: How many steps pass between looks at which rows are done.
_EVERY = 4
#: Tokens before a completion that are decoded with it.
_CONTEXT = 16


def sample(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[tuple[str, str]],
    samples: int,
    temperature: float,
    max_new_tokens: int,
    seed: int | str = 0,
    stops: Sequence[Sequence[str]] = (),
) -> list[list[str]]:
    """``samples`` completions of every prompt of one batch, each a ``(name, text)``.

    ``temperature`` 0 is greedy. ``stops``: for every prompt, strings that a completion ends before. A completion also ends
    at the model's end token, at ``max_new_tokens`` or where the model's positions end.
    """
    opening = [tokenizer(text)["input_ids"] for _, text in prompts]
    most = positions(model)
    if most is not None and most <= max(map(len, opening)):
        raise ValueError(f"a prompt has {max(map(len, opening))} tokens, the model {most} positions; leave such tasks out")
    noises = [Noise(f"{seed}/{name}", samples) for name, _ in prompts]

    def choose(live: list[int], logits: torch.Tensor) -> torch.Tensor:
        if temperature > 0:
            noise = torch.cat([noise.next(logits.shape[-1]) for noise in noises])[live].to(logits.device)
            logits = logits / temperature + noise
        return logits.argmax(-1)

    rows = [place for place in range(len(prompts)) for _ in range(samples)]
    endings = [stops[place] if stops else () for place in rows]
    written = decode(model, tokenizer, opening, rows, [max_new_tokens] * len(rows), endings, choose)
    completions = []
    for place, tokens, some in zip(rows, written, endings, strict=True):
        text = text_of(tokenizer, opening[place], tokens[: end_of(model, tokenizer, tokens)])
        completions.append(text[: first_stop(text, some)])
    return [completions[first : first + samples] for first in range(0, len(completions), samples)]


@torch.inference_mode()
def decode(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    rows: Sequence[int],
    limits: Sequence[int],
    stops: Sequence[Sequence[str]],
    choose: Callable[[list[int], torch.Tensor], torch.Tensor],
) -> list[list[int]]:
    """Tokens of completions, a row each, all in one batch. Every prompt is read once, whatever the number of its rows.

    ``rows``: which of the prompts a row continues. A row ends at its limit, where the model's positions end, or a few tokens
    after an end token or one of its strings: the caller cuts. Rows that are done leave the batch. ``choose(live, logits)``
    gives the next token of every live row, [live rows], from their logits, [live rows, vocabulary] in float32.
    """
    width = max(map(len, prompts))
    pad = tokenizer.pad_token_id or 0
    ids = torch.tensor([[pad] * (width - len(row)) + list(row) for row in prompts], device=model.device)
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in prompts], device=model.device)
    most = positions(model)
    limits = [
        limit if most is None else min(limit, most - len(prompts[row])) for row, limit in zip(rows, limits, strict=True)
    ]

    output: Any = model(
        input_ids=ids, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0), use_cache=True, logits_to_keep=1
    )
    first = torch.tensor(rows, device=model.device)
    cache, logits, mask = cache_of(output), output.logits[:, -1][first], mask[first]
    cache.batch_select_indices(first)
    live = list(range(len(rows)))
    written: list[list[int]] = [[] for _ in live]
    ends = _ends(model, tokenizer)
    while True:
        chosen = choose(live, logits.float())
        for row, token in zip(live, chosen.tolist(), strict=True):
            written[row].append(token)
        look = len(written[live[0]]) % _EVERY == 0  # all live rows are equally long
        kept = [
            place
            for place, row in enumerate(live)
            if len(written[row]) < limits[row]
            and not (look and (ends & set(written[row][-_EVERY:]) or _stopped(tokenizer, written[row], stops[row])))
        ]
        if not kept:
            return written
        if len(kept) < len(live):
            index = torch.tensor(kept, device=model.device)
            live, chosen, mask = [live[place] for place in kept], chosen[index], mask[index]
            cache.batch_select_indices(index)
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], 1)
        output = model(
            input_ids=chosen[:, None],
            attention_mask=mask,
            position_ids=mask.sum(1, keepdim=True) - 1,
            **with_cache(cache),
            use_cache=True,
        )
        logits = output.logits[:, -1]


def positions(model: PreTrainedModel) -> int | None:
    """How many tokens the model can see, or None where nothing limits them."""
    return getattr(model.config.get_text_config(), "max_position_embeddings", None)


def end_of(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, tokens: Sequence[int]) -> int:
    """Where the first end token stands, or the number of tokens."""
    ends = _ends(model, tokenizer)
    return next((place for place, token in enumerate(tokens) if token in ends), len(tokens))


def text_of(
    tokenizer: PreTrainedTokenizerBase, opening: Sequence[int], tokens: Sequence[int], skip_special_tokens: bool = False
) -> str:
    """The text of tokens that follow others; some tokenizers drop the leading space of a text that stands alone."""
    before = list(opening[-_CONTEXT:])
    options = {"clean_up_tokenization_spaces": False, "skip_special_tokens": skip_special_tokens}
    return str(tokenizer.decode(before + list(tokens), **options))[len(str(tokenizer.decode(before, **options))) :]


class Noise:
    """Gumbel noise of one prompt: [samples, vocabulary] a step."""

    def __init__(self, key: str, samples: int):
        number = int.from_bytes(hashlib.sha256(key.encode()).digest()[:7], "big")
        self.generator = torch.Generator().manual_seed(number)
        self.samples = samples

    def next(self, vocabulary: int) -> torch.Tensor:
        uniform = torch.rand(self.samples, vocabulary, generator=self.generator)
        return -(-uniform.clamp(min=1e-20).log()).log()


def _ends(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """The tokens that end a completion: the model's own, or else the tokenizer's."""
    own = getattr(model.generation_config, "eos_token_id", None)
    found = own if isinstance(own, list) else [own, tokenizer.eos_token_id]
    return {token for token in found if token is not None}


def _stopped(tokenizer: PreTrainedTokenizerBase, tokens: list[int], stops: Sequence[str]) -> bool:
    """Whether one of the strings stands in the last tokens."""
    if not stops:
        return False
    text = tokenizer.decode(tokens[-_EVERY - max(map(len, stops)) :])
    return any(stop in text for stop in stops)
