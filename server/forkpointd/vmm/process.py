"""One VMM process: started, identified, ended.

`launch` is one blocking function made to be short, for it is what a fork of a hundred children
pays a hundred times: files, spawn (vfork, no code between it and exec), connect, all requests in
one write. The process gets a session of its own, a FIFO as its standard input that it holds open
for reading and writing itself, and files for everything else, so nothing of it needs this server.

Everything here blocks: call it in a thread.
"""

from __future__ import annotations

import os
import select
import signal
import subprocess
import threading
import time
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from forkpointd.model import ProcessRecord, SandboxExit, SandboxMemory, VmmKind, now
from forkpointd.vmm.api import (
    CONNECT_RETRY_SECONDS,
    SOCKET_NAME,
    ApiConnection,
    ApiReply,
    ApiRequest,
    FolderSocket,
    GoneAfter,
    VmmFault,
    VmmGone,
)
from forkpointd.vmm.binary import Binary
from forkpointd.vmm.oom_order import place
from forkpointd.vmm.words import ERROR_NAME, LOG_NAME, read_last_words

CONSOLE_INPUT_NAME = "console.in"
CONSOLE_OUTPUT_NAME = "console.out"
METRICS_NAME = "metrics"

EMPTIED_NAMES = frozenset({LOG_NAME, ERROR_NAME, METRICS_NAME})
"""Files that `launch` empties where they are there already; the console's must not be."""

LAUNCH_SECONDS = 60.0
"""From the spawn to the last reply: a VMM that takes longer is ended."""
LOG_LEVEL = "Error"
"""At Warning each window writes some lines, inside of it."""

_READ_WRITE = os.O_RDWR | os.O_CLOEXEC
_EMPTY = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND | os.O_CLOEXEC
_NEW = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND | os.O_CLOEXEC

_METRICS_REQUEST = ApiRequest("PUT", "/metrics", {"metrics_path": METRICS_NAME})


@dataclass(frozen=True, slots=True)
class Launched:
    """A VMM that was started and did all that it was asked to."""

    record: ProcessRecord
    pidfd: int
    """The caller's to close."""
    replies: tuple[ApiReply, ...]
    """To the caller's requests, in their order."""
    duration_us: int
    """From before the spawn to the last reply."""


class Abandon:
    """Lets a launch under way be given up from another thread: it ends soon, and as failed."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._connection: ApiConnection | None = None
        self.wanted = False

    def want(self) -> None:
        """Gives it up."""
        with self._lock:
            self.wanted = True
            if self._connection is not None:
                self._connection.abort()

    def hold(self, connection: ApiConnection | None) -> None:
        """The connection that the launch waits on from now."""
        with self._lock:
            self._connection = connection
            if self.wanted and connection is not None:
                connection.abort()


def launch(
    binary: Binary,
    folder: Path,
    sandbox_id: str,
    requests: Sequence[ApiRequest],
    abandon: Abandon | None = None,
    oom_score_adj: int | None = None,
) -> Launched:
    """Starts a VMM in `folder` (which is there, and has no console and no socket yet) and has it
    do `requests`. Without `oom_score_adj` (see `oom_order`) it has the server's own.

    If this fails the process is gone and reaped. Raises VmmFault with the VMM's own words where it
    refused something, VmmGone with its last words where it ended, TimeoutError after
    LAUNCH_SECONDS, OSError where a file could not be made or the binary not be run.
    """
    with closing(_Files(folder)) as files:
        start_ns = time.monotonic_ns()
        pid = _spawn(binary, folder, sandbox_id, files)
    try:
        pidfd = os.pidfd_open(pid)
    except OSError:  # no descriptor left, say; the pid is sure as long as nobody reaps it
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        raise
    try:
        if oom_score_adj is not None:  # before it has any memory to speak of
            place(pid, oom_score_adj)
        record = record_of(pid)
        replies = _set_up(folder, pidfd, requests, abandon or Abandon())
    except BaseException as error:
        kill(pidfd)
        reap(pidfd)
        os.close(pidfd)
        if isinstance(error, VmmGone):
            words = read_last_words(folder) or "it left no words"
            raise VmmGone(f"it ended before it was set up: {words}") from error
        raise
    return Launched(record, pidfd, replies, (time.monotonic_ns() - start_ns) // 1000)


class _Files:
    """What a VMM needs to find in its folder, made; and, open, what it is to inherit.

    Firecracker makes neither its log nor its metrics file itself.
    """

    def __init__(self, folder: Path) -> None:
        inside = f"{folder}/"
        self._open: list[int] = []
        try:
            os.mkfifo(inside + CONSOLE_INPUT_NAME, 0o600)
            # Read-write: the guest's console never sees an end of file, whoever comes and goes.
            self.input = self._keep(os.open(inside + CONSOLE_INPUT_NAME, _READ_WRITE))
            self.output = self._keep(os.open(inside + CONSOLE_OUTPUT_NAME, _NEW, 0o600))
            self.errors = self._keep(os.open(inside + ERROR_NAME, _EMPTY, 0o600))
            os.close(os.open(inside + LOG_NAME, _EMPTY, 0o600))
            os.close(os.open(inside + METRICS_NAME, _EMPTY, 0o600))
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Closes what the VMM has by now."""
        for fd in self._open:
            os.close(fd)

    def _keep(self, fd: int) -> int:
        self._open.append(fd)
        return fd


