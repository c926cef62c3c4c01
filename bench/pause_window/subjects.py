"""The sources that windows are taken of, one kind a role, behind one seam.

A subject is one running witness guest. `window` branches it once and tells what that took; what is
made is removed again, outside of all clocks, unless it is the base of the next window.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from bench.branch_figures import branch_figures, staging_name
from bench.cp import cp_seconds, make_dense, settle
from bench.floor import FloorError, FloorVmm, FloorWindow
from bench.pause_window.cells import (
    DISK,
    FULL,
    PREALLOCATED,
    SEQUENTIAL,
    Cell,
)
from bench.pause_window.rows import READY_SECONDS
from bench.pause_window.sequential import copy_whole, lay_over
from bench.phase_running import need_room
from bench.rounds import CONTROL, FLOOR, FORKPOINT
from bench.scratch import Scratch
from bench.served import Served
from bench.sparse import fsync
from bench.witness import Asked, PageRange, file_range


@dataclass(frozen=True, slots=True)
class Taken:
    """What one window took."""

    figures: dict[str, float]
    staging_used: str = ""


@dataclass(frozen=True, slots=True)
class Verdict:
    """What a child found in its memory: the answer to the witness's `v`."""

    oldest: int
    newest: int
    changes: int
    misplaced: int

    @classmethod
    def parse(cls, answer: str) -> Verdict:
        """From `V mib oldest newest changes misplaced`. Raises FloorError for another answer."""
        letter, *numbers = answer.split() or [""]
        if letter != "V" or len(numbers) != 5:
            raise FloorError(f"the guest answered {answer!r} instead of V ...")
        return cls(*map(int, numbers[1:]))

    @property
    def one_moment(self) -> bool:
        """Whether a guest that stamps its pages one after the other was caught at one moment. One
        page may have its generation and not yet its index: the writer was caught in it."""
        return self.changes <= 1 and self.newest - self.oldest <= 1 and self.misplaced <= 1

    def figures(self) -> dict[str, float]:
        """For the row."""
        return {
            "oldest_generation": self.oldest,
            "newest_generation": self.newest,
            "generation_changes": self.changes,
            "misplaced_pages": self.misplaced,
        }


class Subject(Protocol):
    """A source of one role."""

    def ask(self, command: str) -> str:
        """A command to the guest, and its answer."""

    def window(self, mode: str, written: Sequence[PageRange]) -> Taken:
        """One window. `written`: what the guest was told to write since the last one."""

    def check(self, region_mib: int) -> Verdict | None:
        """What a child of the last snapshot finds; None where this role has no children."""

    def forget(self) -> None:
        """Removes all snapshots but the last."""

    def close(self) -> None:
        """Ends it and removes what it made."""


@dataclass(frozen=True, slots=True)
class Place:
    """What subjects are made from."""

    scratch: Scratch
    served: Served
    firecracker: Path
    kernel: Path
    cell: Cell
    names: list[int] = field(default_factory=lambda: [0])

    def name(self, kind: str) -> str:
        """A name that no other subject has."""
        self.names[0] += 1
        return f"{kind}-{self.names[0]}"

    def subject(self, role: str, *, keeps_all: bool = False) -> Subject:
        """A source of this role that has written `touched_mib`, of which there is a snapshot, and
        idles. `keeps_all`: its snapshots stay until `forget`."""
        if role == FORKPOINT:
            return ForkpointSubject(self, keeps_all=keeps_all)
        if role == SEQUENTIAL:
            return SequentialSubject(self)
        if self.cell.phase == "ready":
            return CpSubject(self)
        assert role in (FLOOR, CONTROL, PREALLOCATED)
        return FloorSubject(self, allocates=role == PREALLOCATED)


