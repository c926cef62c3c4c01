"""The composition root: builds every part, in the order in which they need each other, runs them,
drains and stops them. Nothing else knows all rooms.

    start    lock the data folder, open the registry, choose the VMM, probe the staging folders,
             adopt the sandboxes that still run, go on with unfinished branches and forks, serve
    drain    (SIGTERM or SIGINT) take no new work, finish what is at work within `drain_seconds`
    stop     leave: sandboxes run on, for the next start to adopt
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Awaitable, Callable, Iterator, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import AsyncExitStack, contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import forkpointd
from forkpointd.branching.admission import Admission
from forkpointd.branching.archives import Archives
from forkpointd.branching.checksumming import Checksummer
from forkpointd.branching.flatten_policy import FlattenPolicy, flatten_as_due
from forkpointd.branching.flattening import Flattener
from forkpointd.branching.imaging import CopyWorkers
from forkpointd.branching.opening import Windows
from forkpointd.branching.page_cache import PageCache
from forkpointd.branching.prediction import PausePredictor
from forkpointd.branching.quiet import Bandwidth, Quiet
from forkpointd.branching.service import Branches
from forkpointd.branching.workshop import Workshop
from forkpointd.branching.write_back import WriteBack
from forkpointd.config import Settings
from forkpointd.host import (
    check_data_dir,
    check_kvm,
    check_memory_images,
    check_reflink,
    check_staging,
    choose_binary,
    describe_vmm,
    raise_file_limit,
)
from forkpointd.images import (
    Budget,
    Limit,
    MemoryRoom,
    Room,
    SnapshotStore,
    StagingArea,
    StagingRoom,
    free_pages_are_cold,
    low_water,
    quota,
    read_host_facts,
)
from forkpointd.model import (
    MIB,
    CheckOutcome,
    HostCheck,
    ServerFacts,
    StagingKind,
    VmmKind,
    VmmVersion,
    now,
)
from forkpointd.registry import Registry
from forkpointd.rpc.listener import Ports, RpcServer
from forkpointd.sandboxes.adoption import adopt_all
from forkpointd.sandboxes.console import Consoles
from forkpointd.sandboxes.datadir import DataDir, open_data_dir
from forkpointd.sandboxes.expiry import Expiry
from forkpointd.sandboxes.folders import Folders
from forkpointd.sandboxes.forks import Forks
from forkpointd.sandboxes.memory import MemoryBudget
from forkpointd.sandboxes.memory_host import host_memory
from forkpointd.sandboxes.pruning import PrunePolicy, prune_as_due
from forkpointd.sandboxes.service import Sandboxes
from forkpointd.sandboxes.snapshots import Snapshots
from forkpointd.sandboxes.starting import Starter, host_memory_bytes
from forkpointd.sandboxes.tasks import Tasks, drain_tasks
from forkpointd.telemetry.lag import watch_loop_lag
from forkpointd.vmm import Binary, OomKills, memory_cgroup, snapshot_version, take_place
from forkpointd.vmm.oom_kills import RECENT_SECONDS

T = TypeVar("T")

log = logging.getLogger(__name__)

HOUSEKEEPING_SECONDS = 60.0
REQUESTS_KEPT = timedelta(hours=24)
PREALLOCATED_SHARE = 8
"""Of the memory, one in so many bytes may be had ahead of windows where no setting says more."""


class StartError(Exception):
    """The server can't start; the message says why and what to do."""


@dataclass(frozen=True, slots=True)
class _Threads:
    """The thread pools, by what waits in them."""

    files: Executor
    vmm: Executor
    precopies: Executor
    merges: Executor
    sums: Executor
    verifying: Executor
    archives: Executor


