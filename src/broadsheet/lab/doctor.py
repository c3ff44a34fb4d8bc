"""`broadsheet doctor`: what is here, what is missing, and what for."""

from __future__ import annotations

import os
import shutil
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec

from broadsheet.core.records import home

_OPTIONAL = {
    "datasets": "official SCBench records from the hub: pip install 'broadsheet[data]'",
    "optimum.quanto": "peer: transformers' QuantizedCache: pip install 'broadsheet[peers]'",
    "hqq": "peer: transformers' QuantizedCache: pip install 'broadsheet[peers]'",
}


def examine() -> list[tuple[str, str, str]]:
    """(what, state, note) lines; state is ok, missing or problem."""
    import torch

    from broadsheet.core.models import pockets
    from broadsheet.core.sandbox import backend

    lines = []
    for package in ("broadsheet", "torch", "transformers", "numba", "matplotlib"):
        try:
            lines.append((package, "ok", version(package)))
        except PackageNotFoundError:
            lines.append((package, "problem", "not installed; run make install"))
    lines.append(("cpu", "ok", f"{os.cpu_count()} cores, {torch.backends.cpu.get_cpu_capability()}"))
    cuda = torch.cuda.get_device_name(0) if torch.cuda.is_available() else None
    lines.append(("gpu", "ok" if cuda else "missing", cuda or "none; everything runs on the CPU"))
    names = pockets()
    lines.append(("models", "ok" if names else "problem", ", ".join(names) or "no pocket model in the package"))
    name = backend()
    notes = {
        "bubblewrap": "namespaces and a seccomp filter",
        "namespaces": "namespaces (made without bubblewrap) and a seccomp filter",
        "seccomp": "a seccomp filter; bubblewrap or user namespaces would add a file system of its own",
        "rlimits": "nothing confines programs that models write here; BROADSHEET_UNSAFE_SANDBOX=1 runs them in a container",
    }
    lines.append(("sandbox", "missing" if name == "rlimits" else "ok", f"{name}: {notes[name]}"))
    jdk = bool(shutil.which("java") and shutil.which("javac"))
    lines.append(
        ("jdk", "ok" if jdk else "missing", "" if jdk else "Java tasks of 'broadsheet study code' need java and javac")
    )
    folder = home()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(folder).free / 2**30
        lines.append(("state", "ok" if free > 0.1 else "problem", f"{folder}, {free:.1f} GiB free"))
    except OSError as error:
        lines.append(("state", "problem", f"{folder}: {error.strerror}; set BROADSHEET_HOME"))
    for package, use in _OPTIONAL.items():
        here = _found(package)
        lines.append((package, "ok" if here else "missing", "" if here else use))
    return lines


def _found(package: str) -> bool:
    try:
        return find_spec(package) is not None
    except ModuleNotFoundError:
        return False
