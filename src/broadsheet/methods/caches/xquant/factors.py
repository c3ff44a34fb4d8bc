"""SVD factors of the key and value projections: made once a model, kept on disk if wished."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn
from transformers import PreTrainedModel

from broadsheet.core.models.taps import attention_modules
from broadsheet.core.numerics.ledger import nbytes

PLAIN_FACTORS = ("U_k", "M_k", "U_v", "M_v")
CROSS_FACTOR = "U_kv"


@dataclass(frozen=True)
class Factors:
    """SVD factors of a model's key and value projections: weights, not cache state.

    ``tensors``, by the names of the file: ``layers.{i}.U_k``, ``U_v`` [hidden_size, rank], ``M_k``, ``M_v``
    [rank, kv_heads * head_dim], with U M = W^T for nn.Linear's W; ``U_kv`` [hidden_size, rank], a basis of
    what keys and values read together. ``fingerprint``: of the projection weights they were made from.
    """

    tensors: dict[str, torch.Tensor] = field(default_factory=dict)
    fingerprint: str = ""

    @property
    def nbytes(self) -> int:
        return nbytes(self.tensors)

    def of(self, index: int) -> dict[str, torch.Tensor]:
        """The factors of layer ``index``, by their short names."""
        names = {name: f"layers.{index}.{name}" for name in (*PLAIN_FACTORS, CROSS_FACTOR)}
        return {name: self.tensors[full] for name, full in names.items() if full in self.tensors}

    def save(self, path: str | Path) -> None:
        """Writes a safetensors file; its header names the model by its fingerprint."""
        about = {"kind": "xquant factors", "model": self.fingerprint}
        tensors = {name: tensor.contiguous().cpu() for name, tensor in self.tensors.items()}
        save_file(tensors, path, metadata={"broadsheet": json.dumps(about)})


#: factors made or loaded, by model, each with a stamp of the weights that they belong to
_prepared: WeakKeyDictionary[nn.Module, tuple[tuple[Any, ...], Factors]] = WeakKeyDictionary()


def fingerprint(model: PreTrainedModel) -> str:
    """SHA-256 over the key and value projection weights of every layer."""
    digest = hashlib.sha256()
    for weight in _weights(model):
        digest.update(f"{tuple(weight.shape)} {weight.dtype}".encode())
        digest.update(weight.detach().cpu().contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _weights(model: PreTrainedModel) -> Iterator[torch.Tensor]:
    for module in attention_modules(model):
        for name in ("k_proj", "v_proj"):
            weight = getattr(projection_of(module, name), "weight", None)
            if not isinstance(weight, torch.Tensor) or not weight.is_floating_point():
                kind = type(module).__name__
                raise ValueError(f"{name} of {kind} has no floating-point weight; use latent='none'")
            yield weight


def projection_of(module: nn.Module, name: str) -> nn.Module:
    """``module.k_proj`` or ``module.v_proj``; raises ValueError where projections are fused."""
    found = getattr(module, name, None)
    if not isinstance(found, nn.Module):
        raise ValueError(
            f"{type(module).__name__} has no separate {name}; XQuant rebuilds keys and values by k_proj and "
            "v_proj and does not cover fused projections (Phi-3, GPT-NeoX)"
        )
    return found


def _svd(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """U [in, rank] and M = S B^T [rank, out] with U M = W^T, float64; each column's largest entry is > 0."""
    u, s, bt = torch.linalg.svd(weight.detach().double().T, full_matrices=False)
    signs = u.gather(0, u.abs().argmax(0, keepdim=True)).sign()
    return u * signs, (s[:, None] * bt) * signs.T


def prepared(model: PreTrainedModel, names: list[str]) -> Factors:
    """The factors ``names`` of ``model``: computed in float64, kept in the weights' dtype.

    What was computed or loaded before is used again as long as the weights are the same.
    """
    if not names:
        return Factors()
    weights = list(_weights(model))
    stamp = _stamp(weights)
    known = _prepared.get(model)
    held = known[1] if known and known[0] == stamp else Factors(fingerprint=fingerprint(model))
    missing = [name for name in names if name not in held.tensors]
    if missing:
        made = dict(held.tensors)
        for name in missing:
            if name not in made:
                made |= _factors_of(name, weights)
        held = replace(held, tensors=made)
        _prepared[model] = (stamp, held)
    return replace(held, tensors={name: held.tensors[name] for name in names})


def loaded(path: str | Path, model: PreTrainedModel, names: list[str]) -> Factors:
    """Reads the factors ``names`` that `Factors.save` wrote; `prepared` gives them from then on.

    Raises ValueError when the file belongs to another model or lacks one of them.
    """
    weights = list(_weights(model))
    try:
        with safe_open(path, framework="pt") as file:
            about = json.loads((file.metadata() or {}).get("broadsheet", "{}"))
            stored = set(file.keys())
            found = {name: file.get_tensor(name) for name in names if name in stored}
    except (SafetensorError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is no file of XQuant factors: {error}") from None
    if about.get("kind") != "xquant factors":
        raise ValueError(f"{path} is no file of XQuant factors; make one with XQuant.prepare(model).save(path)")
    if about.get("model") != fingerprint(model):
        raise ValueError(f"{path} belongs to a model with other weights; make its factors with XQuant.prepare(model)")
    if missing := [name for name in names if name not in found]:
        raise ValueError(f"{path} lacks {missing[0]}: it was made for another latent or cross_layer; prepare again")
    tensors = {name: tensor.to(weights[2 * _layer_of(name)].device) for name, tensor in found.items()}
    factors = Factors(tensors, about["model"])
    _prepared[model] = (_stamp(weights), factors)
    return factors


def _stamp(weights: list[torch.Tensor]) -> tuple[Any, ...]:
    return tuple((weight.data_ptr(), weight._version, weight.dtype, weight.device) for weight in weights)


def _layer_of(name: str) -> int:
    return int(name.split(".")[1])


def _factors_of(name: str, weights: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    """The factor ``name`` and those that come with it."""
    layer, kind = name.rsplit(".", 1)
    number = _layer_of(name)
    keys, values = weights[2 * number : 2 * number + 2]
    if kind == CROSS_FACTOR:
        return {name: _svd(torch.cat([keys, values]))[0].to(keys.dtype)}
    which, weight = ("k", keys) if kind.endswith("_k") else ("v", values)
    u, m = _svd(weight)
    return {f"{layer}.U_{which}": u.to(weight.dtype), f"{layer}.M_{which}": m.to(weight.dtype)}
