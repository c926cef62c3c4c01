"""Medians and ranges of groups of rows: what tables and plots are made of."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from bench.rows import Outcome, TrialRow
from bench.stats import quantile

Key = TypeVar("Key", bound=Hashable)
R = TypeVar("R", bound=TrialRow[Any])


@dataclass(frozen=True, slots=True)
class Spread:
    """Median and the range of the middle 80 %."""

    median: float
    p10: float
    p90: float
    count: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread | None:
        """None where there are no values."""
        if not values:
            return None
        middle, low, high = (quantile(values, share) for share in (0.5, 0.1, 0.9))
        return cls(middle, low, high, len(values))


@dataclass(frozen=True, slots=True)
class Group(Generic[R]):
    """Rows of one kind."""

    rows: Sequence[R]

    def spread(self, figure: str) -> Spread | None:
        """Of the trials that are good and have this figure."""
        return Spread.of(
            [
                row.figures[figure]
                for row in self.rows
                if row.outcome is Outcome.OK and figure in row.figures
            ]
        )

    @property
    def trials(self) -> int:
        """All but what only tells what a load beside them did."""
        return sum(not _tells_of_a_load(row) for row in self.rows)

    def count(self, outcome: Outcome) -> int:
        """How many ended so."""
        return sum(row.outcome is outcome for row in self.rows)


def grouped(rows: Iterable[R], key: Callable[[R], Key]) -> dict[Key, Group[R]]:
    """The rows by key, in the order of their first."""
    groups: dict[Key, list[R]] = {}
    for row in rows:
        groups.setdefault(key(row), []).append(row)
    return {key: Group(rows) for key, rows in groups.items()}


def trials(rows: Iterable[TrialRow[Any]]) -> int:
    """How many of these rows are trials."""
    return sum(not _tells_of_a_load(row) for row in rows)


def _tells_of_a_load(row: TrialRow[Any]) -> bool:
    return bool(row.figures) and all(name.startswith("load_") for name in row.figures)
