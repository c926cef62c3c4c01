"""How the trials of a cell are taken: sources made ready, then one slot after the other."""

from __future__ import annotations

import os
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from bench.cp import cp_seconds, settle, write_seconds
from bench.images.cells import AGAIN, CHILD, FLAT, FLATTEN, READY, REFLINK, ROW, Job, Slot
from bench.images.floors import ChildrenFloor, OpenLayer
from bench.images.rows import (
    BYTES_PER_SECOND,
    FLATTENED,
    FLATTENS,
    GROWN,
    SECONDS,
    WRITTEN,
)
from bench.images.sources import Place, Source
from bench.phase_running import need_room
from bench.rounds import FORKPOINT
from bench.sparse import allocated_bytes
from forkpoint.v1 import snapshot_pb2

LAYERED, FLAT_LAYOUT = snapshot_pb2.LAYOUT_LAYERED, snapshot_pb2.LAYOUT_FLAT
CHAIN = 25
"""Rounds after which the chains of `ready` are flattened, outside of all clocks."""
POLICY_SECONDS = 120.0
POLL_SECONDS = 0.2
READ_BYTES = 8 << 20


@dataclass(frozen=True, slots=True)
class Shot:
    """One trial."""

    number: int
    figures: dict[str, float]
    refused: str = ""
    wrong: str = ""


class Images(ABC):
    """The trials of one cell; a kind for each phase."""

    def __init__(self, place: Place, job: Job) -> None:
        self.place = place
        self.job = job
        self._sources: dict[tuple[bool, int], Source] = {}
        self._stack = ExitStack()

    def close(self) -> None:
        """Ends all sources."""
        self._stack.close()
        self._sources.clear()

    def source(self, slot: Slot) -> Source:
        """The one that a slot of forkpoint branches: FLAT the same as LAYERED."""
        return self._sources[slot.role == AGAIN, slot.source_mib]

    def prepare(self, number: int, *, afresh: bool) -> None:
        """The sources, the largest first: it needs most while it is made."""
        if afresh:
            self.close()
        if self._sources:
            return
        wanted = {
            (slot.role == AGAIN, slot.source_mib)
            for slot in self.job.slots
            if slot.role in (FORKPOINT, AGAIN, FLAT)
        }
        for again, source_mib in sorted(wanted, key=lambda one: (-one[1], one[0])):
            need_room(self.place.scratch.disk, 3 * self.place.cell.touched_of(source_mib))
            source = Source(self.place, source_mib)
            self._stack.callback(source.close)
            self._sources[again, source_mib] = source

    @abstractmethod
    def shots(self, slot: Slot) -> Iterator[Shot]:
        """The trials of one slot, as they come."""


class Ready(Images):
    """From the request to READY, against writing and syncing as much as was dirtied."""

    def prepare(self, number: int, *, afresh: bool) -> None:
        super().prepare(number, afresh=afresh)
        if number % CHAIN == CHAIN // 2:
            for source in self._sources.values():
                source.flatten(source.last)

    def shots(self, slot: Slot) -> Iterator[Shot]:
        if slot.role in (FORKPOINT, AGAIN, FLAT):
            source = self.source(slot)
            source.write()
            settle()
            yield Shot(0, source.branch(FLAT_LAYOUT if slot.role == FLAT else LAYERED))
            return
        settle()
        folder, size_mib = self.place.scratch.disk, self.place.cell.dirty_mib
        yield Shot(0, {SECONDS: write_seconds(folder / "floor", size_mib), "bytes": size_mib << 20})


