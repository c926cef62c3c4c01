"""A window that clones drives, when its server or its guardian is ended, stopped or refused
something: the source runs, and no page is lost."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import grpc.aio
import pytest

from forkpoint.v1 import branch_pb2, sandbox_pb2
from forkpointd.model import MIB
from forkpointd.vmm import ApiConnection, Binary
from tests.faults.test_kill import (
    KilledHouse,
    ended_branch,
    next_branch_is_right,
    wait_for_death,
)
from tests.integration.drives import REGION_MIB, booted, drive_of, head, plain, write, xfs
from tests.integration.refusals import nothing_half_made
from tests.integration.serving import DIFF, Guest, House, stage_error
from tests.integration.vmms import wait_for

__all__ = ["plain", "xfs"]

LARGE_BYTES = 256 * MIB
"""A drive whose copy takes a while."""

STEPS = {
    "prepared": "forkpointd.vmm.guarded:GuardedWindow.__init__:after",
    "pending": "forkpointd.branching.source:Source._make_pending:after",
    "told-to-go": "forkpointd.vmm.guarded:_Story.add:before:1",
    "pause-answered": "forkpointd.vmm.guarded:_Story.add:before:2",
    "create-answered": "forkpointd.vmm.guarded:_Story.add:before:3",
    "drives-cloned": "forkpointd.vmm.guarded:_Story.add:before:4",
    "resume-answered": "forkpointd.vmm.guarded:_Story.add:before:5",
    "guardian-done": "forkpointd.vmm.guarded:_Story.add:before:6",
    "window-over": "forkpointd.vmm.guarded:GuardedWindow.run:after",
    "not-resumed-yet": "forkpointd.branching.life:BranchLife._after_window:before",
    "resumed": "forkpointd.branching.life:BranchLife._after_resumed:before",
    "before-finalise": "forkpointd.images.store:SnapshotStore.finalise:before",
    "after-finalise": "forkpointd.images.store:SnapshotStore.finalise:after",
}
FINISHED_AFTER_A_RESTART = ("resumed", "before-finalise", "after-finalise")

_number = iter(range(10_000))


@asynccontextmanager
async def housed(root: Path, binary: Binary, kernel: Path) -> AsyncIterator[KilledHouse]:
    house = KilledHouse(root, binary, kernel)
    try:
        await house.start()
        yield house
    finally:
        await house.close()
        await wait_for(lambda: not house.vmm_pids(), "its file system is in use no more")
        print(house.log)  # shown where a test fails: its folder is gone by then


@pytest.fixture
async def house(binary: Binary, witness_kernel: Path, xfs: Path) -> AsyncIterator[KilledHouse]:
    async with housed(xfs / f"guarded-{next(_number)}", binary, witness_kernel) as made:
        yield made


@pytest.fixture
async def slow_house(
    binary: Binary, witness_kernel: Path, plain: Path
) -> AsyncIterator[KilledHouse]:
    """Without reflink, and with a large drive: its windows are long."""
    async with housed(plain / "house", binary, witness_kernel) as made:
        with (made.images / "data.img").open("wb") as image:
            for _ in range(LARGE_BYTES // MIB):
                image.write(b"\xa5" * MIB)
        yield made


def guardians(house: House) -> list[int]:
    """Processes that run a window of this house's server: they hold its sandboxes' drives open."""
    found = []
    for entry in Path("/proc").iterdir():
        with suppress(OSError):
            if entry.name.isdigit() and b"guardian.py" in (entry / "cmdline").read_bytes():
                files = [os.readlink(fd) for fd in (entry / "fd").iterdir()]
                if any(name.startswith(str(house.data_dir.resolve())) for name in files):
                    found.append(int(entry.name))
    return found


def state_of(house: House, sandbox_id: str) -> str:
    """What Firecracker itself says, without any server."""
    with ApiConnection.open(house.data_dir / "sandboxes" / sandbox_id, 10.0) as connection:
        return str(connection.request("GET", "/", timeout=30.0)["state"])


async def is_so(what: Callable[[], bool], words: str) -> None:
    await asyncio.wait_for(wait_for(what, words), 30.0)


async def as_root(*command: str) -> None:
    await asyncio.to_thread(subprocess.run, command, check=True)


@pytest.mark.parametrize("step", STEPS)
async def test_the_server_is_killed_at(house: KilledHouse, step: str) -> None:
    source = await booted(house)
    await house.kill()
    house.point = STEPS[step]
    await house.start()
    generation = await source.dirty(REGION_MIB)
    write(drive_of(house, "src"), b"generation %5d" % generation)
    with suppress(grpc.aio.AioRpcError):
        await house.branch("src", branch_id="br", snapshot_id="one")
    assert await wait_for_death(house) == -signal.SIGKILL
    # Nobody but the guardian is there to do it.
    await is_so(lambda: state_of(house, "src") == "Running", "the source runs")
    await is_so(lambda: not guardians(house), "the guardian leaves")
    house.point = None
    await house.start()
    branch = await ended_branch(house, "br")
    if step in FINISHED_AFTER_A_RESTART:
        assert branch.stage == branch_pb2.BRANCH_STAGE_READY, branch
        child = await house.child("one")
        assert await child.verify(REGION_MIB) == (generation, generation, 0, 0)
        assert head(drive_of(house, child.id)) == b"generation %5d" % generation
    else:
        assert branch.stage == branch_pb2.BRANCH_STAGE_FAILED, branch
        assert stage_error(branch) == "SERVER_RESTARTED"
    await nothing_half_made(house)
    await next_branch_is_right(house, source, "again")


async def test_the_server_is_killed_while_a_drive_is_copied(slow_house: KilledHouse) -> None:
    """The resume does not wait for the copy."""
    house = slow_house
    source = await booted(house, allow_drive_copy=True)
    await house.kill()
    house.point = STEPS["create-answered"]
    await house.start()
    with suppress(grpc.aio.AioRpcError):
        await house.branch("src", branch_id="br", allow_drive_copy=True)
    assert await wait_for_death(house) == -signal.SIGKILL
    await is_so(lambda: state_of(house, "src") == "Running", "the source runs")
    await is_so(lambda: not guardians(house), "the guardian leaves")
    draft = house.data_dir / "snapshots" / ".draft-br" / "drive-data"
    assert draft.stat().st_blocks * 512 < LARGE_BYTES, "it was given up"
    house.point = None
    await house.start()
    assert (await ended_branch(house, "br")).stage == branch_pb2.BRANCH_STAGE_FAILED
    await nothing_half_made(house)
    assert (await source.ask("t"))[0] == "T"


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
async def test_the_guardian_is_lost_while_a_drive_is_copied(
    slow_house: KilledHouse, how: signal.Signals
) -> None:
    house = slow_house
    source = await booted(house, allow_drive_copy=True)
    generation = await source.dirty(REGION_MIB)
    branching = asyncio.create_task(house.branch("src", branch_id="br", allow_drive_copy=True))
    await is_so(lambda: state_of(house, "src") == "Paused", "the window is open")
    (pid,) = guardians(house)
    # SIGTERM, SIGINT and SIGHUP are not for it.
    for each in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, how):
        os.kill(pid, each)
    branch = await branching
    assert branch.stage == branch_pb2.BRANCH_STAGE_FAILED, branch
    assert stage_error(branch) == "GUARDIAN_LOST", branch
    assert state_of(house, "src") == "Running"
    await is_so(lambda: not guardians(house), "the guardian leaves")
    assert (await source.ask("t"))[0] == "T"
    assert (await house.get("src")).state == sandbox_pb2.SANDBOX_STATE_RUNNING
    again = await house.ready("src", snapshot_id="again", allow_drive_copy=True)
    assert (await source.verify(REGION_MIB))[:2] == (generation, generation)
    fork = await house.fork(again.snapshot_id, allow_drive_copy=True)
    child = Guest(house, fork.children[0].sandbox_id)
    assert await child.verify(REGION_MIB) == (generation, generation, 0, 0)
    assert [path for path in house.half_made() if ".draft" in path] == []


async def test_a_clone_that_fails_keeps_the_pages(house: KilledHouse, tmp_path: Path) -> None:
    """Another file system's file in the drive's place: FICLONE is refused in the window."""
    source = await booted(house)
    await house.ready("src", snapshot_id="root")
    generation = await source.dirty(REGION_MIB)
    foreign = tmp_path / "foreign"
    foreign.write_bytes(b"of another file system")
    mount = drive_of(house, "src")
    await as_root("mount", "--bind", str(foreign), str(mount))
    try:
        branch = await house.branch("src", mode=DIFF, branch_id="br")
    finally:
        await as_root("umount", str(mount))
    assert branch.stage == branch_pb2.BRANCH_STAGE_FAILED
    assert stage_error(branch) == "WRITE_FAILED"
    assert "drive data" in branch.error.message
    assert branch_pb2.BRANCH_STAGE_RESUMED not in [entry.stage for entry in branch.stages]
    assert (await source.ask("t"))[0] == "T"
    base = (await house.get("src")).dirty_base
    assert base.state == sandbox_pb2.DIRTY_BASE_STATE_VALID
    assert base.unmerged_bytes >= REGION_MIB * MIB
    again = await house.ready("src", mode=DIFF, snapshot_id="again")
    assert again.pause_window.dirty_bytes < REGION_MIB * MIB, "the pages were kept"
    child = await house.child("again")
    assert await child.verify(REGION_MIB) == (generation, generation, 0, 0)
    await next_branch_is_right(house, source, "later")
