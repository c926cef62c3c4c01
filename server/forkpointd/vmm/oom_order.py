"""Whom the kernel's out-of-memory killer takes first: children, then everything else, and sources
and the server last.

The kernel ends the process with the highest score: its share of the memory in thousandths, plus its
`oom_score_adj` (proc_pid_oom_score_adj(5)). A process inherits that value, so each VMM is given its
own right after its spawn; it keeps it when the server leaves, and is adopted with it.

    child   1,000   goes before all that is not a child, however large that is: a share is at most
                    1,000. It can be forked again from its snapshot, which is on disk
    source   -500   was booted, or branched: its state is nowhere else, and others come from it. It
                    goes after every ordinary process that has less than half of the memory more
    server   -999   goes last, but can go: a kernel that finds nobody to end (-1,000) panics, or
                    lets a control group hang. Its end costs no guest: the next start adopts them

Lowering a value takes CAP_SYS_RESOURCE, which an ordinary user has not, nor root in many
containers. There the server and its sources stay at the lowest value that they may have (as a rule
what the server was started with), and the order is kept by the children, which may always be
raised, and later lowered to that again.

Everything here blocks for some microseconds: call it in a thread.
"""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass
from pathlib import Path

log = logging.getLogger(__name__)

CHILD_SCORE_ADJ = 1000
SOURCE_SCORE_ADJ = -500
SERVER_SCORE_ADJ = -999

_OWN = Path("/proc/self/oom_score_adj")


@dataclass(frozen=True, slots=True)
class OomOrder:
    """The values of `oom_score_adj` that this server gives."""

    server: int
    source: int
    child: int


def take_place(own: Path = _OWN) -> OomOrder | None:
    """Gives this process the lowest value that it may have, and says what its VMMs are to have.

    None, with a warning, where /proc can't be written: nothing is changed for anyone then.
    """
    try:
        server = _lower(own)
    except OSError as error:
        log.warning("the out-of-memory killer takes whom it likes: %s: %s", own, error.strerror)
        return None
    return OomOrder(server, max(SOURCE_SCORE_ADJ, server), max(CHILD_SCORE_ADJ, server))


def _lower(own: Path) -> int:
    """The value that this process has now. The lowest that it may have is told by nothing: it is
    found by halving."""
    allowed = int(own.read_text(encoding="ascii"))
    own.write_text(f"{allowed}", encoding="ascii")  # an OSError of this one is no matter of rights
    refused = SERVER_SCORE_ADJ - 1
    wanted = SERVER_SCORE_ADJ
    while allowed > wanted > refused:
        try:
            own.write_text(f"{wanted}", encoding="ascii")
        except PermissionError:
            refused = wanted
        else:
            allowed = wanted
        wanted = (refused + allowed) // 2
    return allowed


def place(pid: int, score_adj: int) -> None:
    """Gives a process its value. The caller is sure of the pid. One that has ended needs none; a
    failure is a warning: a sandbox in the wrong place is better than none."""
    try:
        fd = open_score(pid)
        try:
            write_score(fd, score_adj)
        finally:
            os.close(fd)
    except (FileNotFoundError, ProcessLookupError):
        return
    except OSError as error:
        log.warning("process %d keeps its oom_score_adj: %s", pid, error.strerror)


def open_score(pid: int) -> int:
    """A descriptor (the caller's to close) that stands for this process's value, and never for
    that of another process that is given the pid later. Raises OSError."""
    return os.open(f"/proc/{pid}/oom_score_adj", os.O_WRONLY | os.O_CLOEXEC)


def write_score(fd: int, score_adj: int) -> None:
    """Writes a value to what `open_score` opened. Raises OSError."""
    os.write(fd, str(score_adj).encode("ascii"))
