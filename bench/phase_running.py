"""A run of a bench in phases: what is not in the CSVs yet is measured, cell by cell. Each trial
becomes a row, whatever comes of it."""

from __future__ import annotations

import math
import os
import shutil
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

import grpc

from bench.machine import Machine, available_bytes
from bench.phases import AnySlot, Job, Phase
from bench.rounds import FAILURES_IN_A_ROW, TRIAL_FAILURES, describe, raise_if_interrupted
from bench.rows import Outcome, RowLog, Table, TrialRow, identity, path_of, progress_of
from bench.scratch import SHM, Scratch

REFUSALS = (grpc.StatusCode.RESOURCE_EXHAUSTED, grpc.StatusCode.FAILED_PRECONDITION)
SPARE_MIB = 2048
"""Of memory and of disk, left to the machine."""

Say = Callable[[str], None]


class RefusedError(Exception):
    """There is no room for this trial, or this host can't do what it is about."""


FAILURES = (*TRIAL_FAILURES, RefusedError)


def need_room(folder: Path, mib: int) -> None:
    """Raises RefusedError where so much, and what the machine needs, is not there: in memory, and
    on the folder's file system."""
    free = shutil.disk_usage(folder).free >> 20
    if free < mib + SPARE_MIB:
        raise RefusedError(
            f"{mib} MiB and {SPARE_MIB} to spare are needed on disk, {free} are free"
        )
    if os.stat(folder).st_dev == os.stat(SHM).st_dev:
        need_memory(mib)


def need_memory(mib: int) -> None:
    """Raises RefusedError where so much of the memory, and what the machine needs, is not free."""
    memory = available_bytes() >> 20
    if memory < mib + SPARE_MIB:
        raise RefusedError(f"{mib} MiB and {SPARE_MIB} to spare are needed in memory, not {memory}")


def outcome_of(error: BaseException) -> Outcome:
    """Whether a trial was refused for want of room, or failed."""
    code = getattr(error, "code", None)
    if isinstance(error, grpc.RpcError) and callable(code) and code() in REFUSALS:
        return Outcome.REFUSED
    return Outcome.REFUSED if isinstance(error, RefusedError) else Outcome.FAILED


class AnyShot(Protocol):
    """One trial of a slot that came to its end."""

    @property
    def number(self) -> int:
        """Within the slot."""

    @property
    def figures(self) -> Mapping[str, float]:
        """What it took."""

    @property
    def refused(self) -> str:
        """Why it is none of what the cell asks for; empty where it is."""

    @property
    def wrong(self) -> str:
        """What is wrong with what came of it; empty where nothing is."""


Slot_contra = TypeVar("Slot_contra", bound=AnySlot, contravariant=True)
Shot_co = TypeVar("Shot_co", bound=AnyShot, covariant=True)


class AnyMeasure(Protocol[Slot_contra, Shot_co]):
    """What takes the trials of a cell."""

    def prepare(self, number: int, *, afresh: bool) -> None:
        """Makes ready for a round, outside of all clocks. `afresh`: a trial failed before, so
        what there is may be in any state."""

    def shots(self, slot: Slot_contra, /) -> Iterator[Shot_co]:
        """The trials of one slot, as they come."""


S = TypeVar("S", bound=AnySlot)
H = TypeVar("H", bound=AnyShot)
R = TypeVar("R", bound=TrialRow[Any])


