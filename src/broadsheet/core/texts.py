"""A user's text as pieces of equal length, for calibration, perplexity and divergence."""

from __future__ import annotations

import json

import torch
from transformers import PreTrainedTokenizerBase


def pieces(path: str, tokenizer: PreTrainedTokenizerBase, length: int) -> torch.Tensor:
    """All pieces of ``length`` tokens of a text: [pieces, length], each with its opening token if the tokenizer has one.

    Of a text file, windows that do not overlap; of a JSON list of texts, the beginnings of those that are long enough.
    Raises ValueError when the file cannot be read.
    """
    try:
        with open(path, encoding="utf-8") as file:
            text = file.read(20_000_000)
        texts = json.loads(text) if path.endswith(".json") else [text]
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"cannot read the text {path}: {error}") from None
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise ValueError(f"{path} is not a JSON list of texts")
    opening = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    body = length - len(opening)
    found = []
    for ids in tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]:
        windows = min(len(ids) // body, 1) if len(texts) > 1 else len(ids) // body
        found += [opening + ids[index * body : (index + 1) * body] for index in range(windows)]
    return torch.tensor(found, dtype=torch.long).reshape(-1, length)


def documents(path: str, tokenizer: PreTrainedTokenizerBase, length: int, count: int, seed: int) -> torch.Tensor:
    """``count`` seeded pieces of ``length`` tokens: [count, length]. Raises ValueError when the text is too short."""
    found = pieces(path, tokenizer, length)
    if len(found) < count:
        raise ValueError(f"{path} holds {len(found)} pieces of {length} tokens, {count} are needed; lower --sessions")
    return found[torch.randperm(len(found), generator=torch.Generator().manual_seed(seed))[:count]]
