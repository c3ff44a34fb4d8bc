"""What the checks behind claims share. A check takes all committed records and returns (verdict, our number as text).

None means that nothing was measured yet. A verdict is *holds* when what the catalogue says must be seen was seen beyond
its interval, *holds in direction* when the sign is right but the size or the certainty is not, else *does not hold here*.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from typing import Any

from .records import Record

Verdict = tuple[str, str] | None

HOLDS, DIRECTION, FAILS = "holds", "holds in direction", "does not hold here"


def find(records: Iterable[Record], **wanted: Any) -> list[Record]:
    """Records whose fields, or entries of their setting, have these values."""
    fields = {name: value for name, value in wanted.items() if name in Record.__dataclass_fields__}
    setting = {name: value for name, value in wanted.items() if name not in fields}
    some = [record for record in records if all(getattr(record, name) == value for name, value in fields.items())]
    return [record for record in some if setting.items() <= record.setting.items()]


def mean(values: Sequence[float]) -> float | None:
    return statistics.mean(values) if values else None


def graded(certain: Sequence[bool], likely: Sequence[bool]) -> str:
    """*holds* when all of ``certain`` are true, *holds in direction* when all of ``likely`` are."""
    return HOLDS if all(certain) else DIRECTION if all(likely) else FAILS


def percent(value: float) -> str:
    return f"{100 * value:.1f} %"
