"""Tuning: how rows become tokens and labels, and LoRA on them (paper section 3.3).

The official labels do not mask the prompt: its positions hold the padding token's number, so that the model is trained to
predict padding there, and only the padding of a batch is ignored. ``mask="official"`` does so too; ``mask="ignore"``, the
default, takes the loss over the answer alone.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from .rows import Row

if TYPE_CHECKING:
    import torch

Mask = Literal["ignore", "official"]
IGNORED = -100
#: the paper's; the target modules are Llama's
LORA: Mapping[str, Any] = {"r": 8, "alpha": 32, "dropout": 0.1, "target_modules": ("q_proj", "k_proj", "v_proj")}


@dataclass(frozen=True)
class Encoded:
    """Token numbers and labels of one row, of equal length."""

    input_ids: list[int]
    labels: list[int]


def encode(rows: Iterable[Row], tokenizer: Any, max_length: int = 512, mask: Mask = "ignore") -> tuple[list[Encoded], int]:
    """(encoded rows, how many were too long and are left out).

    A row is the prompt's tokens, the answer's, and the end token where it fits. One of ``max_length`` tokens or more is left
    out, as officially. Raises ValueError for an answer that alone is too long, a tokenizer without end or padding token,
    and an unknown mask.
    """
    if mask not in ("ignore", "official"):
        raise ValueError(f"mask is ignore or official, got '{mask}'")
    end, pad = tokenizer.eos_token_id, tokenizer.pad_token_id
    if end is None or (mask == "official" and pad is None):
        raise ValueError("the tokenizer needs an end token, and for the official mask a padding token: set them")
    found, dropped = [], 0
    for row in rows:
        prompt = tokenizer(row.prompt)["input_ids"]
        answer = tokenizer(row.output.strip(), add_special_tokens=False)["input_ids"]
        if len(answer) >= max_length:
            raise ValueError(
                f"an answer has {len(answer)} tokens, more than max_length {max_length}: '{row.output[:40]}...'"
            )
        ids = [*prompt, *answer]
        if len(ids) >= max_length:
            dropped += 1
            continue
        if ids[-1] != end:
            ids.append(end)
        hidden = [pad if mask == "official" else IGNORED] * len(prompt)
        found.append(Encoded(ids, [*hidden, *ids[len(prompt) :]]))
    return found, dropped


def collate(batch: Sequence[Encoded], pad: int) -> dict[str, torch.Tensor]:
    """``input_ids``, ``attention_mask``, ``labels`` [rows, tokens], padded on the left; the padding has no label."""
    import torch

    longest = max(len(one.input_ids) for one in batch)

    def filled(values: Sequence[int], value: int) -> list[int]:
        return [value] * (longest - len(values)) + list(values)

    return {
        "input_ids": torch.tensor([filled(one.input_ids, pad) for one in batch]),
        "attention_mask": torch.tensor([filled([1] * len(one.input_ids), 0) for one in batch]),
        "labels": torch.tensor([filled(one.labels, IGNORED) for one in batch]),
    }


def causal_loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy of the next token, from logits [rows, tokens, vocabulary] and labels [rows, tokens]."""
    import torch.nn.functional as F

    return F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten(), ignore_index=IGNORED)


def training_flops(parameters: int, tokens: int) -> float:
    """6 x parameters x tokens: the usual estimate of one pass forward and back, on paper only."""
    return 6.0 * parameters * tokens


@dataclass(frozen=True)
class Tuned:
    """A tuned model and its price: ``tokens`` read, ``minutes``, ``trainable`` parameters, rows ``dropped`` as too long,
    the mean loss of every epoch."""

    model: Any
    tokens: int
    minutes: float
    trainable: int
    dropped: int
    losses: list[float] = field(default_factory=list)


def tune(
    model: Any,
    tokenizer: Any,
    rows: Iterable[Row],
    lora: Mapping[str, Any] | None = LORA,
    mask: Mask = "ignore",
    epochs: int = 1,
    learning_rate: float = 1e-4,
    warmup: float = 0.05,
    batch_size: int = 32,
    max_length: int = 512,
    max_steps: int | None = None,
    seed: int = 0,
) -> Tuned:
    """LoRA (or, with ``lora=None``, all parameters) on ``rows`` in the order given: AdamW, a linear schedule with
    ``warmup``.

    ``batch_size``: rows a step, the paper's 4 x 8 accumulated. The model is changed in place. Raises ValueError when peft
    is not installed and for the reasons of `encode`.
    """
    import torch

    encoded, dropped = encode(rows, tokenizer, max_length, mask)
    if not encoded:
        raise ValueError(f"no row is shorter than max_length {max_length}")
    if lora is not None:
        model = _with_adapters(model, {**LORA, **lora})
    torch.manual_seed(seed)  # dropout
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    steps = epochs * -(-len(encoded) // batch_size)
    steps = min(steps, max_steps) if max_steps else steps
    optimizer = torch.optim.AdamW(trained, lr=learning_rate, weight_decay=0.0)
    rise = max(round(warmup * steps), 1) if warmup else 0
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: (step + 1) / rise if step < rise else max(steps - step, 0) / max(steps - rise, 1)
    )
    begun, tokens, losses, done = time.monotonic(), 0, [], 0
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    device = next(model.parameters()).device
    model.train()
    while done < steps:
        total, batches = 0.0, 0
        for start in range(0, len(encoded), batch_size):
            if done == steps:
                break
            batch = {name: t.to(device) for name, t in collate(encoded[start : start + batch_size], pad).items()}
            loss = causal_loss(
                model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits, batch["labels"]
            )
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            tokens += int(batch["attention_mask"].sum())
            total, batches, done = total + loss.item(), batches + 1, done + 1
        losses.append(total / max(batches, 1))
    model.eval()
    minutes = (time.monotonic() - begun) / 60
    return Tuned(model, tokens, minutes, sum(weight.numel() for weight in trained), dropped, losses)


def _with_adapters(model: Any, lora: Mapping[str, Any]) -> Any:
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError:
        raise ValueError("LoRA needs the package peft: pip install peft (or lora=None for all parameters)") from None
    return get_peft_model(
        model,
        LoraConfig(
            task_type="CAUSAL_LM",
            r=lora["r"],
            lora_alpha=lora["alpha"],
            lora_dropout=lora["dropout"],
            target_modules=list(lora["target_modules"]),
            bias="none",
        ),
    )
