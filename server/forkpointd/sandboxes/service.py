"""The sandboxes of this server: made, looked at, paused, resumed, deleted.

The order of things is what keeps the promises: a row is durable before its process is spawned, a
wish before Firecracker is asked, a tombstone before anything is removed. Every change runs in a
task of the server's own, so a caller that leaves ends nothing halfway.
"""

from __future__ import annotations

import asyncio
import errno
import functools
import logging
import secrets
import signal
from collections.abc import Awaitable, Callable, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import replace
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any, TypeVar

from forkpointd.images import Reservation, StoredSnapshot
from forkpointd.model import (
    CreateOrder,
    DirtyBase,
    ForkpointError,
    Machine,
    MemoryUse,
    Page,
    ProcessRecord,
    Reason,
    Sandbox,
    SandboxChange,
    SandboxExit,
    SandboxMemory,
    SandboxState,
    VmmVersion,
    WishedState,
    now,
)
from forkpointd.registry import Registry
from forkpointd.sandboxes.folders import Folders
from forkpointd.sandboxes.live import LiveSandbox, describe_exit, not_found, remove_diffs
from forkpointd.sandboxes.memory import Counted, MemoryBudget
from forkpointd.sandboxes.repeats import Repeats
from forkpointd.sandboxes.snapshots import Snapshots
from forkpointd.sandboxes.starting import Starter, check_memory
from forkpointd.sandboxes.tasks import Tasks
from forkpointd.vmm import OomKills, Vmm, VmmFault, VmmGone, process_memory, read_last_words

T = TypeVar("T")

log = logging.getLogger(__name__)

BOOT_HINT = ". Look at the kernel image, the initrd, the boot arguments and the drives"
NOT_SEEN = (-1, 0)
"""Exit code and signal of an adopted process."""
VMSTATE_DAMAGED = "snapshot state from file"
"""In what Firecracker says of a vmstate that it can't read, the one file that has a CRC."""
RECHECK_FIRST_SECONDS = 0.1
RECHECK_MOST_SECONDS = 2.0


