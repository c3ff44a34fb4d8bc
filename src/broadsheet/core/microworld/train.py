"""Trains a pocket model from scratch: `broadsheet train-pocket`.

The curriculum is the point. A small transformer that starts on random key-value pairs learns nothing; one that first learns
to continue a passage it has seen before (induction) picks retrieval up within minutes. So: induction first, then the
microworld's tasks at short context, then longer contexts, with many questions on every context so that one expensive
forward pass carries many lessons. The loss is taken on answers alone.

Positions: within a sequence the context is cut in places and the position ids jump there (PoSE, arXiv 2309.10400), so that
distances up to `reach` are seen while only short sequences are paid for.

Everything is a function of (seed, step): a run that was stopped goes on from its last checkpoint as if nothing had happened.
"""

from __future__ import annotations

import json
import random
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from .lexicon import WORDS
from .sessions import Session
from .tasks import SCBENCH_MINI, SHORT, TASKS, arithmetic
from .tokenizer import train_tokenizer


@dataclass(frozen=True)
class Stage:
    """A stretch of training: ``steps`` batches of about ``tokens`` tokens in sequences of ``first`` to ``last`` tokens.

    The length grows steadily from ``first`` to ``last``. ``reach`` is the largest position id that jumps may lead to;
    0 leaves positions alone.
    """

    name: str
    steps: int
    tokens: int
    first: int
    last: int
    reach: int = 0


@dataclass(frozen=True)
class Recipe:
    """Everything that determines a pocket model."""

    name: str
    layers: int = 4
    hidden: int = 192
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 64
    intermediate: int = 512
    rope_theta: float = 20_000.0
    learning_rate: float = 3e-3
    matrix_learning_rate: float = 0.02
    warmup: int = 100
    seed: int = 0
    stages: tuple[Stage, ...] = ()

    @property
    def steps(self) -> int:
        return sum(stage.steps for stage in self.stages)

    def stage_at(self, step: int) -> tuple[Stage, int]:
        """The stage of a step and the sequence length there."""
        for stage in self.stages:
            if step < stage.steps:
                return stage, stage.first + (stage.last - stage.first) * step // stage.steps
            step -= stage.steps
        raise ValueError(f"the recipe has {self.steps} steps")

    def config(self, tokenizer: PreTrainedTokenizerFast) -> LlamaConfig:
        return LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=self.hidden,
            intermediate_size=self.intermediate,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.kv_heads,
            head_dim=self.head_dim,
            max_position_embeddings=4096,
            rope_parameters={"rope_type": "default", "rope_theta": self.rope_theta},
            rms_norm_eps=1e-5,
            tie_word_embeddings=True,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )


_STAGES = (
    Stage("induction", 450, 4_800, 48, 128),
    Stage("short", 1_500, 4_800, 160, 352),
    Stage("medium", 700, 6_000, 384, 768, 2048),
    Stage("long", 400, 6_400, 800, 1_152, 4096),
)
RECIPES = {
    recipe.name: recipe
    for recipe in (
        Recipe("pocket-2m", stages=_STAGES),
        Recipe("pocket-2m-mha", layers=8, hidden=128, heads=2, kv_heads=2, intermediate=384, stages=_STAGES),
    )
}

IGNORE = -100


@dataclass
class Batch:
    """``ids``, ``labels``, ``positions``: [batch, tokens]; labels are IGNORE where no loss is taken."""

    ids: torch.Tensor
    labels: torch.Tensor
    positions: torch.Tensor


def encode_session(session: Session, tokenizer: PreTrainedTokenizerFast) -> tuple[list[int], list[int]]:
    """Token ids of the whole conversation and its labels: the answers and their end token carry loss."""
    texts, spans = [], []
    opening = " " + session.context if session.context else ""
    for turn in session.turns:
        answer = turn.extra.get("reference", turn.answer)
        texts += [f"{opening} {turn.input}", f" {answer}"]
        spans.append(len(texts) - 1)
        opening = ""
    pieces = tokenizer(texts, add_special_tokens=False)["input_ids"]
    user, assistant = tokenizer.convert_tokens_to_ids(["<|user|>", "<|assistant|>"])
    ids, labels = [tokenizer.bos_token_id], [IGNORE]
    for index in spans:
        question, reply = pieces[index - 1], pieces[index] + [tokenizer.eos_token_id]
        ids += [user, *question, assistant, *reply]
        labels += [IGNORE] * (len(question) + 2) + reply
    return ids, labels


