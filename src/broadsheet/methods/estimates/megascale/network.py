"""Nodes with network links of their own: Linux network namespaces on one bridge, so that a link can really go down.

    namespace bs0 [eth0 10.77.0.1] ── bridge bsbr ── [eth0 10.77.0.2] namespace bs1

Needs root and ``ip``; `available` says whether it can be had. Control traffic between driver and executors goes over
local sockets, the management network that a cluster has beside its data network.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
from collections.abc import Iterator

_PREFIX = "10.77.0."


def _ip(*words: str) -> None:
    done = subprocess.run(["ip", *words], capture_output=True, text=True)
    if done.returncode:
        raise OSError(f"ip {' '.join(words)}: {done.stderr.strip()}")


def available() -> str:
    """Why there can be no namespaces here; empty when there can."""
    if os.geteuid():
        return "network namespaces need root"
    if not shutil.which("ip"):
        return "network namespaces need ip (iproute2)"
    try:
        _ip("netns", "add", "bsprobe")
        _ip("netns", "del", "bsprobe")
    except OSError as error:
        return str(error)
    return ""


@contextlib.contextmanager
def namespaces(count: int, tag: str = "bs") -> Iterator[tuple[dict[str, str], dict[str, str]]]:
    """``count`` namespaces for node0, node1 ...: node -> namespace, and node -> address (of "": the bridge's, where
    the driver is). They are gone at the end.

    Raises ValueError where they cannot be had.
    """
    if reason := available():
        raise ValueError(f"{reason}; run without namespaces")
    bridge = f"{tag}br"
    names = [f"{tag}{number}" for number in range(count)]
    _clear(names, bridge)
    try:
        _ip("link", "add", bridge, "type", "bridge")
        _ip("link", "set", bridge, "up")
        _ip("addr", "add", f"{_PREFIX}254/24", "dev", bridge)
        for number, name in enumerate(names):
            _ip("netns", "add", name)
            _ip("link", "add", f"{name}v", "type", "veth", "peer", "name", "eth0", "netns", name)
            _ip("link", "set", f"{name}v", "master", bridge, "up")
            _ip("-n", name, "addr", "add", f"{_PREFIX}{number + 1}/24", "dev", "eth0")
            _ip("-n", name, "link", "set", "eth0", "up")
            _ip("-n", name, "link", "set", "lo", "up")
        nodes = {f"node{number}": name for number, name in enumerate(names)}
        addresses = {node: f"{_PREFIX}{number + 1}" for number, node in enumerate(nodes)}
        yield nodes, addresses | {"": f"{_PREFIX}254"}
    except OSError as error:
        raise ValueError(f"{error}; run without namespaces") from None
    finally:
        _clear(names, bridge)


def _clear(names: list[str], bridge: str) -> None:
    for words in (*(("netns", "del", name) for name in names), *(("link", "del", f"{name}v") for name in names)):
        with contextlib.suppress(OSError):
            _ip(*words)
    with contextlib.suppress(OSError):
        _ip("link", "del", bridge)
