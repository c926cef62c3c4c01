"""The pause window of an idle source with 4 GiB: `idle_diff_window` and `idle_diff_total`.

Three sources, booted anew every BLOCK rounds so that no one machine's place in memory decides: one
for the floor, one for its control, one for forkpoint. Each touched TOUCHED_MIB once, was
snapshotted once, and idles. The floor's window is pause, Diff and resume in one write into a
sparse file on tmpfs; forkpoint's is BranchSandbox in mode DIFF, staged on tmpfs as well.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path

from bench.floor import FloorVmm
from bench.rounds import CONTROL, FLOOR, FORKPOINT
from bench.scratch import Scratch
from bench.served import Served, ServedError
from forkpoint.v1 import branch_pb2

MEMORY_MIB = 4096
TOUCHED_MIB = 32
BLOCK = 25

VMM_TOTAL, TOTAL = "vmm_total_us", "total_us"


class IdleWindows:
    """The windows of three idle sources."""

    name = "idle_diff"
    roles = frozenset({FLOOR, CONTROL, FORKPOINT})

    def __init__(self, scratch: Scratch, served: Served, firecracker: Path, kernel: Path) -> None:
        self._scratch = scratch
        self._served = served
        self._firecracker = firecracker
        self._kernel = kernel
        self._sources = 0
        self._stack = ExitStack()
        self._floors: dict[str, FloorVmm] = {}

    def close(self) -> None:
        """Ends the sources."""
        self._stack.close()

    def prepare(self, round_number: int, *, afresh: bool) -> None:
        """New sources at the start of each block."""
        if round_number % BLOCK and not afresh:
            return
        self._stack.close()
        self._sources += 1
        self._source_id = f"idle-{self._sources}"
        for role in (FLOOR, CONTROL):
            self._floors[role] = self._boot_floor(role)
        self._served.boot(self._source_id, MEMORY_MIB)
        self._stack.callback(self._served.delete, [self._source_id])
        self._served.ask(self._source_id, f"d{TOUCHED_MIB}")
        # The first snapshot holds what was touched, the second what answering did to the guest.
        self._snapshot_id = self._served.branch(self._source_id).snapshot_id
        self.measure(FORKPOINT)

    def _boot_floor(self, role: str) -> FloorVmm:
        folder = self._scratch.memory / f"{role}-{self._sources}"
        floor = FloorVmm(self._firecracker, folder)
        self._stack.callback(floor.close)
        floor.boot(self._kernel, MEMORY_MIB)
        floor.ask(f"d{TOUCHED_MIB}")
        for _ in range(2):
            floor.window(self._scratch.memory, MEMORY_MIB << 20)
        return floor

    def measure(self, role: str) -> Mapping[str, float]:
        """One window."""
        if role != FORKPOINT:
            window = self._floors[role].window(self._scratch.memory, MEMORY_MIB << 20)
            return {
                VMM_TOTAL: window.vmm_total_us,
                TOTAL: window.total_us,
                "pause_us": window.pause_us,
                "snapshot_us": window.snapshot_us,
                "resume_us": window.resume_us,
            }
        branch = self._served.branch(self._source_id)
        self._served.delete_snapshot(self._snapshot_id)
        self._snapshot_id = branch.snapshot_id
        pause = branch.pause_window
        if pause.staging != branch_pb2.STAGING_KIND_TMPFS:
            raise ServedError("the window was not staged on tmpfs: there is not enough of it")
        vmm_total_us = pause.vmm_total.ToMicroseconds()
        if not vmm_total_us:
            raise ServedError("the window has no latencies of Firecracker's")
        return {
            VMM_TOTAL: vmm_total_us,
            TOTAL: pause.total.ToMicroseconds(),
            "pause_us": pause.pause.ToMicroseconds(),
            "snapshot_us": pause.snapshot.ToMicroseconds(),
            "resume_us": pause.resume.ToMicroseconds(),
            "dirty_bytes": pause.dirty_bytes,
        }
