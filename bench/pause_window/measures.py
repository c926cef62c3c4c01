"""How the trials of a cell are taken: sources made ready, windows one after the other."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench.cp import make_dense, settle
from bench.floor import FloorError
from bench.pause_window.cells import (
    CALLS,
    DISK,
    FORKS,
    FRESH,
    NOTHING,
    PRECOPIES,
    REPEATED,
    SEQUENTIAL,
    WATCHING,
    WRITING,
    Job,
    Slot,
)
from bench.pause_window.load import REWRITTEN_MIB, beside
from bench.pause_window.subjects import (
    GuestClock,
    Place,
    Subject,
    Taken,
)
from bench.phase_running import need_room
from bench.rounds import FORKPOINT
from bench.witness import PAGES_PER_MIB, PageRange, write_pages

BLOCK = 25
"""Rounds after which new sources are made, so that no one machine's place in memory decides."""
READY_BLOCK = 100
FRESH_BLOCK = 4
"""The same where pages must not have been written before: images stay small, and with them what
forkpoint has to copy."""

PACE_SECONDS = 0.1
"""Between two windows of 1e, alone as well as beside a load: ten windows of the floor would be over
before eight cp come to their fsync."""
WRITING_SECONDS = 1.0
"""How long a guest that keeps writing has done so before its branch is asked for, whoever asks: all
its pages are dirty by then."""


@dataclass(frozen=True, slots=True)
class Shot:
    """One window of a slot, or what the load beside all of them did."""

    number: int
    figures: dict[str, float]
    staging_used: str = ""
    refused: str = ""
    """The staging rule took another place than the cell asks for."""
    wrong: str = ""
    """A child found what its source never had."""


