"""The rows of a bench in phases: every trial of every phase, one CSV a phase, written as they come.

A row has all that the trial was (cell, round, role), all that came (outcome, figures with their
unit in the name) and where (machine, versions, commit). What a restarted run skips, and what the
report says, is read from these files and from nowhere else.
"""

from __future__ import annotations

import csv
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from enum import StrEnum
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Generic, Self, TypeVar

from bench.machine import Machine
from bench.phases import AnyCell, AnySlot, Job

TRIAL_COLUMNS = ("round", "position", "role", "number", "start", "outcome", "error")


class Outcome(StrEnum):
    """How a trial ended."""

    OK = "ok"
    FAILED = "failed"
    REFUSED = "refused"
    """There was no room for it, or this host can't do what it is about."""


C = TypeVar("C", bound=AnyCell)


@dataclass(frozen=True, slots=True, kw_only=True)
class TrialRow(Generic[C]):
    """One trial; each bench adds what tells its slots apart."""

    cell: C
    round: int
    position: int
    """Within the round."""
    role: str
    number: int
    """Within its slot, where a slot is several trials in a row."""
    start: float
    """Seconds since the epoch."""
    outcome: Outcome
    error: str = ""
    figures: Mapping[str, float] = field(default_factory=dict)
    machine: Mapping[str, str] = field(default_factory=dict)

    @property
    def slot_key(self) -> Hashable:
        """What `key` of its slot is."""
        raise NotImplementedError

    def record(self) -> dict[str, str]:
        """For the CSV. Raises ValueError for a figure that has no column."""
        raise NotImplementedError


def record_of(row: TrialRow[Any], known: Sequence[str]) -> dict[str, str]:
    """The columns that rows of all benches have. `known`: the figures that have columns. Raises
    ValueError for another."""
    if unknown := set(row.figures) - set(known):
        raise ValueError(f"there is no column for {sorted(unknown)}")
    return {
        **row.cell.row(),
        "round": str(row.round),
        "position": str(row.position),
        "role": row.role,
        "number": str(row.number),
        "start": datetime.fromtimestamp(row.start, UTC).isoformat(),
        "outcome": row.outcome.value,
        "error": row.error,
        **{name: f"{value:.10g}" for name, value in row.figures.items()},
        **row.machine,
    }


def fields_of(record: Mapping[str, str], known: Sequence[str]) -> dict[str, Any]:
    """All fields of a TrialRow but its cell. Raises KeyError, ValueError."""
    return {
        "round": int(record["round"]),
        "position": int(record["position"]),
        "role": record["role"],
        "number": int(record["number"]),
        "start": datetime.fromisoformat(record["start"]).timestamp(),
        "outcome": Outcome(record["outcome"]),
        "error": record["error"],
        "figures": {name: float(record[name]) for name in known if record[name]},
        "machine": {name: record[name] for name in Machine.COLUMNS},
    }


R = TypeVar("R", bound=TrialRow[Any])


class ResultsError(Exception):
    """A CSV can't be read or added to; the message names it and says what to do."""


@dataclass(frozen=True, slots=True)
class Table(Generic[R]):
    """The CSVs of one bench."""

    columns: tuple[str, ...]
    of: Callable[[dict[str, str]], R]
    """A row from its columns. Raises KeyError, ValueError."""

    def read(self, path: Path) -> list[R]:
        """The rows of a CSV; none where there is no file. Raises ResultsError."""
        if not path.exists():
            return []
        with path.open(newline="", encoding="utf-8") as opened:
            reader = csv.DictReader(opened)
            if tuple(reader.fieldnames or ()) != self.columns:
                raise ResultsError(f"{path} has other columns than this bench writes: move it away")
            try:
                return [self.of(record) for record in reader]
            except (KeyError, TypeError, ValueError) as error:
                raise ResultsError(f"{path}, line {reader.line_num}, is no row: {error}") from error

    def log(self, folder: Path, phase: str, machine: Machine) -> RowLog[R]:
        """Opens the CSV of a phase, to be gone on with. Raises ResultsError for a file with other
        columns."""
        return RowLog(self, folder, phase, machine)


class RowLog(Generic[R]):
    """The open CSV of one phase."""

    def __init__(self, table: Table[R], folder: Path, phase: str, machine: Machine) -> None:
        """Goes on where the file ends. A last line that was cut off by a kill is removed.

        Raises ResultsError for a file with other columns.
        """
        folder.mkdir(parents=True, exist_ok=True)
        self.path = path_of(folder, phase)
        self._machine = identity(machine)
        new = not self.path.exists()
        if not new:
            _cut_unfinished_line(self.path)
            table.read(self.path)
        self._file: IO[str] = self.path.open("a", newline="", encoding="utf-8")
        self._writer = csv.DictWriter(self._file, table.columns, lineterminator="\n")
        if new:
            self._writer.writeheader()
            self._file.flush()

    def add(self, row: R) -> None:
        """Writes a row."""
        self._writer.writerow({**row.record(), **self._machine})
        self._file.flush()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._file.close()


def identity(machine: Machine) -> dict[str, str]:
    """A machine as its rows name it."""
    return {name: str(value) for name, value in machine.row().items()}


def path_of(folder: Path, phase: str) -> Path:
    """The CSV of a phase."""
    return folder / f"{phase}.csv"


def _cut_unfinished_line(path: Path) -> None:
    with path.open("r+b") as opened:
        text = opened.read()
        end = text.rfind(b"\n") + 1
        if end != len(text):
            opened.truncate(end)


@dataclass(frozen=True, slots=True)
class Progress:
    """What of a job is there already."""

    done: int
    """Rounds with all their trials."""
    next_round: int
    """A round that was broken off is not taken up again: its number stays used."""


def progress_of(
    job: Job[Any, Any], rows: Iterable[TrialRow[Any]], machine: Mapping[str, str]
) -> Progress:
    """How far a job is on this machine and commit. A round is done when each of its slots has its
    last row, or one that says why not."""
    rounds: defaultdict[int, set[AnySlot]] = defaultdict(set)
    slots = {slot.key: slot for slot in job.slots}
    highest = -1
    for row in rows:
        if row.cell != job.cell or row.machine != machine:
            continue
        highest = max(highest, row.round)
        slot = slots.get(row.slot_key)
        if slot and (row.outcome is not Outcome.OK or row.number >= slot.last):
            rounds[row.round].add(slot)
    done = sum(set(job.order(number)) <= there for number, there in rounds.items())
    return Progress(done, highest + 1)


def newest(rows: Sequence[R]) -> list[R]:
    """The rows of the machine and commit that the newest row is of: figures of different runs are
    never put beside each other."""
    if not rows:
        return []
    machine = max(rows, key=lambda row: row.start).machine
    return [row for row in rows if row.machine == machine]
