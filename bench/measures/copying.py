"""What a branch copies, in bytes per second: `copy`.

A source with 4 GiB touched FIRST_MIB and was branched; before each round it writes MORE_MIB that it
never wrote before. So a branch pre-copies what the last one left, and merges MORE_MIB beside it: no
byte is written twice, and the floor's cp has as many to write. After GROWTHS rounds a new source
begins. The guest has 4 GiB, the data is at most a quarter of it, and what cp copies has no holes.

forkpoint's time is that of the stages: from PRECOPYING to PAUSED, and from MERGING to READY, which
has the fsyncs, the manifest and the commits in it. The window between them is no copy.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack

from bench.cp import cp_seconds, make_dense, settle
from bench.rounds import CONTROL, FLOOR, FORKPOINT
from bench.scratch import Scratch
from bench.served import Served, ServedError, entered
from bench.witness import PAGES_PER_MIB
from forkpoint.v1 import branch_pb2

MEMORY_MIB = 4096
FIRST_MIB = 512
MORE_MIB = 64
GROWTHS = 8

BYTES_PER_SECOND = "bytes_per_second"


class Copying:
    """Pre-copy and merge against cp."""

    name = "copy"
    roles = frozenset({FLOOR, CONTROL, FORKPOINT})

    def __init__(self, scratch: Scratch, served: Served) -> None:
        self._folder = scratch.disk
        self._base = scratch.disk / "cp-base"
        self._diff = scratch.memory / "cp-diff"
        self._served = served
        self._stack = ExitStack()
        self._sources = self._growths = 0

    def close(self) -> None:
        """Ends the source, removes the files."""
        self._stack.close()
        for path in (self._base, self._diff):
            path.unlink(missing_ok=True)

    def prepare(self, round_number: int, *, afresh: bool) -> None:
        """A source that has written more, and files of the same sizes for cp."""
        if afresh or not self._sources or self._growths == GROWTHS:
            self._new_source()
        first = (FIRST_MIB + self._growths * MORE_MIB) * PAGES_PER_MIB
        self._base_mib = FIRST_MIB + self._growths * MORE_MIB
        self._served.ask(self._source_id, f"p{first},{MORE_MIB * PAGES_PER_MIB}")
        make_dense(self._base, self._base_mib)
        self._growths += 1

    def _new_source(self) -> None:
        self._stack.close()
        self._sources += 1
        self._growths = 0
        self._source_id = f"copied-{self._sources}"
        self._served.boot(self._source_id, MEMORY_MIB)
        self._stack.callback(self._served.delete, [self._source_id])
        self._served.ask(self._source_id, f"d{FIRST_MIB}")
        self._snapshot_id = self._served.branch(self._source_id).snapshot_id
        self._stack.callback(lambda: self._served.delete_snapshot(self._snapshot_id))
        make_dense(self._diff, MORE_MIB)

    def measure(self, role: str) -> Mapping[str, float]:
        """One copy of all there is."""
        settle()
        if role != FORKPOINT:
            seconds = cp_seconds([self._base, self._diff], self._folder)
            size = (self._base_mib + MORE_MIB) << 20
            return {BYTES_PER_SECOND: size / seconds, "seconds": seconds, "bytes": size}
        branch = self._served.branch(self._source_id)
        self._served.delete_snapshot(self._snapshot_id)
        self._snapshot_id = branch.snapshot_id
        precopy = entered(branch, branch_pb2.BRANCH_STAGE_PAUSED) - entered(
            branch, branch_pb2.BRANCH_STAGE_PRECOPYING
        )
        merging = entered(branch, branch_pb2.BRANCH_STAGE_FINALIZING) - entered(
            branch, branch_pb2.BRANCH_STAGE_MERGING
        )
        finalising = entered(branch, branch_pb2.BRANCH_STAGE_READY) - entered(
            branch, branch_pb2.BRANCH_STAGE_FINALIZING
        )
        seconds = precopy + merging + finalising
        size = branch.precopy.total_bytes + branch.merge.total_bytes
        if size < (self._base_mib + MORE_MIB) << 20:
            raise ServedError(f"only {size} bytes were copied, of {self._base_mib + MORE_MIB} MiB")
        return {
            BYTES_PER_SECOND: size / seconds,
            "seconds": seconds,
            "bytes": size,
            "precopy_seconds": precopy,
            "merge_seconds": merging,
            "finalise_seconds": finalising,
        }
