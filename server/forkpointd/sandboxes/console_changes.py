"""When to look at a console's file again: one inotify instance for all readers.

One for all, since a user may have few of them (fs.inotify.max_user_instances, often 128), while
watches are plenty. The kernel merges events that come faster than they are read.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from asyncinotify import Inotify, Mask, Watch

LOOK_AGAIN_SECONDS = 30.0
"""A reader looks at least this often, whatever is announced."""

_EVENTS = Mask.MODIFY | Mask.ATTRIB
"""Output; unlinking, which changes the count of links."""

log = logging.getLogger(__name__)


class _File:
    """What happened to one file."""

    def __init__(self, watch: Watch) -> None:
        self.watch = watch
        self.readers = 0
        self.events = 0
        self.waiting: set[asyncio.Future[None]] = set()

    def note(self) -> None:
        """Something happened."""
        self.events += 1
        for future in self.waiting:
            if not future.done():
                future.set_result(None)


class Changes:
    """What one reader has seen of its file."""

    def __init__(self, file: _File) -> None:
        self._file = file

    def seen(self) -> int:
        """A mark, to be taken before a look at the file."""
        return self._file.events

    async def after(self, mark: int, end: asyncio.Future[Any]) -> None:
        """Returns when something has happened since `mark`, when `end` is done, or when it is time
        to look anyway."""
        file = self._file
        if file.events != mark:
            return
        future = asyncio.get_running_loop().create_future()
        file.waiting.add(future)
        try:
            await asyncio.wait(
                {future, end}, timeout=LOOK_AGAIN_SECONDS, return_when=asyncio.FIRST_COMPLETED
            )
        finally:
            file.waiting.discard(future)


class ConsoleChanges:
    """Watches the files that have readers."""

    def __init__(self) -> None:
        self._inotify: Inotify | None = None
        self._files: dict[int, _File] = {}
        self._listening: asyncio.Task[None] | None = None

    @contextmanager
    def of(self, fd: int) -> Iterator[Changes]:
        """The changes of an open file, for one reader. Raises OSError where the host has no more
        watches to give."""
        if self._inotify is None:
            self._inotify = Inotify()
            self._listening = asyncio.create_task(self._listen(self._inotify), name="consoles")
        # By descriptor: no path is walked, and it is this file whatever its path names now.
        watch = self._inotify.add_watch(f"/proc/self/fd/{fd}", _EVENTS)
        file = self._files.setdefault(watch.wd, _File(watch))
        file.readers += 1
        try:
            yield Changes(file)
        finally:
            file.readers -= 1
            if file.readers == 0:
                del self._files[watch.wd]
                # The file is gone, and its watch with it; or all watches are.
                with suppress(OSError, ValueError):
                    self._inotify.rm_watch(watch)

    def close(self) -> None:
        """Stops watching."""
        if self._listening is not None:
            self._listening.cancel()
        if self._inotify is not None:
            self._inotify.close()

    async def _listen(self, inotify: Inotify) -> None:
        try:
            async for event in inotify:
                if Mask.Q_OVERFLOW in event.mask:
                    for file in self._files.values():
                        file.note()
                elif event.watch is not None and event.watch.wd in self._files:
                    self._files[event.watch.wd].note()
        except OSError:
            log.exception("consoles are followed by looking now and then only")
