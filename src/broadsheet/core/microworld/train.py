"""Trains a pocket model from scratch: `broadsheet train-pocket`.

The curriculum is the point. A small transformer that starts on random key-value pairs learns nothing; one that first learns
to continue a passage it has seen before (induction) picks retrieval up within minutes. So: induction until it is there,
then the microworld's tasks at short context, then longer contexts, with many questions on every context so that one
expensive forward pass carries many lessons. The loss is taken on answers alone.

Induction is a circuit of two heads, and the wait for the first of them (the one that looks at the previous token) is most
of the wait. It needs no learning, only rotary geometry, so the model is given such heads: see `_look_back`.

Everything is a function of the seed: a run that was stopped goes on from its last checkpoint as if nothing had happened.
"""

from __future__ import annotations

import json
import random
import statistics
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from . import code
from .encoding import IGNORE, encode_session, padded
from .lexicon import WORDS
from .sessions import Session
from .tasks import SCBENCH_MINI, SHORT, TASKS, arithmetic
from .tokenizer import train_tokenizer


@dataclass(frozen=True)
class Stage:
    """A stretch of training: at most ``steps`` batches of about ``tokens`` tokens.

    Every batch draws its sequence length between ``first`` and ``last``. ``until``: the stage ends when the running
    accuracy reaches this. ``arithmetic``: how often it is drawn, against 1 for most tasks; its hundreds of facts take
    longest to learn. ``focus``: take the loss on what is not known yet, see `answer_loss`. ``tail``: the context is at most
    three quarters of a sequence, or all but so many tokens. ``rates``: the learning rate's factor at the first and after the
    last step, linear between them and never below a twentieth.
    """

    name: str
    steps: int
    tokens: int
    first: int
    last: int
    until: float = 2.0
    arithmetic: float = 2.5
    focus: bool = False
    tail: int = 0
    rates: tuple[float, float] = (1.0, 1.0)


