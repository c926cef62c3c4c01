"""A running VMM as the rest of the server sees it: an object with verbs, on the event loop.

The work is done by the synchronous parts of this room, in threads of the executor that is given
(a window in a thread of its own); nothing here waits for a disk or a socket. Calls may be
cancelled: the connection is then broken off, which keeps a VMM that is stopped from executing what
it had not read, and frees the thread at once.

The order of calls is the caller's business: pause, resume, window and kill of one sandbox must be
serialised.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from forkpointd.model import ProcessRecord, SandboxExit
from forkpointd.vmm import identity
from forkpointd.vmm.api import ApiConnection, ApiRequest, VmmFault
from forkpointd.vmm.binary import Binary
from forkpointd.vmm.guarded import DriveClones, GuardedWindow
from forkpointd.vmm.latencies import WindowLatencies, read_latencies
from forkpointd.vmm.oom_order import open_score, write_score
from forkpointd.vmm.process import (
    Abandon,
    Launched,
    exit_of,
    has_ended,
    kill,
    launch,
    reap,
    send_kill,
)
from forkpointd.vmm.window import (
    PAUSE_REQUEST,
    RESUME_REQUEST,
    AnyWindow,
    Window,
    WindowOutcome,
    run_in_thread,
)
from forkpointd.vmm.words import read_last_words

T = TypeVar("T")

CALL_SECONDS = 10.0
"""The longest that one request may take (not a window, which has no limit)."""


@dataclass(frozen=True, slots=True)
class VmmInfo:
    """What `GET /` answers."""

    vmm_id: str
    state: str
    """`Not started`, `Running` or `Paused`."""
    version: str


DESCRIBE_REQUEST = ApiRequest("GET", "/")


def info_of(answer: Any) -> VmmInfo:
    """What an answer to DESCRIBE_REQUEST says. Raises VmmFault where it says something else."""
    try:
        return VmmInfo(str(answer["id"]), str(answer["state"]), str(answer["vmm_version"]))
    except (TypeError, KeyError) as error:
        raise VmmFault(0, f"it does not say what it is: {answer!r}") from error


class Vmm:
    """One VMM process, started or adopted."""

    def __init__(
        self,
        folder: Path,
        sandbox_id: str,
        record: ProcessRecord,
        pidfd: int,
        executor: Executor,
        start_us: int | None,
        call_seconds: float,
    ) -> None:
        """Takes `pidfd` over. Use `start` or `adopt`."""
        self.folder = folder
        self.sandbox_id = sandbox_id
        self.record = record
        self.start_us = start_us
        """From before the spawn to the reply of the last request; None where it was adopted."""
        self._pidfd = pidfd
        self._executor = executor
        self._call_seconds = call_seconds
        self._last_window_full = False
        self._killing = False
        self._loop = asyncio.get_running_loop()
        self.exited: asyncio.Future[SandboxExit] = self._loop.create_future()
        """Has its result as soon as the process has ended. Cancelled by `close`."""
        self._loop.add_reader(pidfd, self._on_end)

    # --- coming to be ---

    @classmethod
    async def start(
        cls,
        binary: Binary,
        folder: Path,
        sandbox_id: str,
        setup: Sequence[ApiRequest],
        executor: Executor,
        *,
        prepare: Callable[[], None] | None = None,
        oom_score_adj: int | None = None,
        call_seconds: float = CALL_SECONDS,
    ) -> Vmm:
        """Starts a VMM in `folder`, made by `prepare` (in the same thread, right before), and has
        it do `setup`. `oom_score_adj` as for `process.launch`.

        If this fails, or is cancelled, the process is gone. Raises what `process.launch` and
        `prepare` raise.
        """
        abandon = Abandon()

        def work() -> Launched:
            if prepare is not None:
                prepare()
            return launch(binary, folder, sandbox_id, setup, abandon, oom_score_adj)

        thread = asyncio.get_running_loop().run_in_executor(executor, work)
        try:
            launched = await asyncio.shield(thread)
        except asyncio.CancelledError:
            abandon.want()
            await _end_abandoned(thread)
            raise
        return cls(
            folder,
            sandbox_id,
            launched.record,
            launched.pidfd,
            executor,
            launched.duration_us,
            call_seconds,
        )

    @classmethod
    async def adopt(
        cls,
        record: ProcessRecord,
        folder: Path,
        sandbox_id: str,
        executor: Executor,
        *,
        call_seconds: float = CALL_SECONDS,
    ) -> Vmm | None:
        """The VMM that a former server started, if it still runs (see `identity.adopt`)."""
        loop = asyncio.get_running_loop()
        pidfd = await loop.run_in_executor(executor, identity.adopt, record, folder, sandbox_id)
        if pidfd is None:
            return None
        return cls(folder, sandbox_id, record, pidfd, executor, None, call_seconds)

    # --- one request each ---

    async def describe(self) -> VmmInfo:
        """Who answers there and what it does. Raises VmmFault, VmmGone, TimeoutError."""
        info = info_of(await self._request(DESCRIBE_REQUEST))
        if info.vmm_id != self.sandbox_id:
            raise VmmFault(0, f"the VMM in the folder of {self.sandbox_id} is {info.vmm_id!r}")
        return info

    async def pause(self) -> None:
        """Pauses the guest; a paused one stays so. Raises VmmFault, VmmGone, TimeoutError, after
        the last of which it may still come to be paused."""
        await self._request(PAUSE_REQUEST)

    async def resume(self) -> None:
        """Lets the guest run; a running one goes on. Raises as `pause`."""
        await self._request(RESUME_REQUEST)

    # --- the pause window ---

    async def prepare_window(
        self,
        *,
        full: bool,
        vmstate_name: str,
        memory_name: str,
        was_paused: bool,
        clones: DriveClones | None = None,
    ) -> AnyWindow:
        """Everything that can be done before: the connection is open, and the VMM has answered on
        it. Names are relative to the sandbox's folder. With `clones` a guardian will run it
        (`guarded.py`). The window is to be run or closed.

        If this fails nothing was asked of the guest. Raises VmmFault, VmmGone, TimeoutError, with
        `clones` also VmmError and OSError.
        """
        seconds = self._call_seconds

        def work(connection: ApiConnection) -> AnyWindow:
            answer = connection.pipeline(DESCRIBE_REQUEST.encode(), 1, timeout=seconds)[0]
            if clones is not None:
                return GuardedWindow(
                    connection,
                    self.folder,
                    info_of(answer.value()).version,
                    full=full,
                    vmstate_name=vmstate_name,
                    memory_name=memory_name,
                    was_paused=was_paused,
                    clones=clones,
                )
            return Window(
                connection,
                info_of(answer.value()).version,
                full=full,
                vmstate_name=vmstate_name,
                memory_name=memory_name,
                was_paused=was_paused,
            )

        window = await self._with_connection(work, keep_open=True)
        self._last_window_full = full
        return window

    async def run_window(
        self,
        window: AnyWindow,
        *,
        deadline_seconds: float | None = None,
        late: Callable[[WindowOutcome], None] | None = None,
    ) -> WindowOutcome:
        """Opens the window and waits for its end.

        Raises TimeoutError after `deadline_seconds`: the window is still open then, the VMM must
        be asked nothing else, and `late` is called in this loop with the outcome when it ends. The
        same holds when this call is cancelled.
        """
        name = f"window-{self.sandbox_id}"
        return await run_in_thread(window, name, deadline_seconds, late or _ignore)

    async def window_latencies(self) -> WindowLatencies:
        """The VMM's own figures of the window that ended last, if nothing paused or resumed the
        guest since. Raises VmmFault, VmmGone, TimeoutError, OSError."""
        full, seconds = self._last_window_full, self._call_seconds
        return await self._run(lambda: read_latencies(self.folder, full=full, timeout=seconds))

    async def set_oom_score_adj(self, score_adj: int) -> None:
        """Moves it in the order of the out-of-memory killer (see `oom_order`). Raises OSError."""
        if self._pidfd >= 0:
            # The descriptor keeps its number from being given again while the thread looks.
            pidfd = os.dup(self._pidfd)
            await self._run(lambda: _set_score(self.record.pid, pidfd, score_adj))

    # --- ending ---

    async def kill(self) -> None:
        """Ends the process (SIGKILL) and waits until it has ended. Idempotent."""
        if self.exited.cancelled():
            raise RuntimeError(f"the VMM of {self.sandbox_id} was forgotten by close()")
        if self._pidfd >= 0:
            self._killing = True
            send_kill(self._pidfd)
        await asyncio.shield(self.exited)

    def close(self) -> None:
        """Forgets the process without ending it. Idempotent."""
        if self._pidfd >= 0:
            self._release()
            self.exited.cancel()

    def _on_end(self) -> None:
        """The pidfd is readable: the process has ended. This reaps it and doesn't block."""
        how = reap(self._pidfd)
        self._release()
        if self._killing:  # whoever ended it asks for no last words
            self._resolve(exit_of(how, ""))
            return
        try:
            reading = self._loop.run_in_executor(self._executor, read_last_words, self.folder)
        except RuntimeError:  # the server leaves, its threads are gone
            self._resolve(exit_of(how, ""))
            return
        reading.add_done_callback(
            lambda words: self._resolve(exit_of(how, "" if words.cancelled() else words.result()))
        )

    def _resolve(self, exit_: SandboxExit) -> None:
        if not self.exited.done():
            self.exited.set_result(exit_)

    def _release(self) -> None:
        self._loop.remove_reader(self._pidfd)
        os.close(self._pidfd)
        self._pidfd = -1

    # --- threads ---

    async def _request(self, request: ApiRequest) -> Any:
        seconds = self._call_seconds

        def work(connection: ApiConnection) -> Any:
            return connection.pipeline(request.encode(), 1, timeout=seconds)[0].value()

        return await self._with_connection(work)

    async def _with_connection(
        self, work: Callable[[ApiConnection], T], *, keep_open: bool = False
    ) -> T:
        """Runs `work` on a new connection in a thread. If the caller is cancelled the connection
        is broken off."""
        abandon = Abandon()

        def in_thread() -> T:
            connection = ApiConnection.open(self.folder, self._call_seconds)
            try:
                abandon.hold(connection)
                result = work(connection)
            except BaseException:
                connection.close()
                raise
            finally:
                abandon.hold(None)
            if not keep_open:
                connection.close()
            return result

        thread = self._loop.run_in_executor(self._executor, in_thread)
        try:
            return await asyncio.shield(thread)
        except asyncio.CancelledError:
            abandon.want()
            thread.add_done_callback(_drop)
            raise

    async def _run(self, work: Callable[[], T]) -> T:
        return await self._loop.run_in_executor(self._executor, work)


