"""What the gRPC room needs of the rooms behind it.

The servicers know these protocols only, so they can be read, and tested, without a VMM. Every
method raises `ForkpointError` for what a client is meant to see; anything else is a fault of the
server. All arguments were checked at the edge already (ids, sizes, paths).

An iterator that the edge leaves before its end (the client is gone, the server drains) is closed by
its `aclose`, if it has one; there it gives free what it holds.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from datetime import datetime
from typing import Protocol

from forkpointd.model import (
    ArchivePiece,
    Branch,
    BranchOrder,
    BranchStage,
    BranchView,
    CreateOrder,
    ExportOrder,
    Flattening,
    Fork,
    ForkOrder,
    ImportOrder,
    Page,
    Sandbox,
    SandboxChange,
    SandboxMemory,
    SandboxState,
    ServerFacts,
    Snapshot,
    Verification,
)

Position = tuple[datetime, str]
"""Where a page starts: after this creation time and id."""


class SandboxPort(Protocol):
    """Sandboxes: made, looked at, changed, ended."""

    async def create(self, order: CreateOrder) -> Sandbox:
        """A sandbox whose guest runs. If this fails nothing of it is left."""
        ...

    async def get(self, sandbox_id: str) -> Sandbox: ...

    async def memory_of(self, sandbox_id: str) -> SandboxMemory | None:
        """What it has of the host's memory; None where it has no process."""
        ...

    async def list(
        self,
        *,
        page_size: int,
        after: Position | None,
        labels: Mapping[str, str],
        states: frozenset[SandboxState],
    ) -> Page[Sandbox]: ...

    async def update(self, sandbox_id: str, change: SandboxChange) -> Sandbox: ...

    async def delete(self, sandbox_id: str) -> None: ...

    async def pause(self, sandbox_id: str) -> Sandbox: ...

    async def resume(self, sandbox_id: str) -> Sandbox: ...


class BranchPort(Protocol):
    """Branches: owned by the server, followed by whoever likes."""

    async def start(self, order: BranchOrder) -> Branch:
        """Admits a branch (or finds the one that this request_id made). Raises what is refused."""
        ...

    async def get(self, branch_id: str) -> BranchView: ...

    async def list(
        self,
        *,
        page_size: int,
        after: Position | None,
        sandbox_id: str | None,
        stages: frozenset[BranchStage],
    ) -> Page[BranchView]: ...

    async def cancel(self, branch_id: str) -> BranchView: ...

    def watch(self, branch_id: str, after_sequence: int) -> AsyncIterator[BranchView]:
        """The branch as of now (unless its sequence is `after_sequence`), then after each change,
        its end last. Stage changes are delivered; progress between them is coalesced for a slow
        reader. Leaving the iterator ends nothing but the watching."""
        ...


class ForkPort(Protocol):
    """Forks: owned by the server as well."""

    async def start(self, order: ForkOrder) -> Fork: ...

    async def get(self, fork_id: str) -> Fork: ...

    def watch(self, fork_id: str, after_sequence: int) -> AsyncIterator[Fork]:
        """As `BranchPort.watch`."""
        ...


class SnapshotPort(Protocol):
    """Snapshots that are READY."""

    async def get_with_room(self, snapshot_id: str) -> Snapshot: ...

    async def list(
        self,
        *,
        page_size: int,
        after: Position | None,
        labels: Mapping[str, str],
        source_sandbox_id: str | None,
    ) -> Page[Snapshot]: ...

    async def set_labels(self, snapshot_id: str, labels: Mapping[str, str]) -> Snapshot: ...

    async def delete(self, snapshot_id: str) -> None: ...

    def flattening(self, snapshot_id: str) -> AsyncIterator[Flattening]:
        """Makes it FLAT, if it isn't: the state as of now, then each later one."""
        ...

    def verifying(self, snapshot_id: str) -> AsyncIterator[Verification]:
        """Compares it with its checksums: the state as of now, then each later one."""
        ...


class ArchivePort(Protocol):
    """Snapshots that leave as archives, and archives that become snapshots."""

    def export(self, order: ExportOrder) -> AsyncIterator[ArchivePiece]:
        """The archive in pieces, the first without data."""
        ...

    async def import_(self, order: ImportOrder, pieces: AsyncIterator[bytes]) -> Snapshot:
        """The snapshot, once all pieces came and were right; else nothing is left of it."""
        ...


class ConsoleWriter(Protocol):
    """The one writer of a console."""

    async def write(self, data: bytes) -> None:
        """Hands all of `data` to the guest, waiting as long as it does not read."""
        ...

    async def try_write(self, data: bytes, wait_seconds: float) -> int:
        """Hands over what the guest takes within `wait_seconds`; returns how many bytes."""
        ...

    def close(self) -> None:
        """Gives the console free. Idempotent."""
        ...


class ConsolePort(Protocol):
    """Serial consoles."""

    async def bounds(self, sandbox_id: str) -> tuple[int, int]:
        """First offset that is still there, and the offset after the last byte."""
        ...

    def read(
        self, sandbox_id: str, from_offset: int, *, follow: bool
    ) -> AsyncIterator[tuple[int, bytes]]:
        """Chunks (offset, data) of at most 64 KiB; `follow` goes on until the sandbox is gone."""
        ...

    async def writer(self, sandbox_id: str) -> ConsoleWriter:
        """Raises CONSOLE_BUSY while someone else is the writer."""
        ...


class ServerPort(Protocol):
    """The server itself."""

    async def facts(self) -> ServerFacts: ...