def _induction(rng: random.Random, length: int, vocabulary: list[int]) -> tuple[list[int], list[int]]:
    """Random tokens, then passages of 3 to 16 tokens copied from random places; loss from a passage's second token on."""
    half = rng.randrange(length // 4, length // 2)
    ids = [rng.choice(vocabulary) for _ in range(half)]
    labels = [IGNORE] * half
    while len(ids) < length:
        size = rng.randrange(3, 17)
        start = rng.randrange(0, half - size) if half > size else 0
        passage = ids[start : start + size]
        ids += passage
        labels += [IGNORE, *passage[1:]]
    return ids[:length], labels[:length]


_WEIGHTS = {
    "kv": 2.0,
    "vt": 2.0,
    "mf": 1.5,
    "many_shot": 1.5,
    "arithmetic": 2.0,
    "lists": 0.7,
    "formats": 0.4,
    "facts": 0.4,
    "functions": 0.4,
}


def _draw(rng: random.Random, length: int) -> Session:
    """One session of at most about ``length`` tokens; half of it or less is questions."""
    names = list(TASKS)
    name = rng.choices(names, [_WEIGHTS.get(n, 1.0) for n in names])[0]
    if name in SHORT:
        if name == "arithmetic":
            steps = rng.randrange(2, max(3, min(80, length // 13)))
            return arithmetic(rng, 0, max(1, length // (13 * steps + 8)), steps)
        return TASKS[name](rng, 0, max(1, length // 28))
    # The share of the sequence that is context varies, so that every number of items is met.
    context = rng.randrange(length // 4, (3 * length) // 4 + 1)
    per_turn = {"mf": 11, "many_shot": 14, "needle": 15, "vt": 16, "kv": 15, "prefix_suffix": 16, "copy": 21, "repoqa": 27}
    turns = max(1, (length - context) // per_turn.get(name, 14))
    limit = {"kv": context // 5, "prefix_suffix": context // 5, "vt": 40, "needle": 24, "copy": context // 32}
    turns = min(turns, max(1, limit.get(name, turns)))
    return SCBENCH_MINI[name](rng, context, turns)


def make_batch(recipe: Recipe, step: int, tokenizer: PreTrainedTokenizerFast) -> Batch:
    """The batch of one step; a function of (recipe.seed, step) alone."""
    stage, length = recipe.stage_at(step)
    rng = random.Random(f"{recipe.name}/{recipe.seed}/{step}")
    rows = []
    words = tokenizer.convert_tokens_to_ids(["Ġ" + word for word in WORDS]) if stage.name == "induction" else []
    for _ in range(stage.tokens // length):
        if stage.name == "induction" and rng.random() < 0.75:
            rows.append(_induction(rng, length, words))
        else:
            ids, labels = encode_session(_draw(rng, length), tokenizer)
            rows.append((ids[: length + 64], labels[: length + 64]))
    width = max(len(ids) for ids, _ in rows)
    batch = Batch(
        ids=torch.full((len(rows), width), int(tokenizer.pad_token_id)),
        labels=torch.full((len(rows), width), IGNORE),
        positions=torch.zeros(len(rows), width, dtype=torch.long),
    )
    for row, (ids, labels) in enumerate(rows):
        batch.ids[row, : len(ids)] = torch.tensor(ids)
        batch.labels[row, : len(ids)] = torch.tensor(labels)
        positions = torch.arange(width)
        if stage.reach > width and rng.random() < 0.5:
            room = rng.randrange(stage.reach - width)
            for _ in range(rng.randrange(1, 4)):
                jump = rng.randrange(room // 3 + 1)
                positions[rng.randrange(1, width) :] += jump
        batch.positions[row] = positions
    return batch


def _learning_rate(recipe: Recipe, step: int) -> float:
    """Warm-up, flat, then linear decay to a twentieth over the last third."""
    decay = recipe.steps // 3
    warm = min(1.0, (step + 1) / recipe.warmup)
    return warm * max(0.05, min(1.0, (recipe.steps - step) / max(1, decay)))


class Muon(torch.optim.Optimizer):
    """Momentum orthogonalised by Newton-Schulz, for matrices (Jordan et al. 2024).

    `torch.optim.Muon` iterates in bfloat16, which a CPU without bfloat16 units runs a hundred times slower than float32.
    """

    def __init__(self, params: list[torch.nn.Parameter], lr: float, momentum: float = 0.95, weight_decay: float = 0.01):
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for matrix in group["params"]:
                state = self.state[matrix]
                if not state:
                    state["momentum"] = torch.zeros_like(matrix)
                average = state["momentum"].lerp_(matrix.grad, 1 - group["momentum"])
                update = _orthogonalise(matrix.grad.lerp(average, group["momentum"]))
                stretch = max(1.0, matrix.size(0) / matrix.size(1)) ** 0.5
                matrix.mul_(1 - group["lr"] * group["weight_decay"]).add_(update, alpha=-group["lr"] * stretch)


def _orthogonalise(matrix: torch.Tensor, steps: int = 5) -> torch.Tensor:
    """The nearest semi-orthogonal matrix, roughly: a quintic Newton-Schulz iteration."""
    x = matrix / (matrix.norm() + 1e-7)
    tall = x.size(0) > x.size(1)
    x = x.T if tall else x
    for _ in range(steps):
        gram = x @ x.T
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x.T if tall else x


def _optimizers(model: LlamaForCausalLM, recipe: Recipe) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the blocks, AdamW for embeddings and gains (the usual split)."""
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n and "lm_head" not in n]
    chosen = {id(p) for p in matrices}
    others = [p for p in model.parameters() if id(p) not in chosen]
    return [
        Muon(matrices, lr=recipe.matrix_learning_rate),
        torch.optim.AdamW(others, lr=recipe.learning_rate, betas=(0.9, 0.98), weight_decay=0.0),
    ]


def answer_loss(model: LlamaForCausalLM, batch: Batch) -> tuple[torch.Tensor, float]:
    """Cross-entropy and accuracy on the labelled tokens; the output head runs on those positions alone.

    Every sequence weighs the same, however long its answers are: or the written-out steps of arithmetic would drown the
    few tokens that a retrieval task answers with.
    """
    hidden = model.model(input_ids=batch.ids, position_ids=batch.positions, use_cache=False).last_hidden_state
    labels = batch.labels[:, 1:]
    wanted = labels != IGNORE
    logits = model.lm_head(hidden[:, :-1][wanted])
    targets = labels[wanted]
    weight = (1.0 / wanted.sum(1, keepdim=True).clamp(min=1)).expand_as(wanted)[wanted]
    loss = (F.cross_entropy(logits.float(), targets, reduction="none") * weight).sum() / weight.sum()
    return loss, float(((logits.argmax(-1) == targets).float() * weight).sum() / weight.sum())


def _save(folder: Path, model: LlamaForCausalLM, optimizers: list[torch.optim.Optimizer], step: int) -> None:
    """Checkpoint without pickle: weights and moments as safetensors, written beside and then renamed."""
    tensors = {f"model.{name}": value for name, value in model.state_dict().items() if name != "lm_head.weight"}
    for index, optimizer in enumerate(optimizers):
        for key, state in optimizer.state_dict()["state"].items():
            for name, value in state.items():
                tensors[f"optimizer.{index}.{key}.{name}"] = torch.as_tensor(value)
    temporary = folder / "checkpoint.tmp"
    save_file({k: v.contiguous().clone() for k, v in tensors.items()}, temporary, metadata={"step": str(step)})
    temporary.replace(folder / "checkpoint.safetensors")


def _restore(folder: Path, model: LlamaForCausalLM, optimizers: list[torch.optim.Optimizer]) -> int:
    from safetensors import safe_open

    path = folder / "checkpoint.safetensors"
    if not path.exists():
        return 0
    tensors = load_file(path)
    model.load_state_dict({k[6:]: v for k, v in tensors.items() if k.startswith("model.")}, strict=False)
    for index, optimizer in enumerate(optimizers):
        state = optimizer.state_dict()
        for key, value in tensors.items():
            if key.startswith(f"optimizer.{index}."):
                _, _, number, name = key.split(".")
                state["state"].setdefault(int(number), {})[name] = value
        optimizer.load_state_dict(state)
    with safe_open(path, framework="pt") as file:
        return int(file.metadata()["step"])


def train(recipe: Recipe, folder: str | Path, device: str = "cpu", every: int = 100) -> Iterator[dict[str, Any]]:
    """Trains (or goes on with) a pocket model in ``folder``; yields a progress record every ``every`` steps.

    ``folder`` receives ``checkpoint.safetensors`` while it runs, and a `from_pretrained` folder in bfloat16 at the end.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(recipe.seed)
    tokenizer = train_tokenizer()
    model = LlamaForCausalLM(recipe.config(tokenizer)).to(device)
    model.train()
    optimizers = _optimizers(model, recipe)
    first = _restore(folder, model, optimizers)
    (folder / "recipe.json").write_text(json.dumps(asdict(recipe), indent=1))
    rates = [[group["lr"] for group in optimizer.param_groups] for optimizer in optimizers]
    base = [[recipe.matrix_learning_rate], [recipe.learning_rate]] if first else rates
    losses, hits, seen, start = 0.0, 0.0, 0, time.perf_counter()
    for step in range(first, recipe.steps):
        batch = make_batch(recipe, step, tokenizer)
        batch = replace(batch, **{k: v.to(device) for k, v in vars(batch).items()})
        scale = _learning_rate(recipe, step)
        for optimizer, lrs in zip(optimizers, base, strict=True):
            for group, lr in zip(optimizer.param_groups, lrs, strict=True):
                group["lr"] = lr * scale
        loss, accuracy = answer_loss(model, batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        losses, hits, seen = losses + float(loss.detach()), hits + accuracy, seen + batch.ids.numel()
        if (step + 1) % every == 0 or step + 1 == recipe.steps:
            _save(folder, model, optimizers, step + 1)
            span = (step - first) % every + 1
            yield {
                "step": step + 1,
                "of": recipe.steps,
                "stage": recipe.stage_at(step)[0].name,
                "loss": losses / span,
                "accuracy": hits / span,
                "tokens_per_s": seen / (time.perf_counter() - start),
            }
            losses, hits, seen, start = 0.0, 0.0, 0, time.perf_counter()
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
