"""The rows: every trial of every phase, one CSV a phase, written as they come.

A row has all that the trial was (phase, cell, round, role), all that came (outcome, figures with
their unit in the name) and where (machine, versions, commit). What a restarted run skips, and what
the report says, is read from these files and from nowhere else.
"""

from __future__ import annotations

import csv
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from enum import StrEnum
from pathlib import Path
from types import TracebackType
from typing import IO, Self

from bench.machine import Machine
from bench.pause_window.cells import CELL_COLUMNS, Cell, Job, Slot

WINDOW = ("total_us", "vmm_total_us", "pause_us", "snapshot_us", "resume_us")
"""total: the clock of who sent the window (forkpoint: the server's); the others are Firecracker's
latencies_us and their sum."""
READY_SECONDS = "ready_seconds"
"""From the request to READY, by the client's clock; for the others all that they do."""
STAGES = ("queued", "precopying", "paused", "resumed", "merging", "finalizing")
FIGURES = (
    *WINDOW,
    "guest_gap_us",
    "predicted_us",
    "dirty_bytes",
    READY_SECONDS,
    *(f"{stage}_seconds" for stage in STAGES),
    "precopied_bytes",
    "merged_bytes",
    "load_bytes_per_second",
    "load_children_per_second",
    "load_calls_per_second",
    "oldest_generation",
    "newest_generation",
    "generation_changes",
    "misplaced_pages",
)
COLUMNS = (
    *CELL_COLUMNS,
    "round",
    "position",
    "role",
    "window_mode",
    "beside",
    "number",
    "start",
    "outcome",
    "error",
    "staging_used",
    *FIGURES,
    *Machine.COLUMNS,
)


class Outcome(StrEnum):
    """How a trial ended."""

    OK = "ok"
    FAILED = "failed"
    REFUSED = "refused"
    """The staging rule, or the room on disk or in memory, did not allow it."""


@dataclass(frozen=True, slots=True)
class Row:
    """One trial."""

    cell: Cell
    round: int
    position: int
    """Within the round."""
    role: str
    mode: str
    """DIFF or FULL."""
    beside: str
    """What ran beside it."""
    number: int
    """Within its slot, where a slot is several windows in a row."""
    start: float
    """Seconds since the epoch."""
    outcome: Outcome
    error: str = ""
    staging_used: str = ""
    """Where forkpoint staged it, as the server says."""
    figures: Mapping[str, float] = field(default_factory=dict)
    machine: Mapping[str, str] = field(default_factory=dict)

    def record(self) -> dict[str, str]:
        """For the CSV."""
        unknown = set(self.figures) - set(FIGURES)
        if unknown:
            raise ValueError(f"there is no column for {sorted(unknown)}")
        return {
            **self.cell.row(),
            "round": str(self.round),
            "position": str(self.position),
            "role": self.role,
            "window_mode": self.mode,
            "beside": self.beside,
            "number": str(self.number),
            "start": datetime.fromtimestamp(self.start, UTC).isoformat(),
            "outcome": self.outcome.value,
            "error": self.error,
            "staging_used": self.staging_used,
            **{name: f"{value:.10g}" for name, value in self.figures.items()},
            **self.machine,
        }

    @classmethod
    def of(cls, record: dict[str, str]) -> Row:
        """From the CSV. Raises KeyError, ValueError."""
        return cls(
            cell=Cell.of(record),
            round=int(record["round"]),
            position=int(record["position"]),
            role=record["role"],
            mode=record["window_mode"],
            beside=record["beside"],
            number=int(record["number"]),
            start=datetime.fromisoformat(record["start"]).timestamp(),
            outcome=Outcome(record["outcome"]),
            error=record["error"],
            staging_used=record["staging_used"],
            figures={name: float(record[name]) for name in FIGURES if record[name]},
            machine={name: record[name] for name in Machine.COLUMNS},
        )


class ResultsError(Exception):
    """A CSV can't be read or added to; the message names it and says what to do."""


class RowLog:
    """The open CSV of one phase."""

    def __init__(self, folder: Path, phase: str, machine: Machine) -> None:
        """Goes on where the file ends. A last line that was cut off by a kill is removed.

        Raises ResultsError for a file with other columns.
        """
        folder.mkdir(parents=True, exist_ok=True)
        self.path = path_of(folder, phase)
        self._machine = {name: str(value) for name, value in machine.row().items()}
        new = not self.path.exists()
        if not new:
            _cut_unfinished_line(self.path)
            read_file(self.path)
        self._file: IO[str] = self.path.open("a", newline="", encoding="utf-8")
        self._writer = csv.DictWriter(self._file, COLUMNS, lineterminator="\n")
        if new:
            self._writer.writeheader()
            self._file.flush()

    def add(self, row: Row) -> None:
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


def path_of(folder: Path, phase: str) -> Path:
    """The CSV of a phase."""
    return folder / f"{phase}.csv"


def read_file(path: Path) -> list[Row]:
    """The rows of a CSV; none where there is no file. Raises ResultsError."""
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as opened:
        reader = csv.DictReader(opened)
        if tuple(reader.fieldnames or ()) != COLUMNS:
            raise ResultsError(f"{path} has other columns than this bench writes: move it away")
        try:
            return [Row.of(record) for record in reader]
        except (KeyError, TypeError, ValueError) as error:
            raise ResultsError(f"{path}, line {reader.line_num}, is no row: {error}") from error


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


def progress_of(job: Job, rows: Iterable[Row], machine: Mapping[str, str]) -> Progress:
    """How far a job is on this machine and commit. A round is done when each of its slots has its
    last window, or a row that says why not."""
    rounds: defaultdict[int, set[Slot]] = defaultdict(set)
    slots = {(slot.role, slot.mode, slot.beside): slot for slot in job.slots}
    highest = -1
    for row in rows:
        if row.cell != job.cell or row.machine != machine:
            continue
        highest = max(highest, row.round)
        slot = slots.get((row.role, row.mode, row.beside))
        if slot and (row.outcome is not Outcome.OK or row.number >= slot.windows - 1):
            rounds[row.round].add(slot)
    done = sum(set(job.order(number)) <= there for number, there in rounds.items())
    return Progress(done, highest + 1)


def newest(rows: Sequence[Row]) -> list[Row]:
    """The rows of the machine and commit that the newest row is of: figures of different runs are
    never put beside each other."""
    if not rows:
        return []
    machine = max(rows, key=lambda row: row.start).machine
    return [row for row in rows if row.machine == machine]
