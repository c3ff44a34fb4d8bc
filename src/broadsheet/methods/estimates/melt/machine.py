"""What the operating system says of this machine and process (Linux; None elsewhere)."""

from __future__ import annotations

import os
import platform
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

_PROC = Path("/proc")


@dataclass(frozen=True)
class Memory:
    """Bytes. ``peak_rss`` since `reset_peak`, mapped files counted; ``pss``: shared pages divided among those who share
    them; ``anonymous``: of that what no file backs."""

    peak_rss: int
    pss: int
    anonymous: int

    def to_json(self) -> dict[str, int]:
        return asdict(self)


def memory() -> Memory | None:
    try:
        status = _table(_PROC / "self" / "status")
        rollup = _table(_PROC / "self" / "smaps_rollup")
        return Memory(status["VmHWM"], rollup["Pss"], rollup.get("Pss_Anon", rollup["Anonymous"]))
    except (OSError, KeyError):
        return None


def reset_peak() -> bool:
    """Begins the peak of the resident set anew; False where the kernel does not let us, and the peak is the process's."""
    try:
        (_PROC / "self" / "clear_refs").write_text("5")
    except OSError:
        return False
    return True


def _table(path: Path) -> dict[str, int]:
    """``Name: 123 kB`` lines, in bytes."""
    found = {}
    for line in path.read_text().splitlines():
        parts = line.split()
        if len(parts) == 3 and parts[2] == "kB":
            found[parts[0].rstrip(":")] = int(parts[1]) * 1024
    return found


def busy(seconds: float = 1.0) -> float | None:
    """Share of all CPUs' time that other processes take, over so many seconds in which this one sleeps."""
    before = _ticks()
    time.sleep(seconds)
    after = _ticks()
    if before is None or after is None or after[1] == before[1]:
        return None
    return 1 - (after[0] - before[0]) / (after[1] - before[1])


def _ticks() -> tuple[int, int] | None:
    """Idle (waiting for a disk too) and all ticks of all CPUs."""
    try:
        numbers = [int(part) for part in (_PROC / "stat").read_text().splitlines()[0].split()[1:9]]
    except (OSError, ValueError, IndexError):
        return None
    return numbers[3] + numbers[4], sum(numbers)


def temperature() -> float | None:
    """°C of the hottest thermal zone; None where there is none (virtual machines)."""
    found = []
    for path in Path("/sys/class/thermal").glob("thermal_zone*/temp"):
        try:
            found.append(int(path.read_text()) / 1000)
        except (OSError, ValueError):
            continue
    return max(found, default=None)


def describe() -> dict[str, Any]:
    """The CPU, its number of threads, what it can multiply with, its frequency governor and the memory (GiB)."""
    found: dict[str, Any] = {"machine": platform.machine(), "cpus": os.cpu_count()}
    try:
        info = (_PROC / "cpuinfo").read_text()
        rows = dict(line.split(":", 1) for line in info.split("\n\n")[0].splitlines() if ":" in line)
        values = {key.strip(): value.strip() for key, value in rows.items()}
        found["cpu"] = values.get("model name", "")
        known = {"avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_int8", "amx_bf16", "asimd", "asimddp", "i8mm", "sve"}
        found["features"] = sorted(known & set(values.get("flags", values.get("Features", "")).split()))
        total = next(line for line in (_PROC / "meminfo").read_text().splitlines() if line.startswith("MemTotal"))
        found["memory_gib"] = round(int(total.split()[1]) / 2**20, 1)
        found["governor"] = Path("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor").read_text().strip()
    except (OSError, StopIteration):
        pass  # a virtual machine has no governor
    return found
