"""Serial consoles: many readers and one writer of each, while the guest and the server come and go.

A sandbox's VMM writes its console to a file and reads it from a FIFO, both in the sandbox's folder,
and holds both open itself (`forkpointd.vmm.process`). An offset is a position in the file, so it
stays valid for ever; the file's old end is punched away (`trim`), and what is left is found by
SEEK_DATA, also by a restarted server.

Nothing here blocks the event loop: files are read in threads, new output is announced by inotify,
and the FIFO is written without blocking.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import threading
from collections.abc import AsyncIterator, Callable, Iterable
from concurrent.futures import Executor, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from forkpointd.model import ForkpointError, Reason
from forkpointd.sandboxes.console_changes import ConsoleChanges
from forkpointd.vmm import (
    CONSOLE_INPUT_NAME,
    CONSOLE_OUTPUT_NAME,
    trim_head,
    trim_log,
    trim_metrics,
)

T = TypeVar("T")

CHUNK_BYTES = 64 * 1024
THREADS = 4

log = logging.getLogger(__name__)


class Consoles:
    """The consoles of all sandboxes."""

    def __init__(
        self,
        folder_of: Callable[[str], Path],
        end_of: Callable[[str], asyncio.Future[Any]],
        executor: Executor | None = None,
    ) -> None:
        """`folder_of` gives a sandbox's folder or raises SANDBOX_NOT_FOUND; `end_of` a future that
        is done once nothing more will come from a sandbox. Without an executor it has threads of
        its own."""
        self._folder_of = folder_of
        self._end_of = end_of
        self._executor = executor or ThreadPoolExecutor(THREADS, "console")
        self._writers: set[str] = set()
        self._changes = ConsoleChanges()

    async def bounds(self, sandbox_id: str) -> tuple[int, int]:
        """First offset that is still there, and the offset after the last byte."""
        folder = self._folder_of(sandbox_id)
        return await self._run(lambda: _bounds(folder / CONSOLE_OUTPUT_NAME))

    async def read(
        self, sandbox_id: str, from_offset: int, *, follow: bool
    ) -> AsyncIterator[tuple[int, bytes]]:
        """Chunks (offset, data) of at most 64 KiB. A chunk's offset is later than the last one's
        end where output was trimmed before it was read. `follow` goes on until the sandbox has
        ended, or is deleted, and all that it wrote is read."""
        output = _Output(self._folder_of(sandbox_id) / CONSOLE_OUTPUT_NAME)
        try:
            if not await self._run(output.open):
                return
            offset = from_offset
            with self._changes.of(output.fd) as changes:
                while True:
                    # In this order: what was written before the end is still read after it.
                    end = self._end_of(sandbox_id)
                    last = not follow or end.done()
                    seen = changes.seen()
                    chunk_offset, data, unlinked = await self._run(partial(output.read, offset))
                    if data:
                        yield chunk_offset, data
                        offset = chunk_offset + len(data)
                    elif last or unlinked:
                        return
                    else:
                        await changes.after(seen, end)
        finally:
            # In a thread: closing the last descriptor of a deleted file frees its blocks.
            await asyncio.shield(self._run(output.close))

    async def writer(self, sandbox_id: str) -> ConsoleInput:
        """The one writer. Raises CONSOLE_BUSY while there is another one, SANDBOX_NOT_RUNNING
        where no VMM reads."""
        folder = self._folder_of(sandbox_id)
        if sandbox_id in self._writers:
            raise ForkpointError(
                Reason.CONSOLE_BUSY,
                f"someone else writes to the console of sandbox {sandbox_id}: attach with "
                "read_only, or wait until the console is free",
                metadata={"sandbox_id": sandbox_id},
            )
        self._writers.add(sandbox_id)
        opening = asyncio.ensure_future(self._run(lambda: _open_input(folder)))
        try:
            fd = await asyncio.shield(opening)
        except asyncio.CancelledError:
            opening.add_done_callback(_close_opened)
            self._writers.discard(sandbox_id)
            raise
        except OSError as error:
            self._writers.discard(sandbox_id)
            if error.errno in (errno.ENXIO, errno.ENOENT):
                raise _not_running(sandbox_id) from error
            raise
        return ConsoleInput(sandbox_id, fd, lambda: self._writers.discard(sandbox_id))

    async def trim(self, sandbox_ids: Iterable[str], keep_bytes: int) -> None:
        """Gives back all but the last `keep_bytes` of each console (to the block), and the old
        ends of what the VMMs log. To be called now and then. What can't be trimmed is logged."""
        for sandbox_id in sandbox_ids:
            try:
                folder = self._folder_of(sandbox_id)
            except ForkpointError:  # deleted meanwhile
                continue
            try:
                await self._run(partial(_trim, folder, keep_bytes))
            except OSError as error:
                log.warning("the console of sandbox %s is not trimmed: %s", sandbox_id, error)

    def close(self) -> None:
        """Announces no more changes: at the server's end, when no reader is left."""
        self._changes.close()

    async def _run(self, work: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._executor, work)


