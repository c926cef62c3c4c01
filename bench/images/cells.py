"""The plan: which cells a phase has, who is measured in each, and how often."""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from dataclasses import asdict, dataclass, fields

from bench import phases
from bench.rounds import CONTROL, FLOOR, FORKPOINT
from bench.witness import region_mib

FLAT = "forkpoint-flat"
"""The same branch, with layout FLAT."""
AGAIN = "forkpoint-again"
"""forkpoint with a second source of the same size: the control where it is its own reference."""
ROLES = (FLOOR, CONTROL, FORKPOINT, AGAIN, FLAT)

DISK, XFS = "disk", "xfs"
"""Where the images lie: on the disk of the run, or on an XFS on a loop device, with reflink."""

ALL = 0
"""For `touched_mib`: all that the guest can write to."""
CHILDREN = 10
DIRTY_MIB = 50
READY, ROW, FLATTEN, REFLINK, CHILD = "ready", "row", "flatten", "reflink", "children"


@dataclass(frozen=True, slots=True)
class Cell:
    """What is varied. Each field is a column of the CSV."""

    phase: str
    disk: str = DISK
    touched_mib: int = ALL
    """What the guest wrote before the first snapshot: what the base holds."""
    dirty_mib: int = DIRTY_MIB
    """What it writes before each branch, each time the same pages."""
    in_a_row: int = 1
    """Branches, one after the other and all kept, of one turn."""
    flatten_depth: int = 0
    """The server's setting; 0: it flattens nothing by itself."""

    def touched_of(self, source_mib: int) -> int:
        """What the guest of such a source wrote."""
        return self.touched_mib or region_mib(source_mib)

    def row(self) -> dict[str, str]:
        """For the CSV."""
        return {name: str(value) for name, value in asdict(self).items()}

    @classmethod
    def of(cls, row: dict[str, str]) -> Cell:
        """From a row of the CSV. Raises KeyError, ValueError."""
        numbers = ("touched_mib", "dirty_mib", "in_a_row", "flatten_depth")
        return cls(row["phase"], row["disk"], *(int(row[name]) for name in numbers))

    def __str__(self) -> str:
        held = "all memory" if self.touched_mib == ALL else f"{self.touched_mib} MiB"
        words = [self.phase, self.disk, f"{held} populated", f"{self.dirty_mib} MiB dirtied"]
        if self.in_a_row > 1:
            words.append(f"{self.in_a_row} in a row")
            words.append(f"flatten_depth {self.flatten_depth}")
        return ", ".join(words)


CELL_COLUMNS = tuple(field.name for field in fields(Cell))


@dataclass(frozen=True, slots=True)
class Slot:
    """One that is measured in a round."""

    role: str
    source_mib: int = 0
    """Memory of its source; 0: it has none."""
    trials: int = 1
    """One after the other."""
    every: int = 1
    """Takes part in each so-manieth round, from the first on: for what takes long."""

    @property
    def key(self) -> Hashable:
        """What its rows have as `slot_key`."""
        return self.role, self.source_mib

    @property
    def last(self) -> int:
        """The number of its last trial."""
        return self.trials - 1


Job = phases.Job[Cell, Slot]
Phase = phases.Phase[Cell, Slot]

ROUNDS = 205
SIZES_MIB = (1024, 2048, 4096)
ROW_LENGTH = 100
ROWS = 41
"""Of so many branches. Each gives several pairs: the last branches with those about the tenth."""
ROW_MIB = 1024
"""Memory of the source that is branched in a row."""
POLICY_DEPTH = 32


def _ready() -> Iterator[Job]:
    yield Job(
        Cell(READY),
        (
            Slot(FLOOR),
            Slot(CONTROL),
            *(Slot(FORKPOINT, size) for size in SIZES_MIB),
            Slot(AGAIN, SIZES_MIB[0]),
            *(Slot(FLAT, size, every=25) for size in SIZES_MIB),
        ),
        ROUNDS,
    )


def _row() -> Iterator[Job]:
    row = Slot(FORKPOINT, ROW_MIB, trials=ROW_LENGTH)
    flat = Slot(FLAT, ROW_MIB, trials=ROW_LENGTH, every=40)
    cell = Cell(ROW, touched_mib=128, dirty_mib=10, in_a_row=ROW_LENGTH)
    yield Job(cell, (row, flat), ROWS)
    cell = Cell(ROW, DISK, 128, 10, ROW_LENGTH, flatten_depth=POLICY_DEPTH)
    yield Job(cell, (row,), 10)


def _flatten() -> Iterator[Job]:
    slots = (Slot(FLOOR, 1024), Slot(CONTROL, 1024), Slot(FORKPOINT, 1024))
    yield Job(Cell(FLATTEN, touched_mib=512), (*slots, Slot(FLAT, 1024, every=10)), ROUNDS)


def _reflink() -> Iterator[Job]:
    slots = (Slot(FLOOR, 4096), Slot(CONTROL, 4096), Slot(FORKPOINT, 4096))
    yield Job(Cell(REFLINK, XFS), (*slots, Slot(FLAT, 4096, every=10)), ROUNDS)


def _children() -> Iterator[Job]:
    slots = (Slot(FLOOR, 4096), Slot(CONTROL, 4096), Slot(FORKPOINT, 4096))
    for cell, rounds, every in (
        (Cell(CHILD, XFS), ROUNDS, 5),
        (Cell(CHILD, touched_mib=256), ROUNDS, 5),
        (Cell(CHILD), 10, 1),
    ):
        yield Job(cell, (*slots, Slot(FLAT, 4096, every=every)), rounds)


PHASES = {
    phase.name: phase
    for phase in (
        Phase(READY, "request to READY by memory size, 50 MiB dirtied", 10, (*_ready(),)),
        Phase(ROW, "100 branches in a row, flatten policy off and on", 13, (*_row(),)),
        Phase(FLATTEN, "FlattenSnapshot against cp of the same extents", 8, (*_flatten(),)),
        Phase(REFLINK, "FlattenSnapshot of 4 GiB by reflink, XFS", 5, (*_reflink(),)),
        Phase(CHILD, "a branch to 10 running children, its parts", 15, (*_children(),)),
    )
}
