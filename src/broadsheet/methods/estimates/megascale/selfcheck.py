"""The self-check of a node (MegaScale section 4.2), with sockets and memory in place of NICs and GPUs.

Measured: memory copy (the paper's loopback from NIC to memory), a stream through the loopback interface (NIC to NIC
inside the host), all-to-all among as many processes as the node has ranks, and whether the checkpoint folder takes a
file. Each is the best of three, in GB/s (10^9). Last, the driver's own address on the data network must be reached
(the paper's neighbours under one switch). A node fails when something cannot be done, or is below ``floor`` times
what it was when the run began: its own baseline, because healthy nodes of another kind would be no measure. Bandwidth
on a busy machine is noisy, so the driver blocks a node for it only when three checks in a row agree.
"""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

_MB = 1_000_000


def examine(processes: int, folder: str | Path, neighbour: tuple[str, int] | None = None) -> dict[str, Any]:
    """What this node can do: metric -> GB/s (connections a second for the network), or why it could not be measured."""
    found: dict[str, Any] = {}
    measures: dict[str, Callable[[], float]] = {
        "memory": _memory, "loopback": _loopback, "all_to_all": lambda: _all_to_all(processes),
        "disk": lambda: _disk(Path(folder)),
    }  # fmt: skip
    if neighbour:
        measures["network"] = lambda: _reach(*neighbour)
    for name, measure in measures.items():
        try:
            found[name] = max(measure() for _ in range(3))
        except OSError as error:
            found[name] = f"{name}: {error.strerror or error}"
    return found


def failures(check: dict[str, Any], baseline: dict[str, Any], floor: float = 0.1) -> list[str]:
    """Why a node fails; empty when it passes."""
    if "error" in check:
        return [str(check["error"])]
    reasons = []
    for name, value in check.items():
        usual = baseline.get(name)
        if isinstance(value, str):
            reasons.append(value)
        elif name not in ("disk", "network") and isinstance(usual, int | float) and value < floor * usual:
            reasons.append(f"{name} {value:.2f} GB/s, {usual:.2f} when the run began")
    return reasons


def _memory() -> float:
    source, target = bytearray(8 * _MB), bytearray(8 * _MB)
    start = time.perf_counter()
    target[:] = source
    return 8e-3 / (time.perf_counter() - start)


def _stream(sender: socket.socket, receiver: socket.socket, count: int) -> None:
    """Sends ``count`` bytes and waits until they are there."""
    thread = threading.Thread(target=sender.sendall, args=(bytes(count),), daemon=True)
    thread.start()
    buffer, left = bytearray(1 << 18), count
    while left:
        got = receiver.recv_into(buffer, min(left, len(buffer)))
        if not got:
            raise OSError("the stream ended early")
        left -= got
    thread.join()


def _pair() -> tuple[socket.socket, socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        client = socket.create_connection(server.getsockname(), timeout=5)
        other, _ = server.accept()
        other.settimeout(5)
        return client, other


def _loopback() -> float:
    client, other = _pair()
    with client, other:
        start = time.perf_counter()
        _stream(client, other, 4 * _MB)
        return 4e-3 / (time.perf_counter() - start)


def _all_to_all(processes: int) -> float:
    """Bytes that all processes received over the time of the slowest; each sends 1 MB to every other."""
    if processes < 2:
        return _loopback()
    ends = {(a, b): _pair() for a in range(processes) for b in range(a + 1, processes)}
    children, start = [], time.perf_counter()
    for me in range(processes):
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                mine = [pair[0] if a == me else pair[1] for (a, b), pair in ends.items() if me in (a, b)]
                senders = [threading.Thread(target=one.sendall, args=(bytes(_MB),), daemon=True) for one in mine]
                for thread in senders:
                    thread.start()
                for one in mine:
                    left = _MB
                    while left and (got := len(one.recv(min(left, 1 << 18)))):
                        left -= got
                code = 0 if not left else 1
                for thread in senders:
                    thread.join()
            finally:
                os._exit(code)
        children.append(pid)
    codes = [os.waitpid(pid, 0)[1] for pid in children]
    seconds = time.perf_counter() - start
    for pair in ends.values():
        for end in pair:
            end.close()
    if any(codes):
        raise OSError("a process of the all-to-all failed")
    return processes * (processes - 1) * 1e-3 / seconds


def _reach(host: str, port: int) -> float:
    start = time.perf_counter()
    socket.create_connection((host, port), timeout=2).close()
    return 1 / (time.perf_counter() - start)


def _disk(folder: Path) -> float:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f".selfcheck-{os.getpid()}"
    try:
        start = time.perf_counter()
        with open(path, "wb") as file:
            file.write(bytes(_MB))
            file.flush()
            os.fsync(file.fileno())
        return 1e-3 / (time.perf_counter() - start)
    finally:
        path.unlink(missing_ok=True)