class Sandboxes:
    """All sandboxes that have a row."""

    def __init__(
        self,
        *,
        registry: Registry,
        folders: Folders,
        snapshots: Snapshots,
        starter: Starter,
        memory: MemoryBudget,
        oom_kills: OomKills,
        files: Executor,
        call_timeout_seconds: float,
    ) -> None:
        self.registry = registry
        self.folders = folders
        self.snapshots = snapshots
        self.tasks = Tasks("sandboxes")
        self.before_delete: list[Callable[[str], Awaitable[None]]] = []
        """Called with the id of a sandbox that is about to be ended (state DELETING)."""
        self.expiry_changed: Callable[[], None] = lambda: None
        """Called when some sandbox's expire_time may have changed."""
        self.starter = starter
        self._memory = memory
        self._oom_kills = oom_kills
        self._files = files
        self._call_timeout_seconds = call_timeout_seconds
        self._live: dict[str, LiveSandbox] = {}
        self._creates: Repeats[Sandbox] = Repeats(registry, self.tasks)
        self._deleting: dict[str, asyncio.Task[None]] = {}

    # --- looking ---

    @property
    def live(self) -> Mapping[str, LiveSandbox]:
        """All sandboxes by id."""
        return self._live

    def find(self, sandbox_id: str) -> LiveSandbox:
        """The live sandbox with this id, or SANDBOX_NOT_FOUND."""
        try:
            return self._live[sandbox_id]
        except KeyError:
            raise not_found(sandbox_id) from None

    def console_folder(self, sandbox_id: str) -> Path:
        """The folder with a sandbox's console, or SANDBOX_NOT_FOUND."""
        return self.find(sandbox_id).folder

    def console_end(self, sandbox_id: str) -> asyncio.Future[Any]:
        """Done once nothing more will come from a sandbox's console."""
        live = self._live.get(sandbox_id)
        if live is not None and live.vmm is not None:
            return live.vmm.exited
        ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        ended.set_result(None)
        return ended

    async def get(self, sandbox_id: str) -> Sandbox:
        """The sandbox as of now."""
        return self.find(sandbox_id).row

    async def memory_of(self, sandbox_id: str) -> SandboxMemory | None:
        """What it has of the host's memory; None where it has no process."""
        vmm = self.find(sandbox_id).vmm
        if vmm is None or vmm.exited.done():
            return None
        pid = vmm.record.pid
        return await asyncio.get_running_loop().run_in_executor(
            self._files, lambda: process_memory(pid)
        )

    async def list(
        self,
        *,
        page_size: int,
        after: tuple[datetime, str] | None,
        labels: Mapping[str, str],
        states: frozenset[SandboxState],
    ) -> Page[Sandbox]:
        """A page, in order of creation."""
        return await self.registry.list_sandboxes(
            page_size=page_size, after=after, labels=labels, states=states
        )

    # --- making ---

    async def create(self, order: CreateOrder) -> Sandbox:
        """A sandbox whose guest runs. If this fails nothing of it is left."""

        async def make() -> Sandbox:
            row, stored = await self._admit(order)
            return await self._create(row, stored, allow_drive_copy=order.allow_drive_copy)

        return await self._creates.run(order.request, make, self.get, "create")

    async def _admit(self, order: CreateOrder) -> tuple[Sandbox, StoredSnapshot | None]:
        """Checks an order and makes its row durable."""
        starter = self.starter
        if order.boot is not None:
            starter.check_cloning(order.boot.machine, allow_copy=order.allow_drive_copy)
            check_memory(order.boot.machine)
            await starter.check_kernel(order.boot.kernel_image)
            row = self.new_row(
                order.sandbox_id or new_id("sb"), order.boot.machine, DirtyBase.empty()
            )
            row = _with_order(replace(row, boot=order.boot), order)
            await self._insert(row, order)
            return row, None
        assert order.snapshot_id is not None, "the edge checks that there is a source"
        with self.snapshots.hold(order.snapshot_id):
            snapshot = await self.snapshots.usable(order.snapshot_id)
            starter.check_cloning(snapshot.machine, allow_copy=order.allow_drive_copy)
            stored = await starter.check_loadable(order.snapshot_id)
            row = self.new_row(
                order.sandbox_id or new_id("sb"),
                snapshot.machine,
                DirtyBase.of(snapshot.snapshot_id),
            )
            row = replace(
                row,
                snapshot_id=snapshot.snapshot_id,
                source_sandbox_id=snapshot.source_sandbox_id,
            )
            row = _with_order(row, order)
            await self._insert(row, order)
            return row, stored

    async def _insert(self, row: Sandbox, order: CreateOrder) -> None:
        with await self.memory_for(1, row.machine, f"sandbox {row.sandbox_id}"):
            await self.registry.insert_sandboxes([row], order.request)
            self.hold_row(row)

    # --- memory ---

    async def memory_for(self, count: int, machine: Machine, what: str) -> Reservation:
        """Memory for `count` sandboxes, counted until the promise is released: by then they have
        their rows. Raises NO_MEMORY with the figures."""
        await self._memory.refresh(self._counted())
        try:
            return self._memory.promise(self._counted(), count, machine.memory_bytes, what)
        except (
            ForkpointError
        ):  # perhaps something has ended since: nobody is refused by old figures
            await self._memory.refresh(self._counted(), older_seconds=0.0)
            return self._memory.promise(self._counted(), count, machine.memory_bytes, what)

    async def check_memory(self, what: str) -> None:
        """Refuses (NO_MEMORY) what was reserved on tmpfs beyond the budget."""
        await self._memory.check(self._counted, what)

    async def memory_use(self) -> MemoryUse:
        """The memory budget and what is counted against it."""
        await self._memory.refresh(self._counted())
        return self._memory.use(self._counted())

    def _counted(self) -> Sequence[Counted]:
        """All that have memory, or are about to."""
        return [
            Counted(None if vmm is None else vmm.record.pid, live.row.machine.memory_bytes)
            for live in self._live.values()
            for vmm in (live.vmm,)
            if live.row.state is SandboxState.CREATING
            or (vmm is not None and not vmm.exited.done())
        ]

    async def becomes_source(self, live: LiveSandbox) -> None:
        """A sandbox that was branched goes later where memory is short (`vmm.oom_order`)."""
        order = self.starter.oom_order
        if order is not None and live.vmm is not None:
            try:
                await live.vmm.set_oom_score_adj(order.source)
            except OSError as error:
                log.warning("sandbox %s keeps its oom_score_adj: %s", live.sandbox_id, error)

    # --- rows and processes ---

    def new_row(self, sandbox_id: str, machine: Machine, base: DirtyBase) -> Sandbox:
        """The row of a sandbox that is about to be started here."""
        binary = self.starter.binary
        return Sandbox(
            sandbox_id=sandbox_id,
            state=SandboxState.CREATING,
            wished_state=WishedState.RUNNING,
            machine=machine,
            vmm=VmmVersion(binary.kind, binary.version),
            create_time=now(),
            dirty_base=base,
        )

    def hold_row(self, row: Sandbox) -> LiveSandbox:
        """Takes a durable row into the house."""
        live = LiveSandbox(row, self.folders.of(row.sandbox_id), self.registry)
        self._live[row.sandbox_id] = live
        return live

    async def _create(
        self, row: Sandbox, stored: StoredSnapshot | None, *, allow_drive_copy: bool
    ) -> Sandbox:
        live = self.find(row.sandbox_id)
        if stored is not None:
            try:
                stored = await self.snapshots.flat(stored)
            except BaseException:
                await self.discard([live])
                raise
        async with live.turn:
            live.require_not_deleting()  # meanwhile
            try:
                if stored is not None:
                    vmm = await self.starter.load(row, stored, allow_drive_copy=allow_drive_copy)
                else:
                    assert row.boot is not None
                    vmm = await self.starter.boot(row, row.boot, allow_drive_copy=allow_drive_copy)
                self.attach(live, vmm)
                await live.edit(lambda row: self.started(row, vmm))
            except BaseException as error:
                await self.discard([live])
                hint = BOOT_HINT if stored is None else ""
                raise start_failure(row.sandbox_id, error, hint) from error
        live.require_not_deleting()  # by somebody who didn't wait; that call ends it
        self.expiry_changed()
        return live.row

    def started(self, row: Sandbox, vmm: Vmm) -> Sandbox:
        """The row of a sandbox whose guest runs on `vmm`."""
        at = now()
        row = replace(row, process=vmm.record, start_time=at)
        if row.state is not SandboxState.CREATING:
            return row
        return replace(row, state=SandboxState.RUNNING, expire_time=_expiry(row, at))

    def attach(self, live: LiveSandbox, vmm: Vmm) -> None:
        """Gives a sandbox its running process, and notices that process's end."""
        live.vmm = vmm

        def ended(future: asyncio.Future[SandboxExit]) -> None:
            if not future.cancelled():  # it is when the server leaves
                self.tasks.start_unwatched(
                    self._note_exit(live, vmm, future.result()), f"exit of {live.sandbox_id}"
                )

        vmm.exited.add_done_callback(ended)

    async def _note_exit(self, live: LiveSandbox, vmm: Vmm, exit_: SandboxExit) -> None:
        if live.vmm is not vmm or live.row.state is SandboxState.DELETING:
            return
        await _note_stopped(live, exit_)
        # Whether it was for memory is known a moment later: the kernel kills first and then tells.
        if exit_.signal == signal.SIGKILL or (exit_.exit_code, exit_.signal) == NOT_SEEN:
            exit_ = await self.with_cause(exit_, vmm.record)
            await _note_stopped(live, exit_)
        log.warning(
            "sandbox %s: its VMM %s; last words: %s",
            live.sandbox_id,
            describe_exit(exit_),
            exit_.last_words or "none",
        )

    async def with_cause(
        self, exit_: SandboxExit, record: ProcessRecord, *, just_now: bool = True
    ) -> SandboxExit:
        """The end of a process that this server did not end, with the out-of-memory killer as its
        cause where there is evidence; `just_now` as for `OomKills.find`."""
        try:
            verdict = await self._run(
                functools.partial(self._oom_kills.find, record, just_now=just_now)
            )
        except OSError as error:
            log.warning("why process %d ended can't be told: %s", record.pid, error)
            return exit_
        if verdict is None:
            return exit_
        return replace(exit_, cause=verdict.cause, explanation=verdict.explanation)

    async def last_words(self, live: LiveSandbox) -> str:
        """The ends of what Firecracker logged and wrote to its standard error."""
        return await self._run(read_last_words, live.folder)

    async def discard(self, lives: Sequence[LiveSandbox]) -> None:
        """Takes back sandboxes that never came to run: process, folder, row."""
        for live in lives:
            if live.vmm is not None:
                await live.vmm.kill()
                live.vmm = None
            try:
                await self._run(self.folders.remove, live.sandbox_id)
            except OSError as error:  # the next start removes what has no row
                log.error("the folder of sandbox %s stays: %s", live.sandbox_id, error)
        await self.registry.remove_sandboxes(
            [live.sandbox_id for live in lives], forget_requests=True
        )
        for live in lives:
            self._forget(live)

    def _forget(self, live: LiveSandbox) -> None:
        """Its row is gone, and its id may be another's by now."""
        if self._live.get(live.sandbox_id) is live:
            del self._live[live.sandbox_id]

    # --- changing ---

    async def update(self, sandbox_id: str, change: SandboxChange) -> Sandbox:
        """Changes labels, ttl or on_expiry."""

        def apply(row: Sandbox) -> Sandbox:
            if "labels" in change.fields:
                row = replace(row, labels=dict(change.labels))
            if "on_expiry" in change.fields:
                row = replace(row, on_expiry=change.on_expiry)
            if "ttl" in change.fields:
                row = replace(row, ttl_seconds=change.ttl_seconds)
                alive = row.state is SandboxState.RUNNING
                row = replace(row, expire_time=_expiry(row, now()) if alive else None)
            return row

        live = self.find(sandbox_id)
        row = await self.tasks.run(live.edit(apply), f"update {sandbox_id}")
        self.expiry_changed()
        return row

    async def pause(self, sandbox_id: str) -> Sandbox:
        """Wishes PAUSED, durably, then makes it so. Idempotent."""
        return await self.tasks.run(
            self._wish(self.find(sandbox_id), WishedState.PAUSED), f"pause {sandbox_id}"
        )

    async def resume(self, sandbox_id: str) -> Sandbox:
        """Wishes RUNNING, durably, then makes it so. Idempotent. Starts the ttl anew."""
        return await self.tasks.run(
            self._wish(self.find(sandbox_id), WishedState.RUNNING), f"resume {sandbox_id}"
        )

    async def _wish(self, live: LiveSandbox, wished: WishedState) -> Sandbox:
        live.require_not_deleting()  # its deletion holds the turn to the end
        async with live.turn:
            live.require_callable()
            await live.edit(lambda row: replace(row, wished_state=wished))
            await self.fulfil_wish(live)
        return live.row

    async def fulfil_wish(self, live: LiveSandbox) -> None:
        """Pauses or resumes a sandbox as its owner wishes. Held: its turn."""
        vmm = live.require_callable()
        wanted = (
            SandboxState.PAUSED
            if live.row.wished_state is WishedState.PAUSED
            else SandboxState.RUNNING
        )
        if live.row.state is wanted:
            return
        await self.ask(live, vmm.pause() if wanted is SandboxState.PAUSED else vmm.resume())

        def change(row: Sandbox) -> Sandbox:
            expiry = _expiry(row, now()) if wanted is SandboxState.RUNNING else None
            return replace(row, state=wanted, expire_time=expiry)

        await live.edit(change)
        self.expiry_changed()

    async def ask(self, live: LiveSandbox, request: Awaitable[T]) -> T:
        """One request to a sandbox's Firecracker, with its failures as ours.

        No answer in time makes the sandbox UNKNOWN until there is one.
        """
        try:
            async with asyncio.timeout(self._call_timeout_seconds):
                return await request
        except TimeoutError as error:
            await live.set_state(SandboxState.UNKNOWN)
            self.tasks.start_unwatched(self._recheck(live), f"recheck {live.sandbox_id}")
            live.require_callable()
            raise AssertionError("a sandbox in state UNKNOWN takes no call") from error
        except VmmFault as fault:
            raise ForkpointError(
                Reason.VMM_FAILED,
                f"Firecracker of sandbox {live.sandbox_id} refused: {fault.fault_message}",
                metadata={"sandbox_id": live.sandbox_id},
            ) from fault
        except VmmGone as gone:
            raise ForkpointError(
                Reason.VMM_EXITED,
                f"Firecracker of sandbox {live.sandbox_id} ended: {gone}",
                metadata={"sandbox_id": live.sandbox_id},
            ) from gone

    async def _recheck(self, live: LiveSandbox) -> None:
        """Waits until an UNKNOWN sandbox answers, then restores what its owner wishes."""
        pause_seconds = RECHECK_FIRST_SECONDS
        while live.vmm is not None and not live.vmm.exited.done():
            try:
                async with asyncio.timeout(self._call_timeout_seconds):
                    await live.vmm.describe()
            except (TimeoutError, VmmFault, OSError):
                await asyncio.sleep(pause_seconds)
                pause_seconds = min(2 * pause_seconds, RECHECK_MOST_SECONDS)
                continue
            except VmmGone:
                return
            await self.reconcile(live)
            return

    async def reconcile(self, live: LiveSandbox) -> None:
        """Sets the state by what Firecracker says, then restores what the owner wishes."""
        async with live.turn:
            if live.vmm is None or live.row.state in (SandboxState.STOPPED, SandboxState.DELETING):
                return
            info = await self.ask(live, live.vmm.describe())
            running = info.state == "Running"
            await live.set_state(SandboxState.RUNNING if running else SandboxState.PAUSED)
            await self.fulfil_wish(live)

    # --- ending ---

    async def delete(self, sandbox_id: str) -> None:
        """Ends a sandbox and removes all of it. A second call joins the first."""
        task = self._deleting.get(sandbox_id)
        if task is None:
            live = self.find(sandbox_id)
            task = self.tasks.start(self._delete(live), f"delete {sandbox_id}")
            self._deleting[sandbox_id] = task
            task.add_done_callback(lambda _: self._deleting.pop(sandbox_id, None))
        await asyncio.shield(task)

    async def _delete(self, live: LiveSandbox) -> None:
        await live.edit(lambda row: replace(row, state=SandboxState.DELETING, expire_time=None))
        for hook in self.before_delete:
            await hook(live.sandbox_id)
        async with live.turn:
            if self._live.get(live.sandbox_id) is not live:
                return  # it never came to run, and took itself back
            if live.vmm is not None:
                await live.vmm.kill()
                live.vmm = None
            await self._run(remove_diffs, live.row.dirty_base)
            await self._run(self.folders.remove, live.sandbox_id)
            await self.registry.remove_sandboxes([live.sandbox_id])
            self._forget(live)
        if live.row.dirty_base.snapshot_id is not None:
            self.tasks.start_unwatched(self.snapshots.collect(), "collect snapshots")

    async def close(self) -> None:
        """Forgets all sandboxes without ending one: they outlive the server."""
        await self.tasks.wait(self._call_timeout_seconds)
        await self.tasks.cancel()
        for live in self._live.values():
            if live.vmm is not None:
                live.vmm.close()

    async def _run(self, work: Callable[..., T], *arguments: object) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._files, work, *arguments)