class InARow(Images):
    """Branch after branch of one source, all of which are kept until the row ends."""

    def shots(self, slot: Slot) -> Iterator[Shot]:
        cell, source = self.place.cell, self.source(slot)
        flat = slot.role == FLAT
        held = cell.touched_mib if flat else cell.dirty_mib
        need_room(self.place.scratch.disk, slot.trials * held + 1024)
        # The row stands on one flat image, whatever was before it.
        source.write()
        source.branch(FLAT_LAYOUT)
        settle()
        folder, written = self.place.served.data, 0
        before = allocated_bytes(folder)
        for number in range(slot.trials):
            written += source.write()
            figures = source.branch(FLAT_LAYOUT if flat else LAYERED, keep=True)
            if number == slot.last:
                figures |= self._room(source, before, written, flat=flat)
            yield Shot(number, figures)
        source.forget()
        settle()

    def _room(self, source: Source, before: int, written: int, *, flat: bool) -> dict[str, float]:
        """What the row takes on the disk, when the server's policy has nothing left to do."""
        depth = self.place.cell.flatten_depth
        due = 0 if flat or not depth else (self.job.cell.in_a_row // depth)
        deadline = time.monotonic() + POLICY_SECONDS
        while True:
            row = source.kept()[1:]
            flattened = [] if flat else [one for one in row if one.layout == FLAT_LAYOUT]
            if len(flattened) >= due:
                break
            if time.monotonic() > deadline:
                raise TimeoutError(f"{len(flattened)} of {due} layers were flattened")
            time.sleep(POLL_SECONDS)
        settle()
        return {
            GROWN: allocated_bytes(self.place.served.data) - before,
            WRITTEN: written,
            FLATTENS: len(flattened),
            FLATTENED: sum(one.disk_bytes for one in flattened),
        }


class Flattening(Images):
    """FlattenSnapshot of one layer, against cp of the image that comes of it."""

    def shots(self, slot: Slot) -> Iterator[Shot]:
        (source,) = self._sources.values()
        image = source.files / "memory"
        if slot.role == FLAT:
            source.write()
            settle()
            yield Shot(0, source.branch(FLAT_LAYOUT))
            return
        if slot.role == FORKPOINT:
            source.write()
            source.branch(LAYERED)
            settle()
            seconds = source.flatten(source.last)
            size = (source.files / "memory").stat().st_blocks * 512
        else:
            settle()
            seconds = cp_seconds([image], self.place.scratch.disk)
            size = image.stat().st_blocks * 512
        yield Shot(0, {SECONDS: seconds, "bytes": size, BYTES_PER_SECOND: size / seconds})


class Reflinking(Images):
    """FlattenSnapshot by reflink, against a clone of the same image with the same extents laid over
    it. All of a round is of the same two files."""

    def __init__(self, place: Place, job: Job) -> None:
        super().__init__(place, job)
        self._layer: OpenLayer | None = None
        self._layered = ""

    def close(self) -> None:
        self._let_go()
        super().close()

    def _let_go(self) -> None:
        if self._layer is not None:
            self._layer.close()
            self._layer = None

    def prepare(self, number: int, *, afresh: bool) -> None:
        """The layer that this round is about."""
        self._let_go()
        super().prepare(number, afresh=afresh)
        (source,) = self._sources.values()
        image = source.files / "memory"
        source.write()
        source.branch(LAYERED)
        self._layered = source.last
        self._layer = OpenLayer(image, source.files / "layer")

    def shots(self, slot: Slot) -> Iterator[Shot]:
        (source,) = self._sources.values()
        assert self._layer is not None
        settle()
        if slot.role == FLAT:
            source.write()
            settle()
            yield Shot(0, source.branch(FLAT_LAYOUT, keep=True))
        elif slot.role == FORKPOINT:
            seconds = source.flatten(self._layered)
            yield Shot(0, {SECONDS: seconds})
        else:
            target = self.place.scratch.disk / "floor-clone"
            yield Shot(0, {SECONDS: self._layer.clone_seconds(target)})


class ToChildren(Images):
    """A branch to its running children, against the sum of what its parts cost at least."""

    def __init__(self, place: Place, job: Job) -> None:
        super().__init__(place, job)
        self._floor: ChildrenFloor | None = None

    def prepare(self, number: int, *, afresh: bool) -> None:
        super().prepare(number, afresh=afresh)
        if self._floor is None:
            self._floor = ChildrenFloor(self.place, self.job.slots[0].source_mib)
            self._stack.callback(self._floor.close)

    def close(self) -> None:
        super().close()
        self._floor = None

    def shots(self, slot: Slot) -> Iterator[Shot]:
        (source,) = self._sources.values()
        assert self._floor is not None
        image = source.files / "memory"
        read_through(image)
        if slot.role in (FORKPOINT, FLAT):
            source.write()
            settle()
            layout = LAYERED if slot.role == FORKPOINT else FLAT_LAYOUT
            yield Shot(0, source.branch_to_children(layout))
        else:
            settle()
            yield Shot(0, self._floor.measure(image))


KINDS: dict[str, type[Images]] = {
    READY: Ready,
    ROW: InARow,
    FLATTEN: Flattening,
    REFLINK: Reflinking,
    CHILD: ToChildren,
}


def read_through(path: Path) -> None:
    """Reads a file, so that all of it is in the page cache."""
    buffer = bytearray(READ_BYTES)
    with path.open("rb", buffering=0) as opened:
        while opened.readinto(buffer):
            continue
        os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_NORMAL)
