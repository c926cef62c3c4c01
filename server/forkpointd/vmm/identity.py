"""Recognising processes after a restart of the server: ours, and those that nobody owns.

A process is adopted only when everything fits: the host's boot, the pid and its start time, the
executable, the folder it runs in, and the id that it answers. A pid alone means nothing: it is
given again. Everything here blocks: call it in a thread.
"""

from __future__ import annotations

import itertools
import logging
import os
from collections.abc import Collection
from pathlib import Path
from typing import NamedTuple

from forkpointd.model import ProcessRecord
from forkpointd.vmm.api import SOCKET_NAME, ApiConnection, VmmError
from forkpointd.vmm.process import boot_id, has_ended, kill, reap, start_ticks

ANSWER_SECONDS = 5.0
"""How long an adopted VMM may take to tell its id."""
_DELETED = " (deleted)"

log = logging.getLogger(__name__)


class Orphan(NamedTuple):
    """A VMM in our folders that belongs to no sandbox."""

    pid: int
    folder: Path


def adopt(record: ProcessRecord, folder: Path, sandbox_id: str) -> int | None:
    """A pidfd (the caller's to close) of the VMM that `record` describes, if it still runs.

    A VMM that does not answer within ANSWER_SECONDS (it was stopped, say) but fits in everything
    else is adopted: ending it would lose its guest, and whoever asks it next finds out.
    """
    if record.boot_id != boot_id():
        return None
    try:
        pidfd = os.pidfd_open(record.pid)
    except ProcessLookupError:
        return None
    # The pidfd comes first: what fits the record after this is what the pidfd stands for.
    if _fits(record, folder) and not has_ended(pidfd) and _answers_as(folder, sandbox_id):
        return pidfd
    os.close(pidfd)
    return None


def _fits(record: ProcessRecord, folder: Path) -> bool:
    try:
        if start_ticks(record.pid) != record.start_ticks:
            return False
        # The file itself decides: an upgrade that renamed or replaced it changes the path that is
        # shown here (`... (deleted)`), never device and inode of what runs.
        stat = os.stat(f"/proc/{record.pid}/exe")
        if (stat.st_dev, stat.st_ino) != (record.executable_device, record.executable_inode):
            return False
        return os.path.samefile(f"/proc/{record.pid}/cwd", folder)
    except (FileNotFoundError, ProcessLookupError, PermissionError):
        return False


def _answers_as(folder: Path, sandbox_id: str) -> bool:
    try:
        with ApiConnection.open(folder, ANSWER_SECONDS) as connection:
            answer = connection.request("GET", "/", timeout=ANSWER_SECONDS)
    except TimeoutError:
        log.warning("the VMM of sandbox %s is adopted though it does not answer", sandbox_id)
        return True
    except (VmmError, OSError) as error:
        log.warning("the VMM of sandbox %s is not adopted: %s", sandbox_id, error)
        return False
    return isinstance(answer, dict) and answer.get("id") == sandbox_id


def find_orphans(sandboxes_root: Path, known: Collection[int]) -> list[Orphan]:
    """VMMs that run in a folder of ours, also one that was removed, and whose pid is not known.

    A VMM is known by its command line (`--api-sock api.sock --id NAME-OF-THE-FOLDER`), so a shell
    that someone opened in such a folder is none.
    """
    root = os.path.realpath(sandboxes_root)
    pids = (int(name) for name in os.listdir("/proc") if name.isdecimal())
    found = (_orphan(pid, root) for pid in pids if pid not in known)
    return [orphan for orphan in found if orphan is not None]


def end_orphans(sandboxes_root: Path, known: Collection[int]) -> list[Orphan]:
    """Ends them all, and returns them once they have ended."""
    root = os.path.realpath(sandboxes_root)
    ended = []
    for orphan in find_orphans(sandboxes_root, known):
        try:
            pidfd = os.pidfd_open(orphan.pid)
        except ProcessLookupError:
            continue
        try:
            # Between the look and the pidfd the pid may have become someone else's.
            if _orphan(orphan.pid, root) == orphan:
                kill(pidfd)
                reap(pidfd)
                ended.append(orphan)
        finally:
            os.close(pidfd)
    return ended


def _orphan(pid: int, root: str) -> Orphan | None:
    try:
        folder = os.readlink(f"/proc/{pid}/cwd").removesuffix(_DELETED)
        if os.path.dirname(folder) != root:
            return None
        with open(f"/proc/{pid}/cmdline", "rb") as opened:
            arguments = opened.read().split(b"\0")
    except (FileNotFoundError, ProcessLookupError, PermissionError):
        return None  # it ended meanwhile, or is another user's
    is_vmm = _follows(arguments, b"--api-sock", SOCKET_NAME.encode()) and _follows(
        arguments, b"--id", os.path.basename(folder).encode()
    )
    return Orphan(pid, Path(folder)) if is_vmm else None


def _follows(arguments: list[bytes], option: bytes, value: bytes) -> bool:
    return (option, value) in itertools.pairwise(arguments)