async def _note_stopped(live: LiveSandbox, exit_: SandboxExit) -> None:
    await live.edit(
        lambda row: (
            row
            if row.state is SandboxState.DELETING
            else replace(row, state=SandboxState.STOPPED, exit=exit_, expire_time=None)
        )
    )


def new_id(prefix: str) -> str:
    """An id of the server's choice."""
    return f"{prefix}-{secrets.token_hex(6)}"


def start_failure(sandbox_id: str, error: BaseException, hint: str = "") -> BaseException:
    """What a client is told about a process that did not start; `hint` says what may help where
    Firecracker itself refused."""
    if isinstance(error, VmmFault) and VMSTATE_DAMAGED in error.fault_message:
        return ForkpointError(
            Reason.IMAGE_DAMAGED,
            f"sandbox {sandbox_id} did not start: the vmstate of its snapshot is damaged "
            f"({error.fault_message}). Put it back from a copy, or delete it and branch again",
            metadata={"sandbox_id": sandbox_id},
        )
    if isinstance(error, VmmFault):
        return ForkpointError(
            Reason.VMM_FAILED,
            f"sandbox {sandbox_id} did not start: {error.fault_message}{hint}",
            metadata={"sandbox_id": sandbox_id},
        )
    if isinstance(error, VmmGone):
        return ForkpointError(
            Reason.VMM_EXITED,
            f"sandbox {sandbox_id} did not start: {error}",
            metadata={"sandbox_id": sandbox_id},
        )
    if isinstance(error, OSError):
        remedy = (
            "Raise the server's limit of open files (ulimit -n, LimitNOFILE of systemd)"
            if error.errno in (errno.EMFILE, errno.ENFILE)
            else "Make room, or put away what is in the way, and ask again"
        )
        return ForkpointError(
            Reason.WRITE_FAILED,
            f"sandbox {sandbox_id} did not start: {error}. {remedy}",
            metadata={"sandbox_id": sandbox_id},
        )
    return error


def _with_order(row: Sandbox, order: CreateOrder) -> Sandbox:
    return replace(
        row,
        labels=dict(order.labels),
        ttl_seconds=order.ttl_seconds,
        on_expiry=order.on_expiry,
    )


def _expiry(row: Sandbox, at: datetime) -> datetime | None:
    return None if row.ttl_seconds is None else at + timedelta(seconds=row.ttl_seconds)
