"""The simulator: a process that stands in for Firecracker where /dev/kvm can't be used.

It speaks Firecracker 1.12.1's HTTP API on a Unix socket, with a real memory file, real dirty
tracking by 4 KiB page, the same errors (status and `fault_message`) for the same misuse and the
same serial console on stdin and stdout. What runs in it is not the given kernel but the witness
guest's commands (`forkpointd.witness` lists them), served from state that lies in guest memory, so
a restored child goes on exactly where its source was. One suite, `tests/integration/vmm_contract`,
runs against it and against real Firecracker. It says that it is a simulator wherever a user looks:
in `--version`, in `app_name` and `vmm_version` of `GET /`, in its log's first line.

It imports the standard library only, and nothing of this project outside its own package, so that
a hundred of them start quickly.

What it leaves out, each refused with a message that says so: network devices, vsock, balloon,
entropy device, MMDS, custom CPU templates, memory by userfaultfd, huge pages, `--config-file`.

Faults, for tests only
----------------------
A list of rules, as JSON, in the environment variable FORKPOINT_SIMULATOR_FAULTS or by
`PUT /simulator/faults` with the body `{"rules": [...]}`, which replaces the list (`GET` shows what
is left of it). A rule is an object:

    at           the point where it applies, see below; required
    do           what happens there, see below; required
    nth          applies from the nth time on that the point is reached, counted from when the
                 rule was made; default 1
    times        how often it applies; default 1, 0 means always
    errno        for `error`: a name such as "ENOSPC" (default) or "EIO"
    after_pages  for `error` and `short` at create.memory: so many pages are written before
    ms           for `delay`: milliseconds
    code         for `exit`: the exit code, default 1
    message      for `refuse`: the fault_message

Points of a request, where ACTION is pause, resume, create, load, start, flush or get (which is
every GET): ACTION before it begins; ACTION.reply when it is done and its answer not yet sent.
Points inside a create, in their order:

    create.vmstate   before vmstate is written
    create.open      vmstate is on disk, the memory file not yet opened
    create.memory    the memory file has its size, no page is written yet
    create.sync      all pages are written, the dirty bits are cleared, nothing is synced

Points inside a load: load.vmstate before the file is read, load.memory before memory is mapped.

What can be done (at every point unless said otherwise):

    delay     sleeps `ms`, then goes on
    hang      sleeps for ever: this and every later request stays unanswered
    exit      ends the process at once with `code`, without a reply
    kill      ends the process by SIGKILL
    ignore    only at ACTION: the request is not run and never answered; later ones are
    refuse    only at ACTION: the request is not run and answers 400 with `message`
    error     inside create and load: as if the system call there had failed with `errno`; at
              create.memory the dirty bits come back, at create.sync they are gone
    short     only at create.memory: just `after_pages` pages are written, yet success is reported
              and the dirty bits are cleared: a VMM that lies
"""

from __future__ import annotations

import os.path
import sys

__all__ = ["simulator_argv"]


def simulator_argv() -> list[str]:
    """The command line that starts a simulator; append the options (`--api-sock` and so on).

    Isolated mode and no site-packages: only the standard library is needed, and looking through
    site-packages would double the time to start.
    """
    return [sys.executable, "-I", "-S", os.path.join(os.path.dirname(__file__), "__main__.py")]
