"""What runs a model: the interface, and PyTorch in this process.

A runtime is loaded, and then answers prompts, turn by turn, in a conversation whose cache it keeps. It says when prefill
and decoding began and ended; nobody else's clock is asked.
"""

from __future__ import annotations

import os
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from .clock import Clock
from .config import ModelConfig, RunSettings
from .dialogue import Dialogue, Sampler
from .metrics import Window

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Answer:
    """A reply and its times; see `metrics.Turn`."""

    text: str
    whole: Window
    prefill: Window
    decode: Window
    overhead: float
    input_tokens: int
    output_tokens: int
    session_tokens: int
    first_token: float | None
    cpu_seconds: tuple[float, float] | None = None


class Runtime(ABC):
    """``name``: of the runtime; ``model``: a built-in model, folder, hub name or file; ``format``: of the weights."""

    name: ClassVar[str]
    #: the formats of weights that it takes
    formats: ClassVar[tuple[str, ...]]

    def __init__(self, model: str, form: str, config: ModelConfig, settings: RunSettings, clock: Clock):
        if form not in self.formats:
            raise ValueError(f"{self.name} has no format '{form}'; it has {', '.join(self.formats)}")
        self.model, self.format, self.config, self.settings, self.clock = model, form, config, settings, clock

    @abstractmethod
    def load(self) -> Window:
        """Loads the model; when. Raises ValueError when it cannot."""

    @abstractmethod
    def unload(self) -> None:
        """Frees it."""

    @abstractmethod
    def begin(self, conversation: int) -> None:
        """An empty cache, and the randomness of this conversation."""

    @abstractmethod
    def answer(self, prompt: str) -> Answer:
        """One turn. Raises ValueError for a prompt that the context does not hold."""

    @property
    @abstractmethod
    def nbytes(self) -> int:
        """Bytes of the weights, as they are held (or as the file has them)."""

    @property
    def pass_bytes(self) -> int:
        """Bytes of weights that one decoded token reads: all but an embedding of its own."""
        return self.nbytes

    def files(self) -> list[Path]:
        """The files that loading reads, for a cold load."""
        path = Path(self.model)
        return files_of(path) or [path] * path.is_file()


