"""The branches of one source: one at a time has the turn, and those whose window is over and whose
layer is still to be stored stand in line, in the order of their windows.

A layer is READY only after all that it stands on, so the first in line is stored first. Only
LAYERED branches stand there: all others keep the turn to their end, and open their window only when
nobody is in line.
"""

from __future__ import annotations

import asyncio
from collections import deque


class Place:
    """A place in a line."""

    def __init__(self) -> None:
        self.left = asyncio.Event()
        """Set once whoever stood there has gone."""


class SourceLine:
    """What the branches of one source wait for. Event-loop only."""

    def __init__(self) -> None:
        self.turn = asyncio.Lock()
        """Held by one branch, until its window is over (LAYERED) or to its end (all others); by
        what merges kept diffs; and by a late window."""
        self._places: deque[Place] = deque()

    def __len__(self) -> int:
        """How many stand in line."""
        return len(self._places)

    @property
    def is_idle(self) -> bool:
        """Nobody has the turn, or stands in line."""
        return not self._places and not self.turn.locked()

    def join(self) -> Place:
        """The last place, which must be left again. With the turn held: places are in the order of
        windows."""
        place = Place()
        self._places.append(place)
        return place

    async def first(self, place: Place) -> None:
        """Waits until nobody stands before this place."""
        while self._places[0] is not place:
            await self._places[0].left.wait()

    def leave(self, place: Place) -> None:
        """Makes room for those behind."""
        self._places.remove(place)
        place.left.set()

    async def empty(self) -> None:
        """Waits until nobody stands in line."""
        while self._places:
            await self._places[-1].left.wait()
