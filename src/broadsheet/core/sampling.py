"""Completions drawn with the same randomness whatever the model, so that two models can be compared sample by sample.

The token of sample i of a prompt at step t is the argmax of logits / temperature + noise[i, t], where the noise is Gumbel's
and a function of (seed, prompt's name, i, t) alone: this draws from the model's distribution, and two models that nearly
agree draw nearly the same completions (common random numbers).
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .codetasks import first_stop
from .models import cache_of, with_cache

#: How many steps pass between looks at which rows are done.
_EVERY = 4


@torch.inference_mode()
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
    at the model's end token, at ``max_new_tokens`` or where the model's positions end. Rows that are done are dropped from
    the batch.
    """
    opening = [tokenizer(text)["input_ids"] for _, text in prompts]
    width = max(map(len, opening))
    pad = tokenizer.pad_token_id or 0
    ids = torch.tensor([[pad] * (width - len(row)) + row for row in opening], device=model.device)
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in opening], device=model.device)
    most = getattr(model.config.get_text_config(), "max_position_embeddings", None) or width + max_new_tokens
    if most <= width:
        raise ValueError(f"a prompt has {width} tokens, the model {most} positions; leave such tasks out")
    noises = [_Noise(f"{seed}/{name}", samples) for name, _ in prompts]
    texts = [tokenizer.decode(row, clean_up_tokenization_spaces=False) for row in opening]

    output: Any = model(
        input_ids=ids, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0), use_cache=True, logits_to_keep=1
    )
    cache, logits = cache_of(output), output.logits[:, -1].repeat_interleave(samples, 0)
    cache.batch_repeat_interleave(samples)
    mask = mask.repeat_interleave(samples, 0)
    live = torch.arange(len(prompts) * samples, device=model.device)
    written: list[list[int]] = [[] for _ in live]
    ends = _ends(model, tokenizer)
    for step in range(min(max_new_tokens, most - width)):
        scores = logits.float()
        if temperature > 0:
            noise = torch.cat([noise.next(scores.shape[-1]) for noise in noises])[live.cpu()].to(scores.device)
            scores = scores / temperature + noise
        chosen = scores.argmax(-1)
        for row, token in zip(live.tolist(), chosen.tolist(), strict=True):
            written[row].append(token)
        if step % _EVERY == _EVERY - 1:
            kept = [
                place
                for place, row in enumerate(live.tolist())
                if not ends & set(written[row][-_EVERY:])
                and not _stopped(tokenizer, written[row], stops[row // samples] if stops else ())
            ]
            if not kept:
                break
            if len(kept) < len(live):
                index = torch.tensor(kept, device=model.device)
                live, chosen, mask = live[index], chosen[index], mask[index]
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
    completions = []
    for row, tokens in enumerate(written):
        place = row // samples
        tokens = tokens[: next((i for i, token in enumerate(tokens) if token in ends), len(tokens))]
        # With the prompt before it, because some tokenizers drop a leading space.
        text = str(tokenizer.decode(opening[place] + tokens, clean_up_tokenization_spaces=False))[len(texts[place]) :]
        completions.append(text[: first_stop(text, stops[place] if stops else ())])
    return [completions[first : first + samples] for first in range(0, len(completions), samples)]


class _Noise:
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
