"""One clock for events and power: the host's epoch, carried on by the monotonic counter."""

from __future__ import annotations

import time
from collections.abc import Callable

#: clocks that differ by more than this cannot say which energy belongs to which event
MISMATCH = 0.1


class Clock:
    """Seconds since the epoch that never jump: read once, then carried on by the monotonic counter."""

    def __init__(self, epoch: Callable[[], float] = time.time):
        self.epoch, self._ticks = epoch, time.perf_counter()
        self._began = epoch()

    def now(self) -> float:
        return self._began + time.perf_counter() - self._ticks

    @property
    def drift(self) -> float:
        """Seconds by which the epoch's clock has moved against this one (it was set, or slewed)."""
        return self.epoch() - self.now()


def check_clocks(offset: float, whose: str) -> None:
    """Raises ValueError when two clocks differ by more than 100 ms."""
    if abs(offset) > MISMATCH:
        raise ValueError(
            f"the clock of {whose} is {1000 * abs(offset):.0f} ms {'ahead' if offset > 0 else 'behind'}: energy cannot be "
            f"matched with events beyond {1000 * MISMATCH:.0f} ms; set both clocks (ntpdate, adb shell date) and run again"
        )
