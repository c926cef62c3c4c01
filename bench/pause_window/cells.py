"""The plan: which cells a phase has, who is measured in each, and how often.

A cell is one combination of all that is varied. Its rounds are interleaved: in each round every
slot is measured once, in an order that rotates.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from dataclasses import asdict, dataclass, fields

from bench import phases
from bench.rounds import CONTROL, FLOOR, FORKPOINT
from bench.witness import region_mib

PREALLOCATED = "floor-preallocated"
"""The floor into a memory file whose pages were had before the window."""
SEQUENTIAL = "sequential-disk"
"""bench.pause_window.sequential."""
ROLES = (FLOOR, CONTROL, PREALLOCATED, FORKPOINT, SEQUENTIAL)

DIFF, FULL, BOTH = "DIFF", "FULL", "DIFF+FULL"
TMPFS, DISK = "tmpfs", "disk"
FRESH, REPEATED, NONE = "fresh", "repeated", "none"
IDLE, WATCHING, WRITING = "idle", "watching", "writing"
NOTHING, PRECOPIES, FORKS, CALLS = "nothing", "precopies", "forks", "calls"

IDLE_TOUCHED_MIB = 32
SIZES_MIB = (256, 512, 1024, 2048, 4096, 8192)


@dataclass(frozen=True, slots=True)
class Cell:
    """What is varied. Each field is a column of the CSV."""

    phase: str
    source_mib: int
    mode: str = DIFF
    """DIFF, FULL, or DIFF+FULL where both are taken in turn of the same sources."""
    staging: str = TMPFS
    """Where windows are to be staged; sequential-disk always stages on the disk."""
    touched_mib: int = IDLE_TOUCHED_MIB
    """What the guest wrote before the first snapshot: what the image holds."""
    dirty_mib: int = 0
    """What the guest writes before each window."""
    pattern: str = NONE
    """fresh: each time pages that it never wrote before; repeated: each time the same."""
    guest: str = IDLE
    """What the guest does in the window: idle, watching (a loop that looks at its clock and sees
    every pause) or writing (without stop)."""
    load: str = NOTHING
    """What runs beside, in the slots that say so."""
    in_a_row: int = 1
    """Windows, one after the other, of one turn."""

    @property
    def region_mib(self) -> int:
        """What the guest can write to."""
        return region_mib(self.source_mib)

    def row(self) -> dict[str, str]:
        """For the CSV."""
        return {name: str(value) for name, value in asdict(self).items()}

    @classmethod
    def of(cls, row: dict[str, str]) -> Cell:
        """From a row of the CSV. Raises KeyError, ValueError."""
        texts = {name: row[name] for name in ("phase", "mode", "staging", "pattern", "guest")}
        numbers = {
            name: int(row[name]) for name in ("touched_mib", "dirty_mib", "in_a_row", "source_mib")
        }
        return cls(**texts, **numbers, load=row["load"])  # type: ignore[arg-type]

    def __str__(self) -> str:
        words = [self.phase, f"{self.source_mib} MiB", self.mode, self.staging]
        if self.phase == "ready":
            words.append(f"image of {self.touched_mib} MiB")
        if self.dirty_mib:
            words.append(f"{self.dirty_mib} MiB {self.pattern}")
        words.append(self.guest)
        if self.in_a_row > 1:
            words.append(f"{self.in_a_row} in a row")
        if self.load != NOTHING:
            words.append(f"beside {self.load}")
        return ", ".join(words)


CELL_COLUMNS = tuple(field.name for field in fields(Cell))


@dataclass(frozen=True, slots=True)
class Slot:
    """One that is measured in a round."""

    role: str
    mode: str = DIFF
    beside: str = NOTHING
    """What runs beside it."""
    windows: int = 1
    """One after the other."""
    every: int = 1
    """Takes part in each so-manieth round, from the first on: for what takes long."""

    @property
    def key(self) -> Hashable:
        """What its rows have as `slot_key`."""
        return self.role, self.mode, self.beside

    @property
    def last(self) -> int:
        """The number of its last window."""
        return self.windows - 1


Job = phases.Job[Cell, Slot]
Phase = phases.Phase[Cell, Slot]


def _slots(
    *roles: str, mode: str = DIFF, windows: int = 1, sequential_every: int = 0
) -> tuple[Slot, ...]:
    slots = [Slot(role, mode, windows=windows) for role in roles]
    if sequential_every:
        slots.append(Slot(SEQUENTIAL, mode, windows=windows, every=sequential_every))
    return tuple(slots)


ROUNDS = {4096: 1010, 8192: 840}
"""Of idle windows: a percentile needs a thousand, and the largest source, whose windows vary most,
decides how well the slope over all sizes is known."""


def _memory() -> Iterator[Job]:
    for size in SIZES_MIB:
        rounds = ROUNDS.get(size, 210)
        every = rounds // 4 if size in ROUNDS else 70
        yield Job(
            Cell("1a", size),
            _slots(FLOOR, CONTROL, FORKPOINT, sequential_every=every),
            rounds,
        )
    for size in SIZES_MIB:
        yield Job(
            Cell("1a", size, staging=DISK),
            _slots(FLOOR, CONTROL, FORKPOINT, sequential_every=10),
            16,
        )
    for staging in (TMPFS, DISK):
        for size in SIZES_MIB:
            slots = _slots(FLOOR, PREALLOCATED, FORKPOINT, mode=FULL, sequential_every=2)
            yield Job(Cell("1a", size, FULL, staging), slots, 4 if size < 2048 else 2)
    slots = _slots(FLOOR, CONTROL, FORKPOINT, sequential_every=20)
    yield Job(Cell("1a", 4096, guest=WATCHING), slots, 60)


AGENT_MIB = (10, 25, 50, 100, 250, 500)
SHARES_PERCENT = (0, 50, 75, 100)
"""Of what the guest can write to; 10 and 25 % are 200 and 500 MiB."""


def _dirtied() -> Iterator[Job]:
    region = region_mib(2048)
    sizes = sorted({*AGENT_MIB, *(region * share // 100 for share in SHARES_PERCENT)})
    for size in sizes:
        if not size:
            slots = _slots(FLOOR, CONTROL, FORKPOINT, sequential_every=10)
            yield Job(Cell("1b", 2048), slots, 20)
            continue
        rounds, every = (16, 8) if size < 250 else (6, 3)
        floors: tuple[str, ...] = (FLOOR, CONTROL)
        if size >= region // 2:  # seconds for each, and as much memory for each role
            rounds, every, floors = 3, 2, (FLOOR,)
        if size == 100:
            rounds, every = 210, 70
        if size <= region // 2:  # else there is no second region
            slots = _slots(*floors, FORKPOINT, sequential_every=every)
            cell = Cell("1b", 2048, touched_mib=0, dirty_mib=size, pattern=FRESH)
            yield Job(cell, slots, rounds)
        slots = _slots(*floors, PREALLOCATED, FORKPOINT, sequential_every=every)
        cell = Cell("1b", 2048, touched_mib=0, dirty_mib=size, pattern=REPEATED)
        yield Job(cell, slots, rounds)
    slots = _slots(FLOOR, CONTROL, FORKPOINT, sequential_every=10)
    cell = Cell("1b", 2048, touched_mib=0, dirty_mib=100, pattern=REPEATED, guest=WATCHING)
    yield Job(cell, slots, 20)


def _in_a_row() -> Iterator[Job]:
    cell = Cell("1c", 2048, touched_mib=0, dirty_mib=100, pattern=REPEATED, in_a_row=10)
    row_of_floors = Slot(FLOOR, windows=10, every=10)
    yield Job(cell, (row_of_floors, *_slots(FORKPOINT, windows=10, sequential_every=105)), 210)
    for length in (30, 100):
        cell = Cell("1c", 2048, touched_mib=0, dirty_mib=100, pattern=REPEATED, in_a_row=length)
        yield Job(cell, _slots(FLOOR, FORKPOINT, windows=length), 2)


CROSSOVER_MIB = 512


def _crossover() -> Iterator[Job]:
    region = region_mib(CROSSOVER_MIB)
    for share in (0, 5, 10, 25, 50, 75, 90, 100):
        dirty = region * share // 100
        slots = [
            Slot(role, mode, every=4 if role == SEQUENTIAL else 1)
            for role in (FLOOR, FORKPOINT, SEQUENTIAL)
            for mode in (DIFF, FULL)
        ]
        pattern = REPEATED if dirty else NONE
        cell = Cell("1d", CROSSOVER_MIB, BOTH, touched_mib=region, dirty_mib=dirty, pattern=pattern)
        yield Job(cell, tuple(slots), 6)


def _loaded() -> Iterator[Job]:
    for load in (PRECOPIES, FORKS, CALLS):
        for dirty in (0, 100):
            rounds = 21 if load == PRECOPIES else 2
            cell = Cell(
                "1e",
                1024,
                touched_mib=0 if dirty else IDLE_TOUCHED_MIB,
                dirty_mib=dirty,
                pattern=REPEATED if dirty else NONE,
                load=load,
                in_a_row=10,
            )
            slots = tuple(
                Slot(role, DIFF, beside, windows=10)
                for role in (FLOOR, CONTROL, FORKPOINT)
                for beside in (NOTHING, load)
            )
            slots += tuple(Slot(SEQUENTIAL, DIFF, beside, every=5) for beside in (NOTHING, load))
            yield Job(cell, slots, rounds)


def _writing() -> Iterator[Job]:
    cell = Cell("1f", 1024, touched_mib=256, guest=WRITING)
    yield Job(cell, _slots(FLOOR, FORKPOINT, sequential_every=5), 30)


def _ready() -> Iterator[Job]:
    for image, every in ((100, 40), (2048, 100)):
        slots = _slots(FLOOR, CONTROL, FORKPOINT, sequential_every=every)
        yield Job(Cell("ready", 4096, touched_mib=image), slots, 205)


PHASES = {
    phase.name: phase
    for phase in (
        Phase(
            "1a", "memory 256 MiB to 8 GiB, idle, FULL and DIFF, tmpfs and disk", 24, (*_memory(),)
        ),
        Phase("1b", "dirtied 0 to 100 % of a 2 GiB source, and 10 to 500 MiB", 16, (*_dirtied(),)),
        Phase("1c", "10, 30 and 100 branches in a row, 100 MiB each", 18, (*_in_a_row(),)),
        Phase("1d", "DIFF against FULL by share of memory dirtied", 4, (*_crossover(),)),
        Phase("1e", "beside pre-copies, forks and unary calls", 16, (*_loaded(),)),
        Phase("1f", "a source that keeps writing: one point in time", 2, (*_writing(),)),
        Phase("ready", "BranchSandbox to READY against cp", 32, (*_ready(),)),
    )
}
