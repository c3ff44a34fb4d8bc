"""Small random models and a small tokenizer for tests."""

from __future__ import annotations

import os
from functools import lru_cache
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    GPTNeoXConfig,
    LlamaConfig,
    OPTConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
)

SHARED = Path(os.environ.get("BROADSHEET_SHARED", Path(__file__).parents[2] / "shared"))

needs_stories = pytest.mark.skipif(
    not (SHARED / "models" / "stories260K").is_dir(), reason="shared models are not here; set BROADSHEET_SHARED"
)

_SIZES = {
    "vocab_size": 97,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "max_position_embeddings": 1024,
}


def tiny(kind: str = "gqa", seed: int = 0, **sizes: object) -> PreTrainedModel:
    """A random model, with large weights: Llama's ``gqa``, ``mha``, ``mqa``; ``qwen2``, ``qwen3``; ``neox``; ``opt``."""
    wanted = {**_SIZES, **sizes}
    kv_heads = {"gqa": 2, "mha": 4, "mqa": 1}.get(kind, 2)
    if kind == "neox":
        config = GPTNeoXConfig(**wanted)
    elif kind == "opt":
        config = OPTConfig(**{"ffn_dim": 96, "word_embed_proj_dim": wanted["hidden_size"], **wanted})
    elif kind == "qwen2":
        config = Qwen2Config(**{"num_key_value_heads": kv_heads, **wanted})
    elif kind == "qwen3":
        config = Qwen3Config(**{"num_key_value_heads": kv_heads, "head_dim": 16, **wanted})
    else:
        config = LlamaConfig(**{"num_key_value_heads": kv_heads, **wanted})
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 2 and "embed" not in name:
                parameter.mul_(4)  # sharper attention than the tiny default initialisation gives
    return model


@lru_cache
def shared_tiny(kind: str = "gqa") -> PreTrainedModel:
    """One instance a kind for tests that do not change the weights."""
    return tiny(kind)


def random_ids(batch: int, tokens: int, seed: int = 0, vocabulary: int = 97) -> torch.Tensor:
    """Token ids without the special ones, [batch, tokens]."""
    return torch.randint(3, vocabulary, (batch, tokens), generator=torch.Generator().manual_seed(seed))


def positions(mask: torch.Tensor) -> torch.Tensor:
    """Position ids of a left-padded batch."""
    return (mask.cumsum(1) - 1).clamp(min=0)