class Rounds(Generic[S, H, R]):
    """The rounds of one job."""

    def __init__(
        self,
        job: Job[Any, S],
        log: RowLog[R],
        say: Say,
        row: Callable[[S, H | None, dict[str, Any]], R],
    ) -> None:
        """`row`: makes one of a slot, of what came (None: nothing) and of a TrialRow's fields."""
        self._job = job
        self._log = log
        self._say = say
        self._row = row
        self.done = 0
        self._bad = {Outcome.FAILED: 0, Outcome.REFUSED: 0}

    def run(self, measure: AnyMeasure[S, H], rounds: Iterable[int]) -> None:
        """Takes these rounds, unless too many in a row fail."""
        failures = 0
        for number in rounds:
            good = self._round(measure, number, afresh=failures > 0)
            self.done += 1
            failures = 0 if good else failures + 1
            if failures == FAILURES_IN_A_ROW:
                self._say(f"  {self._job.cell} is given up after {failures} bad rounds in a row")
                break

    def refuse(self, number: int, error: BaseException) -> None:
        """Writes down that a round, and all after it, can't be."""
        for position, slot in enumerate(self._job.order(number)):
            self._bad_row(number, position, slot, 0, error)

    def troubles(self) -> str:
        """How many trials failed and were refused; empty where none was."""
        return "".join(f", {count} {outcome}" for outcome, count in self._bad.items() if count)

    def _round(self, measure: AnyMeasure[S, H], number: int, *, afresh: bool) -> bool:
        slots = self._job.order(number)
        try:
            measure.prepare(number, afresh=afresh)
        except FAILURES as error:
            raise_if_interrupted(error)
            self.refuse(number, error)
            return False
        good = True
        for position, slot in enumerate(slots):
            good = self._slot(measure, number, position, slot) and good
        return good

    def _slot(self, measure: AnyMeasure[S, H], number: int, position: int, slot: S) -> bool:
        start, next_number = time.time(), 0
        try:
            for shot in measure.shots(slot):
                outcome = Outcome.OK
                if shot.refused or shot.wrong:
                    outcome = Outcome.FAILED if shot.wrong else Outcome.REFUSED
                    self._bad[outcome] += 1
                self._add(
                    slot,
                    shot,
                    round=number,
                    position=position,
                    number=shot.number,
                    start=start,
                    outcome=outcome,
                    error=shot.wrong or shot.refused,
                    figures=shot.figures,
                )
                start, next_number = time.time(), shot.number + 1
        except FAILURES as error:
            raise_if_interrupted(error)
            self._bad_row(number, position, slot, next_number, error)
            return False
        return True

    def _bad_row(
        self, number: int, position: int, slot: S, trial: int, error: BaseException
    ) -> None:
        outcome = outcome_of(error)
        if not self._bad[outcome]:
            self._say(f"  {self._job.cell}, {slot.role}, {outcome}: {describe(error)}")
        self._bad[outcome] += 1
        self._add(
            slot,
            None,
            round=number,
            position=position,
            number=trial,
            start=time.time(),
            outcome=outcome,
            error=describe(error),
        )

    def _add(self, slot: S, shot: H | None, **fields: Any) -> None:
        self._log.add(self._row(slot, shot, {"cell": self._job.cell, "role": slot.role, **fields}))


@dataclass(frozen=True, slots=True)
class Runner(ABC, Generic[S, H, R]):
    """What all phases of a run share."""

    scratch: Scratch
    firecracker: Path
    kernel: Path
    machine: Machine
    results: Path
    say: Say
    most_rounds: float = math.inf
    """Of each cell."""

    @property
    @abstractmethod
    def table(self) -> Table[R]:
        """Of the rows."""

    @abstractmethod
    def row(self, slot: S, shot: H | None, fields: dict[str, Any]) -> R:
        """See Rounds."""

    @abstractmethod
    def measuring(self, job: Job[Any, S]) -> AbstractContextManager[AnyMeasure[S, H]]:
        """What takes the trials of a job; nothing of it is left after the block."""

    def run(self, phases: Sequence[Phase[Any, S]]) -> int:
        """Measures what is missing of these phases; returns how many cells were broken off."""
        return sum(self._phase(phase) for phase in phases)

    def _phase(self, phase: Phase[Any, S]) -> int:
        here = identity(self.machine)
        there = self.table.read(path_of(self.results, phase.name))
        start = time.monotonic()
        self.say(f"{phase.name}: {phase.about}")
        with self.table.log(self.results, phase.name, self.machine) as log:
            skipped = broken_off = 0
            for job in phase.jobs:
                wanted = int(min(job.rounds, self.most_rounds))
                progress = progress_of(job, there, here)
                skipped += min(progress.done, wanted)
                if progress.done < wanted:
                    first = progress.next_round
                    rounds = range(first, first + wanted - progress.done)
                    broken_off += not self._job(job, rounds, log)
        if skipped:
            self.say(f"  {skipped} rounds were there already and were skipped")
        self.say(f"  took {time.monotonic() - start:.0f} s")
        return broken_off

    def _job(self, job: Job[Any, S], rounds: range, log: RowLog[R]) -> bool:
        start = time.monotonic()
        taken = Rounds[S, H, R](job, log, self.say, self.row)
        try:
            with self.measuring(job) as measure:
                taken.run(measure, rounds)
        except RefusedError as error:
            raise_if_interrupted(error)
            taken.refuse(rounds.start, error)
            return True
        except FAILURES as error:
            raise_if_interrupted(error)
            self.say(f"  {job.cell} was broken off: {describe(error)}")
            return False
        seconds = time.monotonic() - start
        self.say(f"  {job.cell}: {taken.done} rounds in {seconds:.0f} s{taken.troubles()}")
        return True
