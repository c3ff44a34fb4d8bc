"""ONNX Runtime in this process (an optional extra), and the ONNX files that it runs.

A file is exported by torch's own exporter from what transformers loads: one graph for prompt and reply, with the cache as
inputs and outputs. The formats of fewer bits are made of it by ``onnxruntime.quantization``: `MatMulNBits`, in groups of 128
with a float32 scale and a zero of as many bits. Its kernels round what is multiplied with them to 8 bits in groups too
(``accuracy_level`` 4, as published models have it), where our PyTorch formats keep 16. An output layer that is the embedding
stays in 32 bits, one of its own has the format's bits.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import shutil
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from broadsheet.core.records import home

from .clock import Clock
from .config import ModelConfig, RunSettings
from .dialogue import Dialogue
from .metrics import Window
from .runtimes import StepRuntime, files_of, tokenizer_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

FORMATS = ("fp32", "int8", "int4")
GROUP_SIZE = 128
_FILE = "model.onnx"


def need_onnx() -> tuple[Any, Any]:
    """The onnxruntime and onnx packages. Raises ValueError where they are not installed."""
    try:
        import onnx
        import onnxruntime
        import onnxscript  # noqa: F401  # the exporter's
    except ImportError:
        raise ValueError(
            "the runtime onnxruntime needs onnxruntime, onnx and onnxscript: pip install 'broadsheet[onnx]'"
        ) from None
    return onnxruntime, onnx


class OnnxRuntime(StepRuntime):
    """ONNX Runtime on the CPU. ``model``: what transformers loads, of which a file in ``format`` is written under
    BROADSHEET_HOME the first time."""

    name = "onnxruntime"
    formats = FORMATS

    def __init__(self, model: str, form: str, config: ModelConfig, settings: RunSettings, clock: Clock):
        super().__init__(model, form, config, settings, clock)
        need_onnx()
        self.session: Any = None
        #: keys and values of all layers in turn, float32 [1, kv_heads, tokens, head_dim]
        self.cache: list[Any] = []
        self.path = self._written()

    def _written(self) -> Path:
        from broadsheet.core.models import identity, load

        folder = home() / "melt" / "onnx"
        key = hashlib.sha256(identity(self.model).encode()).hexdigest()[:16]
        path = folder / f"{Path(self.model).name}-{self.format}-{key}" / _FILE
        if path.is_file():
            return path
        plain = folder / f"{Path(self.model).name}-fp32-{key}" / _FILE
        if not plain.is_file():
            with _whole(plain.parent) as part:
                export(load(self.model)[0], part / _FILE)
        if self.format != "fp32":
            with _whole(path.parent) as part:
                quantise(plain, part / _FILE, int(self.format.removeprefix("int")))
        return path

    def load(self) -> Window:
        runtime, _ = need_onnx()
        options = runtime.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads = self.settings.threads, 1
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # waiting is no work
        start = self.clock.now()
        try:
            self.session = runtime.InferenceSession(self.path, options, providers=["CPUExecutionProvider"])
        except Exception as error:  # its own kinds of errors have no common base
            raise ValueError(f"ONNX Runtime cannot load {self.path}: {' '.join(str(error).split())}") from None
        loaded = Window(start, self.clock.now())
        from broadsheet.core.models import load_config

        config, tokenizer = load_config(self.model).get_text_config(), tokenizer_of(self.model)
        most = config.max_position_embeddings
        if self.settings.context > most:
            raise ValueError(f"a context of {self.settings.context} is beyond the {most} positions of {self.model}")
        own = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
        self.ends = frozenset(token for token in (*own, tokenizer.eos_token_id) if token is not None)
        self.dialogue = Dialogue.of(tokenizer, self.config.prompt)
        self.vocabulary = config.vocab_size
        self._text = lambda ids: str(tokenizer.decode(ids, skip_special_tokens=True))
        self._ids, *self._past = [one.name for one in self.session.get_inputs()]
        _, heads, _, width = self.session.get_inputs()[1].shape
        self._empty = np.zeros((1, heads, 0, width), np.float32)
        return loaded

    def unload(self) -> None:
        self.session, self.cache = None, []

    def clear(self) -> None:
        self.cache = [self._empty] * len(self._past)

    def rewind(self, tokens: int) -> None:
        self.cache = [part[:, :, :tokens] for part in self.cache]

    def run(self, ids: list[int]) -> Any:
        feed = {self._ids: np.array([ids], np.int64), **dict(zip(self._past, self.cache, strict=True))}
        logits, *self.cache = self.session.run(None, feed)
        return logits[0]

    def text(self, ids: list[int]) -> str:
        return self._text(ids)

    @property
    def nbytes(self) -> int:
        return sum(_weights(self.path).values())

    @property
    def pass_bytes(self) -> int:
        _, onnx = need_onnx()
        graph = onnx.load(self.path, load_external_data=False).graph
        looked_up = {node.input[0] for node in graph.node if node.op_type == "Gather"}
        multiplied = {name for node in graph.node if node.op_type != "Gather" for name in node.input}
        return sum(size for name, size in _weights(self.path).items() if name not in looked_up - multiplied)

    def files(self) -> list[Path]:
        return files_of(self.path.parent)


def _weights(path: Path) -> dict[str, int]:
    """Bytes of every tensor of weights in a file."""
    _, onnx = need_onnx()
    tensors = onnx.load(path, load_external_data=False).graph.initializer
    size = onnx.helper.tensor_dtype_to_np_dtype
    return {one.name: int(np.prod(one.dims, dtype=np.int64)) * size(one.data_type).itemsize for one in tensors}


@contextlib.contextmanager
def _whole(folder: Path) -> Iterator[Path]:
    """A folder to write into, which takes its name when everything is in it."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    part = Path(tempfile.mkdtemp(prefix=".part-", dir=folder.parent))
    try:
        yield part
        with contextlib.suppress(OSError):  # another process was first
            os.rename(part, folder)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def export(model: PreTrainedModel, path: Path) -> None:
    """Writes ``model`` as ONNX, weights beside it: ids int64 [1, new] and the cache, two tensors a layer [1, kv_heads, held,
    head_dim], to the last token's logits [1, vocabulary] and the cache with the new tokens. Raises ValueError for models
    that torch cannot export."""
    import torch
    from torch import nn
    from transformers import DynamicCache

    class Step(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, ids: torch.Tensor, past: list[tuple[torch.Tensor, torch.Tensor]]) -> Any:
            cache = DynamicCache(config=model.config)
            for number, (key, value) in enumerate(past):
                cache.update(key, value, number)
            output: Any = model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
            layers: Any = cache.layers
            return output.logits[:, -1], [(layer.keys, layer.values) for layer in layers]

    config: Any = model.config.get_text_config()
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    shape = (1, config.num_key_value_heads, 5, width)  # any length but 0 and 1, which torch would take for constants
    past = [(torch.zeros(shape), torch.zeros(shape)) for _ in range(config.num_hidden_layers)]
    grows = torch.export.Dim.DYNAMIC
    lengths = {"ids": {1: grows}, "past": [({2: grows}, {2: grows}) for _ in past]}
    step, before = Step().eval(), model.config._attn_implementation
    model.set_attn_implementation("eager")
    log = logging.getLogger("torch.onnx")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            inputs = (torch.tensor([[1, 2, 3]]), past)
            program = torch.onnx.export(step, inputs, dynamo=True, dynamic_shapes=lengths, verbose=False)
            assert program is not None  # it is with dynamo
            program.save(path, external_data=True)
    except torch.onnx.errors.OnnxExporterError as error:
        raise ValueError(
            f"torch cannot export a {model.config.model_type} model: {' '.join(str(error).split())[:300]}"
        ) from None
    finally:
        log.setLevel(level)
        model.set_attn_implementation(before)


def quantise(source: Path, target: Path, bits: int) -> None:
    """Writes the ONNX file ``source`` with its products of weights in ``bits`` bits."""
    _, onnx = need_onnx()
    from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

    logging.getLogger("onnxruntime.quantization").setLevel(logging.ERROR)
    made = MatMulNBitsQuantizer(onnx.load(source), bits=bits, block_size=GROUP_SIZE, accuracy_level=4)
    made.process()
    made.model.save_model_to_file(str(target), use_external_data_format=True)