@dataclass
class Windows:
    """Windows of sources side by side: all phases but what runs beside them."""

    place: Place
    job: Job
    _stack: ExitStack = field(default_factory=ExitStack)
    _subjects: dict[str, Subject] = field(default_factory=dict)
    _clocks: dict[str, GuestClock] = field(default_factory=dict)
    _block: int = -1
    _round: int = 0

    def close(self) -> None:
        """Ends all sources."""
        self._stack.close()
        for role in list(self._subjects):
            self._end(role)

    def prepare(self, number: int, *, afresh: bool) -> None:
        """Sources for the slots of this round. Those of sequential-disk, whose image takes long
        to make, stay over blocks."""
        self._round = number
        block = number // self._rounds_of_a_block()
        if afresh or block != self._block:
            for role in list(self._subjects):
                if afresh or role != SEQUENTIAL:
                    self._end(role)
        self._block = block
        for role in dict.fromkeys(slot.role for slot in self.job.order(number)):
            if role not in self._subjects:
                self._make(role)

    def shots(self, slot: Slot) -> Iterator[Shot]:
        """The windows of one slot, as they come."""
        subject = self._subjects[slot.role]
        for number in range(slot.windows):
            if number and self.job.cell.phase == "1e":
                time.sleep(PACE_SECONDS)
            if self.job.cell.phase == "ready" or self.job.cell.staging == DISK:
                settle()
            yield self._shot(slot, subject, number)
        subject.forget()

    def _shot(self, slot: Slot, subject: Subject, number: int) -> Shot:
        cell = self.job.cell
        written = self._write(subject)
        if cell.guest == WRITING:
            return self._caught(slot, subject, number)
        if cell.guest == WATCHING:
            subject.ask("w")
        taken = subject.window(slot.mode, written)
        if cell.guest == WATCHING:
            taken.figures["guest_gap_us"] = self._gap(slot.role, subject, subject.ask(""), "G", 1)
        return self._judged(slot, number, taken)

    def _caught(self, slot: Slot, subject: Subject, number: int) -> Shot:
        """A window of a source that keeps writing, and what a child of it finds."""
        region_mib = self.job.cell.touched_mib
        subject.ask(f"f{region_mib}")
        time.sleep(WRITING_SECONDS)
        taken = subject.window(slot.mode, ())
        verdict = subject.check(region_mib)
        answer = subject.ask("")
        taken.figures["guest_gap_us"] = self._gap(slot.role, subject, answer, "S", 2)
        wrong = ""
        if verdict is not None:
            taken.figures.update(verdict.figures())
            wrong = "" if verdict.one_moment else "the child's memory is of more than one moment"
        shot = self._judged(slot, number, taken)
        return Shot(shot.number, shot.figures, shot.staging_used, shot.refused, wrong)

    def _judged(self, slot: Slot, number: int, taken: Taken) -> Shot:
        asked, used, refused = self.job.cell.staging, taken.staging_used, ""
        if slot.role == FORKPOINT and used != asked:
            refused = f"the staging rule of the server took {used}, not {asked}"
        return Shot(number, taken.figures, used, refused)

    def _gap(self, role: str, subject: Subject, answer: str, letter: str, word: int) -> float:
        words = answer.split()
        if not words or words[0] != letter:
            raise FloorError(f"the guest answered {answer!r} instead of {letter} ...")
        return self._clocks[role].microseconds(int(words[word]))

    def _write(self, subject: Subject) -> tuple[PageRange, ...]:
        cell = self.job.cell
        if not cell.dirty_mib:
            return ()
        pages = cell.dirty_mib * PAGES_PER_MIB
        first = 0
        if cell.pattern == FRESH:
            first = self._round % self._rounds_of_a_block() * pages
        write_pages(subject, first, pages)
        return ((first, pages),)

    def _rounds_of_a_block(self) -> int:
        cell = self.job.cell
        if cell.phase == "ready":
            return READY_BLOCK
        if cell.pattern == FRESH:
            return min(FRESH_BLOCK, cell.region_mib // cell.dirty_mib)
        return BLOCK

    def _make(self, role: str) -> None:
        subject = self.place.subject(role, keeps_all=self.job.cell.phase == "1c")
        self._subjects[role] = subject
        if self.job.cell.guest in (WATCHING, WRITING):
            self._clocks[role] = GuestClock(subject)
        if self.job.cell.pattern == REPEATED and role != SEQUENTIAL:
            # The first of them is not measured: until then these pages were in no diff.
            for mode in dict.fromkeys(slot.mode for slot in self.job.slots):
                subject.window(mode, self._write(subject))
            subject.forget()

    def _end(self, role: str) -> None:
        self._clocks.pop(role, None)
        self._subjects.pop(role).close()


OTHERS = 8
OTHERS_MIB = 512
OTHERS_TOUCHED_MIB = 64
CHILDREN = 100


@dataclass
class LoadedWindows(Windows):
    """The same, with what the slots say running beside them."""

    _specs: dict[tuple[bool, str], Callable[[], dict[str, Any]]] = field(default_factory=dict)

    def prepare(self, number: int, *, afresh: bool) -> None:
        if not self._specs:
            self._make_load()
        super().prepare(number, afresh=afresh)

    def shots(self, slot: Slot) -> Iterator[Shot]:
        if slot.beside == NOTHING:
            yield from super().shots(slot)
            return
        spec = self._specs[slot.role == FORKPOINT, slot.beside]()
        try:
            with beside(spec, self.place.scratch.memory) as figures:
                yield from super().shots(slot)
        finally:
            if "folder" in spec:
                shutil.rmtree(spec["folder"])
            settle()
        yield Shot(slot.windows, figures)

    def _make_load(self) -> None:
        """What the loads stand on. The floor's has to do as much as forkpoint's."""
        place, served, load = self.place, self.place.served, self.job.cell.load
        socket = str(served.socket)
        if load == PRECOPIES:
            need_room(place.scratch.disk, 4 * OTHERS * OTHERS_TOUCHED_MIB)
            ids = [f"other-{n}" for n in range(OTHERS)]
            for sandbox_id in ids:
                served.boot(sandbox_id, OTHERS_MIB)
                self._stack.callback(served.delete, [sandbox_id])
                served.ask(sandbox_id, f"d{OTHERS_TOUCHED_MIB}")
                served.branch(sandbox_id)
            source = place.scratch.disk / "load-image"
            make_dense(source, OTHERS_TOUCHED_MIB + REWRITTEN_MIB)
            self._stack.callback(source.unlink)
            branches = {"kind": "branches", "socket": socket, "sandbox_ids": ids}
            self._specs[True, load] = lambda: branches
            self._specs[False, load] = lambda: {
                "kind": "cp",
                "source": str(source),
                "folder": str(self._new_folder(on_disk=True)),
                "count": OTHERS,
            }
        elif load == FORKS:
            served.boot("forked", OTHERS_MIB)
            self._stack.callback(served.delete, ["forked"])
            served.ask("forked", "d50")
            forks = {"kind": "forks", "socket": socket, "count": CHILDREN}
            forks["snapshot_id"] = served.branch("forked").snapshot_id
            self._specs[True, load] = lambda: forks
            self._specs[False, load] = lambda: {
                "kind": "raw-forks",
                "firecracker": str(place.firecracker),
                "kernel": str(place.kernel),
                "folder": str(self._new_folder(on_disk=False)),
                "memory_mib": OTHERS_MIB,
                "count": CHILDREN,
            }
        else:
            assert load == CALLS
            served.boot("asked", 128)
            self._stack.callback(served.delete, ["asked"])
            calls = {"kind": "calls", "socket": socket, "sandbox_id": "asked"}
            self._specs[True, load] = self._specs[False, load] = lambda: calls

    def _new_folder(self, *, on_disk: bool) -> Path:
        scratch = self.place.scratch
        folder = (scratch.disk if on_disk else scratch.memory) / self.place.name("load")
        folder.mkdir()
        return folder