class ConsoleInput:
    """The one writer of a console, until it is closed."""

    def __init__(self, sandbox_id: str, fd: int, release: Callable[[], None]) -> None:
        self._sandbox_id = sandbox_id
        self._fd = fd
        self._release = release
        self._loop = asyncio.get_running_loop()
        self._waiting: asyncio.Future[None] | None = None

    async def write(self, data: bytes) -> None:
        """Hands all of `data` to the guest, waiting as long as it does not read. When cancelled,
        some of it may have been handed over. Raises SANDBOX_NOT_RUNNING once no VMM reads."""
        left = memoryview(data)
        while left:
            if (taken := self._take(left)) == 0:
                await self._writable()
            left = left[taken:]

    async def try_write(self, data: bytes, wait_seconds: float) -> int:
        """Hands over what the guest takes within `wait_seconds`; returns how many bytes."""
        left = memoryview(data)
        try:
            async with asyncio.timeout(max(0.0, wait_seconds)):
                while left:
                    if (taken := self._take(left)) == 0:
                        await self._writable()
                    left = left[taken:]
        except TimeoutError:
            return len(data) - len(left)
        return len(data)

    def close(self) -> None:
        """Gives the console free. Idempotent."""
        if self._fd < 0:
            return
        self._loop.remove_writer(self._fd)
        os.close(self._fd)
        self._fd = -1
        self._release()
        if self._waiting is not None and not self._waiting.done():
            self._waiting.set_exception(RuntimeError("this writer of a console was closed"))

    def _take(self, data: memoryview) -> int:
        """What the FIFO takes at once."""
        if self._fd < 0:
            raise RuntimeError("this writer of a console was closed")
        try:
            return os.write(self._fd, data)
        except BlockingIOError:
            return 0
        except BrokenPipeError as error:
            raise _not_running(self._sandbox_id) from error

    async def _writable(self) -> None:
        self._waiting = self._loop.create_future()
        self._loop.add_writer(self._fd, self._on_writable)
        try:
            await self._waiting
        finally:
            if self._fd >= 0:
                self._loop.remove_writer(self._fd)
            self._waiting = None

    def _on_writable(self) -> None:
        if self._waiting is not None and not self._waiting.done():
            self._waiting.set_result(None)


class _Output:
    """A console's output file, read by threads.

    Its lock keeps a reading thread that its caller left from touching a descriptor that is closed
    meanwhile, and then another file's.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock = threading.Lock()
        self._closed = False
        self.fd = -1

    def open(self) -> bool:
        """Whether there is such a file."""
        with self._lock:
            if self._closed:
                return False
            try:
                self.fd = os.open(self._path, os.O_RDONLY | os.O_CLOEXEC)
            except FileNotFoundError:
                return False
            return True

    def read(self, offset: int) -> tuple[int, bytes, bool]:
        """What is at `offset` or, where that was trimmed, at the first offset after it that is
        still there; and whether the file was deleted (before the read)."""
        with self._lock:
            if self._closed:
                return offset, b"", True
            unlinked = os.fstat(self.fd).st_nlink == 0
            while True:
                start = _first_data(self.fd, offset)
                if start is None:
                    return offset, b"", unlinked
                data = os.pread(self.fd, CHUNK_BYTES, start)
                # A trim in between has made zeros of it; trims go from the old end on, so if the
                # first byte is still there all are.
                if _first_data(self.fd, start) == start:
                    return start, data, unlinked
                offset = start

    def close(self) -> None:
        """Closes the file, once a thread that still reads it is done."""
        with self._lock:
            self._closed = True
            if self.fd >= 0:
                os.close(self.fd)
                self.fd = -1


def _first_data(fd: int, offset: int) -> int | None:
    """The first offset from `offset` on that is not trimmed; None at the end of the file."""
    try:
        return os.lseek(fd, offset, os.SEEK_DATA)
    except OSError as error:
        if error.errno == errno.ENXIO:
            return None
        raise


def _bounds(path: Path) -> tuple[int, int]:
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:  # it is being made, or deleted
        return 0, 0
    try:
        # In this order: what the guest writes in between must not look as if it had been trimmed.
        end = os.fstat(fd).st_size
        first = _first_data(fd, 0)
    finally:
        os.close(fd)
    return end if first is None else min(first, end), end


def _open_input(folder: Path) -> int:
    """Raises OSError ENXIO where nobody reads."""
    return os.open(folder / CONSOLE_INPUT_NAME, os.O_WRONLY | os.O_NONBLOCK | os.O_CLOEXEC)


def _close_opened(opening: asyncio.Future[int]) -> None:
    if not opening.cancelled() and opening.exception() is None:
        os.close(opening.result())


def _trim(folder: Path, keep_bytes: int) -> None:
    trim_head(folder / CONSOLE_OUTPUT_NAME, keep_bytes)
    trim_metrics(folder)
    trim_log(folder)


def _not_running(sandbox_id: str) -> ForkpointError:
    return ForkpointError(
        Reason.SANDBOX_NOT_RUNNING,
        f"sandbox {sandbox_id} does not run, so nobody reads its console; what it said "
        "can still be read (read_only)",
        metadata={"sandbox_id": sandbox_id},
    )
