"""The folders and processes of a run: made in one place, so that nothing is left behind.

Everything that a run starts works in one of two folders, one on the disk and one on tmpfs. At the
end, whatever brought it about, each process whose working folder lies in them is ended and both
are removed. A Ctrl-C meanwhile has to wait.
"""

from __future__ import annotations

import os
import select
import shutil
import signal
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from bench.machine import filesystem_of

SHM = Path("/dev/shm")
PREFIX = "forkpoint-bench-"
END_SECONDS = 10.0
_ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class ScratchError(Exception):
    """There is no place to work in; the message says what to do."""


@dataclass(frozen=True, slots=True)
class Scratch:
    """The folders of one run."""

    disk: Path
    """Images lie here."""
    memory: Path
    """A tmpfs: windows are staged here."""


@contextmanager
def scratch(parent: Path | None) -> Iterator[Scratch]:
    """Makes the folders, and ends and removes all that is in them afterwards. `parent`: where the
    one on the disk is made; None: the system's folder for temporary files, or /var/tmp where that
    is a tmpfs, on which a copy would cost no disk."""
    if not SHM.is_dir() or filesystem_of(SHM) != "tmpfs":
        raise ScratchError(f"{SHM} is no tmpfs, on which windows are staged: mount one there")
    with _terminating():
        folders: list[Path] = []
        try:
            folders.append(_make(parent or _disk()))
            folders.append(_make(SHM))
            yield Scratch(*folders)
        finally:
            with uninterrupted():
                for folder in folders:
                    end_processes(folder)
                for folder in folders:
                    shutil.rmtree(folder, ignore_errors=True)


def end_processes(folder: Path) -> int:
    """Kills every process that works in this folder or below, and waits for its end; returns how
    many there were."""
    ended = 0
    for pid in processes_in(folder):
        with suppress(ProcessLookupError):
            descriptor = os.pidfd_open(pid)
            try:
                if _works_in(pid, folder):  # the pid may be another's by now
                    signal.pidfd_send_signal(descriptor, signal.SIGKILL)
                    _wait(descriptor)
                    ended += 1
            finally:
                os.close(descriptor)
    return ended


def processes_in(folder: Path) -> list[int]:
    """The processes that work in this folder or below."""
    pids = (int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit())
    return [pid for pid in pids if pid != os.getpid() and _works_in(pid, folder)]


def _works_in(pid: int, folder: Path) -> bool:
    try:
        where = Path(os.readlink(f"/proc/{pid}/cwd").removesuffix(" (deleted)"))
    except OSError:
        return False
    return where == folder or folder in where.parents


def _wait(descriptor: int) -> None:
    poll = select.poll()
    poll.register(descriptor, select.POLLIN)
    poll.poll(END_SECONDS * 1000)


def _make(parent: Path) -> Path:
    return Path(tempfile.mkdtemp(prefix=PREFIX, dir=parent)).resolve()


def _disk() -> Path:
    default = Path(tempfile.gettempdir())
    return Path("/var/tmp") if filesystem_of(default) == "tmpfs" else default


@contextmanager
def _terminating() -> Iterator[None]:
    """SIGTERM and SIGHUP end a run as a Ctrl-C does; so does SIGINT where a shell that started the
    run in the background has it ignored."""

    def interrupt(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    before = {n: signal.signal(n, interrupt) for n in _ENDING}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def uninterrupted() -> Iterator[None]:
    """A Ctrl-C meanwhile is lost."""
    before = {number: signal.signal(number, signal.SIG_IGN) for number in _ENDING}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
