"""The pause window as a branch sees it: prepared before, opened once, read right after.

Everything that can be done outside is: the staging files exist and have their size, the connection
is open, the request bytes are built and measured. In the window nothing happens but one write and
the wait for its replies (`forkpointd.vmm.window`).
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from typing import TypeVar

from forkpointd.branching.imaging import Staged
from forkpointd.branching.quiet import Pace
from forkpointd.images import (
    Extent,
    Extents,
    ImageError,
    StagingArea,
    find_extents_of,
    save_extents,
)
from forkpointd.model import (
    BranchMode,
    ForkpointError,
    PauseWindow,
    Reason,
    StagingKind,
)
from forkpointd.sandboxes.datadir import STAGING_LINKS
from forkpointd.vmm import (
    AnyWindow,
    DriveClones,
    Vmm,
    VmmError,
    WindowLatencies,
    WindowOutcome,
)

T = TypeVar("T")

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Prepared:
    """A window that is ready to be opened."""

    window: AnyWindow
    staged: Staged
    vmm: Vmm
    was_paused: bool


class Windows:
    """Prepares windows and reads what they left."""

    def __init__(
        self, areas: dict[StagingKind, StagingArea], files: Executor, *, cold_pages: bool
    ) -> None:
        """`cold_pages`: free memory is slow to write to here."""
        self._areas = areas
        self._files = files
        self.cold_pages = cold_pages

    def staged(self, kind: StagingKind, serial: int) -> Staged:
        """The names of one window's files."""
        names = self._areas[kind].names(serial)
        return Staged(kind, names.memory, names.vmstate, names.extents)

    async def stage(self, kind: StagingKind, serial: int, memory_bytes: int) -> Staged:
        """Makes the staging files of one window. Raises OSError if there is no room for them,
        ImageError for a serial that was used: those files are another window's, and stay."""
        staged = self.staged(kind, serial)
        try:
            await self._run(lambda: self._areas[kind].create(serial, memory_bytes))
        except ImageError:
            raise
        except BaseException:
            await asyncio.shield(self.remove(staged))
            raise
        return staged

    def allocate_ahead(
        self,
        kind: StagingKind,
        serial: int,
        extents: Sequence[Extent],
        progress: Callable[[int], None],
        pace: Pace,
    ) -> int:
        """Gives parts of a staged memory file their room before its window. Blocks."""
        return self._areas[kind].allocate(
            serial, extents, progress=progress, should_stop=pace.should_stop, gate=pace.gate
        )

    async def prepare(
        self,
        vmm: Vmm,
        mode: BranchMode,
        staged: Staged,
        *,
        was_paused: bool,
        clones: DriveClones | None,
    ) -> Prepared:
        """Opens the connection and builds the requests; with `clones` the guardian is started.
        Nothing reaches Firecracker yet."""
        link = STAGING_LINKS[staged.kind]
        window = await vmm.prepare_window(
            full=mode is BranchMode.FULL,
            vmstate_name=f"{link}/{staged.vmstate_path.name}",
            memory_name=f"{link}/{staged.memory_path.name}",
            was_paused=was_paused,
            clones=clones,
        )
        return Prepared(window, staged, vmm, was_paused)

    async def read_extents(self, staged: Staged, mode: BranchMode, memory_bytes: int) -> Extents:
        """Reads the extents of what the window wrote, once, and stores them beside it; from then
        on they are the only truth (step 6)."""
        return await self._run(lambda: _store_extents(staged, mode, memory_bytes))

    async def describe(
        self, prepared: Prepared, outcome: WindowOutcome, dirty_bytes: int
    ) -> PauseWindow:
        """The window's figures: the server's clock and Firecracker's own.

        Held: the source's turn, for Firecracker remembers its last pause and resume only. Where it
        can't be asked any more its parts are 0: the snapshot is good all the same.
        """
        try:
            latencies = await prepared.vmm.window_latencies()
        except (VmmError, TimeoutError, OSError) as error:
            log.warning("the window in %s has no latencies: %s", prepared.vmm.folder, error)
            latencies = WindowLatencies(0, 0, 0)
        return PauseWindow(
            start_time=outcome.start_time,
            total_us=outcome.total_us,
            pause_us=0 if prepared.was_paused else latencies.pause_us,
            snapshot_us=latencies.snapshot_us,
            resume_us=0 if prepared.was_paused else latencies.resume_us,
            dirty_bytes=dirty_bytes,
            staging=prepared.staged.kind,
            was_paused=prepared.was_paused,
            drive_clone_us=0 if outcome.drives is None else outcome.drives.clone_us,
        )

    async def remove(self, staged: Staged) -> None:
        """Removes the files of a window that has had its last reply."""
        await self._run(staged.remove)

    async def _run(self, work: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._files, work)


def _store_extents(staged: Staged, mode: BranchMode, memory_bytes: int) -> Extents:
    if mode is BranchMode.FULL:
        extents = Extents.of((Extent(0, memory_bytes),))
    else:
        extents = find_extents_of(staged.memory_path, memory_bytes)
    save_extents(staged.extents_path, extents, memory_bytes, sync=staged.kind is StagingKind.DISK)
    return extents


def drive_failure(sandbox_id: str, outcome: WindowOutcome) -> ForkpointError | None:
    """What a client is told about drives that are no clones of their window; None where they
    are."""
    if outcome.drives is None or not outcome.drives.fault:
        return None
    if outcome.guardian_lost:
        return guardian_lost(sandbox_id, "no page is lost: branch it again")
    return ForkpointError(
        Reason.WRITE_FAILED,
        f"the drives of sandbox {sandbox_id} could not be cloned in its pause window: "
        f"{outcome.drives.fault}. The source runs on and no page is lost: make room, or put away "
        "what is in the way, and branch again",
        metadata={"sandbox_id": sandbox_id},
    )


def guardian_lost(sandbox_id: str, then: str) -> ForkpointError:
    """What a client is told about a guardian that was ended, or hung, in its window."""
    return ForkpointError(
        Reason.GUARDIAN_LOST,
        f"the process that ran the pause window of sandbox {sandbox_id} was ended, or gave no sign "
        f"of life. The server has resumed the source; {then}",
        metadata={"sandbox_id": sandbox_id},
    )


def window_failure(sandbox_id: str, outcome: WindowOutcome) -> ForkpointError:
    """What a client is told about a window in which no snapshot was written."""
    if outcome.process_gone:
        return ForkpointError(
            Reason.VMM_EXITED,
            f"the Firecracker of sandbox {sandbox_id} ended in its pause window",
            metadata={"sandbox_id": sandbox_id},
        )
    if outcome.guardian_lost and outcome.create_reply is None:
        return guardian_lost(sandbox_id, "its next branch must be FULL")
    if outcome.memory_write_failed:
        return ForkpointError(
            Reason.WRITE_FAILED,
            f"Firecracker could not write the memory of sandbox {sandbox_id}: {outcome.fault}. The "
            "source runs on and no page is lost: make room and branch again",
            metadata={"sandbox_id": sandbox_id},
        )
    return ForkpointError(
        Reason.VMM_FAILED,
        f"Firecracker of sandbox {sandbox_id} refused in the pause window: {outcome.fault}. The "
        "source runs on; its next branch must be FULL",
        metadata={"sandbox_id": sandbox_id},
    )