@dataclass(frozen=True)
class Recipe:
    """Everything that determines a pocket model."""

    name: str
    layers: int = 4
    hidden: int = 256
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 64
    intermediate: int = 384
    positions: int = 4608
    rope_theta: float = 20_000.0
    learning_rate: float = 3e-3
    matrix_learning_rate: float = 0.02
    warmup: int = 50
    looks_back: int = 2  #: heads of the first layer that look 1, 2, ... tokens back
    seed: int = 0
    without: tuple[str, ...] = ()  #: tasks that are left out
    code: bool = False  #: learns `code` instead of the sessions
    stages: tuple[Stage, ...] = ()

    def tokenizer(self) -> PreTrainedTokenizerFast:
        return code.train_tokenizer() if self.code else train_tokenizer()

    def model(self, tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
        """The model at the start of training."""
        config = LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=self.hidden,
            intermediate_size=self.intermediate,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.kv_heads,
            head_dim=self.head_dim,
            max_position_embeddings=self.positions,
            rope_parameters={"rope_type": "default", "rope_theta": self.rope_theta},
            rms_norm_eps=1e-5,
            tie_word_embeddings=True,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
        model = LlamaForCausalLM(config)
        _look_back(model, self.looks_back)
        return model


_STAGES = (
    Stage("induction", 400, 1_200, 24, 64, until=0.95, rates=(1.0, 0.1)),
    Stage("short", 700, 2_400, 64, 256, arithmetic=5, rates=(1.0, 0.5)),
)
RECIPES = {
    recipe.name: recipe
    for recipe in (
        Recipe(
            "pocket-2m",
            stages=(
                *_STAGES,
                Stage("medium", 500, 3_600, 128, 768, arithmetic=8, focus=True, rates=(0.5, 0.3)),
                Stage("long", 125, 4_800, 256, 1_536, arithmetic=6, focus=True, rates=(0.3, 0.3)),
                # Until here every result of arithmetic is off by one as often as not.
                Stage("sums", 500, 3_600, 64, 320, arithmetic=40, focus=True, rates=(0.6, 0.3)),
                Stage("far", 330, 9_216, 384, 4_608, arithmetic=8, focus=True, tail=160, rates=(0.3, 0.0)),
                Stage("farther", 260, 9_216, 1_536, 4_608, arithmetic=2, focus=True, tail=160, rates=(0.4, 0.0)),
                # What the long stages have let slip comes back.
                Stage("all", 600, 9_216, 64, 4_608, arithmetic=8, focus=True, tail=160, rates=(0.4, 0.0)),
            ),
        ),
        # As many key/value heads as query heads, and deep: what XQuant's cross-layer form is made for. Short contexts only.
        Recipe(
            "pocket-2m-mha",
            layers=8,
            hidden=128,
            heads=2,
            kv_heads=2,
            positions=2048,
            stages=(*_STAGES, Stage("medium", 400, 3_600, 128, 512, arithmetic=5, rates=(0.5, 0.0))),
        ),
        # Completes functions of one line, and knows a little English: what a code model is compressed for.
        Recipe(
            "pocket-code",
            layers=3,
            intermediate=256,
            positions=1024,
            code=True,
            stages=(
                Stage("induction", 150, 1_200, 24, 64, until=0.95, rates=(1.0, 0.3)),
                Stage("functions", 1500, 3_072, 128, 256, rates=(1.0, 0.0)),
            ),
        ),
    )
}


@dataclass
class Batch:
    """``ids``, ``labels``: [batch, tokens], padded on the right; labels are IGNORE off the answers. A task per row."""

    ids: torch.Tensor
    labels: torch.Tensor
    tasks: list[str]

    def to(self, device: str) -> Batch:
        return replace(self, ids=self.ids.to(device), labels=self.labels.to(device))


def _repeats(rng: random.Random, length: int, vocabulary: list[int]) -> tuple[list[int], list[int]]:
    """A passage of random tokens, over and over; loss from the second time on, but for a passage's first token.

    The passage's length differs from row to row: a fixed one is solved by position, which transfers to nothing.
    """
    size = rng.randrange(length // 4, length // 2 + 1)
    passage = [rng.choice(vocabulary) for _ in range(size)]
    times = length // size + 1
    return (passage * times)[:length], ([IGNORE] * size + [IGNORE, *passage[1:]] * times)[:length]


_WEIGHTS = {"kv": 1.5, "lists": 0.6, "formats": 0.3, "facts": 0.3, "functions": 0.5}


def _draw(rng: random.Random, length: int, weights: dict[str, float], tail: int) -> Session:
    """One session of at most about ``length`` tokens; see `Stage` for the share of its context."""
    names = list(TASKS)
    name = rng.choices(names, [weights.get(n, 1.0) for n in names])[0]
    if name in SHORT:
        if name == "arithmetic":
            steps = rng.randrange(2, max(3, min(80, length // 13)))
            return arithmetic(rng, 0, max(1, length // (13 * steps + 8)), steps)
        return TASKS[name](rng, 0, max(1, length // 28))
    # The share of the sequence that is context varies, so that every number of items is met.
    context = rng.randrange(length // 4, max((3 * length) // 4, length - tail if tail else 0) + 1)
    per_turn = {"mf": 11, "many_shot": 14, "needle": 15, "vt": 16, "kv": 15, "prefix_suffix": 16, "copy": 21, "repoqa": 27}
    turns = max(1, (length - context) // per_turn.get(name, 14))
    limit = {"kv": context // 5, "prefix_suffix": context // 5, "vt": 40, "needle": 24, "copy": context // 32}
    turns = min(turns, max(1, limit.get(name, turns)))
    return SCBENCH_MINI[name](rng, context, turns)


def make_batch(recipe: Recipe, stage: Stage, step: int, tokenizer: PreTrainedTokenizerFast) -> Batch:
    """The batch of one step of a stage; a function of (recipe.name, recipe.seed, stage.name, step) alone."""
    rng = random.Random(f"{recipe.name}/{recipe.seed}/{stage.name}/{step}")
    length = rng.randrange(stage.first, stage.last + 1)
    # What is repeated is what the tasks repeat: words, and numerals with and without a space.
    if recipe.code:
        vocabulary = list(range(len(tokenizer.all_special_ids), len(tokenizer)))
    else:
        pieces = [*(f"Ġ{word}" for word in WORDS), *(f"{space}{n}" for space in ("", "Ġ") for n in range(100))]
        vocabulary = cast(list[int], tokenizer.convert_tokens_to_ids(pieces))
    rows, tasks = [], []
    for _ in range(max(1, stage.tokens // length)):
        if stage.name == "induction":
            tasks.append(stage.name)
            rows.append(_repeats(rng, length, vocabulary))
        elif recipe.code:
            domain, ids, labels = code.training_row(rng, length, 0.2, tokenizer)
            tasks.append(domain)
            rows.append((ids, labels))
        else:
            weights = {**_WEIGHTS, "arithmetic": stage.arithmetic, **dict.fromkeys(recipe.without, 0.0)}
            session = _draw(rng, length, weights, stage.tail)
            tasks.append(session.task)
            ids, labels = encode_session(session, tokenizer)
            rows.append((ids[: length + 64], labels[: length + 64]))
    return Batch(*padded(rows, int(tokenizer.pad_token_id)), tasks)


@torch.no_grad()
def _look_back(model: LlamaForCausalLM, heads: int, sharpness: float = 40.0, pairs: int = 8) -> None:
    """Makes the first ``heads`` attention heads of the first layer look 1, 2, ... tokens back.

    Half of every embedding's energy is its mean, the same for all tokens but for its size. A key is this mean times a fixed
    vector u, spread over the ``pairs`` fastest rotary frequencies and rotated by one position; the query of head i is u
    rotated by -i. The logit at distance d is then ``sharpness * mean_j cos(theta_j (d - 1 - i))``, largest at d = 1 + i.
    With few pairs they nearly meet again far away and the head blurs: at 4,600 tokens 4 pairs of sharpness 20 leave 15 % of
    the attention on the token meant, 8 of sharpness 40 leave 98.7 %.

    Called again after every step of training. Left free, the means are gone after some hundred steps, the heads see a blend
    of the last tokens, and the order in a copied passage is lost.
    """
    config: Any = model.config  # its fields are declared optional
    dim, hidden = config.head_dim, config.hidden_size
    embeddings = model.model.embed_tokens.weight
    deviation, mean = torch.std_mean(embeddings, dim=-1, correction=0, keepdim=True)
    embeddings.add_(deviation - mean)
    frequencies = config.rope_parameters["rope_theta"] ** (-torch.arange(0, dim, 2) / dim)[:pairs]
    # After RMSNorm the mean is 1 / sqrt(2) and a row of ones sums to hidden / sqrt(2); the softmax scale is 1 / sqrt(dim).
    size = (sharpness * dim**0.5 / (hidden**2 / 2)) ** 0.5

    def turned(by: int) -> torch.Tensor:
        vector = torch.zeros(dim, 1)
        vector[:pairs, 0] = (by * frequencies).cos() * pairs**-0.5
        vector[dim // 2 : dim // 2 + pairs, 0] = (by * frequencies).sin() * pairs**-0.5
        return size * vector

    attention = model.model.layers[0].self_attn
    for head in range(heads):
        shared = head // (config.num_attention_heads // config.num_key_value_heads)
        attention.q_proj.weight[head * dim : (head + 1) * dim] = turned(-head)
        attention.k_proj.weight[shared * dim : (shared + 1) * dim] = turned(1)


def _learning_rate(recipe: Recipe, stage: Stage, step: int) -> float:
    """The factor on the recipe's rates: what the stage says, and a warm-up in the first one."""
    first, last = stage.rates
    factor = max(0.05, first + (last - first) * step / stage.steps)
    return factor * min(1.0, (step + 1) / recipe.warmup) if stage is recipe.stages[0] else factor


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


def answer_loss(model: LlamaForCausalLM, batch: Batch, focus: bool = False) -> tuple[torch.Tensor, list[float]]:
    """Cross-entropy on the labelled tokens, and the accuracy on them by row; the output head runs on them alone.

    Every sequence weighs the same, however long its answers are: or the written-out steps of arithmetic would drown the
    few tokens that a retrieval task answers with. With ``focus`` a token weighs 1 - p (p: the probability that it has),
    so that within a sequence the one result counts that six predictable words surround.
    """
    hidden = model.model(input_ids=batch.ids, use_cache=False).last_hidden_state  # causal, so right padding needs no mask
    labels = batch.labels[:, 1:]
    wanted = labels != IGNORE
    logits = model.lm_head(hidden[:, :-1][wanted])
    targets = labels[wanted]
    rows = wanted.nonzero()[:, 0]
    losses = F.cross_entropy(logits.float(), targets, reduction="none")
    by_row = torch.zeros(len(labels), device=losses.device)
    weight = 1 - (-losses.detach()).exp() if focus else torch.ones_like(losses)
    total = by_row.index_add(0, rows, weight).clamp(min=1)
    loss = (losses * weight / total[rows]).sum() / len(labels)
    hits = by_row.index_add(0, rows, (logits.argmax(-1) == targets).float()) / wanted.sum(1).clamp(min=1)
    return loss, hits.tolist()


@dataclass
class _Progress:
    """Where a run stands: the stage, the steps done in it, the running accuracy (decay 0.95) and all steps done."""

    stage: int = 0
    step: int = 0
    accuracy: float = 0.0
    done: int = 0

    def advance(self, stage: Stage, accuracy: float) -> None:
        self.step, self.done = self.step + 1, self.done + 1
        self.accuracy += 0.05 * (accuracy - self.accuracy)
        if self.step >= stage.steps or self.accuracy >= stage.until:
            self.stage, self.step, self.accuracy = self.stage + 1, 0, 0.0


def _save(folder: Path, model: LlamaForCausalLM, optimizers: list[torch.optim.Optimizer], progress: _Progress) -> None:
    """Checkpoint without pickle: weights and moments as safetensors, written beside and then renamed."""
    tensors = {f"model.{name}": value for name, value in model.state_dict().items() if name != "lm_head.weight"}
    for index, optimizer in enumerate(optimizers):
        for key, state in optimizer.state_dict()["state"].items():
            for name, value in state.items():
                tensors[f"optimizer.{index}.{key}.{name}"] = torch.as_tensor(value)
    temporary = folder / "checkpoint.tmp"
    metadata = {"progress": json.dumps(asdict(progress))}
    save_file({k: v.contiguous().clone() for k, v in tensors.items()}, temporary, metadata=metadata)
    temporary.replace(folder / "checkpoint.safetensors")


def _restore(folder: Path, model: LlamaForCausalLM, optimizers: list[torch.optim.Optimizer]) -> _Progress:
    path = folder / "checkpoint.safetensors"
    if not path.exists():
        return _Progress()
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
        return _Progress(**json.loads(file.metadata()["progress"]))


def train(recipe: Recipe, folder: str | Path, device: str = "cpu", every: int = 100) -> Iterator[dict[str, Any]]:
    """Trains (or goes on with) a pocket model in ``folder``; yields a progress record every ``every`` steps.

    ``folder`` receives ``checkpoint.safetensors`` while it runs, and a `from_pretrained` folder in bfloat16 at the end.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(recipe.seed)
    tokenizer = recipe.tokenizer()
    model = recipe.model(tokenizer)
    model.to(device).train()  # type: ignore[arg-type]  # transformers wraps `to` and loses its signature
    optimizers = _optimizers(model, recipe)
    progress = _restore(folder, model, optimizers)
    (folder / "recipe.json").write_text(json.dumps(asdict(recipe), indent=1))
    base = (recipe.matrix_learning_rate, recipe.learning_rate)
    losses: list[float] = []
    hits: dict[str, list[float]] = {}
    seen, start = 0, time.perf_counter()
    while progress.stage < len(recipe.stages):
        stage = recipe.stages[progress.stage]
        batch = make_batch(recipe, stage, progress.step, tokenizer).to(device)
        scale = _learning_rate(recipe, stage, progress.step)
        for optimizer, rate in zip(optimizers, base, strict=True):
            for group in optimizer.param_groups:
                group["lr"] = rate * scale
        loss, accuracies = answer_loss(model, batch, stage.focus)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        _look_back(model, recipe.looks_back)
        progress.advance(stage, statistics.mean(accuracies))
        losses.append(float(loss.detach()))
        for task, accuracy in zip(batch.tasks, accuracies, strict=True):
            hits.setdefault(task, []).append(accuracy)
        seen += batch.ids.numel()
        if progress.done % every == 0 or progress.step == 0:
            _save(folder, model, optimizers, progress)
            yield {
                "step": progress.done,
                "of": progress.done + sum(s.steps for s in recipe.stages[progress.stage :]) - progress.step,
                "stage": stage.name,
                "loss": statistics.mean(losses),
                "accuracy": statistics.mean(value for values in hits.values() for value in values),
                "tasks": {task: statistics.mean(values) for task, values in sorted(hits.items())},
                "tokens_per_s": seen / (time.perf_counter() - start),
            }
            losses, hits, seen, start = [], {}, 0, time.perf_counter()
    model.to(torch.bfloat16).save_pretrained(folder)  # type: ignore[arg-type]
    tokenizer.save_pretrained(folder)
