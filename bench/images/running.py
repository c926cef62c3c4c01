"""One run of the images' phases: each cell on a server of its own, on the disk it asks for."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from typing import Any

from bench import phase_running
from bench.images.cells import XFS, Job, Slot
from bench.images.measures import KINDS, Images, Shot
from bench.images.rows import TABLE, Row
from bench.images.sources import Place
from bench.loop_disk import xfs_on_loop
from bench.rows import Table
from bench.scratch import Scratch
from bench.served import Served

XFS_MIB = 16 << 10


def row_of(slot: Slot, shot: Shot | None, fields: dict[str, Any]) -> Row:
    """A row of what a slot's trial was, and what came of it."""
    return Row(source_mib=slot.source_mib, **fields)


@dataclass(frozen=True, slots=True)
class Runner(phase_running.Runner[Slot, Shot, Row]):
    """What all phases share."""

    @property
    def table(self) -> Table[Row]:
        return TABLE

    def row(self, slot: Slot, shot: Shot | None, fields: dict[str, Any]) -> Row:
        return row_of(slot, shot, fields)

    @contextmanager
    def measuring(self, job: Job) -> Iterator[Images]:
        settings = {"FORKPOINT_FLATTEN_DEPTH": str(job.cell.flatten_depth)}
        with ExitStack() as stack:
            scratch = self.scratch
            if job.cell.disk == XFS:
                disk = stack.enter_context(xfs_on_loop(scratch.disk, XFS_MIB))
                scratch = Scratch(disk, scratch.memory)
            served = stack.enter_context(Served(scratch, self.firecracker, self.kernel, settings))
            place = Place(scratch, served, self.firecracker, self.kernel, job.cell)
            yield stack.enter_context(closing(KINDS[job.cell.phase](place, job)))
