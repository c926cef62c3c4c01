"""The rows of the images' phases: their columns."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass

from bench.branch_figures import STAGES, WINDOW
from bench.images.cells import CELL_COLUMNS, Cell
from bench.machine import Machine
from bench.rows import TRIAL_COLUMNS, Table, TrialRow, fields_of, record_of

SECONDS = "seconds"
"""From the request to its last message, by the client's clock; of the floor all that it does."""
BYTES_PER_SECOND = "bytes_per_second"
"""Of a flatten, or of cp."""
COPY, WINDOW_PART, STORE, FORK, REST = PARTS = (
    "copy_part_seconds",
    "window_part_seconds",
    "store_part_seconds",
    "fork_part_seconds",
    "rest_part_seconds",
)
"""Of a branch to running children: what is copied or cloned of the base, the window, making its
pages durable, starting the children, and all else."""
GROWN, WRITTEN = "grown_bytes", "written_bytes"
"""At the last branch of a row: what the server's folder takes more on the disk than before the row,
and what the guest wrote in it."""
FLATTENS, FLATTENED = "flattens", "flattened_bytes"
"""At the last branch of a row: how many of its snapshots were flattened, and what their images take
on the disk."""
FIGURES = (
    SECONDS,
    BYTES_PER_SECOND,
    "bytes",
    *WINDOW,
    "predicted_us",
    "dirty_bytes",
    *(f"{stage}_seconds" for stage in STAGES),
    "precopied_bytes",
    "merged_bytes",
    *PARTS,
    GROWN,
    WRITTEN,
    FLATTENS,
    FLATTENED,
)
COLUMNS = (*CELL_COLUMNS, *TRIAL_COLUMNS, "source_mib", *FIGURES, *Machine.COLUMNS)


@dataclass(frozen=True, slots=True, kw_only=True)
class Row(TrialRow[Cell]):
    """One branch, flatten, or what the floor does in its place."""

    source_mib: int
    """Memory of the source; 0: it has none."""

    @property
    def slot_key(self) -> Hashable:
        return self.role, self.source_mib

    def record(self) -> dict[str, str]:
        return {**record_of(self, FIGURES), "source_mib": str(self.source_mib)}

    @classmethod
    def of(cls, record: dict[str, str]) -> Row:
        """From the CSV. Raises KeyError, ValueError."""
        return cls(
            cell=Cell.of(record),
            source_mib=int(record["source_mib"]),
            **fields_of(record, FIGURES),
        )


TABLE = Table(COLUMNS, Row.of)