async def _end_abandoned(thread: asyncio.Future[Launched]) -> None:
    """Waits for a launch that was given up, and ends the process if it came to run after all.

    A further cancellation must not leave a process behind, so it waits until this is done; that is
    soon, since the launch was told.
    """
    while not thread.done():
        try:
            await asyncio.wait([thread])
        except asyncio.CancelledError:
            continue
    if thread.cancelled() or thread.exception() is not None:
        return
    launched = thread.result()
    ending = asyncio.get_running_loop().run_in_executor(None, _end_launched, launched.pidfd)
    while not ending.done():
        try:
            await asyncio.wait([ending])
        except asyncio.CancelledError:
            continue


def _drop(thread: asyncio.Future[Any]) -> None:
    """Takes what a thread brought after its caller had left."""
    if not thread.cancelled() and thread.exception() is None:
        result = thread.result()
        if isinstance(result, Window | GuardedWindow):
            result.close()


def _set_score(pid: int, pidfd: int, score_adj: int) -> None:
    """Takes `pidfd` over. Does nothing for a process that has ended."""
    try:
        fd = open_score(pid)
        try:
            # As long as it has not ended its pid is nobody else's, and what was opened stands for
            # it for good.
            if not has_ended(pidfd):
                write_score(fd, score_adj)
        finally:
            os.close(fd)
    except (FileNotFoundError, ProcessLookupError):
        return
    finally:
        os.close(pidfd)


def _end_launched(pidfd: int) -> None:
    kill(pidfd)
    reap(pidfd)
    os.close(pidfd)


def _ignore(_: WindowOutcome) -> None:
    """Nobody wants to know how a window ended late."""
