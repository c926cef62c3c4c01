"""The sources that are branched."""

from __future__ import annotations

import time
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

from bench.branch_figures import branch_figures
from bench.images.cells import CHILDREN, Cell
from bench.images.rows import COPY, FORK, REST, SECONDS, STORE, WINDOW_PART
from bench.phase_running import need_memory
from bench.scratch import Scratch
from bench.served import Served, ServedError, entered
from bench.witness import PAGES_PER_MIB, write_pages
from forkpoint.v1 import branch_pb2, fork_pb2, snapshot_pb2

REMOVE_SECONDS = 60.0
POLL_SECONDS = 0.01


@dataclass(frozen=True, slots=True)
class Place:
    """What sources are made from."""

    scratch: Scratch
    """Its disk is the one that the images lie on."""
    served: Served
    firecracker: Path
    kernel: Path
    cell: Cell
    names: list[int] = field(default_factory=lambda: [0])

    def name(self, kind: str) -> str:
        """A name that nothing else has."""
        self.names[0] += 1
        return f"{kind}-{self.names[0]}"


class Source:
    """A sandbox of a forkpointd, by its public API only. Its guest wrote what the cell says, of
    which there is a FLAT snapshot, and idles."""

    def __init__(self, place: Place, memory_mib: int) -> None:
        self._served = served = place.served
        self._cell = cell = place.cell
        self._id = place.name("source")
        self._stack = ExitStack()
        self._snapshots: list[str] = []
        self._below: set[str] = set()
        # Its memory, and as much again while the first snapshot is staged.
        need_memory(2 * cell.touched_of(memory_mib))
        served.boot(self._id, memory_mib)
        self._stack.callback(self._delete)
        served.ask(self._id, f"d{cell.touched_of(memory_mib)}")
        self.branch(snapshot_pb2.LAYOUT_FLAT)
        # What the next diff holds is as many pages as those that are measured.
        self.write()
        self.branch(snapshot_pb2.LAYOUT_LAYERED)
        self.flatten(self.last)

    @property
    def last(self) -> str:
        """Its last snapshot, on which the next branch stands."""
        return self._snapshots[-1]

    @property
    def files(self) -> Path:
        """The folder of that snapshot."""
        return self._served.files_of(self.last)

    def write(self) -> int:
        """The guest writes what the cell says; returns how many bytes."""
        pages = self._cell.dirty_mib * PAGES_PER_MIB
        write_pages(self, 0, pages)
        return pages * 4096

    def ask(self, command: str) -> str:
        """A command to the guest, and its answer."""
        return self._served.ask(self._id, command)

    def branch(
        self, layout: snapshot_pb2.Layout.ValueType, *, keep: bool = False
    ) -> dict[str, float]:
        """One branch to READY; returns its figures. `keep`: the snapshots before it stay."""
        start = time.perf_counter()
        branch = self._served.branch(self._id, layout=layout)
        seconds = time.perf_counter() - start
        self._made(branch, layout, keep=keep)
        if layout == snapshot_pb2.LAYOUT_FLAT and not keep:
            self._stands_alone(self.last)
        return {SECONDS: seconds, **branch_figures(branch)}

    def branch_to_children(self, layout: snapshot_pb2.Layout.ValueType) -> dict[str, float]:
        """One branch to its running children, which are deleted afterwards; with its parts."""
        starting = 0.0

        def seen(branch: branch_pb2.Branch) -> None:
            nonlocal starting
            if not starting and branch.fork.stage >= fork_pb2.FORK_STAGE_STARTING:
                starting = time.time()

        start = time.perf_counter()
        branch = self._served.branch(self._id, layout=layout, children=CHILDREN, seen=seen)
        seconds = time.perf_counter() - start
        self._served.delete(child.sandbox_id for child in branch.fork.children)
        self._made(branch, layout, keep=False)
        self._stands_alone(self.last)
        return {
            SECONDS: seconds,
            **branch_figures(branch),
            **parts_of(branch, starting, seconds),
        }

    def flatten(self, snapshot_id: str) -> float:
        """Flattens one of its snapshots; returns how long that took."""
        start = time.perf_counter()
        self._served.flatten(snapshot_id)
        seconds = time.perf_counter() - start
        self._stands_alone(snapshot_id)
        return seconds

    def forget(self) -> None:
        """Deletes all snapshots but the last."""
        while len(self._snapshots) > 1:
            self._served.delete_snapshot(self._snapshots[0])
            self._below.add(self._snapshots.pop(0))

    def kept(self) -> list[snapshot_pb2.Snapshot]:
        """Its snapshots, the oldest first."""
        return [self._served.snapshot(snapshot_id) for snapshot_id in self._snapshots]

    def close(self) -> None:
        """Ends it and deletes its snapshots."""
        self._stack.close()

    def _made(
        self, branch: branch_pb2.Branch, layout: snapshot_pb2.Layout.ValueType, *, keep: bool
    ) -> None:
        self._snapshots.append(branch.snapshot_id)
        if not keep:
            self.forget()
        if branch.layout != layout:
            raise ServedError(f"the branch was kept {snapshot_pb2.Layout.Name(branch.layout)}")
        if branch.pause_window.dirty_bytes < self._cell.dirty_mib << 20:
            raise ServedError(f"only {branch.pause_window.dirty_bytes} bytes were dirty")

    def _stands_alone(self, snapshot_id: str) -> None:
        """Waits until the server has removed what a snapshot stood on, and its layer: no trial is
        to pay for the one before it. The snapshot is FLAT, and those below it are deleted."""
        layer = self._served.files_of(snapshot_id) / "layer"
        deadline = time.monotonic() + REMOVE_SECONDS
        while layer.exists() or any(self._served.files_of(each).exists() for each in self._below):
            if time.monotonic() > deadline:
                raise TimeoutError(f"the server keeps what {snapshot_id} doesn't stand on")
            time.sleep(POLL_SECONDS)
        self._below.clear()

    def _delete(self) -> None:
        self._served.delete([self._id])
        for snapshot_id in self._snapshots:
            self._served.delete_snapshot(snapshot_id)


def parts_of(branch: branch_pb2.Branch, starting: float, seconds: float) -> dict[str, float]:
    """The parts of a branch to running children. `starting`: when the client saw that the children
    were started, in seconds since the epoch; what a fork of a layer waits for is done by then."""
    resumed = entered(branch, branch_pb2.BRANCH_STAGE_RESUMED)
    forking = entered(branch, branch_pb2.BRANCH_STAGE_FORKING)
    precopied = 0.0
    for entry, after in zip(branch.stages, branch.stages[1:], strict=False):
        if entry.stage == branch_pb2.BRANCH_STAGE_PRECOPYING:
            precopied = (after.enter_time.ToNanoseconds() - entry.enter_time.ToNanoseconds()) / 1e9
    ready = entered(branch, branch_pb2.BRANCH_STAGE_READY)
    parts = {
        COPY: precopied + starting - forking,
        WINDOW_PART: branch.pause_window.total.ToNanoseconds() / 1e9,
        STORE: forking - resumed,
        FORK: ready - starting,
    }
    return {**parts, REST: seconds - sum(parts.values())}
