"""One run of the pause window's phases: each cell on a server of its own."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from typing import Any

from bench import phase_running
from bench.pause_window.cells import DISK, Job, Slot
from bench.pause_window.measures import LoadedWindows, Shot, Windows
from bench.pause_window.rows import TABLE, Row
from bench.pause_window.subjects import Place
from bench.rows import Table
from bench.served import Served

DISK_ONLY = {"FORKPOINT_STAGING_BYTES": "0"}


def row_of(slot: Slot, shot: Shot | None, fields: dict[str, Any]) -> Row:
    """A row of what a slot's window was, and what came of it."""
    used = "" if shot is None else shot.staging_used
    return Row(mode=slot.mode, beside=slot.beside, staging_used=used, **fields)


@dataclass(frozen=True, slots=True)
class Runner(phase_running.Runner[Slot, Shot, Row]):
    """What all phases share."""

    @property
    def table(self) -> Table[Row]:
        return TABLE

    def row(self, slot: Slot, shot: Shot | None, fields: dict[str, Any]) -> Row:
        return row_of(slot, shot, fields)

    @contextmanager
    def measuring(self, job: Job) -> Iterator[Windows]:
        settings = DISK_ONLY if job.cell.staging == DISK else {}
        with Served(self.scratch, self.firecracker, self.kernel, settings) as served:
            place = Place(self.scratch, served, self.firecracker, self.kernel, job.cell)
            kind = LoadedWindows if job.cell.phase == "1e" else Windows
            with closing(kind(place, job)) as measure:
                yield measure
