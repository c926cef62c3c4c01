"""A hundred children of one snapshot: `fork_100`, `delete_100` and `resident`.

The source has 4 GiB and touched 50 MiB. forkpoint's fork is ForkSandboxes to its READY message, by
the client's clock; all children must run. They are deleted by a hundred DeleteSandbox calls at
once, to the last answer. In between, with the children idle, the server's VmRSS is read. The floor
is `bench.fork_floor`.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path

from bench.fork_floor import TOUCHED_MIB, ForkFloor
from bench.rounds import CONTROL, FLOOR, FORKPOINT
from bench.scratch import Scratch
from bench.served import Served

MEMORY_MIB = 4096
CHILDREN = 100

FORK_SECONDS, DELETE_SECONDS = "fork_seconds", "delete_seconds"
RESIDENT_BYTES = "resident_bytes"


class Forking:
    """Forks of a hundred, and their end."""

    name = "fork"
    roles = frozenset({FLOOR, CONTROL, FORKPOINT})

    def __init__(self, scratch: Scratch, served: Served, firecracker: Path, kernel: Path) -> None:
        self._folder = scratch.memory
        self._served = served
        self._firecracker = firecracker
        self._kernel = kernel
        self._stack = ExitStack()
        self._sources = 0

    def close(self) -> None:
        """Ends what runs."""
        self._stack.close()

    def prepare(self, round_number: int, *, afresh: bool) -> None:
        """A snapshot for each, once."""
        if self._sources and not afresh:
            return
        self._stack.close()
        self._sources += 1
        folder = self._folder / f"fork-{self._sources}"
        folder.mkdir()
        self._floor = ForkFloor(self._firecracker, folder)
        self._floor.snapshot(self._kernel, MEMORY_MIB)
        source_id = f"forked-{self._sources}"
        self._served.boot(source_id, MEMORY_MIB)
        self._stack.callback(self._served.delete, [source_id])
        self._served.ask(source_id, f"d{TOUCHED_MIB}")
        self._snapshot_id = self._served.branch(source_id).snapshot_id
        self._stack.callback(self._served.delete_snapshot, self._snapshot_id)
        for role in (FLOOR, FORKPOINT):  # the first loads find nothing in the caches
            self.measure(role)

    def measure(self, role: str) -> Mapping[str, float]:
        """One fork and its end."""
        if role != FORKPOINT:
            fork_seconds, delete_seconds = self._floor.fork(CHILDREN)
            return {FORK_SECONDS: fork_seconds, DELETE_SECONDS: delete_seconds}
        start = time.perf_counter()
        fork = self._served.fork(self._snapshot_id, CHILDREN)
        forked = time.perf_counter()
        resident = self._served.resident_bytes()
        begin = time.perf_counter()
        self._served.delete(child.sandbox_id for child in fork.children)
        deleted = time.perf_counter()
        return {
            FORK_SECONDS: forked - start,
            DELETE_SECONDS: deleted - begin,
            RESIDENT_BYTES: resident,
        }
