"""From BranchSandbox to READY with 100 MiB dirtied: `branch_ready`.

A source with 4 GiB writes the same DIRTY_MIB before each round. So each branch pre-copies 100 MiB,
writes 100 MiB in its window and merges 100 MiB over them; the floor is one cp of 100 MiB, warm and
on the same file system, and an fsync. forkpoint's time is the client's: from the request to the
message that says READY.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from contextlib import ExitStack

from bench.cp import cp_seconds, make_dense, settle
from bench.rounds import CONTROL, FLOOR, FORKPOINT
from bench.scratch import Scratch
from bench.served import Served, ServedError, entered
from forkpoint.v1 import branch_pb2

MEMORY_MIB = 4096
DIRTY_MIB = 100

SECONDS = "seconds"
STAGES = (
    ("queued_seconds", branch_pb2.BRANCH_STAGE_QUEUED, branch_pb2.BRANCH_STAGE_PRECOPYING),
    ("precopy_seconds", branch_pb2.BRANCH_STAGE_PRECOPYING, branch_pb2.BRANCH_STAGE_PAUSED),
    ("window_seconds", branch_pb2.BRANCH_STAGE_PAUSED, branch_pb2.BRANCH_STAGE_RESUMED),
    ("resumed_seconds", branch_pb2.BRANCH_STAGE_RESUMED, branch_pb2.BRANCH_STAGE_MERGING),
    ("merge_seconds", branch_pb2.BRANCH_STAGE_MERGING, branch_pb2.BRANCH_STAGE_FINALIZING),
    ("finalise_seconds", branch_pb2.BRANCH_STAGE_FINALIZING, branch_pb2.BRANCH_STAGE_READY),
)
"""Where the time goes: each from entering the one stage to entering the next."""


class BranchReady:
    """A whole branch against cp."""

    name = "branch_ready"
    roles = frozenset({FLOOR, CONTROL, FORKPOINT})

    def __init__(self, scratch: Scratch, served: Served) -> None:
        self._folder = scratch.disk
        self._extents = scratch.disk / "cp-extents"
        self._served = served
        self._stack = ExitStack()
        self._sources = 0

    def close(self) -> None:
        """Ends the source, removes the file."""
        self._stack.close()
        self._extents.unlink(missing_ok=True)

    def prepare(self, round_number: int, *, afresh: bool) -> None:
        """The source writes its 100 MiB again."""
        if afresh or not self._sources:
            self._stack.close()
            make_dense(self._extents, DIRTY_MIB)
            self._sources += 1
            self._source_id = f"branched-{self._sources}"
            self._served.boot(self._source_id, MEMORY_MIB)
            self._stack.callback(self._served.delete, [self._source_id])
            self._served.ask(self._source_id, f"d{DIRTY_MIB}")
            self._snapshot_id = self._served.branch(self._source_id).snapshot_id
            self._stack.callback(lambda: self._served.delete_snapshot(self._snapshot_id))
        self._served.ask(self._source_id, f"d{DIRTY_MIB}")

    def measure(self, role: str) -> Mapping[str, float]:
        """One branch, or one cp."""
        settle()
        if role != FORKPOINT:
            return {SECONDS: cp_seconds([self._extents], self._folder)}
        start = time.perf_counter()
        branch = self._served.branch(self._source_id)
        seconds = time.perf_counter() - start
        self._served.delete_snapshot(self._snapshot_id)
        self._snapshot_id = branch.snapshot_id
        if branch.pause_window.dirty_bytes < DIRTY_MIB << 20:
            raise ServedError(f"only {branch.pause_window.dirty_bytes} bytes were dirty")
        stages = {
            name: entered(branch, end) - entered(branch, begin) for name, begin, end in STAGES
        }
        return {SECONDS: seconds, **stages}
