"""A stack on disk: the blocks in load order, and an index.

`bitstack.safetensors` holds every block as one uint8 tensor, named ``<layer>.block<i>``, one after the other in load order:
whatever the size, what is loaded is the beginning of the file, and a change of size touches one contiguous range.
`bitstack_index.json` holds the order (once; all sizes follow from it), the layouts, and a CRC-32 of every block and of
itself, so that a truncated or damaged file is an error and never a wrong weight.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO
from zlib import crc32

import torch

from .decompose import Layout
from .order import Order, counts_at, prefix_bytes, whole_order

STACK_FILE = "bitstack.safetensors"
INDEX_FILE = "bitstack_index.json"
VERSION = 1


@dataclass(frozen=True)
class Index:
    """What `bitstack_index.json` says.

    ``names``: layers by full name, in model order; ``layouts`` of their blocks; ``order`` of the blocks after block 0 of
    every layer, as (layer, block); ``checksums``: CRC-32 of the blocks in load order; ``loaded``: blocks of every layer
    that the saved model had; ``base_bytes``: its other tensors.
    """

    names: tuple[str, ...]
    layouts: tuple[Layout, ...]
    n_iter: int
    order: Order
    checksums: tuple[int, ...] = ()
    loaded: tuple[int, ...] = ()
    base_bytes: int = 0

    @cached_property
    def whole(self) -> Order:
        """The order with block 0 of every layer, as it is in the file."""
        return whole_order(self.order, len(self.names))

    @cached_property
    def places(self) -> dict[tuple[int, int], int]:
        """Where in the whole order a block stands."""
        return {entry: place for place, entry in enumerate(self.whole)}

    @cached_property
    def offsets(self) -> list[int]:
        """Bytes before the blocks in load order, and all bytes at the end."""
        return prefix_bytes(self.whole, [layout.nbytes for layout in self.layouts])

    @property
    def layers(self) -> int:
        return len(self.names)

    def counts(self, position: int) -> list[int]:
        """Blocks of every layer in the first ``position`` of the whole order."""
        return counts_at(self.whole, self.layers, position)

    def position(self, room: int, base_bytes: int) -> int:
        """How many blocks fit beside ``base_bytes`` into ``room``; raises ValueError, with the least, below one a layer."""
        least = base_bytes + self.offsets[self.layers]
        if room < least:
            raise ValueError(
                f"{room} bytes are too few: the least is {least}, {base_bytes} of them for what is not in blocks and the "
                "rest for one block of every layer"
            )
        return bisect_right(self.offsets, room - base_bytes) - 1

    def sizes(self, base_bytes: int | None = None) -> list[int]:
        """Every size that the model can have, in bytes, from one block of every layer to all."""
        base = self.base_bytes if base_bytes is None else base_bytes
        return [base + size for size in self.offsets[self.layers :]]

    def to_json(self) -> dict[str, Any]:
        body = {
            "version": VERSION,
            "n_iter": self.n_iter,
            "base_bytes": self.base_bytes,
            "layers": [{"name": name, **asdict(layout)} for name, layout in zip(self.names, self.layouts)],
            "loaded": list(self.loaded),
            "order": [list(entry) for entry in self.order],
            "checksums": list(self.checksums),
        }
        return {**body, "checksum": _checksum(body)}

    @classmethod
    def from_json(cls, text: str, path: Path) -> Index:
        try:
            body = json.loads(text)
            claimed = body.pop("checksum")
            if claimed != _checksum(body):
                raise ValueError("its checksum does not match")
            if body["version"] != VERSION:
                raise ValueError(f"version {body['version']} is not {VERSION}")
            names = tuple(layer.pop("name") for layer in body["layers"])
            layouts = tuple(Layout(**layer) for layer in body["layers"])
            order = [(int(layer), int(block)) for layer, block in body["order"]]
            checksums, loaded = tuple(map(int, body["checksums"])), tuple(map(int, body["loaded"]))
            index = cls(names, layouts, int(body["n_iter"]), order, checksums, loaded, int(body["base_bytes"]))
            if len(index.whole) != len(checksums) or len(index.whole) != len(names) * index.n_iter:
                raise ValueError(f"{len(names)} layers of {index.n_iter} blocks, but {len(checksums)} checksums")
            if len(loaded) != len(names) or not all(1 <= count <= index.n_iter for count in loaded):
                raise ValueError("'loaded' is not a number of blocks for every layer")
        except KeyError as error:
            raise ValueError(f"{path} is damaged: {error} is missing; save or download the model again") from None
        except (ValueError, TypeError, AttributeError) as error:
            reason = str(error).splitlines()[0]
            raise ValueError(f"{path} is damaged: {reason}; save or download the model again") from None
        return index


def _checksum(body: dict[str, Any]) -> int:
    return crc32(json.dumps(body, sort_keys=True).encode())


class Stack:
    """An open stack: reads blocks, and counts the bytes that it read in ``bytes_read``.

    Copies of a model share it. ``Stack.write`` without a folder keeps the files for as long as the stack lives.
    """

    def __init__(self, folder: Path, index: Index, start: int, owner: tempfile.TemporaryDirectory[str] | None = None):
        self.folder = folder
        self.index = index
        self.bytes_read = 0
        self._start = start  # where in the file the first block begins
        self._owner = owner

    @classmethod
    def write(cls, index: Index, blocks: Sequence[Sequence[torch.Tensor]], folder: str | Path | None = None) -> Stack:
        """Writes ``blocks`` [layer][block] in the order of ``index``."""
        owner = tempfile.TemporaryDirectory(prefix="broadsheet-bitstack-") if folder is None else None
        target = Path(owner.name if owner else folder or "")
        target.mkdir(parents=True, exist_ok=True)
        header = _header(index)
        checksums = []
        with _replacing(target / STACK_FILE) as file:
            file.write(header)
            for layer, block in index.whole:
                data = _bytes_of(blocks[layer][block].cpu())
                checksums.append(crc32(data))
                file.write(data)
        index = replace(index, checksums=tuple(checksums))
        _write_index(index, target)
        return cls(target, index, len(header), owner)

    @classmethod
    def open(cls, folder: str | Path) -> Stack:
        """Opens what `write` or `save` wrote; reads no block. Raises ValueError where the two files are not whole."""
        folder = Path(folder)
        for name in (INDEX_FILE, STACK_FILE):
            if not (folder / name).is_file():
                raise ValueError(f"{folder} has no {name}; give the folder that save_pretrained wrote, whole")
        index = Index.from_json(_text(folder / INDEX_FILE), folder / INDEX_FILE)
        path, header = folder / STACK_FILE, _header(index)
        with open(path, "rb") as file:
            found = file.read(len(header))
        if found != header:
            raise ValueError(f"{path} does not hold the blocks that {INDEX_FILE} lists; save or download the model again")
        expected, size = len(header) + index.offsets[-1], path.stat().st_size
        if size != expected:
            raise ValueError(f"{path} has {size} bytes where {expected} belong; save or download the model again")
        return cls(folder, index, len(header))

    def read(self, entries: Iterable[tuple[int, int]]) -> Iterator[tuple[tuple[int, int], torch.Tensor]]:
        """Yields blocks (layer, block) as uint8 tensors, each in memory of its own, in the order asked for.

        Raises ValueError where a block is not what was written.
        """
        path = self.folder / STACK_FILE
        try:
            file = open(path, "rb", buffering=0)  # noqa: SIM115  # closed below: the handle outlives this clause
        except OSError as error:
            raise ValueError(f"{path} cannot be read ({error.strerror}); was the folder moved?") from None
        with file:
            for layer, block in entries:
                place = self.index.places[layer, block]
                tensor = torch.empty(self.index.layouts[layer].nbytes, dtype=torch.uint8)
                file.seek(self._start + self.index.offsets[place])
                view = _bytes_of(tensor)
                got = _fill(file, view)
                self.bytes_read += got
                if got != len(view) or crc32(view) != self.index.checksums[place]:
                    name = self.index.names[layer]
                    raise ValueError(f"{path}: block {block} of {name} is damaged; save or download the model again")
                yield (layer, block), tensor

    def save(self, folder: str | Path, loaded: Sequence[int], base_bytes: int) -> None:
        """Copies the stack to ``folder``, whose index says that ``loaded`` blocks of every layer are to be loaded."""
        folder, source = Path(folder), self.folder / STACK_FILE
        folder.mkdir(parents=True, exist_ok=True)
        target = folder / STACK_FILE
        if not (target.exists() and target.samefile(source)):
            with open(source, "rb") as original, _replacing(target) as file:
                shutil.copyfileobj(original, file, 1 << 22)
        _write_index(replace(self.index, loaded=tuple(loaded), base_bytes=base_bytes), folder)

    def __deepcopy__(self, memo: dict[int, Any]) -> Stack:
        return self


def _bytes_of(block: torch.Tensor) -> memoryview:
    return memoryview(block.numpy())  # type: ignore[arg-type]  # numpy's arrays are buffers


def _fill(file: Any, view: memoryview) -> int:
    """Reads until ``view`` is full or the file ends; the bytes read."""
    got = 0
    while got < len(view):
        count = file.readinto(view[got:])
        if not count:
            break
        got += count
    return got


def _header(index: Index) -> bytes:
    """The beginning of the safetensors file: eight bytes of length, then JSON."""
    entries: dict[str, Any] = {"__metadata__": {"format": "bitstack"}}
    for place, (layer, block) in enumerate(index.whole):
        first, last = index.offsets[place : place + 2]
        entries[f"{index.names[layer]}.block{block}"] = {
            "dtype": "U8",
            "shape": [last - first],
            "data_offsets": [first, last],
        }
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        return ""  # which is not JSON, and is reported as such


def _write_index(index: Index, folder: Path) -> None:
    with _replacing(folder / INDEX_FILE) as file:
        file.write(json.dumps(index.to_json(), separators=(",", ":")).encode())


@contextmanager
def _replacing(path: Path) -> Iterator[BinaryIO]:
    """A file to write that takes the place of ``path`` when it is complete: a kill leaves the old one."""
    partial = path.with_name(path.name + ".partial")
    try:
        with open(partial, "wb") as file:
            yield file
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
