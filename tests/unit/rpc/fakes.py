"""Small in-memory rooms behind the edge. They keep what they were asked and hold what they have."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass, field, replace
from datetime import datetime

from forkpointd import model
from forkpointd.model import ForkpointError, Reason
from forkpointd.rpc.listener import Ports
from tests.unit.rpc import samples

Position = tuple[datetime, str]


class Scripted:
    """What all fakes share: an error that the next call raises."""

    def __init__(self) -> None:
        self.fails_with: BaseException | None = None

    def _maybe_fail(self) -> None:
        if self.fails_with is not None:
            raise self.fails_with


class FakeSandboxes(Scripted):
    def __init__(self) -> None:
        super().__init__()
        self.there: dict[str, model.Sandbox] = {}
        self.orders: list[model.CreateOrder] = []
        self.changes: list[model.SandboxChange] = []
        self.filters: list[tuple[Mapping[str, str], frozenset[model.SandboxState]]] = []
        self.memory: dict[str, model.SandboxMemory] = {}
        self.creating = asyncio.Event()
        self.may_finish = asyncio.Event()
        self.may_finish.set()
        self.cancelled = 0

    def add(self, *ids: str) -> None:
        for index, each in enumerate(ids):
            self.there[each] = samples.sandbox(each, create_time=samples.at(index))

    async def create(self, order: model.CreateOrder) -> model.Sandbox:
        self._maybe_fail()
        self.orders.append(order)
        self.creating.set()
        try:
            await self.may_finish.wait()
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        made = samples.sandbox(order.sandbox_id or "chosen", labels=order.labels)
        self.there[made.sandbox_id] = made
        return made

    async def get(self, sandbox_id: str) -> model.Sandbox:
        self._maybe_fail()
        if sandbox_id not in self.there:
            raise ForkpointError(Reason.SANDBOX_NOT_FOUND, f"no sandbox {sandbox_id}")
        return self.there[sandbox_id]

    async def memory_of(self, sandbox_id: str) -> model.SandboxMemory | None:
        await self.get(sandbox_id)
        return self.memory.get(sandbox_id)

    async def list(
        self,
        *,
        page_size: int,
        after: Position | None,
        labels: Mapping[str, str],
        states: frozenset[model.SandboxState],
    ) -> model.Page[model.Sandbox]:
        self._maybe_fail()
        self.filters.append((labels, states))
        items = sorted(self.there.values(), key=lambda it: (it.create_time, it.sandbox_id))
        rest = [it for it in items if after is None or (it.create_time, it.sandbox_id) > after]
        page = tuple(rest[:page_size])
        more = len(rest) > page_size
        return model.Page(page, (page[-1].create_time, page[-1].sandbox_id) if more else None)

    async def update(self, sandbox_id: str, change: model.SandboxChange) -> model.Sandbox:
        self.changes.append(change)
        return await self.get(sandbox_id)

    async def delete(self, sandbox_id: str) -> None:
        await self.get(sandbox_id)
        del self.there[sandbox_id]

    async def pause(self, sandbox_id: str) -> model.Sandbox:
        return replace(await self.get(sandbox_id), state=model.SandboxState.PAUSED)

    async def resume(self, sandbox_id: str) -> model.Sandbox:
        return replace(await self.get(sandbox_id), state=model.SandboxState.RUNNING)


class Feed:
    """States that a test hands out: every watcher gets all of them, late ones too."""

    def __init__(self) -> None:
        self._states: list[object] = []
        self._queues: list[asyncio.Queue[object]] = []
        self.left = asyncio.Event()
        self.after_sequence: int | None = None

    @property
    def watchers(self) -> int:
        return len(self._queues)

    def send(self, *states: object) -> None:
        self._states.extend(states)
        for queue in self._queues:
            for state in states:
                queue.put_nowait(state)

    def end(self) -> None:
        self.send(None)

    async def watch(self, after_sequence: int) -> AsyncIterator[object]:
        self.after_sequence = after_sequence
        queue: asyncio.Queue[object] = asyncio.Queue()
        for state in self._states:
            queue.put_nowait(state)
        self._queues.append(queue)
        try:
            while (state := await queue.get()) is not None:
                yield state
        finally:
            self._queues.remove(queue)
            self.left.set()


class FakeBranches(Scripted):
    def __init__(self) -> None:
        super().__init__()
        self.there: dict[str, model.BranchView] = {}
        self.orders: list[model.BranchOrder] = []
        self.feed = Feed()
        self.filters: list[tuple[str | None, frozenset[model.BranchStage]]] = []
        self.before_yield: Callable[[], None] | None = None
        """Called while the write of what is yielded is under way."""

    async def start(self, order: model.BranchOrder) -> model.Branch:
        self._maybe_fail()
        self.orders.append(order)
        return samples.branch(order.branch_id or "chosen")

    async def get(self, branch_id: str) -> model.BranchView:
        self._maybe_fail()
        if branch_id not in self.there:
            raise ForkpointError(Reason.BRANCH_NOT_FOUND, f"no branch {branch_id}")
        return self.there[branch_id]

    async def list(
        self,
        *,
        page_size: int,
        after: Position | None,
        sandbox_id: str | None,
        stages: frozenset[model.BranchStage],
    ) -> model.Page[model.BranchView]:
        self.filters.append((sandbox_id, stages))
        items = [view for view in self.there.values() if after is None or _key(view) > after]
        page = tuple(items[:page_size])
        return model.Page(page, _key(page[-1]) if len(items) > page_size else None)

    async def cancel(self, branch_id: str) -> model.BranchView:
        return await self.get(branch_id)

    async def watch(self, branch_id: str, after_sequence: int) -> AsyncIterator[model.BranchView]:
        self._maybe_fail()
        source = self.feed.watch(after_sequence)
        try:
            async for view in source:
                assert isinstance(view, model.BranchView)
                if self.before_yield is not None:
                    asyncio.get_running_loop().call_soon(self.before_yield)
                yield view
        finally:
            await source.aclose()  # type: ignore[attr-defined]


def _key(view: model.BranchView) -> Position:
    return view.branch.create_time, view.branch.branch_id


class FakeForks(Scripted):
    def __init__(self) -> None:
        super().__init__()
        self.there: dict[str, model.Fork] = {}
        self.orders: list[model.ForkOrder] = []
        self.feed = Feed()

    async def start(self, order: model.ForkOrder) -> model.Fork:
        self._maybe_fail()
        self.orders.append(order)
        return samples.fork(order.spec.fork_id or "chosen")

    async def get(self, fork_id: str) -> model.Fork:
        if fork_id not in self.there:
            raise ForkpointError(Reason.FORK_NOT_FOUND, f"no fork {fork_id}")
        return self.there[fork_id]

    async def watch(self, fork_id: str, after_sequence: int) -> AsyncIterator[model.Fork]:
        self._maybe_fail()
        source = self.feed.watch(after_sequence)
        try:
            async for it in source:
                assert isinstance(it, model.Fork)
                yield it
        finally:
            await source.aclose()  # type: ignore[attr-defined]


class FakeSnapshots(Scripted):
    def __init__(self) -> None:
        super().__init__()
        self.there: dict[str, model.Snapshot] = {}
        self.filters: list[tuple[Mapping[str, str], str | None]] = []

    async def get_with_room(self, snapshot_id: str) -> model.Snapshot:
        return await self.get(snapshot_id)

    async def get(self, snapshot_id: str) -> model.Snapshot:
        if snapshot_id not in self.there:
            raise ForkpointError(Reason.SNAPSHOT_NOT_FOUND, f"no snapshot {snapshot_id}")
        return self.there[snapshot_id]

    async def list(
        self,
        *,
        page_size: int,
        after: Position | None,
        labels: Mapping[str, str],
        source_sandbox_id: str | None,
    ) -> model.Page[model.Snapshot]:
        self.filters.append((labels, source_sandbox_id))
        items = [
            it
            for it in self.there.values()
            if after is None or (it.create_time, it.snapshot_id) > after
        ]
        page = tuple(items[:page_size])
        more = len(items) > page_size
        return model.Page(page, (page[-1].create_time, page[-1].snapshot_id) if more else None)

    async def set_labels(self, snapshot_id: str, labels: Mapping[str, str]) -> model.Snapshot:
        self.there[snapshot_id] = replace(await self.get(snapshot_id), labels=labels)
        return self.there[snapshot_id]

    async def delete(self, snapshot_id: str) -> None:
        await self.get(snapshot_id)
        del self.there[snapshot_id]

    async def flattening(self, snapshot_id: str) -> AsyncIterator[model.Flattening]:
        layered = replace(await self.get(snapshot_id), layout=model.Layout.LAYERED)
        flat = replace(layered, layout=model.Layout.FLAT)
        yield model.Flattening(layered, model.FlattenProgress(0, 0))
        yield model.Flattening(layered, model.FlattenProgress(5, 10))
        yield model.Flattening(flat, model.FlattenProgress(10, 10))

    async def verifying(self, snapshot_id: str) -> AsyncIterator[model.Verification]:
        await self.get(snapshot_id)
        yield model.Verification("parent", 5, 10)
        if snapshot_id == "bad":
            raise model.ForkpointError(
                model.Reason.IMAGE_DAMAGED, "it is not as it was", metadata={"file": "memory"}
            )
        yield model.Verification(snapshot_id, 10, 10, verified=True)


class FakeArchives:
    """An archive is its snapshot's id, again and again."""

    def __init__(self, snapshots: FakeSnapshots) -> None:
        self._snapshots = snapshots
        self.exports: list[model.ExportOrder] = []
        self.imports: list[model.ImportOrder] = []
        self.got = b""
        self.exporting = 0
        self.takes: int | None = None
        """After so many bytes an import is refused."""

    async def export(self, order: model.ExportOrder) -> AsyncIterator[model.ArchivePiece]:
        self.exports.append(order)
        await self._snapshots.get(order.snapshot_id)
        self.exporting += 1
        try:
            for done in range(0, 30, 10):
                data = order.snapshot_id.encode() if done else b""
                yield model.ArchivePiece(
                    order.snapshot_id, model.Layout.LAYERED, 3, 25, 30, done, data
                )
        finally:
            self.exporting -= 1

    async def import_(
        self, order: model.ImportOrder, pieces: AsyncIterator[bytes]
    ) -> model.Snapshot:
        self.imports.append(order)
        async for piece in pieces:
            self.got += piece
            if self.takes is not None and len(self.got) > self.takes:
                raise ForkpointError(Reason.ARCHIVE_INVALID, "it is damaged")
        return await self._snapshots.get(order.snapshot_id or "s")


