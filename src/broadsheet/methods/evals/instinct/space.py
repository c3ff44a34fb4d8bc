"""The instructions that an open model says when random soft prompts stand before the examples, and their features.

A point z of a Sobol sequence in [0, 1]^d becomes the soft prompt A z: ``n_tok`` vectors in the model's embedding space, A
fixed and uniform in (-1, 1). The model reads [soft prompt; newline, examples, "The instruction was to"]: the last layer's
state at the last token is the point's feature, the greedy continuation its instruction (paper sections 3 and 4.1).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    import torch

Array = NDArray[np.float64]
Pooling = Literal["last", "mean", "max"]
PREFIX = "The instruction was to"
_SENTENCE = re.compile(r" *[.?!]['\")\]]* *")


def domain(size: int, d: int, seed: int = 0) -> Array:
    """``size`` points of a scrambled Sobol sequence, [size, d] in [0, 1]; the same for the same seed."""
    from torch.quasirandom import SobolEngine

    if d < 1 or size < 1:
        raise ValueError(f"a domain has at least one point and one dimension, got {size} and d = {d}")
    return SobolEngine(dimension=d, scramble=True, seed=seed).draw(size).double().numpy()


def projection(rows: int, d: int, seed: int = 0) -> torch.Tensor:
    """A [rows, d], uniform in (-1, 1)."""
    import torch

    return torch.rand(rows, d, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def first_sentence(continuation: str) -> str:
    """The instruction in what a model went on to say: up to "Comment:", the first sentence, with the prefix before it."""
    text = f"{PREFIX} {continuation.strip()}".split("Comment:")[0]
    return " ".join(_SENTENCE.split(text)[0].split())


def spoken(demos: Sequence[tuple[str, str]]) -> str:
    """What the white box reads after the soft prompt."""
    shown = "\n\n".join(f"Input: {given}\nOutput: {wanted}" for given, wanted in demos)
    return f"\n{shown}\n\n{PREFIX}"


@dataclass
class InstructionSpace:
    """``z`` [n, d], ``features`` [n, width] (both float64) and the instruction of every point, said when it is asked for."""

    z: Array
    features: Array
    say: Callable[[int], str] = field(repr=False)
    _said: dict[int, str] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        if len(self.z) != len(self.features):
            raise ValueError(f"every point has features: got {len(self.z)} points and {len(self.features)} rows")

    def __len__(self) -> int:
        return len(self.z)

    def decode(self, i: int) -> str:
        """The instruction of point ``i``; it is generated once."""
        if i not in self._said:
            self._said[i] = self.say(int(i))
        return self._said[i]

    def texts(self, points: Iterable[int]) -> list[str]:
        return [self.decode(i) for i in points]

    @classmethod
    def from_model(
        cls,
        model: Any,
        tokenizer: Any,
        demos: Sequence[tuple[str, str]],
        n_domain: int = 10_000,
        d: int = 10,
        n_tok: int = 5,
        pooling: Pooling = "last",
        *,
        scale: float = 1.0,
        batch: int = 10,
        max_new_tokens: int = 64,
        seed: int = 0,
    ) -> InstructionSpace:
        """The space of a local transformers causal language model and examples (input, output).

        ``scale``: factor of A; 1 is the paper's, whose soft prompts are far longer vectors than the embeddings of a small
        model. Features are in float64, whatever the model's type. Raises ValueError for a model that cannot be given
        embeddings.
        """
        import torch

        if n_tok < 1 or batch < 1 or not demos:
            raise ValueError(f"n_tok and batch are at least 1 and there are examples; got {n_tok}, {batch}, {len(demos)}")
        if pooling not in ("last", "mean", "max"):
            raise ValueError(f"pooling is last, mean or max, got {pooling}")
        z = domain(n_domain, d, seed)
        embedding = _embeddings(model)
        ids = tokenizer(spoken(demos), return_tensors="pt").input_ids.to(embedding.weight.device)
        with torch.no_grad():
            words = embedding(ids)
        a = projection(n_tok * words.shape[-1], d, seed) * scale

        def embeds(points: Sequence[int]) -> torch.Tensor:
            """[points, n_tok + words, width]"""
            soft = (torch.from_numpy(z[list(points)]).float() @ a.T).to(words.device, words.dtype)
            return torch.cat([soft.unflatten(1, (n_tok, -1)), words.expand(len(points), -1, -1)], dim=1)

        @torch.no_grad()
        def features(points: Sequence[int]) -> torch.Tensor:
            states = model.base_model(inputs_embeds=embeds(points), use_cache=False).last_hidden_state.double()
            if pooling == "last":
                return states[:, -1]
            return states.mean(1) if pooling == "mean" else states.amax(1)

        @torch.no_grad()
        def say(i: int) -> str:
            given = embeds([i])
            mask = torch.ones(given.shape[:2], dtype=torch.long, device=given.device)
            new = model.generate(
                inputs_embeds=given, attention_mask=mask, max_new_tokens=max_new_tokens, do_sample=False,
                pad_token_id=tokenizer.pad_token_id,
            )  # fmt: skip
            return first_sentence(tokenizer.decode(new[0], skip_special_tokens=True))

        found = [features(range(at, min(at + batch, n_domain))).cpu() for at in range(0, n_domain, batch)]
        return cls(z, torch.cat(found).numpy(), say)


def _embeddings(model: Any) -> Any:
    """The model's input embeddings, if it can be given vectors instead of words."""
    from inspect import signature

    takes = "inputs_embeds" in signature(getattr(model, "forward", lambda: None)).parameters
    if not takes or not hasattr(model, "generate") or getattr(model.config, "is_encoder_decoder", False):
        raise ValueError("the white box must be a decoder of transformers that generates from inputs_embeds")
    return model.get_input_embeddings()
