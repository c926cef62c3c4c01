"""The pause window: three requests in one write, timed by a thread that does nothing else.

Life of a window. It is *prepared*: the connection is open and has been answered on, the bytes are
built and measured. It is *run*, once: a thread of its own sends the bytes and waits for the
answers. It ends only by them or by the end of the process; there is no time limit in the thread,
for a stopped Firecracker runs the requests late, and as long as it may, the window is open.
Whoever waits for it may stop waiting and is told later.

Firecracker reads 1,024 bytes at a time and drops the rest when its client is gone. So all of a
window fits in MAX_WINDOW_BYTES: once sent, the resume is with Firecracker, and a server that is
killed right then leaves the source running.
"""

from __future__ import annotations

import asyncio
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from typing import Protocol

from forkpointd.model import now
from forkpointd.vmm.api import ApiConnection, ApiReply, ApiRequest, GoneAfter, VmmError
from forkpointd.vmm.binary import memory_write_failed

MAX_WINDOW_BYTES = 1_000
SWITCH_SECONDS = 0.000_1
"""The interpreter's switch interval while a window is open. With the usual 5 ms a reply that came
while another thread computes is seen, and timed, that much too late: beside one busy thread the
server's clock read 7.6 ms more than Firecracker's (median of 40, p90 14.4), with this 1.2 (5.9)."""

PAUSE_REQUEST = ApiRequest("PATCH", "/vm", {"state": "Paused"})
RESUME_REQUEST = ApiRequest("PATCH", "/vm", {"state": "Resumed"})


def create_request(*, full: bool, vmstate_name: str, memory_name: str) -> ApiRequest:
    """Writes a snapshot. Names are relative to the VMM's folder."""
    return ApiRequest(
        "PUT",
        "/snapshot/create",
        {
            "snapshot_type": "Full" if full else "Diff",
            "snapshot_path": vmstate_name,
            "mem_file_path": memory_name,
        },
    )


@dataclass(frozen=True, slots=True)
class DriveOutcome:
    """What became of the drives that a window was to clone."""

    clone_us: int = 0
    """How long the source stood still for it."""
    copied: tuple[str, ...] = ()
    """Those that were copied: there is no reflink."""
    fault: str = ""
    """Why they are not clones of this moment; empty where they are."""


@dataclass(frozen=True, slots=True)
class WindowOutcome:
    """What came of a window."""

    start_time: datetime
    total_us: int
    """From just before the first byte was sent to the last reply, or to the end of the process."""
    create_reply: ApiReply | None
    """None where the process ended before it answered."""
    pause_reply: ApiReply | None = None
    """None also where the source was paused already."""
    resume_reply: ApiReply | None = None
    """As pause_reply."""
    process_gone: bool = False
    """The process ended before all answers came."""
    memory_write_failed: bool = False
    """The create failed, and Firecracker's dirty log is whole again all the same (step 6)."""
    drives: DriveOutcome | None = None
    """None of a window without drives."""
    guardian_lost: bool = False
    """The process that ran it ended, or hung, and the server resumed the source (`guarded.py`)."""

    @property
    def created(self) -> bool:
        """Whether vmstate and memory were written. May be true though the process is gone."""
        return self.create_reply is not None and self.create_reply.ok

    @property
    def resume_failed(self) -> bool:
        """Whether the VMM refused to resume: the source stands still and must be resumed again."""
        return self.resume_reply is not None and not self.resume_reply.ok

    @property
    def fault(self) -> str:
        """The VMM's own words for the first thing that it refused; empty if it refused nothing."""
        for reply in (self.pause_reply, self.create_reply, self.resume_reply):
            if reply is not None and not reply.ok:
                return reply.fault_message
        return ""


class AnyWindow(Protocol):
    """What is run once, or closed."""

    was_paused: bool

    def run(self) -> WindowOutcome:
        """Opens the window and waits for its end, in a thread of its own."""

    def close(self) -> None:
        """Gives up a window that was not run. Idempotent."""


