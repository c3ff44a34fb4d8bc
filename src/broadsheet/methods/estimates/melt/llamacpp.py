"""llama.cpp as a runtime: in this process (llama-cpp-python, an optional extra), or its ``llama-server`` over HTTP."""

from __future__ import annotations

import hashlib
import json
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from broadsheet.core.records import home

from .clock import Clock
from .config import ModelConfig, RunSettings
from .dialogue import Dialogue, Messages
from .gguf_file import FORMATS, need_gguf, write_gguf
from .metrics import Window
from .runtimes import Answer, Runtime, StepRuntime, tokenizer_of


def need_llama() -> Any:
    """The llama_cpp package. Raises ValueError where it is not installed."""
    try:
        import llama_cpp
    except ImportError:
        raise ValueError(
            "the runtime llamacpp needs llama-cpp-python (built from source, some minutes): "
            "pip install 'broadsheet[llamacpp]'"
        ) from None
    return llama_cpp


class LlamaCppRuntime(StepRuntime):
    """llama.cpp in this process. ``model``: a GGUF file, whose format is its own (``format`` "file"), or what transformers
    loads, of which a file in ``format`` is written under BROADSHEET_HOME. Tokens are drawn by our sampler, from llama.cpp's
    logits."""

    name = "llamacpp"
    formats = (*FORMATS, "file")

    def __init__(self, model: str, form: str, config: ModelConfig, settings: RunSettings, clock: Clock):
        if model.endswith(".gguf"):
            form = "file"
        super().__init__(model, form, config, settings, clock)
        if form == "file" and not Path(model).is_file():
            raise ValueError(f"no GGUF file at {model}; give a file, or a model and a format of {', '.join(FORMATS)}")
        need_llama()
        self.path = Path(model) if form == "file" else self._written()

    def _written(self) -> Path:
        from broadsheet.core.models import identity, load

        key = hashlib.sha256(f"{identity(self.model)} {self.format}".encode()).hexdigest()[:16]
        path = home() / "melt" / "gguf" / f"{Path(self.model).name}-{self.format}-{key}.gguf"
        if not path.is_file():
            write_gguf(*load(self.model), path, self.format)
        return path

    def load(self) -> Window:
        llama = need_llama()
        start = self.clock.now()
        try:
            self.llama = llama.Llama(
                str(self.path), n_ctx=self.settings.context, n_batch=self.config.sampling.n_batch, verbose=False,
                n_threads=self.settings.threads, n_threads_batch=self.settings.threads, no_perf=True,
                flash_attn=True,  # as llama.cpp does by itself; the binding switches it off
            )  # fmt: skip
        except (ValueError, RuntimeError) as error:
            raise ValueError(f"llama.cpp cannot load {self.path}: {error}") from None
        loaded = Window(start, self.clock.now())
        self.vocabulary = int(self.llama.n_vocab())
        self._tokenizer()
        return loaded

    def _tokenizer(self) -> None:
        if self.format == "file":
            self.ends = frozenset({self.llama.token_eos()} - {-1})
            self.dialogue = Dialogue(self._ids, self._template(), self.config.prompt, self._begin())
            self._text = lambda ids: self.llama.detokenize(ids).decode("utf-8", "replace")
            return
        tokenizer = tokenizer_of(self.model)
        self.ends = frozenset({tokenizer.eos_token_id} - {None})
        self.dialogue = Dialogue.of(tokenizer, self.config.prompt)
        self._text = lambda ids: str(tokenizer.decode(ids, skip_special_tokens=True))

    def _ids(self, text: str) -> list[int]:
        return list(self.llama.tokenize(text.encode(), add_bos=False, special=True))

    def _begin(self) -> list[int]:
        return [self.llama.token_bos()] if self.llama.metadata.get("tokenizer.ggml.add_bos_token", "true") == "true" else []

    def _template(self) -> Any:
        """The file's own chat template, in jinja2's sandbox; None without one."""
        source = self.llama.metadata.get("tokenizer.chat_template")
        if not source:
            return None
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        template = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True).from_string(source)
        ends = {"bos_token": self.llama.token_bos(), "eos_token": self.llama.token_eos()}
        named = {
            name: "" if token < 0 else self.llama.detokenize([token], special=True).decode() for name, token in ends.items()
        }

        def render(messages: Messages) -> str:
            return str(template.render(messages=messages, add_generation_prompt=True, **named))

        return render

    def unload(self) -> None:
        if hasattr(self, "llama"):
            self.llama.close()
            del self.llama

    def clear(self) -> None:
        self.llama.reset()

    def rewind(self, tokens: int) -> None:
        self.llama.n_tokens = tokens  # what is behind it is removed with the next call

    def run(self, ids: list[int]) -> Any:
        self.llama.eval(ids)  # behind what was run before
        pointer = need_llama().llama_get_logits_ith(self.llama.ctx, -1)
        return np.ctypeslib.as_array(pointer, (self.llama.n_vocab(),)).copy()

    def text(self, ids: list[int]) -> str:
        return str(self._text(ids))

    @property
    def nbytes(self) -> int:
        return self.path.stat().st_size

    @property
    def pass_bytes(self) -> int:
        return _pass_bytes(self.path)

    def files(self) -> list[Path]:
        return [self.path]


def _pass_bytes(path: Path) -> int:
    """Bytes of all tensors but an embedding that is not the output layer too."""
    tensors = {tensor.name: int(tensor.n_bytes) for tensor in need_gguf().GGUFReader(path).tensors}
    own = "output.weight" in tensors
    return sum(size for name, size in tensors.items() if not (own and name == "token_embd.weight"))


