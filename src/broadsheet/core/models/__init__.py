"""Loading models: built-in pocket models, folders, hub names."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from inspect import signature
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

POCKET_FOLDER = Path(__file__).parent.parent / "microworld" / "pocket"


class ModelError(ValueError):
    """A model could not be loaded; the message is one line and says what to do."""


def pockets() -> list[str]:
    """Names of the built-in models."""
    return sorted(path.parent.name for path in POCKET_FOLDER.glob("*/model.safetensors"))


def load(
    name: str, dtype: torch.dtype | None = None, device: str = "cpu"
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Loads a causal language model (or a vision-language model, LLaVA and the like) and its tokenizer, in evaluation mode.

    ``name``: a built-in pocket model, a folder with safetensors weights, or a hub name. ``dtype``: float32 on a CPU and the
    checkpoint's own elsewhere when None. Remote code is never run and pickled weights are never read. Raises `ModelError`.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoTokenizer

    wanted = dtype or (torch.float32 if device == "cpu" else "auto")
    sees = getattr(load_config(name), "vision_config", None) is not None
    with _explained(name):
        kind = AutoModelForImageTextToText if sees else AutoModelForCausalLM
        model = kind.from_pretrained(_source(name), dtype=wanted, use_safetensors=True)
        tokenizer = AutoTokenizer.from_pretrained(_source(name))
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.bos_token
    tokenizer.padding_side = "left"
    model.to(device)  # type: ignore[arg-type]  # transformers wraps `to` without its signature
    return model.eval(), tokenizer


@lru_cache
def _cache_argument() -> str:
    from transformers import LlamaModel

    return "cache" if "cache" in signature(LlamaModel.forward).parameters else "past_key_values"


def with_cache(cache: Any) -> dict[str, Any]:
    """``model(ids, **with_cache(cache))``: the argument is ``cache`` since transformers 5.24, ``past_key_values`` before."""
    return {_cache_argument(): cache}


def cache_of(output: Any) -> Any:
    """The cache that a model's output brings, whatever transformers calls it."""
    return output[_cache_argument()]


def load_config(name: str) -> PreTrainedConfig:
    """The configuration of a model that `load` would take, without its weights. Raises `ModelError`."""
    from transformers import AutoConfig

    with _explained(name):
        return AutoConfig.from_pretrained(_source(name))


def _source(name: str) -> str | Path:
    """What transformers is asked for."""
    if name in pockets():
        return POCKET_FOLDER / name
    if not Path(name).is_dir():
        if name.startswith((".", "/", "~")) or name.count("/") != 1:
            raise ModelError(
                f"no model '{name}': give a built-in one ({', '.join(pockets()) or 'none yet'}), a folder, or a hub name"
            )
    elif not (Path(name) / "config.json").is_file():
        raise ModelError(f"{name} has no config.json; give the folder that save_pretrained wrote")
    return name


@contextmanager
def _explained(name: str) -> Iterator[None]:
    """Turns what transformers raises into a `ModelError`."""
    from safetensors import SafetensorError

    try:
        yield
    except SafetensorError as error:
        raise ModelError(f"{name}: the weights are damaged ({error}); download or save them again") from None
    except ModelError:
        raise
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        text = str(error.args[0] if isinstance(error, KeyError) and error.args else error).strip()
        reason = text.splitlines()[0] if text else type(error).__name__
        raise ModelError(f"cannot load '{name}': {reason}") from None


def fingerprint(model: PreTrainedModel) -> str:
    """A short hash of configuration and weights: two models with it are the same model."""
    digest = hashlib.sha256()
    config = {k: v for k, v in model.config.to_dict().items() if not k.startswith(("_", "transformers_version", "dtype"))}
    digest.update(json.dumps(config, sort_keys=True, default=str).encode())
    for name, value in sorted(model.state_dict().items()):
        flat = value.detach().float().flatten()
        digest.update(f"{name}{tuple(value.shape)}{flat.sum():.6e}{flat.abs().sum():.6e}".encode())
    return digest.hexdigest()[:12]


def identity(name: str) -> str:
    """What stands behind a model name, without loading it: changes when a folder's files do."""
    folder = POCKET_FOLDER / name if name in pockets() else Path(name)
    if not folder.is_dir():
        return name
    files = sorted(path for path in folder.iterdir() if path.suffix in {".json", ".safetensors"})
    stamps = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    return hashlib.sha256(json.dumps(stamps).encode()).hexdigest()[:12]