class Window:
    """A window that is ready to be run once. Close it if it is not."""

    def __init__(
        self,
        connection: ApiConnection,
        version: str,
        *,
        full: bool,
        vmstate_name: str,
        memory_name: str,
        was_paused: bool,
    ) -> None:
        """`version`: the VMM's, as it tells it. `was_paused`: the owner paused the source, so the
        window is a create and nothing else.

        Raises ValueError where the names make it longer than MAX_WINDOW_BYTES.
        """
        create = create_request(full=full, vmstate_name=vmstate_name, memory_name=memory_name)
        requests = (create,) if was_paused else (PAUSE_REQUEST, create, RESUME_REQUEST)
        self.was_paused = was_paused
        self.request_bytes = b"".join(request.encode() for request in requests)
        if len(self.request_bytes) > MAX_WINDOW_BYTES:
            raise ValueError(
                f"the window's requests are {len(self.request_bytes)} bytes, more than "
                f"{MAX_WINDOW_BYTES}: a server killed in it would leave the source paused"
            )
        self._n_replies = len(requests)
        self._connection = connection
        self._version = version
        self._used = False

    def run(self) -> WindowOutcome:
        """Opens the window and waits for its end, however long. Blocks; call it in a thread of
        its own. Never raises for what the VMM does: the outcome tells."""
        if self._used:
            raise RuntimeError("a window runs once")
        self._used = True
        connection, request_bytes = self._connection, self.request_bytes
        gone: VmmError | None = None
        start_time = now()
        with _quick_switches:
            start_ns = time.monotonic_ns()
            try:
                replies = connection.pipeline(request_bytes, self._n_replies)
            except GoneAfter as error:
                replies, gone = error.replies, error
            except VmmError as error:  # it answered nonsense: what it did is not known
                replies, gone = [], error
        end_ns = connection.received_ns  # what was said then is looked at outside of the window
        connection.close()
        return self._outcome(start_time, (end_ns - start_ns) // 1000, replies, gone)

    def close(self) -> None:
        """Gives up a window that was not run. Idempotent."""
        if not self._used:
            self._used = True
            self._connection.close()

    def _outcome(
        self,
        start_time: datetime,
        total_us: int,
        replies: list[ApiReply],
        gone: VmmError | None,
    ) -> WindowOutcome:
        known: list[ApiReply | None] = [*replies, None, None, None]
        pause, create, resume = (None, known[0], None) if self.was_paused else known[:3]
        return WindowOutcome(
            start_time=start_time,
            total_us=total_us,
            create_reply=create,
            pause_reply=pause,
            resume_reply=resume,
            process_gone=gone is not None,
            memory_write_failed=create is not None
            and not create.ok
            and memory_write_failed(self._version, create.fault_message),
        )


async def run_in_thread(
    window: AnyWindow,
    name: str,
    deadline_seconds: float | None,
    late: Callable[[WindowOutcome], None],
) -> WindowOutcome:
    """Runs a window in a thread of its own and waits for its outcome.

    Raises TimeoutError after `deadline_seconds`. The window goes on then, as it does when the
    caller is cancelled, and `late` is called with its outcome, in this loop, whenever it ends.
    """
    loop = asyncio.get_running_loop()
    ended: asyncio.Future[WindowOutcome] = loop.create_future()

    def deliver(outcome: WindowOutcome) -> None:
        if ended.cancelled():
            late(outcome)
        else:
            ended.set_result(outcome)

    def work() -> None:
        outcome = window.run()
        try:
            loop.call_soon_threadsafe(deliver, outcome)
        except RuntimeError:  # the loop is closed: the server has left, and a restart will ask
            return

    threading.Thread(target=work, name=name, daemon=True).start()
    try:
        async with asyncio.timeout(deadline_seconds):
            return await ended
    except TimeoutError:
        if ended.cancelled():
            raise
        return ended.result()  # it came in the same moment
    except asyncio.CancelledError:
        if not ended.cancelled():
            late(ended.result())
        raise


class _QuickSwitches:
    """Holds the interpreter's switch interval down while at least one window is open."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._open = 0
        self._usual = sys.getswitchinterval()

    def __enter__(self) -> None:
        with self._lock:
            if self._open == 0:
                self._usual = sys.getswitchinterval()
                sys.setswitchinterval(min(SWITCH_SECONDS, self._usual))
            self._open += 1

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._open -= 1
            if self._open == 0:
                sys.setswitchinterval(self._usual)


_quick_switches = _QuickSwitches()
