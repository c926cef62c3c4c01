"""What keeps copies out of the way: of open pause windows, and of others who want the disk.

A window beside a pre-copy takes two to four times as long, and nobody waits for a copy while a
source stands still. So all pre-copies and merges of the server pause between two chunks as long as
any window is open: from before its source's base is PENDING (by when a chunk that was under way is
done) to its last reply.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from forkpointd.branching.page_cache import PageCache

LOOK_SECONDS = 0.05
"""How often a copy that holds still looks whether it was cancelled."""

ShouldStop = Callable[[], bool]


class Quiet:
    """Holds copies still while windows are open. Safe to use from any thread."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._windows = 0
        self.held_seconds = 0.0
        """How long copies were held still in all, for those who wonder where the time went."""

    @contextmanager
    def window(self) -> Iterator[None]:
        """From here to the end of the block a window is open, or about to be. Never blocks."""
        with self._changed:
            self._windows += 1
        try:
            yield
        finally:
            with self._changed:
                self._windows -= 1
                self._changed.notify_all()

    def wait(self, should_stop: ShouldStop) -> None:
        """Blocks a copy while a window is open, unless it is to stop: to be called before each
        chunk."""
        if not self._windows:  # the usual case, without the lock that a window would wait for
            return
        start = time.monotonic()
        with self._changed:
            while self._windows and not should_stop():
                self._changed.wait(LOOK_SECONDS)
            self.held_seconds += time.monotonic() - start


class Bandwidth:
    """How many bytes a second all copies of the server may move together.

    Each chunk is paid for after it was moved, by waiting; a pause of the copies earns nothing, so
    there are no bursts. Safe to use from any thread.
    """

    def __init__(self, bytes_per_second: int | None) -> None:
        """None: no limit."""
        self._bytes_per_second = bytes_per_second
        self._lock = threading.Lock()
        self._paid_until = 0.0

    def spend(self, count: int, should_stop: ShouldStop) -> None:
        """Says that `count` bytes were moved, and waits until they are paid for or the copy is to
        stop."""
        if self._bytes_per_second is None:
            return
        with self._lock:
            begin = max(self._paid_until, time.monotonic())
            self._paid_until = until = begin + count / self._bytes_per_second
        while (left := until - time.monotonic()) > 0 and not should_stop():
            time.sleep(min(left, LOOK_SECONDS))


@dataclass(frozen=True, slots=True)
class Pace:
    """How one copy goes: what it asks before each chunk, and what it does after it."""

    should_stop: ShouldStop
    quiet: Quiet
    bandwidth: Bandwidth
    page_cache: PageCache

    def gate(self) -> None:
        """Before a chunk: holds still while a window is open."""
        self.quiet.wait(self.should_stop)

    def paying(self, progress: Callable[[int], None]) -> Callable[[int], None]:
        """After a chunk: `progress`, and then the wait for its bytes."""

        def moved(count: int) -> None:
            progress(count)
            self.bandwidth.spend(count, self.should_stop)

        return moved
