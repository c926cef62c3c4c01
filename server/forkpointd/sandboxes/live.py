"""One sandbox that the server holds: its row, its VMM, and the two locks that keep them true."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from forkpointd.images import Extents
from forkpointd.model import (
    DirtyBase,
    ForkpointError,
    Reason,
    Sandbox,
    SandboxExit,
    SandboxState,
)
from forkpointd.registry import Registry
from forkpointd.vmm import Vmm


@dataclass(frozen=True, slots=True)
class LastDiff:
    """What a sandbox's last DIFF window found: the next is likely to find much the same. Not kept
    over a restart of the server."""

    extents: Extents
    resident_bytes: int
    """Private memory of its process then."""


class LiveSandbox:
    """A sandbox with a row in the registry, whether or not its process still runs.

    `turn` serialises what Firecracker is asked to do: pause, resume, delete and the pause window.
    `edit` serialises changes of the row, each of which is durable before it is visible here; it is
    taken for the length of one commit only and may be taken inside `turn`, never around it.
    """

    def __init__(self, row: Sandbox, folder: Path, registry: Registry) -> None:
        self.row = row
        self.folder = folder
        self.vmm: Vmm | None = None
        self.last_diff: LastDiff | None = None
        self.turn = asyncio.Lock()
        self._edit = asyncio.Lock()
        self._registry = registry

    @property
    def sandbox_id(self) -> str:
        """Its id."""
        return self.row.sandbox_id

    async def edit(self, change: Callable[[Sandbox], Sandbox]) -> Sandbox:
        """Changes the row: durable first, then visible. If the commit fails nothing changed."""
        async with self.editing() as draft:
            draft.row = change(draft.row)
            if draft.row != self.row:
                await self._registry.put_sandbox(draft.row)
        return self.row

    @asynccontextmanager
    async def editing(self) -> AsyncIterator[RowDraft]:
        """A change of the row that is committed inside the block together with something else
        (`Registry.put_branch(..., sandbox=draft.row)`); visible when the block ends without error.
        """
        async with self._edit:
            draft = RowDraft(self.row)
            yield draft
            self.row = draft.row

    def require_callable(self) -> Vmm:
        """The VMM, if it can be asked for something; else raises why it can't."""
        state = self.row.state
        if state is SandboxState.UNKNOWN:
            raise ForkpointError(
                Reason.SANDBOX_UNRESPONSIVE,
                f"the Firecracker of sandbox {self.sandbox_id} does not answer; it takes calls "
                "again as soon as it does. If it never does, delete the sandbox",
                metadata={"sandbox_id": self.sandbox_id},
                retry_after_seconds=1.0,
            )
        self.require_not_deleting()
        if state is SandboxState.CREATING:
            raise ForkpointError(
                Reason.SANDBOX_NOT_RUNNING,
                f"sandbox {self.sandbox_id} is still being made: ask again once it is RUNNING",
                metadata={"sandbox_id": self.sandbox_id, "state": str(state)},
            )
        if state is SandboxState.STOPPED or self.vmm is None:
            exit_ = self.row.exit
            how = "" if exit_ is None else f" ({describe_exit(exit_)})"
            raise ForkpointError(
                Reason.SANDBOX_NOT_RUNNING,
                f"sandbox {self.sandbox_id} does not run: its process has ended{how}. Its console "
                "is still there; delete it, or start another from a snapshot",
                metadata={"sandbox_id": self.sandbox_id, "state": str(state)},
            )
        return self.vmm

    def require_not_deleting(self) -> None:
        """Raises SANDBOX_DELETED for a sandbox that is being deleted."""
        if self.row.state is SandboxState.DELETING:
            raise deleted(self.sandbox_id)

    async def set_state(self, state: SandboxState) -> Sandbox:
        """Notes what the sandbox does now, unless it has ended or is being deleted."""

        def change(row: Sandbox) -> Sandbox:
            if row.state in (SandboxState.STOPPED, SandboxState.DELETING):
                return row
            return replace(row, state=state)

        return await self.edit(change)


class RowDraft:
    """The row that a change under way will leave."""

    def __init__(self, row: Sandbox) -> None:
        self.row = row


def describe_exit(exit_: SandboxExit) -> str:
    """How a process ended, in words."""
    if exit_.signal:
        how = f"ended by signal {exit_.signal}"
    else:
        how = "exit code not known" if exit_.exit_code < 0 else f"exit code {exit_.exit_code}"
    return f"{how}: {exit_.explanation}" if exit_.explanation else how


def deleted(sandbox_id: str) -> ForkpointError:
    """The error for a sandbox that is being deleted."""
    return ForkpointError(
        Reason.SANDBOX_DELETED,
        f"sandbox {sandbox_id} is being deleted",
        metadata={"sandbox_id": sandbox_id},
    )


def not_found(sandbox_id: str) -> ForkpointError:
    """The error for an id that no sandbox has."""
    return ForkpointError(
        Reason.SANDBOX_NOT_FOUND,
        f"there is no sandbox {sandbox_id}; `forkpoint sandbox list` shows those there are",
        metadata={"sandbox_id": sandbox_id},
    )


def remove_diffs(base: DirtyBase) -> None:
    """Unlinks the kept diffs of a base that is not used any more. Blocks."""
    for diff in base.unmerged:
        diff.memory_path.unlink(missing_ok=True)
        diff.extents_path.unlink(missing_ok=True)
