"""Fan-out of one resource's states to whoever watches it.

A feed holds the latest view of a branch or a fork. Each watcher has a queue of its own that is
bounded by the number of *milestones* (stage changes) a resource can have: progress between two
milestones is coalesced for a slow reader, a milestone never is. Publishing never waits, so a slow
reader slows neither the work nor another reader.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator
from typing import Generic, TypeVar

V = TypeVar("V")


class _Watcher(Generic[V]):
    """What one reader has not seen yet."""

    def __init__(self) -> None:
        self.pending: deque[tuple[V, bool]] = deque()
        self.wake = asyncio.Event()

    def put(self, view: V, milestone: bool) -> None:
        if self.pending and not self.pending[-1][1]:
            self.pending.pop()
        self.pending.append((view, milestone))
        self.wake.set()


class Feed(Generic[V]):
    """The latest view of one resource, and its watchers."""

    def __init__(self, view: V, *, ended: bool = False) -> None:
        self._latest = view
        self._ended = ended
        self._watchers: set[_Watcher[V]] = set()

    @property
    def latest(self) -> V:
        """The view of now."""
        return self._latest

    @property
    def watcher_count(self) -> int:
        """How many are watching."""
        return len(self._watchers)

    def publish(self, view: V, *, milestone: bool, ended: bool = False) -> None:
        """Hands a new view to everyone. After `ended` nothing may be published."""
        if self._ended:
            raise AssertionError("this feed has ended")
        self._latest = view
        self._ended = ended
        for watcher in self._watchers:
            watcher.put(view, milestone or ended)

    async def watch(self, *, skip_first: bool) -> AsyncIterator[V]:
        """The latest view (unless `skip_first`, which an ended feed ignores), then each later one,
        the end last."""
        watcher: _Watcher[V] = _Watcher()
        if self._ended or not skip_first:
            watcher.put(self._latest, True)
        self._watchers.add(watcher)
        try:
            while True:
                while watcher.pending:
                    yield watcher.pending.popleft()[0]
                if self._ended:
                    return
                watcher.wake.clear()
                await watcher.wake.wait()
        finally:
            self._watchers.discard(watcher)