def _spawn(binary: Binary, folder: Path, sandbox_id: str, files: _Files) -> int:
    """The pid of a new VMM. It is this process's child, and only `reap` reaps it."""
    process = subprocess.Popen(
        [
            *binary.argv,
            *("--api-sock", SOCKET_NAME, "--id", sandbox_id),
            *("--log-path", LOG_NAME, "--level", LOG_LEVEL),
        ],
        cwd=folder,
        stdin=files.input,
        stdout=files.output,
        stderr=files.errors,
        start_new_session=True,  # a Ctrl-C at the server's terminal is not for the guests
        env={} if binary.kind is VmmKind.FIRECRACKER else None,
    )
    # From here on the pidfd is what stands for the process: `subprocess` must neither reap it nor
    # warn that nobody did.
    process.returncode = 0
    return process.pid


def _set_up(
    folder: Path, pidfd: int, requests: Sequence[ApiRequest], abandon: Abandon
) -> tuple[ApiReply, ...]:
    """Waits for the VMM's socket and has all requests done, sent in one write."""
    deadline = time.monotonic() + LAUNCH_SECONDS
    with _connect(folder, pidfd, deadline, abandon) as connection:
        abandon.hold(connection)
        try:
            wanted = (_METRICS_REQUEST, *requests)
            connection.send(b"".join(r.encode() for r in wanted), timeout=LAUNCH_SECONDS)
            replies = connection.receive(len(wanted), deadline)
        except GoneAfter as gone:
            # A failed load ends Firecracker: its refusal says more than its end.
            _raise_refusal(gone.replies)
            raise
        finally:
            abandon.hold(None)
    _raise_refusal(replies)
    return tuple(replies[1:])


def _connect(folder: Path, pidfd: int, deadline: float, abandon: Abandon) -> ApiConnection:
    with FolderSocket(folder) as there:
        while True:
            try:
                return ApiConnection(there.connect())
            except (FileNotFoundError, ConnectionRefusedError, BlockingIOError):
                if abandon.wanted or has_ended(pidfd):
                    raise VmmGone("it ended before it listened") from None
                if time.monotonic() >= deadline:
                    raise TimeoutError(
                        f"the VMM did not listen within {LAUNCH_SECONDS:.0f} s"
                    ) from None
            time.sleep(CONNECT_RETRY_SECONDS)


def _raise_refusal(replies: Sequence[ApiReply]) -> None:
    for reply in replies:
        if not reply.ok:
            raise VmmFault(reply.status, reply.fault_message)


# --- what a process is -------------------------------------------------------------------------


@cache
def boot_id() -> str:
    """The random name of this boot of the host."""
    return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()


