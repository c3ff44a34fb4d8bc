"""MegaScale's algorithmic levers as real modules on a tiny Llama: parallel block, sliding window, LAMB (section 3.1).

The parallel block is y = x + MLP(N(x)) + Attn(N(x)) with one norm N, in place of two residual steps. The sliding
window lets a token attend to itself and the ``window - 1`` tokens before it. LAMB (You et al., ICLR 2020, algorithm
2) scales Adam's direction by |w| / |direction| for each tensor, which is what lets the paper raise the batch four
times.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaDecoderLayer


@dataclass(frozen=True)
class TinyModel:
    """Shape of the model. ``parallel_block`` and ``window`` (0: full attention) are the paper's levers."""

    hidden: int = 64
    layers: int = 2
    heads: int = 4
    feedforward: int = 128
    vocabulary: int = 64
    tokens: int = 32
    dropout: float = 0.1
    parallel_block: bool = False
    window: int = 0

    def __post_init__(self) -> None:
        if self.hidden % self.heads:
            raise ValueError(f"hidden={self.hidden} is not divisible by heads={self.heads}")
        if not 0 <= self.window <= self.tokens:
            raise ValueError(f"window={self.window} must lie between 0 (full attention) and tokens={self.tokens}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout={self.dropout} must lie in [0, 1)")

    def build(self) -> LlamaForCausalLM:
        """The model, fp32, initialised from torch's generator as it stands."""
        config = LlamaConfig(  # type: ignore[call-arg]  # takes attn_implementation, which its signature hides
            hidden_size=self.hidden, num_hidden_layers=self.layers, num_attention_heads=self.heads,
            num_key_value_heads=self.heads, intermediate_size=self.feedforward, vocab_size=self.vocabulary,
            max_position_embeddings=self.tokens, attention_dropout=self.dropout, use_cache=False,
            attn_implementation="eager", pad_token_id=0, bos_token_id=1, eos_token_id=2,
        )  # fmt: skip
        model = LlamaForCausalLM(config)
        if self.parallel_block:
            for layer in model.model.layers:
                layer.__class__ = ParallelLayer
                del layer.post_attention_layernorm  # one norm serves both branches
        return model

    def mask(self) -> Tensor:
        """Additive attention mask [1, 1, tokens, tokens]: causal, and within the window."""
        place = torch.arange(self.tokens)
        distance = place[:, None] - place[None, :]
        seen = (distance >= 0) & (distance < (self.window or self.tokens))
        return torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)[None, None]

    def loss(self, model: Callable[..., Any], batch: Tensor, mask: Tensor) -> Tensor:
        """Mean next-token cross-entropy (nats) of ``batch`` [rows, tokens]; ``mask`` is `mask`'s."""
        logits = model(input_ids=batch, attention_mask=mask.expand(len(batch), -1, -1, -1)).logits
        return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), batch[:, 1:].flatten())


class ParallelLayer(LlamaDecoderLayer):
    """A Llama layer whose attention and MLP read the same normed input: y = x + MLP(N(x)) + Attn(N(x))."""

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        normed = self.input_layernorm(hidden_states)
        attended, _ = self.self_attn(normed, *args, **kwargs)
        return hidden_states + self.mlp(normed) + attended


class Lamb(torch.optim.Optimizer):
    """LAMB with bias correction: w -= lr * |w| / |d| * d, d = m / (sqrt(v) + eps) + weight_decay * w.

    The trust ratio is 1 where either norm is zero, as the authors say.
    """

    def __init__(
        self, params: Iterable[Tensor], lr: float = 1e-2, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-6,
        weight_decay: float = 0.01,
    ):  # fmt: skip
        if lr <= 0:
            raise ValueError(f"lr={lr} must be positive")
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        loss = closure() if closure else None
        for group in self.param_groups:
            first, second = group["betas"]
            for weight in group["params"]:
                if weight.grad is None:
                    continue
                state = self.state[weight]
                if not state:
                    state["step"] = torch.zeros(())
                    state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(weight), torch.zeros_like(weight)
                state["step"] += 1
                count = state["step"].item()
                mean = state["exp_avg"].mul_(first).add_(weight.grad, alpha=1 - first) / (1 - first**count)
                square = state["exp_avg_sq"].mul_(second).addcmul_(weight.grad, weight.grad, value=1 - second)
                direction = mean / ((square / (1 - second**count)).sqrt() + group["eps"]) + group["weight_decay"] * weight
                size, length = weight.norm().item(), direction.norm().item()
                weight.add_(direction, alpha=-group["lr"] * (size / length if size and length else 1.0))
        return loss


class Corpus:
    """An endless text whose truth is known: a random Markov chain of order one over the vocabulary.

    A batch is a function of (seed, step, rank) alone, so a restarted run sees what the unbroken one saw.
    """

    def __init__(self, vocabulary: int, tokens: int, seed: int = 0, branches: int = 4):
        if vocabulary <= branches + 3:
            raise ValueError(f"vocabulary={vocabulary} must be above {branches + 3}")
        self.tokens, self.seed = tokens, seed
        make = torch.Generator().manual_seed(seed)
        self.next = torch.randint(3, vocabulary, (vocabulary, branches), generator=make)  # 0 to 2 are special

    def batch(self, step: int, rank: int, rows: int) -> Tensor:
        """Token ids [rows, tokens]."""
        make = torch.Generator().manual_seed((self.seed * 1_000_003 + step) * 4099 + rank)
        choice = torch.randint(0, self.next.shape[1], (rows, self.tokens), generator=make)
        current = torch.randint(3, self.next.shape[0], (rows,), generator=make)
        found = [current]
        for place in range(1, self.tokens):
            current = self.next[current, choice[:, place]]
            found.append(current)
        return torch.stack(found, dim=1)