@contextmanager
def _threads(settings: Settings) -> Iterator[_Threads]:
    with (
        ThreadPoolExecutor(4, thread_name_prefix="files") as files,
        ThreadPoolExecutor(settings.concurrent_starts + 8, thread_name_prefix="vmm") as vmm,
        ThreadPoolExecutor(settings.concurrent_copies, thread_name_prefix="precopy") as precopies,
        ThreadPoolExecutor(settings.concurrent_copies, thread_name_prefix="merge") as merges,
        ThreadPoolExecutor(1, thread_name_prefix="sums") as sums,
        ThreadPoolExecutor(settings.concurrent_copies, thread_name_prefix="verify") as verifying,
        ThreadPoolExecutor(settings.concurrent_copies, thread_name_prefix="archive") as archives,
    ):
        yield _Threads(files, vmm, precopies, merges, sums, verifying, archives)


def _limits(settings: Settings, store: SnapshotStore) -> list[Limit]:
    """What keeps the images from having all of their disk."""
    limits = []
    if settings.images_quota_bytes:
        limits.append(quota("images_quota_bytes", settings.images_quota_bytes, store.all_bytes))
    if settings.images_low_water_bytes:
        limits.append(low_water("images_low_water_bytes", settings.images_low_water_bytes))
    return limits


