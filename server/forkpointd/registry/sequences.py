"""Sequences of branches and forks: numbers that only grow, also across restarts.

Not every number is worth a commit: progress that is shown to a watcher takes one, and is gone when
the server is killed. So a row holds its `sequence` and a `sequence_limit`, a block above it; memory
may run ahead of the row up to the limit, and a restarted server goes on from the limit, above
anything that was ever shown.
"""

from __future__ import annotations

import sqlite3

SEQUENCE_BLOCK = 1 << 20
"""Numbers that memory may run ahead of the row: a day of ten a second."""


def sequence_limit(stored: int) -> int:
    """The limit for a row with this sequence."""
    return stored + SEQUENCE_BLOCK


class Sequence:
    """The sequence of one resource in memory.

    number = sequence.next()          # for progress, not stored
    if number is None: put the row with sequence.above(), then sequence.stored(...)
    """

    def __init__(self, stored: int) -> None:
        """`stored` is the sequence of the row as it was put or loaded last."""
        self._value = stored
        self._limit = sequence_limit(stored)

    @property
    def value(self) -> int:
        """The last number given out."""
        return self._value

    def next(self) -> int | None:
        """One more, for a state that is shown but not stored; None when the block is used up and
        the row has to be put first."""
        if self._value >= self._limit:
            return None
        self._value += 1
        return self._value

    def above(self) -> int:
        """The number with which the row is to be put next: above all given out. Takes nothing."""
        return self._value + 1

    def stored(self, value: int) -> None:
        """Notes that the row was put with this sequence."""
        if value < self._value:
            raise AssertionError(f"sequence {value} was stored after {self._value} was given out")
        self._value = value
        self._limit = sequence_limit(value)


def check_growth(
    connection: sqlite3.Connection, table: str, key: str, row_id: str, sequence: int
) -> None:
    """Raises `AssertionError` where a row is to be put with a sequence below what it holds: a
    watcher would see time go backwards, and an older state would overwrite a newer one."""
    row = connection.execute(f"SELECT sequence FROM {table} WHERE {key} = ?", (row_id,)).fetchone()
    if row is not None and sequence < row[0]:
        raise AssertionError(f"{row_id} in {table}: sequence {sequence} after {row[0]}")
