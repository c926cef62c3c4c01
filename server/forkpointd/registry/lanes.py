"""Threads that own a SQLite connection each, and what the event loop hands them.

Why not aiosqlite: it gives a connection a thread, but every statement is a hop there and back, and
its transactions belong to the connection, so two tasks would have to take turns with a lock and pay
one fsync each. A hundred deletes at once must not cost a hundred fsyncs. Here a task hands over a
whole *operation*, a plain function of the connection, and the thread takes all that are waiting
into one transaction (a *group commit*): while it waits for one fsync the next group gathers by
itself, so nothing lingers when little is to do.

A lane's operations run in the order in which they were handed over. Operations change nothing but
the database, and have no way to see whether they share their transaction.
"""

from __future__ import annotations

import asyncio
import logging
import queue
import sqlite3
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from forkpointd.model import ForkpointError, Reason
from forkpointd.registry.errors import RegistryClosed, RegistryFault

T = TypeVar("T")

Operation = Callable[[sqlite3.Connection], T]
"""Plain, synchronous; runs on the lane's thread, inside a transaction."""

QUEUE_LIMIT = 1024
"""Operations at once in a lane; whoever comes later waits until one is done."""

log = logging.getLogger(__name__)


@dataclass(slots=True)
class Job(Generic[T]):
    """An operation that was handed over, and what became of it."""

    operation: Operation[T]
    future: asyncio.Future[T]
    result: T | None = None
    error: BaseException | None = None

    def run(self, connection: sqlite3.Connection) -> None:
        """Runs the operation; its failure is its caller's."""
        try:
            self.result = self.operation(connection)
        except BaseException as error:  # noqa: BLE001  # handed to the caller, by the future
            self.error = error
            if isinstance(error, StopIteration) or not isinstance(error, Exception):
                # A future takes no StopIteration, and the others would end the event loop.
                self.error = RuntimeError(f"an operation raised {error!r}")
                self.error.__cause__ = error


@dataclass(slots=True)
class LaneStats:
    """What a lane has done. Written by its thread only."""

    operations: int = 0
    transactions: int = 0
    """Of a writing lane: commits, with one fsync each."""
    failed_transactions: int = 0
    last_transaction_seconds: float = 0.0


class Lane:
    """One thread, one connection, a bounded queue. Subclasses say what a transaction is."""

    def __init__(
        self,
        name: str,
        connect: Callable[[], sqlite3.Connection],
        queue_limit: int = QUEUE_LIMIT,
    ) -> None:
        """`connect` runs on the lane's thread."""
        self.stats = LaneStats()
        self._name = name
        self._connect = connect
        self._loop = asyncio.get_running_loop()
        self._queue: queue.SimpleQueue[Job[Any] | None] = queue.SimpleQueue()
        self._room = asyncio.Semaphore(queue_limit)
        self._inside = 0
        self._idle = asyncio.Event()
        self._idle.set()
        self._closed = False
        self._opened: asyncio.Future[None] = self._loop.create_future()
        self._ended: asyncio.Future[None] = self._loop.create_future()
        self._thread = threading.Thread(target=self._main, name=name, daemon=True)

    async def start(self) -> None:
        """Starts the thread and opens its connection. Raises what `connect` raises; then nothing
        is left open."""
        try:
            self._thread.start()
            await asyncio.shield(self._opened)
        except BaseException:
            await self.close()
            raise

    async def run(self, operation: Operation[T]) -> T:
        """Runs an operation in this lane; returns once its transaction is over.

        Cancelling the caller while the queue is full takes the operation back; after that it is
        done all the same, and only nobody waits for it.
        """
        if self._closed:
            raise RegistryClosed(f"{self._name} is closed")
        self._inside += 1
        self._idle.clear()
        try:
            await self._room.acquire()
        except BaseException:
            self._leave()
            raise
        job: Job[T] = Job(operation, self._loop.create_future())
        self._queue.put(job)
        return await job.future

    def refuse(self) -> None:
        """Takes no more. What was handed over goes on."""
        self._closed = True

    async def close(self) -> None:
        """Takes no more, finishes what was handed over, closes the connection. Idempotent."""
        self.refuse()
        if not self._thread.ident:
            return
        await self._idle.wait()
        self._queue.put(None)
        await asyncio.shield(self._ended)
        # The thread's last act was to set `_ended`: this doesn't wait.
        self._thread.join()

    # --- on the loop's thread ---

    def _leave(self) -> None:
        self._inside -= 1
        if not self._inside:
            self._idle.set()

    def _deliver(self, jobs: list[Job[Any]]) -> None:
        for job in jobs:
            self._room.release()
            self._leave()
            if job.future.done():  # its caller was cancelled
                if job.error is not None:
                    log.warning(
                        "an operation of %s failed after its caller left",
                        self._name,
                        exc_info=job.error,
                    )
            elif job.error is not None:
                job.future.set_exception(job.error)
            else:
                job.future.set_result(job.result)

    # --- on the lane's thread ---

    def _main(self) -> None:
        try:
            connection = self._connect()
        except BaseException as error:  # noqa: BLE001  # handed to `start`
            self._tell(self._end, error)
            return
        self._tell(self._opened.set_result, None)
        try:
            self._serve(connection)
        finally:
            try:
                connection.close()
            finally:
                self._tell(self._end, None)

    def _end(self, error: BaseException | None) -> None:
        if not self._opened.done():
            assert error is not None
            self._opened.set_exception(error)
        if not self._ended.done():
            self._ended.set_result(None)

    def _serve(self, connection: sqlite3.Connection) -> None:
        while (first := self._queue.get()) is not None:
            jobs = [first]
            more = True
            while more:
                try:
                    job = self._queue.get_nowait()
                except queue.Empty:
                    break
                more = job is not None
                if job is None:
                    self._queue.put(None)
                else:
                    jobs.append(job)
            began = time.monotonic()
            try:
                self._transact(connection, jobs)
            except BaseException as error:  # whatever it is, the callers must not wait for ever
                log.exception("%s could not go on with a transaction", self._name)
                self._fail_all(jobs, error)
            self.stats.operations += len(jobs)
            self.stats.last_transaction_seconds = time.monotonic() - began
            self._tell(self._deliver, jobs)

    def _transact(self, connection: sqlite3.Connection, jobs: list[Job[Any]]) -> None:
        """Runs the jobs in a transaction, and gives each its result or its error. Raises only what
        is fatal to the connection."""
        raise NotImplementedError

    def _fail_all(self, jobs: list[Job[Any]], error: BaseException) -> None:
        self.stats.failed_transactions += 1
        for job in jobs:
            if job.error is None:
                job.error = RegistryFault(f"the registry failed: {error!r}")
                job.error.__cause__ = error

    def _tell(self, callback: Callable[[Any], object], argument: object) -> None:
        try:
            self._loop.call_soon_threadsafe(callback, argument)
        except RuntimeError:
            log.warning("the event loop ended before %s was closed", self._name)


