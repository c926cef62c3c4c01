"""One run: what is not in the CSVs yet is measured, cell by cell, each on a server of its own."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import grpc

from bench.machine import Machine
from bench.pause_window.cells import DISK, Job, Phase, Slot
from bench.pause_window.measures import LoadedWindows, Windows
from bench.pause_window.rows import Outcome, Row, RowLog, path_of, progress_of, read_file
from bench.pause_window.subjects import Place, RefusedError
from bench.rounds import FAILURES_IN_A_ROW, TRIAL_FAILURES, describe, raise_if_interrupted
from bench.scratch import Scratch
from bench.served import Served

FAILURES = (*TRIAL_FAILURES, RefusedError)
DISK_ONLY = {"FORKPOINT_STAGING_BYTES": "0"}
REFUSALS = (grpc.StatusCode.RESOURCE_EXHAUSTED, grpc.StatusCode.FAILED_PRECONDITION)

Say = Callable[[str], None]


def outcome_of(error: BaseException) -> Outcome:
    """Whether a trial was refused for want of room, or failed."""
    code = getattr(error, "code", None)
    if isinstance(error, grpc.RpcError) and callable(code) and code() in REFUSALS:
        return Outcome.REFUSED
    return Outcome.REFUSED if isinstance(error, RefusedError) else Outcome.FAILED


@dataclass(frozen=True, slots=True)
class Runner:
    """What all phases share."""

    scratch: Scratch
    firecracker: Path
    kernel: Path
    machine: Machine
    results: Path
    say: Say
    most_rounds: float = math.inf
    """Of each cell."""

    def run(self, phases: Sequence[Phase]) -> int:
        """Measures what is missing of these phases; returns how many cells were broken off."""
        return sum(self._phase(phase) for phase in phases)

    def _phase(self, phase: Phase) -> int:
        identity = {name: str(value) for name, value in self.machine.row().items()}
        there = read_file(path_of(self.results, phase.name))
        start = time.monotonic()
        self.say(f"{phase.name}: {phase.about}")
        with RowLog(self.results, phase.name, self.machine) as log:
            skipped = broken_off = 0
            for job in phase.jobs:
                wanted = int(min(job.rounds, self.most_rounds))
                progress = progress_of(job, there, identity)
                skipped += min(progress.done, wanted)
                if progress.done < wanted:
                    first = progress.next_round
                    rounds = range(first, first + wanted - progress.done)
                    broken_off += not self._job(job, rounds, log)
        if skipped:
            self.say(f"  {skipped} rounds were there already and were skipped")
        self.say(f"  took {time.monotonic() - start:.0f} s")
        return broken_off

    def _job(self, job: Job, rounds: Iterable[int], log: RowLog) -> bool:
        start = time.monotonic()
        taken = Rounds(job, log, self.say)
        settings = DISK_ONLY if job.cell.staging == DISK else {}
        try:
            with Served(self.scratch, self.firecracker, self.kernel, settings) as served:
                place = Place(self.scratch, served, self.firecracker, self.kernel, job.cell)
                kind = LoadedWindows if job.cell.phase == "1e" else Windows
                with closing(kind(place, job)) as measure:
                    taken.run(measure, rounds)
        except FAILURES as error:
            raise_if_interrupted(error)
            self.say(f"  {job.cell} was broken off: {describe(error)}")
            return False
        seconds = time.monotonic() - start
        self.say(f"  {job.cell}: {taken.done} rounds in {seconds:.0f} s{taken.troubles()}")
        return True


class Rounds:
    """The rounds of one job: each trial becomes a row, whatever comes of it."""

    def __init__(self, job: Job, log: RowLog, say: Say) -> None:
        self._job = job
        self._log = log
        self._say = say
        self.done = 0
        self._bad = {Outcome.FAILED: 0, Outcome.REFUSED: 0}

    def run(self, measure: Windows, rounds: Iterable[int]) -> None:
        """Takes these rounds, unless too many in a row fail."""
        failures = 0
        for number in rounds:
            good = self._round(measure, number, afresh=failures > 0)
            self.done += 1
            failures = 0 if good else failures + 1
            if failures == FAILURES_IN_A_ROW:
                self._say(f"  {self._job.cell} is given up after {failures} bad rounds in a row")
                break

    def troubles(self) -> str:
        """How many trials failed and were refused; empty where none was."""
        return "".join(f", {count} {outcome}" for outcome, count in self._bad.items() if count)

    def _round(self, measure: Windows, number: int, *, afresh: bool) -> bool:
        slots = self._job.order(number)
        try:
            measure.prepare(number, afresh=afresh)
        except FAILURES as error:
            raise_if_interrupted(error)
            for position, slot in enumerate(slots):
                self._bad_row(number, position, slot, 0, error)
            return False
        good = True
        for position, slot in enumerate(slots):
            good = self._slot(measure, number, position, slot) and good
        return good

    def _slot(self, measure: Windows, number: int, position: int, slot: Slot) -> bool:
        start, window = time.time(), 0
        try:
            for shot in measure.shots(slot):
                outcome = Outcome.OK
                if shot.refused or shot.wrong:
                    outcome = Outcome.FAILED if shot.wrong else Outcome.REFUSED
                    self._bad[outcome] += 1
                row = Row(
                    self._job.cell,
                    number,
                    position,
                    slot.role,
                    slot.mode,
                    slot.beside,
                    shot.number,
                    start,
                    outcome,
                    shot.wrong or shot.refused,
                    shot.staging_used,
                    shot.figures,
                )
                self._log.add(row)
                start, window = time.time(), shot.number + 1
        except FAILURES as error:
            raise_if_interrupted(error)
            self._bad_row(number, position, slot, window, error)
            return False
        return True

    def _bad_row(
        self, number: int, position: int, slot: Slot, window: int, error: BaseException
    ) -> None:
        outcome = outcome_of(error)
        if not self._bad[outcome]:
            self._say(f"  {self._job.cell}, {slot.role}, {outcome}: {describe(error)}")
        self._bad[outcome] += 1
        self._log.add(
            Row(
                self._job.cell,
                number,
                position,
                slot.role,
                slot.mode,
                slot.beside,
                window,
                time.time(),
                outcome,
                describe(error),
            )
        )