class StepRuntime(Runtime):
    """A runtime that is stepped token by token from here.

    A reply ends at an end token, before the config's ``reverse`` string, or at ``max_gen`` tokens. Every token that was
    drawn is run through the model, the last too. When prompt and longest reply do not fit behind what the cache holds, the
    conversation starts anew with this prompt.
    """

    dialogue: Dialogue
    ends: frozenset[int]
    vocabulary: int

    @abstractmethod
    def clear(self) -> None:
        """Empties the cache."""

    @abstractmethod
    def rewind(self, tokens: int) -> None:
        """Keeps the first ``tokens`` of the cache."""

    @abstractmethod
    def run(self, ids: list[int]) -> Any:
        """Appends tokens to the cache; the last one's logits [vocabulary]."""

    @abstractmethod
    def text(self, ids: list[int]) -> str:
        """Of a reply's tokens, without special ones."""

    def begin(self, conversation: int) -> None:
        key = self.settings.seed * 1_000_003 + conversation
        self.sampler = Sampler(self.config.sampling, key, sorted(self.ends) if self.settings.ignore_eos else ())
        self.tokens: list[int] = []
        self.turn, self.conversation = 0, conversation
        self.clear()

    def prefill(self, ids: list[int]) -> Any:
        """`run`, at most ``n_batch`` tokens at once."""
        size = self.config.sampling.n_batch
        for first in range(0, len(ids), size):
            logits = self.run(ids[first : first + size])
        return logits

    def log_likelihoods(self, prompt: list[int], replies: list[list[int]]) -> list[float]:
        """Of whole replies behind a prompt, in nats."""
        import torch

        self.clear()
        first = torch.as_tensor(self.prefill(prompt)).float().log_softmax(-1)
        found = []
        for reply in replies:
            self.rewind(len(prompt))
            total = float(first[reply[0]])
            for before, token in pairwise(reply):
                total += float(torch.as_tensor(self.run([before])).float().log_softmax(-1)[token])
            found.append(total)
        return found

    def _enter(self, prompt: str) -> tuple[list[int], int]:
        """The tokens to prefill, and how many the cache holds before them."""
        context, most = self.settings.context, self.settings.max_gen
        if self.tokens:
            new = self.dialogue.following(prompt, self.tokens[-1])
            if len(self.tokens) + len(new) + most <= context:
                if self.settings.keep_cache:
                    return new, len(self.tokens)
                self.clear()
                return self.tokens + new, 0
            self.tokens = []
            self.clear()
        new = self.dialogue.opening(prompt)
        least = most if self.settings.ignore_eos else 1
        if len(new) + least > context:
            raise ValueError(
                f"conversation {self.conversation}, turn {self.turn}: a prompt of {len(new)} tokens leaves no room for a "
                f"reply of {least} in a context of {context}; set --context higher"
            )
        return new, 0

    def answer(self, prompt: str) -> Answer:
        clock, cpu = self.clock.now, time.process_time
        start = clock()
        new, held = self._enter(prompt)
        prefill_start, cpu_start = clock(), cpu()
        logits = self.prefill(new)
        prefill_end, cpu_middle = clock(), cpu()
        self.tokens = self.tokens[:held] + new
        room = min(self.settings.max_gen, self.settings.context - len(self.tokens))
        reverse, reply, first_token = self.config.prompt.plain.reverse, list[int](), None
        decode_start = clock()
        while len(reply) < room:
            reply.append(self.sampler.draw(logits, self.tokens))
            self.tokens.append(reply[-1])
            first_token = first_token or clock()
            logits = self.run(reply[-1:])
            if reply[-1] in self.ends:
                break
            if reverse and not self.settings.ignore_eos and reverse in self.text(reply[-len(reverse) - 1 :]):
                break
        decode_end, cpu_end = clock(), cpu()
        text = self.text(reply)
        end = clock()
        self.turn += 1
        overhead = (prefill_start - start) + (decode_start - prefill_end) + (end - decode_end)
        return Answer(
            text.split(reverse)[0] if reverse else text, Window(start, end), Window(prefill_start, prefill_end),
            Window(decode_start, decode_end), overhead, len(new), len(reply), held, first_token,
            (cpu_middle - cpu_start, cpu_end - cpu_middle),
        )  # fmt: skip


