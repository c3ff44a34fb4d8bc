"""Sessions as token ids, with labels on the answers: what training learns from and teacher-forced evaluation scores."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import PreTrainedTokenizerBase

from .sessions import Session

#: the label of a token that is not scored
IGNORE = -100


def encode_session(session: Session, tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """Token ids of the whole conversation and its labels: the answers and their end token are scored.

    A tokenizer without the microworld's role tokens gets the bare text, question after question.
    """
    texts, spans = [], []
    opening = " " + session.context if session.context else ""
    for turn in session.turns:
        answer = turn.extra.get("reference", turn.answer)
        answer = answer[0] if isinstance(answer, tuple) else answer
        texts += [f"{opening} {turn.input}", f" {answer}"]
        spans.append(len(texts) - 1)
        opening = ""
    pieces = tokenizer(texts, add_special_tokens=False)["input_ids"]
    known = tokenizer.get_vocab()
    user, assistant = ([known[role]] if role in known else [] for role in ("<|user|>", "<|assistant|>"))
    end = [tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else []
    ids = [tokenizer.bos_token_id] if tokenizer.bos_token_id is not None else []
    labels = [IGNORE] * len(ids)
    for index in spans:
        question, reply = [*user, *pieces[index - 1], *assistant], pieces[index] + end
        ids += question + reply
        labels += [IGNORE] * len(question) + reply
    return ids, labels


def padded(rows: Sequence[tuple[list[int], list[int]]], pad: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of (ids, labels) padded on the right: two tensors [rows, tokens]. Causal attention needs no mask then."""
    width = max(len(ids) for ids, _ in rows)
    ids, labels = torch.full((len(rows), width), pad), torch.full((len(rows), width), IGNORE)
    for row, (some, marks) in enumerate(rows):
        ids[row, : len(some)] = torch.tensor(some)
        labels[row, : len(marks)] = torch.tensor(marks)
    return ids, labels
