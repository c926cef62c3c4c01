"""What every branch works with: built once, by the daemon."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import Executor
from dataclasses import dataclass
from typing import TypeVar

from forkpointd.branching.admission import Admission, Holding
from forkpointd.branching.imaging import CopyWorkers
from forkpointd.branching.opening import Windows
from forkpointd.branching.prediction import PausePredictor
from forkpointd.branching.quiet import Quiet
from forkpointd.images import Budget, HostFacts, SnapshotStore
from forkpointd.model import Branch, BranchMode, BranchOrder, Durability, Sandbox
from forkpointd.registry import Registry
from forkpointd.sandboxes.forks import Forks
from forkpointd.sandboxes.service import Sandboxes
from forkpointd.sandboxes.tasks import Tasks

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Workshop:
    """The parts and the settings that branches share."""

    registry: Registry
    sandboxes: Sandboxes
    forks: Forks
    store: SnapshotStore
    admission: Admission
    predictor: PausePredictor
    windows: Windows
    quiet: Quiet
    precopies: CopyWorkers
    merges: CopyWorkers
    allocations: CopyWorkers
    ahead_budget: Budget
    files: Executor
    host: HostFacts
    tasks: Tasks
    window_deadline_seconds: float
    auto_layered_bytes: int | None
    """A base that holds so much is not copied where the layout is AUTO; None: any is."""
    memory_layered_bytes: int | None
    """The same for a branch into memory, where nothing can be reflinked."""

    async def reserve(self, row: Sandbox, mode: BranchMode, asked: BranchOrder | Branch) -> Holding:
        """Room for one branch (`Admission.reserve`), which may not cross the memory budget either:
        NO_MEMORY."""
        layout = asked.layout if isinstance(asked, BranchOrder) else asked.requested_layout
        durability = asked.durability
        holding = await self.run(lambda: self.admission.reserve(row, mode, layout, durability))
        if durability is Durability.MEMORY:
            try:
                await self.sandboxes.check_memory(f"an image of sandbox {row.sandbox_id} in memory")
            except BaseException:
                holding.release()
                raise
        return holding

    async def run(self, work: Callable[[], T]) -> T:
        """Short file work, in a thread."""
        return await asyncio.get_running_loop().run_in_executor(self.files, work)
