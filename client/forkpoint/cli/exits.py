"""Exit codes, for scripts."""

from __future__ import annotations

from forkpoint import errors

OK = 0
FAILED = 1
"""It did not work: the VMM or the server failed, or it was given up halfway."""
USAGE = 2
"""The command line, or a value in it, is wrong."""
NOT_FOUND = 3
"""There is no sandbox, snapshot, branch or fork of that id."""
REFUSED = 4
"""It can't be done as things stand: a state, a limit, an id that is taken."""
NO_ROOM = 5
"""Disk, memory, staging or a queue is full."""
NO_SERVER = 6
"""The server can't be reached, or went away."""
PARTIAL = 7
"""A fork of which some children did not start."""
TIMED_OUT = 8
"""It took longer than allowed."""
INTERRUPTED = 130
"""Ctrl-C."""

HELP = """\
Exit codes: 0 done · 1 failed · 2 wrong usage · 3 not found · 4 refused as things stand · \
5 no room (disk, memory, queue) · 6 server not reachable · 7 some children of a fork did not \
start · 8 took longer than allowed · 130 interrupted."""


def code_of(error: BaseException) -> int:
    """The exit code for a failure."""
    if isinstance(error, BaseExceptionGroup):
        return code_of(error.exceptions[0])
    for kind, code in (
        (errors.NotFound, NOT_FOUND),
        (errors.InvalidArgument, USAGE),
        (errors.AlreadyExists, REFUSED),
        (errors.FailedPrecondition, REFUSED),
        (errors.OutOfRange, REFUSED),
        (errors.ResourceExhausted, NO_ROOM),
        (errors.SandboxUnresponsive, REFUSED),
        (errors.Unavailable, NO_SERVER),
        (errors.DeadlineExceeded, TIMED_OUT),
        (ValueError, USAGE),
    ):
        if isinstance(error, kind):
            return code
    return FAILED
