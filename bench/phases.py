"""A bench in phases: each has jobs, a job is a cell (one combination of all that is varied) and the
slots that are measured side by side in each of its rounds."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar


class AnyCell(Protocol):
    """What is varied."""

    @property
    def phase(self) -> str:
        """The phase it is of."""

    def row(self) -> dict[str, str]:
        """For the CSV."""


class AnySlot(Protocol):
    """One that is measured in a round."""

    @property
    def role(self) -> str:
        """Who is measured."""

    @property
    def every(self) -> int:
        """Takes part in each so-manieth round, from the first on: for what takes long."""

    @property
    def key(self) -> Hashable:
        """What its rows have as `slot_key`."""

    @property
    def last(self) -> int:
        """The number of its last row in a round."""


C_co = TypeVar("C_co", bound=AnyCell, covariant=True)
S_co = TypeVar("S_co", bound=AnySlot, covariant=True)


@dataclass(frozen=True)  # no slots: calls of Job[...] set an attribute
class Job(Generic[C_co, S_co]):
    """A cell, its slots, its number of rounds."""

    cell: C_co
    slots: tuple[S_co, ...]
    rounds: int

    def order(self, number: int) -> list[S_co]:
        """The slots of a round. Each order is followed by its reverse, and then rotated: of any
        two slots each goes first equally often."""
        turned = number // 2 % len(self.slots)
        slots = [*self.slots[turned:], *self.slots[:turned]]
        if number % 2:
            slots.reverse()
        return [slot for slot in slots if number % slot.every == 0]


@dataclass(frozen=True)  # no slots: calls of Job[...] set an attribute
class Phase(Generic[C_co, S_co]):
    """Jobs under one name; a CSV of its own."""

    name: str
    about: str
    minutes: float
    """Expected on two CPUs with a disk of 1 GB/s."""
    jobs: tuple[Job[C_co, S_co], ...]