def record_of(pid: int) -> ProcessRecord:
    """What identifies a process that runs now. Raises VmmGone if it does not."""
    try:
        executable = Path(os.readlink(f"/proc/{pid}/exe"))
        stat = os.stat(f"/proc/{pid}/exe")
        ticks = start_ticks(pid)
    except (FileNotFoundError, ProcessLookupError) as error:
        raise VmmGone(f"process {pid} has ended") from error
    return ProcessRecord(boot_id(), pid, ticks, executable, stat.st_dev, stat.st_ino)


def start_ticks(pid: int) -> int:
    """When a process started, in clock ticks since boot: field 22 of proc_pid_stat(5).

    Raises FileNotFoundError or ProcessLookupError where there is no such process.
    """
    with open(f"/proc/{pid}/stat", "rb", buffering=0) as opened:
        line = opened.read(4096)
    # Field 2 is the name in parentheses, which may hold spaces and parentheses itself.
    return int(line[line.rindex(b")") + 2 :].split()[19])


def resident_bytes(pid: int) -> int:
    """Memory of a process that is its own (`process_memory`). 0 for one that is gone."""
    return process_memory(pid).private_bytes


def process_memory(pid: int) -> SandboxMemory:
    """The memory of a VMM's process: its own (anonymous pages, proc_pid_status(5), which a guest's
    are once it has written to them) and that of files, on tmpfs too. Kept as counters by the
    kernel, 6 us a look; smaps_rollup walks all page tables (10 ms a GiB) and keeps the guest from
    having new pages meanwhile. None at all for a process that is gone."""
    try:
        fd = os.open(f"/proc/{pid}/status", os.O_RDONLY | os.O_CLOEXEC)
    except (FileNotFoundError, ProcessLookupError, PermissionError):
        return SandboxMemory(0, 0)
    try:
        text = os.read(fd, 16384)
    except ProcessLookupError:
        return SandboxMemory(0, 0)
    finally:
        os.close(fd)

    def counted(*names: bytes) -> int:
        return 1024 * sum(
            int(line.split()[1]) for line in text.splitlines() if line.startswith(names)
        )

    # RssShmem is an image on tmpfs that a child has mapped: its guest's own pages are anonymous.
    return SandboxMemory(counted(b"RssAnon:"), counted(b"RssFile:", b"RssShmem:"))


def has_mapped(pid: int, path: Path) -> bool:
    """Whether a process has a file mapped; False for one that is gone. Raises OSError for a file
    that can't be looked at."""
    found = os.stat(path)
    device = f"{os.major(found.st_dev):02x}:{os.minor(found.st_dev):02x}"
    wanted = [device.encode(), str(found.st_ino).encode()]
    try:
        with open(f"/proc/{pid}/maps", "rb") as maps:  # proc_pid_maps(5): device and inode
            return any(line.split(maxsplit=5)[3:5] == wanted for line in maps)
    except (FileNotFoundError, ProcessLookupError, PermissionError):
        return False  # it has ended; another's process of the same number is none of ours


# --- how it ends -------------------------------------------------------------------------------


def has_ended(pidfd: int) -> bool:
    """Whether the process has ended, reaped or not."""
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    return bool(poll.poll(0))


def send_kill(pidfd: int) -> None:
    """SIGKILL, without waiting. A process that has ended already is fine."""
    try:
        signal.pidfd_send_signal(pidfd, signal.SIGKILL)
    except ProcessLookupError:
        return


def kill(pidfd: int) -> None:
    """SIGKILL, and waits for the end. Reaps nothing."""
    send_kill(pidfd)
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    poll.poll()


def reap(pidfd: int) -> tuple[int, int]:
    """Exit code and signal of a process that has ended: (code, 0), (-1, signal), or (-1, 0) where
    not known. An own child is reaped by this; of an adopted process nothing is left to reap."""
    try:
        result = os.waitid(os.P_PIDFD, pidfd, os.WEXITED | os.WNOHANG)
    except ChildProcessError:
        return -1, 0
    if result is None:
        return -1, 0
    if result.si_code == os.CLD_EXITED:
        return result.si_status, 0
    return -1, result.si_status


def exit_of(code_and_signal: tuple[int, int], last_words: str) -> SandboxExit:
    """The end of a process as the model tells it."""
    exit_code, signal_number = code_and_signal
    return SandboxExit(now(), exit_code, signal_number, last_words)