class TorchRuntime(StepRuntime):
    """transformers on PyTorch. Formats: fp32, fp16, bf16, and int8 to int2.

    The integer formats hold the linear layers as codes in groups of 128 with a 16-bit scale and zero, rounded to nearest,
    and compute in float32 (the core's `GroupLinear`); embedding and norms stay in float32. The output layer is held with 8
    bits where it is not the embedding too. They are rounded after loading, which is not counted as loading.
    """

    network: Any = None
    cache: Any = None

    name = "torch"
    formats = ("fp32", "fp16", "bf16", "int8", "int4", "int3", "int2")
    group_size: ClassVar[int] = 128

    def load(self) -> Window:
        import torch

        from broadsheet.core.models import load

        torch.set_num_threads(self.settings.threads)
        start = self.clock.now()
        dtype = {"fp16": torch.float16, "bf16": torch.bfloat16}.get(self.format, torch.float32)
        self.network, self.tokenizer = load(self.model, dtype)
        loaded = Window(start, self.clock.now())
        most = getattr(self.network.config.get_text_config(), "max_position_embeddings", None)
        if most is not None and self.settings.context > most:
            self.unload()
            raise ValueError(f"a context of {self.settings.context} is beyond the {most} positions of {self.model}")
        if self.format.startswith("int"):
            quantise(self.network, int(self.format.removeprefix("int")), self.group_size)
        self.adopt()
        return loaded

    def adopt(self) -> None:
        """Takes the model and tokenizer that are there."""
        own = getattr(self.network.generation_config, "eos_token_id", None)
        found = own if isinstance(own, list) else [own, self.tokenizer.eos_token_id]
        self.ends = frozenset(token for token in found if token is not None)
        self.dialogue = Dialogue.of(self.tokenizer, self.config.prompt)
        self.vocabulary = self.network.config.get_text_config().vocab_size

    def unload(self) -> None:
        self.network = self.cache = None

    def clear(self) -> None:
        from transformers import DynamicCache

        self.cache = DynamicCache(config=self.network.config)

    def rewind(self, tokens: int) -> None:
        if more := self.cache.get_seq_length() - tokens:
            self.cache.crop(-more)

    def run(self, ids: list[int]) -> torch.Tensor:
        import torch

        from broadsheet.core.models import with_cache

        with torch.inference_mode(), _products(self.network.dtype, len(ids)):
            rows = torch.tensor([ids], device=self.network.device)
            output: Any = self.network(input_ids=rows, **with_cache(self.cache), use_cache=True, logits_to_keep=1)
            return output.logits[0, -1]

    def log_likelihoods(self, prompt: list[int], replies: list[list[int]]) -> list[float]:
        """All replies in one batch behind one prefill."""
        import torch

        from broadsheet.core.models import with_cache

        self.clear()
        first = self.prefill(prompt).float().log_softmax(-1)
        width = max(map(len, replies))
        # padded at the end, where causal attention lets nothing look at it
        ids = torch.tensor([reply + [0] * (width - len(reply)) for reply in replies], device=self.network.device)
        total = first[ids[:, 0]]
        if width > 1:
            with torch.inference_mode():
                self.cache.batch_repeat_interleave(len(replies))
                output: Any = self.network(input_ids=ids[:, :-1], **with_cache(self.cache), use_cache=True)
            each = output.logits.float().log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
            known = torch.tensor(
                [[place < len(reply) for place in range(1, width)] for reply in replies], device=each.device
            )
            total = total + (each * known).sum(-1)
        return [float(value) for value in total]

    def text(self, ids: list[int]) -> str:
        return str(self.tokenizer.decode(ids, skip_special_tokens=True))

    @property
    def nbytes(self) -> int:
        from broadsheet.core.numerics.ledger import nbytes

        return nbytes([*self.network.parameters(), *self.network.buffers()])

    @property
    def pass_bytes(self) -> int:
        table = self.network.get_input_embeddings().weight
        head = self.network.get_output_embeddings()
        shared = getattr(head, "weight", None) is table
        return self.nbytes - (0 if shared else table.nbytes)

    def files(self) -> list[Path]:
        return files_of(folder_of(self.model))


def folder_of(model: str) -> Path:
    """Where a built-in model's files are, or those of a folder."""
    from broadsheet.core.models import POCKET_FOLDER, pockets

    return POCKET_FOLDER / model if model in pockets() else Path(model)


def files_of(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.is_file()) if folder.is_dir() else []


def tokenizer_of(model: str) -> PreTrainedTokenizerBase:
    """The tokenizer of a built-in model, folder or hub name, without the model."""
    from transformers import AutoTokenizer

    folder = folder_of(model)
    return AutoTokenizer.from_pretrained(folder if folder.is_dir() else model)


@contextmanager
def _products(dtype: torch.dtype, tokens: int) -> Iterator[None]:
    """Takes torch's own product of a bfloat16 matrix with one vector: oneDNN's writes the matrix anew in its own order
    before every product, which takes as long again as the product."""
    import torch

    one_dnn: Any = torch.backends.mkldnn
    before = one_dnn.enabled
    one_dnn.enabled = before and (tokens > 1 or dtype != torch.bfloat16)
    try:
        yield
    finally:
        one_dnn.enabled = before


def quantise(network: Any, bits: int, group_size: int) -> None:
    """Holds the linear layers of the decoder blocks in groups of codes, and an output layer of its own with 8 bits."""
    import torch

    from broadsheet.core.models.walker import blocks
    from broadsheet.core.numerics.group_linear import GroupLinear
    from broadsheet.core.numerics.groups import quantise_groups

    with torch.no_grad():
        for block in blocks(network):
            for name, linear in block.linears.items():
                block.replace(name, GroupLinear.of(linear, quantise_groups(linear.weight.float(), bits, group_size)))
        head = network.get_output_embeddings()
        if head is not None and head.weight is not network.get_input_embeddings().weight:
            network.set_output_embeddings(GroupLinear.of(head, quantise_groups(head.weight.float(), 8, group_size)))


def drop_page_cache(files: list[Path]) -> None:
    """Asks the kernel to forget files, so that the next load is cold (Linux; elsewhere nothing is done)."""
    if not hasattr(os, "posix_fadvise"):
        return
    for path in files:
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(handle)