class FloorSubject:
    """The floor: all in one write. `allocates`: into pages that were had before."""

    def __init__(self, place: Place, *, allocates: bool) -> None:
        self._cell = cell = place.cell
        self._allocates = allocates
        self._stack = ExitStack()
        on = place.scratch.disk if cell.staging == DISK else place.scratch.memory
        self._vmm = _boot_raw(place, self._stack)
        self._staging = on / place.name("staged")
        self._staging.mkdir()
        self._stack.callback(shutil.rmtree, self._staging)
        _first(self._vmm, cell)
        for _ in range(2):
            self._vmm.window(self._staging, cell.source_mib << 20)

    def ask(self, command: str) -> str:
        return self._vmm.ask(command)

    def window(self, mode: str, written: Sequence[PageRange]) -> Taken:
        full = mode == FULL
        size = self._cell.source_mib << 20
        expected_mib = self._cell.source_mib if full else self._cell.dirty_mib
        need_room(self._staging, expected_mib)
        allocated: list[tuple[int, int]] = []
        if self._allocates:
            allocated = [(0, size)] if full else [file_range(*pages) for pages in written]
        window = self._vmm.window(self._staging, size, full=full, allocated=allocated)
        return Taken(_window_figures(window))

    def check(self, region_mib: int) -> Verdict | None:
        return None

    def forget(self) -> None:
        """It keeps none."""

    def close(self) -> None:
        self._stack.close()


class CpSubject:
    """The floor of a whole branch: cp of as many bytes as the image has, and fsync. There is no
    guest."""

    def __init__(self, place: Place) -> None:
        self._folder = place.scratch.disk / place.name("cp")
        self._folder.mkdir()
        self._size_mib = place.cell.touched_mib
        make_dense(self._folder / "image", self._size_mib)

    def ask(self, command: str) -> str:
        raise FloorError(f"there is no guest to be told {command!r}")

    def window(self, mode: str, written: Sequence[PageRange]) -> Taken:
        need_room(self._folder, self._size_mib)
        seconds = cp_seconds([self._folder / "image"], self._folder)
        return Taken({READY_SECONDS: seconds, "precopied_bytes": self._size_mib << 20})

    def check(self, region_mib: int) -> Verdict | None:
        return None

    def forget(self) -> None:
        """It keeps none."""

    def close(self) -> None:
        shutil.rmtree(self._folder)


class SequentialSubject:
    """See bench.pause_window.sequential."""

    def __init__(self, place: Place) -> None:
        self._place = place
        self._cell = cell = place.cell
        self._stack = ExitStack()
        self._folder = place.scratch.disk / place.name("sequential")
        need_room(place.scratch.disk, 3 * cell.source_mib)
        self._vmm = _boot_raw(place, self._stack)
        self._folder.mkdir()
        self._stack.callback(shutil.rmtree, self._folder)
        self._number = 0
        _first(self._vmm, cell)
        self._image = self._folder / "image-0"
        self._vmstate = self._folder / "vmstate-0"
        self._vmm.snapshot(sparse := self._folder / "sparse", self._vmstate)
        copy_whole(sparse, self._image)
        sparse.unlink()
        settle()

    def ask(self, command: str) -> str:
        return self._vmm.ask(command)

    def window(self, mode: str, written: Sequence[PageRange]) -> Taken:
        need_room(self._folder, 2 * self._cell.source_mib)
        self._number += 1
        start = time.perf_counter()
        staged = self._folder / f"diff-{self._number}"
        image = self._folder / f"image-{self._number}"
        vmstate = self._folder / f"vmstate-{self._number}"
        figures: dict[str, float] = {}
        if mode == FULL:
            window = self._vmm.sequential_window(image, vmstate, full=True)
            fsync(image)
        else:
            window = self._vmm.sequential_window(staged, vmstate)
            figures["precopied_bytes"] = copy_whole(self._image, image)
            figures["merged_bytes"] = figures["dirty_bytes"] = lay_over(staged, image)
        figures |= {READY_SECONDS: time.perf_counter() - start, **_window_figures(window)}
        for path in (staged, self._image, self._vmstate):
            path.unlink(missing_ok=True)
        self._image, self._vmstate = image, vmstate
        settle()
        return Taken(figures, DISK)

    def check(self, region_mib: int) -> Verdict:
        place = self._place
        with ExitStack() as stack:
            folder = place.scratch.memory / place.name("child")
            child = FloorVmm(place.firecracker, folder)
            stack.callback(shutil.rmtree, folder)
            stack.callback(child.close)
            child.load(self._vmstate, self._image)
            child.ask("")  # ends its writing
            return Verdict.parse(child.ask(f"v{region_mib}"))

    def forget(self) -> None:
        """Each new image takes the place of the one before."""

    def close(self) -> None:
        self._stack.close()