class WriteLane(Lane):
    """All waiting operations in one transaction, each in a savepoint of its own.

    One that raises is rolled back alone. If the transaction fails, nothing of it stays, and all
    its callers are told.
    """

    def _transact(self, connection: sqlite3.Connection, jobs: list[Job[Any]]) -> None:
        try:
            connection.execute("BEGIN IMMEDIATE")
            for job in jobs:
                self._in_savepoint(connection, job)
            connection.execute("COMMIT")
            self.stats.transactions += 1
        except sqlite3.Error as error:
            self.stats.failed_transactions += 1
            log.error("a transaction of %d operations failed: %s", len(jobs), error)
            if connection.in_transaction:
                connection.execute("ROLLBACK")
            for job in jobs:
                if job.error is None:
                    job.error = write_failure(error)
        for job in jobs:
            if isinstance(job.error, sqlite3.Error):
                job.error = write_failure(job.error)

    def _in_savepoint(self, connection: sqlite3.Connection, job: Job[Any]) -> None:
        connection.execute("SAVEPOINT operation")
        job.run(connection)
        if job.error is None:
            connection.execute("RELEASE operation")
        elif connection.in_transaction:
            connection.execute("ROLLBACK TO operation")
            connection.execute("RELEASE operation")
        else:  # SQLite rolled back everything: on a full disk, an I/O error, no memory
            raise _cause(job.error)


class ReadLane(Lane):
    """All waiting operations on one snapshot of the database, taken after each was handed over."""

    def _transact(self, connection: sqlite3.Connection, jobs: list[Job[Any]]) -> None:
        try:
            connection.execute("BEGIN")
            for job in jobs:
                job.run(connection)
            connection.execute("COMMIT")
            self.stats.transactions += 1
        except sqlite3.Error as error:
            self.stats.failed_transactions += 1
            if connection.in_transaction:
                connection.execute("ROLLBACK")
            for job in jobs:
                if job.error is None:
                    job.error = error
        for job in jobs:
            if isinstance(job.error, sqlite3.Error):
                job.error = RegistryFault(f"the registry can't be read: {job.error}")


def write_failure(error: sqlite3.Error) -> Exception:
    """What a caller is told when SQLite could not write: no reader sees anything of its change."""
    failure: Exception
    if _code(error) == sqlite3.SQLITE_FULL:
        failure = ForkpointError(
            Reason.NO_DISK_SPACE,
            "the disk with the server's data folder is full, so the change could not be recorded "
            "and was not made: make room, for example delete snapshots",
        )
    else:
        failure = RegistryFault(f"the registry can't be written: {error}")
    failure.__cause__ = error
    return failure


def _code(error: sqlite3.Error) -> int | None:
    """SQLite's primary result code; errors of the Python module itself have none."""
    code = getattr(error, "sqlite_errorcode", None)
    return None if code is None else code & 0xFF


def _cause(error: BaseException) -> sqlite3.Error:
    return error if isinstance(error, sqlite3.Error) else sqlite3.OperationalError(str(error))
