"""An instrument: a classifier of sentiment with a known confusion matrix that answers in many surface forms. It knows the
answers; scorers never see it.

An answer cannot be read with probability ``format_error``; else it names class j for gold class i with probability
``confusion[i][j]``. So accuracy is (1 - format_error) sum_i p(i) confusion[i][i].
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from broadsheet.core.chat.protocol import Request
from broadsheet.core.chat.simulated import Draw

from .rows import LABELS, Row

_FORMS = ("{0}", "{0}.", "The sentiment is {0}.", "Answer: {0}", "I would say that it is {0} .", "**{0}**")
_BESIDE = {
    "neutral": ("Not negative, so neutral", "It is neither positive nor negative, hence neutral."),
    "negative": ("This is not positive but negative.",),
    "positive": ("Not negative at all: positive.",),
}
_BROKEN = (
    "",
    "I cannot tell.",
    "positive or negative",
    "not positive",
    "It depends on the market.",
    "{negative/neutral/positive}",
)


@dataclass(frozen=True)
class SimClassifier:
    """``rows``: what it is asked; ``confusion``: gold -> said -> probability."""

    rows: Iterable[Row]
    confusion: Mapping[str, Mapping[str, float]]
    format_error: float = 0.0
    _golds: dict[str, str] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        if not 0 <= self.format_error <= 1:
            raise ValueError(f"format_error is a probability, got {self.format_error}")
        for gold in LABELS:
            if abs(sum(self.confusion.get(gold, {}).values()) - 1) > 1e-9:
                raise ValueError(f"the confusion of {gold} must be probabilities that sum to 1")
        self._golds.update({row.prompt: row.output for row in self.rows})

    def expected_accuracy(self, golds: Iterable[str]) -> float:
        diagonal = [self.confusion[gold][gold] for gold in golds]
        return (1 - self.format_error) * sum(diagonal) / len(diagonal)

    def broken(self, draw: Draw) -> bool:
        """Whether this answer is one that cannot be read."""
        return draw.chance("format", self.format_error)

    def reply(self, request: Request, draw: Draw) -> str:
        asked = request.messages if isinstance(request.messages, str) else str(request.messages[-1]["content"])
        return self.answer(self._golds[asked], draw)

    def answer(self, gold: str, draw: Draw) -> str:
        if self.broken(draw):
            return draw.pick("broken", _BROKEN)
        left, said = draw.uniform("class"), LABELS[-1]
        for label in LABELS:
            left -= self.confusion[gold].get(label, 0.0)
            if left < 0:
                said = label
                break
        form = draw.pick("form", (*_FORMS, *_BESIDE[said]))
        return form.format(said.capitalize() if draw.chance("capital", 0.3) else said)
