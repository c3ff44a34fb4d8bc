"""How a family's records are to be read: what ranks, what is paid, what the reference is called.

Every family's ``bench`` has one as ``VIEW``; tables, plots and reports are drawn by it.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Quality:
    """A metric that can rank."""

    metric: str
    name: str
    more_is_better: bool = True


@dataclass(frozen=True)
class View:
    """``qualities``: the first that was measured ranks. ``columns``: (heading, metric) beside it, those that were measured.

    ``price``: the metric that budgets buy, ``price_head`` and ``price_label`` its names in a table and at an axis,
    ``price_digits`` its decimals, ``ticks`` its usual values with their names. ``least`` says, with the price put in, that
    a budget is out of reach. ``budgets``: those of a comparison that names none; ``top`` the largest there is.
    ``unbudgeted``: what stands in the place of a budget for methods that have none.
    """

    reference: str
    reference_name: str
    qualities: tuple[Quality, ...]
    columns: tuple[tuple[str, str], ...]
    price: str
    price_head: str
    price_label: str
    price_digits: int
    ticks: tuple[tuple[float, str], ...]
    least: str
    budgets: tuple[float, ...]
    top: float
    budget_name: str
    unbudgeted: str
    note: str

    def quality(self, metrics: set[str]) -> Quality:
        """What ranks where these metrics were measured."""
        return next((quality for quality in self.qualities if quality.metric in metrics), self.qualities[-1])

    def check_budget(self, budget: float) -> None:
        """Raises ValueError for a budget that cannot be meant."""
        if not 0 < budget <= self.top:
            raise ValueError(f"a budget is {self.budget_name}, above 0 and at most {self.top:g}; got {budget}")