class LlamaServerRuntime(Runtime):
    """``llama-server`` at an address. It keeps the cache and says what it prefilled and how long both parts took; when they
    were follows from the arrival of the last token. ``overhead`` is what is left of a turn, transfer included.

    It never runs a reply's last token, which the next turn prefills: where a runtime that is stepped takes n passes for a
    reply of n tokens, it takes n - 1, and its rate is n over their time."""

    name = "llama-server"
    formats = ("server",)

    def __init__(self, model: str, form: str, config: ModelConfig, settings: RunSettings, clock: Clock):
        if not model.startswith(("http://", "https://")):
            raise ValueError(f"llama-server is at an address such as http://localhost:8080, got '{model}'")
        super().__init__(model.rstrip("/"), "server", config, settings, clock)

    def load(self) -> Window:
        """It is loaded already; how long that took nobody knows."""
        properties = self._post("/props", None)
        room = (properties.get("default_generation_settings") or {}).get("n_ctx")
        if room is not None and room < self.settings.context:
            raise ValueError(f"the server has a context of {room}, the run wants {self.settings.context}; start it with -c")
        template = self._render if properties.get("chat_template") else None
        self.dialogue = Dialogue(self._ids, template, self.config.prompt)
        now = self.clock.now()
        return Window(now, now)

    def unload(self) -> None:
        """The server lives on."""

    def begin(self, conversation: int) -> None:
        self.tokens: list[int] = []
        self.turn, self.conversation = 0, conversation

    def answer(self, prompt: str) -> Answer:
        settings, sampling = self.settings, self.config.sampling
        start = self.clock.now()
        last = self.tokens[-1] if self.tokens else None
        new = self.dialogue.following(prompt, last) if self.tokens else self.dialogue.opening(prompt)
        if self.tokens and len(self.tokens) + len(new) + settings.max_gen > settings.context:
            self.tokens, new = [], self.dialogue.opening(prompt)
        if len(self.tokens) + len(new) >= settings.context:
            raise ValueError(
                f"conversation {self.conversation}, turn {self.turn}: a prompt of {len(new)} tokens leaves no room for a "
                f"reply in a context of {settings.context}"
            )
        ids, held = self.tokens + new, len(self.tokens)
        asked = {
            "prompt": ids, "n_predict": min(settings.max_gen, settings.context - len(ids)), "stream": True,
            # a conversation begins with an empty cache, whatever the one before had in common with it
            "return_tokens": True, "cache_prompt": settings.keep_cache and held > 0, "temperature": sampling.temperature,
            "top_k": sampling.top_k, "top_p": sampling.top_p, "min_p": 0.0, "repeat_penalty": sampling.repetition_penalty,
            "repeat_last_n": sampling.repeat_last_n, "seed": settings.seed + self.conversation,
            "ignore_eos": settings.ignore_eos,
        }  # fmt: skip
        if reverse := self.config.prompt.plain.reverse:
            asked["stop"] = [reverse]
        text, reply, first, timings = "", list[int](), None, dict[str, Any]()
        for event in self._stream("/completion", asked):
            first = first or self.clock.now()
            text += event.get("content", "")
            reply += event.get("tokens") or []
            timings = event.get("timings") or timings
        end = self.clock.now()
        if not timings:
            raise ValueError(
                "the server sent no timings: it is no llama-server, or an old one; a build of 2024 or later has them"
            )
        self.turn += 1
        prefill, decode = timings["prompt_ms"] / 1000, timings["predicted_ms"] / 1000
        read, written = int(timings["prompt_n"]), int(timings["predicted_n"])
        self.tokens = ids + reply
        return Answer(
            text, Window(start, end), Window(end - decode - prefill, end - decode), Window(end - decode, end),
            max(end - start - prefill - decode, 0.0), read, written, len(ids) - read, first,
        )  # fmt: skip

    @property
    def nbytes(self) -> int:
        return 0

    def files(self) -> list[Path]:
        return []

    def _ids(self, text: str) -> list[int]:
        return list(self._post("/tokenize", {"content": text, "add_special": False, "parse_special": True})["tokens"])

    def _render(self, messages: Messages) -> str:
        return str(self._post("/apply-template", {"messages": messages})["prompt"])

    def _post(self, path: str, body: dict[str, Any] | None) -> dict[str, Any]:
        with self._open(path, body) as reply:
            return dict(json.loads(reply.read()))

    def _stream(self, path: str, body: dict[str, Any]) -> Iterator[dict[str, Any]]:
        with self._open(path, body) as reply:
            for line in reply:
                if line.startswith(b"data: ") and not line.startswith(b"data: [DONE]"):
                    yield json.loads(line[6:])

    def _open(self, path: str, body: dict[str, Any] | None) -> Any:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.model + path, data, {"Content-Type": "application/json"})
        try:
            return urllib.request.urlopen(request, timeout=600)
        except urllib.error.HTTPError as error:
            raise ValueError(
                f"{self.model}{path} answered {error.code}: {error.read()[:200].decode(errors='replace')}"
            ) from None
        except OSError as error:
            raise ValueError(f"no llama-server at {self.model}: {getattr(error, 'reason', error)}; start it first") from None


def wait_for_server(address: str, seconds: float = 120.0) -> None:
    """Until a server that was just started has loaded its model. Raises ValueError when it does not."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        try:
            with urllib.request.urlopen(address + "/health", timeout=5) as reply:
                if json.loads(reply.read()).get("status") == "ok":
                    return
        except (OSError, ValueError):
            pass
        time.sleep(0.2)
    raise ValueError(f"the llama-server at {address} was not ready after {seconds:.0f} s; look at its log")
