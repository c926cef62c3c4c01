"""The rows of the pause window's phases: their columns."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass

from bench.branch_figures import STAGES, WINDOW
from bench.machine import Machine
from bench.pause_window.cells import CELL_COLUMNS, Cell
from bench.rows import Table, TrialRow, fields_of, record_of

READY_SECONDS = "ready_seconds"
"""From the request to READY, by the client's clock; for the others all that they do."""
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


@dataclass(frozen=True, slots=True, kw_only=True)
class Row(TrialRow[Cell]):
    """One window, or what the load beside a slot's windows did."""

    mode: str
    """DIFF or FULL."""
    beside: str
    """What ran beside it."""
    staging_used: str = ""
    """Where forkpoint staged it, as the server says."""

    @property
    def slot_key(self) -> Hashable:
        return self.role, self.mode, self.beside

    def record(self) -> dict[str, str]:
        return {
            **record_of(self, FIGURES),
            "window_mode": self.mode,
            "beside": self.beside,
            "staging_used": self.staging_used,
        }

    @classmethod
    def of(cls, record: dict[str, str]) -> Row:
        """From the CSV. Raises KeyError, ValueError."""
        return cls(
            cell=Cell.of(record),
            mode=record["window_mode"],
            beside=record["beside"],
            staging_used=record["staging_used"],
            **fields_of(record, FIGURES),
        )


TABLE = Table(COLUMNS, Row.of)