class ForkpointSubject:
    """A sandbox of a forkpointd, by its public API only."""

    def __init__(self, place: Place, *, keeps_all: bool) -> None:
        self._cell = cell = place.cell
        self._served = served = place.served
        self._keeps_all = keeps_all
        self._id = place.name("source")
        self._stack = ExitStack()
        self._snapshots: list[str] = []
        served.boot(self._id, cell.source_mib)
        self._stack.callback(self._delete)
        _first(self, cell)
        # The first snapshot holds what was written, the second what answering did to the guest.
        for _ in range(2):
            self._snapshots.append(served.branch(self._id).snapshot_id)
        self.forget()

    def ask(self, command: str) -> str:
        return self._served.ask(self._id, command)

    def window(self, mode: str, written: Sequence[PageRange]) -> Taken:
        start = time.perf_counter()
        branch = self._served.branch(self._id, full=mode == FULL)
        seconds = time.perf_counter() - start
        self._snapshots.append(branch.snapshot_id)
        if not self._keeps_all:
            self.forget()
        return Taken({READY_SECONDS: seconds, **branch_figures(branch)}, staging_name(branch))

    def check(self, region_mib: int) -> Verdict:
        child_id = self._served.fork(self._snapshots[-1], 1).children[0].sandbox_id
        try:
            self._served.ask(child_id, "")  # ends its writing
            return Verdict.parse(self._served.ask(child_id, f"v{region_mib}"))
        finally:
            self._served.delete([child_id])

    def forget(self) -> None:
        while len(self._snapshots) > 1:
            self._served.delete_snapshot(self._snapshots[0])
            del self._snapshots[0]

    def _delete(self) -> None:
        self._served.delete([self._id])
        for snapshot_id in self._snapshots:
            self._served.delete_snapshot(snapshot_id)

    def close(self) -> None:
        self._stack.close()


class GuestClock:
    """Turns cycles of a guest's clock into time, by the host's."""

    LEAST_SECONDS = 0.2

    def __init__(self, subject: Subject) -> None:
        self._subject = subject
        self._first = self._look()

    def microseconds(self, cycles: int) -> float:
        """The length of a gap."""
        if (left := self._first[0] + self.LEAST_SECONDS - time.monotonic()) > 0:
            time.sleep(left)
        last = self._look()
        rate = (last[1] - self._first[1]) / (last[0] - self._first[0])
        return cycles / rate * 1e6

    def _look(self) -> tuple[float, int]:
        before = time.monotonic()
        cycles = int(self._subject.ask("c").split()[1])
        return (before + time.monotonic()) / 2, cycles


def _first(subject: Asked, cell: Cell) -> None:
    subject.ask(f"d{cell.touched_mib}")


def _boot_raw(place: Place, stack: ExitStack) -> FloorVmm:
    folder = place.scratch.memory / place.name("raw")
    vmm = FloorVmm(place.firecracker, folder)
    stack.callback(shutil.rmtree, folder)
    stack.callback(vmm.close)
    vmm.boot(place.kernel, place.cell.source_mib)
    return vmm


def _window_figures(window: FloorWindow) -> dict[str, float]:
    figures: Mapping[str, float] = {
        "total_us": window.total_us,
        "vmm_total_us": window.vmm_total_us,
        "pause_us": window.pause_us,
        "snapshot_us": window.snapshot_us,
        "resume_us": window.resume_us,
    }
    return dict(figures)