class FakeWriter:
    """Takes bytes while its guest reads; `deaf` guests don't."""

    def __init__(self, console: FakeConsoles) -> None:
        self._console = console

    async def write(self, data: bytes) -> None:
        self._console.writes_begun += 1
        self._console.waiting.set()
        await self._console.reads.wait()
        if self._console.write_fails is not None:
            raise self._console.write_fails
        self._console.input.append(data)
        self._console.got_input.set()

    async def try_write(self, data: bytes, wait_seconds: float) -> int:
        self._console.waits.append(wait_seconds)
        taken = data[: self._console.takes]
        self._console.input.append(taken)
        return len(taken)

    def close(self) -> None:
        if self._console.current is self:
            self._console.current = None
            self._console.free.set()


class FakeConsoles(Scripted):
    def __init__(self) -> None:
        super().__init__()
        self.first = 100
        self.output = b"x" * 50
        self.more: asyncio.Queue[bytes | None] = asyncio.Queue()
        self.readers = 0
        self.input: list[bytes] = []
        self.got_input = asyncio.Event()
        self.writes_begun = 0
        self.waiting = asyncio.Event()
        self.reads = asyncio.Event()
        self.reads.set()
        self.write_fails: ForkpointError | None = None
        self.takes = 1 << 20
        self.waits: list[float] = []
        self.current: FakeWriter | None = None
        self.free = asyncio.Event()

    @property
    def end(self) -> int:
        return self.first + len(self.output)

    async def bounds(self, sandbox_id: str) -> tuple[int, int]:
        if sandbox_id != "agent-7":
            raise ForkpointError(Reason.SANDBOX_NOT_FOUND, f"no sandbox {sandbox_id}")
        return self.first, self.end

    async def read(
        self, sandbox_id: str, from_offset: int, *, follow: bool
    ) -> AsyncIterator[tuple[int, bytes]]:
        self.readers += 1
        try:
            offset = from_offset
            data = self.output[from_offset - self.first :]
            if data:
                yield offset, data
                offset += len(data)
            while follow and (data := await self.more.get() or b""):
                yield offset, data
                offset += len(data)
        finally:
            self.readers -= 1

    async def writer(self, sandbox_id: str) -> FakeWriter:
        self._maybe_fail()
        if sandbox_id != "agent-7":
            raise ForkpointError(Reason.SANDBOX_NOT_FOUND, f"no sandbox {sandbox_id}")
        if self.current is not None:
            raise ForkpointError(Reason.CONSOLE_BUSY, "someone else writes")
        self.current = FakeWriter(self)
        self.free.clear()
        return self.current


class FakeServer(Scripted):
    async def facts(self) -> model.ServerFacts:
        self._maybe_fail()
        return samples.facts()


@dataclass
class Rooms:
    """All fakes of one server."""

    sandboxes: FakeSandboxes = field(default_factory=FakeSandboxes)
    branches: FakeBranches = field(default_factory=FakeBranches)
    forks: FakeForks = field(default_factory=FakeForks)
    snapshots: FakeSnapshots = field(default_factory=FakeSnapshots)
    archives: FakeArchives = field(init=False)
    consoles: FakeConsoles = field(default_factory=FakeConsoles)
    server: FakeServer = field(default_factory=FakeServer)

    def __post_init__(self) -> None:
        self.archives = FakeArchives(self.snapshots)

    def ports(self) -> Ports:
        return Ports(
            self.sandboxes,
            self.branches,
            self.forks,
            self.snapshots,
            self.archives,
            self.consoles,
            self.server,
        )