class Daemon:
    """A forkpointd that serves."""

    def __init__(self, settings: Settings, say: Callable[[str], None]) -> None:
        """`say` tells a person what is going on, a line at a time."""
        self._settings = settings
        self._say = say
        self._start_time = now()
        self._stopping = asyncio.Event()

    def stop(self) -> None:
        """Asks a running daemon to drain and leave."""
        self._stopping.set()

    async def run(self) -> None:
        """Starts, serves until `stop`, drains, stops. Raises what keeps it from starting:
        `StartError`, `DataDirError`, `ForkpointError` (NO_VMM), `OSError`."""
        os.umask(0o077)
        raise_file_limit()
        async with AsyncExitStack() as stack:
            await self._serve(stack)

    async def _serve(self, stack: AsyncExitStack) -> None:
        settings = self._settings
        data = open_data_dir(settings.data_dir, settings.staging_dir, settings.memory_images_dir)
        stack.callback(data.close)
        threads = stack.enter_context(_threads(settings))
        binary = await _in_thread(lambda: choose_binary(settings, self._say))
        checks, staging, reflink = await _in_thread(lambda: self._check_host(data, binary))
        failed = [check for check in checks if check.outcome is CheckOutcome.FAILED]
        if any(check.name == "data_dir" for check in failed):
            raise StartError("; ".join(f"{check.detail}: {check.remedy}" for check in failed))
        registry = await Registry.open(data.registry_path)
        stack.push_async_callback(registry.close)
        await registry.restore_ballast()

        host = await _in_thread(
            lambda: read_host_facts(
                vmm=VmmVersion(binary.kind, binary.version),
                snapshot_version=snapshot_version(binary),
            )
        )
        has_memory_images = data.memory_images.is_dir()  # the checks say why not
        store = SnapshotStore(
            data.snapshots, memory_root=data.memory_images if has_memory_images else None
        )
        image_room = Room(data.root, limits=_limits(settings, store))
        tmpfs = data.tmpfs_staging if staging is StagingKind.TMPFS else None
        staging_room = StagingRoom(tmpfs, settings.staging_bytes, disk=image_room)
        memory_room = self._memory_room(data, store, checks, image_room, staging_room)
        cold_pages = await _in_thread(free_pages_are_cold)
        areas = {StagingKind.DISK: StagingArea(data.disk_staging)}
        areas[StagingKind.TMPFS] = (
            StagingArea(tmpfs, warms=cold_pages) if tmpfs else areas[StagingKind.DISK]
        )

        snapshots = Snapshots(registry, store, threads.files)
        stack.push_async_callback(snapshots.close)
        folders = Folders(data)
        quiet = Quiet()
        starter = Starter(
            folders=folders,
            store=store,
            binary=binary,
            host=host,
            strict_host=settings.strict_host,
            calls=threads.vmm,
            reflink=reflink,
            hold_still=quiet.wait,
            oom_order=await _in_thread(take_place),
        )
        oom_kills = await _in_thread(OomKills.open)
        stack.callback(oom_kills.close)
        cgroup = await _in_thread(memory_cgroup)
        preallocate_bytes = settings.preallocate_bytes
        if preallocate_bytes is None:
            memory = await _in_thread(lambda: host_memory(cgroup))
            preallocate_bytes = memory.total_bytes // PREALLOCATED_SHARE
        sandboxes = Sandboxes(
            registry=registry,
            folders=folders,
            snapshots=snapshots,
            starter=starter,
            memory=MemoryBudget(
                budget_bytes=settings.memory_budget_bytes,
                child_headroom_bytes=settings.child_headroom_mib * MIB,
                staging_bytes=lambda: (
                    staging_room.held_bytes() + (memory_room.held_bytes() if memory_room else 0)
                ),
                host=lambda: host_memory(cgroup),
                files=threads.files,
            ),
            oom_kills=oom_kills,
            files=threads.files,
            call_timeout_seconds=settings.vmm_call_timeout_seconds,
        )
        stack.push_async_callback(sandboxes.close)
        forks = Forks(sandboxes, concurrent_starts=settings.concurrent_starts)
        stack.push_async_callback(forks.close)
        predictor = PausePredictor()
        bandwidth = Bandwidth(settings.precopy_bytes_per_second)
        page_cache = PageCache(cgroup)

        def copy_workers(executor: Executor) -> CopyWorkers:
            return CopyWorkers(executor, settings.concurrent_copies, quiet, bandwidth, page_cache)

        admission = Admission(
            predictor=predictor,
            image_room=image_room,
            memory_room=memory_room,
            staging_room=staging_room,
            auto_full_max_pause_us=int(settings.auto_full_max_pause_seconds * 1e6),
        )
        precopies = copy_workers(threads.precopies)
        flattener = Flattener(
            registry=registry,
            snapshots=snapshots,
            store=store,
            admission=admission,
            copies=precopies,
        )
        write_back = WriteBack(
            registry=registry,
            snapshots=snapshots,
            store=store,
            admission=admission,
            copies=precopies,
        )
        snapshots.flattener, snapshots.write_back = flattener, write_back
        stack.push_async_callback(write_back.close)
        stack.push_async_callback(flattener.close)
        checksummer = Checksummer(
            registry=registry,
            snapshots=snapshots,
            store=store,
            computing=copy_workers(threads.sums),
            comparing=copy_workers(threads.verifying),
        )
        snapshots.verifier = checksummer
        stack.push_async_callback(checksummer.close)
        archives = Archives(
            registry=registry,
            snapshots=snapshots,
            store=store,
            starter=starter,
            admission=admission,
            workers=copy_workers(threads.archives),
            image_roots=settings.image_roots,
        )
        stack.push_async_callback(archives.close)
        branches = Branches(
            Workshop(
                registry=registry,
                sandboxes=sandboxes,
                forks=forks,
                store=store,
                admission=admission,
                predictor=predictor,
                windows=Windows(areas, threads.files, cold_pages=cold_pages),
                quiet=quiet,
                precopies=precopies,
                merges=copy_workers(threads.merges),
                allocations=copy_workers(threads.files),
                ahead_budget=Budget(preallocate_bytes),
                files=threads.files,
                host=host,
                tasks=Tasks("branches"),
                window_deadline_seconds=settings.window_deadline_seconds,
                auto_layered_bytes=None if reflink else settings.auto_layered_bytes or None,
                memory_layered_bytes=settings.auto_layered_bytes or None,
            ),
            max_queued_branches=settings.max_queued_branches,
        )
        stack.push_async_callback(branches.close)
        await write_back.recover()
        await flattener.recover()
        await self._recover(registry, sandboxes, snapshots, store, forks, branches, areas, threads)

        expiry = Expiry(sandboxes, branches.branch_and_wait)
        expiry.start()
        stack.push_async_callback(expiry.close)
        consoles = Consoles(sandboxes.console_folder, sandboxes.console_end)
        stack.callback(consoles.close)
        housekeeping = Tasks("housekeeping")
        stack.push_async_callback(housekeeping.cancel)
        if settings.loop_lag_report_seconds:
            housekeeping.start_unwatched(
                watch_loop_lag(settings.loop_lag_report_seconds), "loop lag"
            )
        if oom_kills.must_look:
            housekeeping.start_unwatched(_watch_oom_kills(oom_kills), "out-of-memory kills")
        housekeeping.start_unwatched(branches.merge_kept_diffs(), "kept diffs")
        housekeeping.start_unwatched(
            self._keep_house(registry, sandboxes, snapshots, consoles), "loop"
        )

        policy = FlattenPolicy(
            max_depth=settings.flatten_depth,
            max_chain_bytes=settings.flatten_chain_bytes,
            max_age=timedelta(seconds=settings.flatten_age_seconds),
        )
        background = Tasks("background")
        stack.push_async_callback(background.cancel)
        background.start_unwatched(flatten_as_due(policy, registry, flattener), "flatten policy")
        background.start_unwatched(checksummer.compute_all(), "checksums")
        delay = timedelta(seconds=settings.write_back_delay_seconds)
        background.start_unwatched(write_back.as_due(delay), "write back as due")

        pruning = PrunePolicy(
            keep_last=settings.prune_keep_last,
            max_age=None
            if settings.prune_older_than_seconds is None
            else timedelta(seconds=settings.prune_older_than_seconds),
        )
        if pruning.deletes:
            background.start_unwatched(prune_as_due(pruning, registry, snapshots), "prune policy")

        async def facts() -> ServerFacts:
            return ServerFacts(
                version=forkpointd.__version__,
                vmm=VmmVersion(binary.kind, binary.version),
                vmm_path=None if binary.kind is VmmKind.SIMULATOR else binary.path,
                checks=checks,
                start_time=self._start_time,
                image_roots=settings.image_roots,
                data_dir=settings.data_dir,
                max_fork_count=settings.max_fork_count,
                max_queued_branches=settings.max_queued_branches,
                staging=staging,
                reflink=reflink,
                image_free_bytes=await _in_thread(image_room.free_bytes),
                image_used_bytes=await _in_thread(store.all_bytes),
                images_quota_bytes=settings.images_quota_bytes,
                images_low_water_bytes=settings.images_low_water_bytes,
                staging_free_bytes=await _in_thread(staging_room.free_bytes),
                memory=await sandboxes.memory_use(),
            )

        server = RpcServer(
            Ports(sandboxes, branches, forks, snapshots, archives, consoles, _Facts(facts)),
            image_roots=settings.image_roots,
            max_fork_count=settings.max_fork_count,
            max_memory_mib=host_memory_bytes() // MIB,
        )
        for check in checks:
            if check.outcome is not CheckOutcome.OK:
                self._say(f"{check.outcome.lower()}: {check.detail}")
        await server.start(settings.listen)
        stack.push_async_callback(server.stop, 0.5)
        self._say(
            f"forkpointd {forkpointd.__version__} serves {settings.listen} on "
            f"{describe_vmm(binary).detail}"
        )
        await self._stopping.wait()
        self._say("draining: no new work; sandboxes run on")
        server.drain()
        await background.cancel()
        left = await drain_tasks(
            (branches.tasks, forks.tasks, sandboxes.tasks, flattener.tasks, archives.tasks),
            settings.drain_seconds,
        )
        if left:
            self._say(f"{left} pieces of work are left for the next start")

    def _check_host(
        self, data: DataDir, binary: Binary
    ) -> tuple[tuple[HostCheck, ...], StagingKind, bool]:
        ours = data.tmpfs_staging  # not there where it could not be made: the check says why
        staging, kind = check_staging(
            ours if ours.is_dir() else self._settings.staging_dir, self._settings.staging_bytes
        )
        images, _ = check_memory_images(data.memory_images, self._settings.memory_images_bytes)
        reflink, able = check_reflink(data.root)
        host = (check_kvm(), describe_vmm(binary), staging, images, reflink)
        return (*host, check_data_dir(data.root)), kind, able

    def _memory_room(
        self,
        data: DataDir,
        store: SnapshotStore,
        checks: Sequence[HostCheck],
        image_room: Room,
        staging_room: StagingRoom,
    ) -> MemoryRoom | None:
        """The room for images in memory; None where none are kept there."""
        budget_bytes = self._settings.memory_images_bytes
        (check,) = (check for check in checks if check.name == "memory_images")
        if check.outcome is not CheckOutcome.OK or budget_bytes == 0:
            return None
        tmpfs = staging_room.tmpfs
        return MemoryRoom(
            data.memory_images,
            budget_bytes,
            store.memory_bytes,
            beside=(image_room,) if tmpfs is None else (tmpfs, image_room),
        )

    async def _recover(
        self,
        registry: Registry,
        sandboxes: Sandboxes,
        snapshots: Snapshots,
        store: SnapshotStore,
        forks: Forks,
        branches: Branches,
        areas: dict[StagingKind, StagingArea],
        threads: _Threads,
    ) -> None:
        """Everything that a former server left (docs/design/promises.md, 4)."""
        children = frozenset(
            child.sandbox_id
            for fork in await registry.unfinished_forks()
            for child in fork.children
        )
        adoption = await adopt_all(
            sandboxes, files=threads.files, calls=threads.vmm, fork_children=children
        )
        recovered = await branches.recover(areas)
        finishing = {work.branch.snapshot_id for work in recovered.to_merge}
        known = await registry.snapshot_ids() | finishing
        swept = await _in_thread(lambda: store.sweep(known))
        restarted_forks = await forks.recover()
        await snapshots.collect()
        if sandboxes.live or recovered.failed or swept:
            self._say(
                f"found {len(sandboxes.live)} sandboxes ({adoption.adopted} adopted, "
                f"{adoption.stopped} ended meanwhile), {len(recovered.to_merge)} branches to "
                f"finish, {recovered.failed} that failed, {restarted_forks} forks to finish; "
                f"removed {adoption.removed} half-made sandboxes, {adoption.orphans_ended} orphan "
                f"processes, {recovered.removed_files + swept} files"
            )

    async def _keep_house(
        self,
        registry: Registry,
        sandboxes: Sandboxes,
        snapshots: Snapshots,
        consoles: Consoles,
    ) -> None:
        """What has to be done now and then: trims consoles, forgets what is old."""
        while True:
            await asyncio.sleep(HOUSEKEEPING_SECONDS)
            try:
                await consoles.trim(list(sandboxes.live), self._settings.console_bytes)
                await registry.restore_ballast()
                await registry.expire_requests(now() - REQUESTS_KEPT)
                await registry.prune_ended(now() - timedelta(days=self._settings.retention_days))
                await snapshots.collect()
            except Exception:
                log.exception("housekeeping failed; it is tried again")


class _Facts:
    """`ServerPort` over a function."""

    def __init__(self, facts: Callable[[], Awaitable[ServerFacts]]) -> None:
        self._facts = facts

    async def facts(self) -> ServerFacts:
        """The facts of now."""
        return await self._facts()


async def _watch_oom_kills(oom_kills: OomKills) -> None:
    """Keeps an old kill for memory from being taken for the cause of a later end."""
    while True:
        await asyncio.sleep(RECENT_SECONDS)
        try:
            await _in_thread(oom_kills.look)
        except OSError as error:
            log.warning("kills for memory are not counted: %s", error)


async def _in_thread(work: Callable[[], T]) -> T:
    return await asyncio.to_thread(work)
