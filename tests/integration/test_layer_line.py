"""Layers of one source in a row: the next window waits for no store, and layers become READY in the
order of their windows, whatever happens to one of them."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from forkpoint.v1 import branch_pb2, sandbox_pb2, snapshot_pb2
from forkpointd.vmm import Binary
from tests.integration.refusals import HeldHouse, crash, snapshot_ids, stopped, until
from tests.integration.serving import DIFF, FULL, READY_STAGE, Guest, House, stage_error
from tests.integration.test_branching import pause, same_pages

MEMORY_MIB = 96
REGION_MIB = 16
LAYERED = snapshot_pb2.LAYOUT_LAYERED
FLAT = snapshot_pb2.LAYOUT_FLAT
QUEUED = branch_pb2.BRANCH_STAGE_QUEUED
RESUMED = branch_pb2.BRANCH_STAGE_RESUMED
VALID = sandbox_pb2.DIRTY_BASE_STATE_VALID
PENDING = sandbox_pb2.DIRTY_BASE_STATE_PENDING
INVALID = sandbox_pb2.DIRTY_BASE_STATE_INVALID


@pytest.fixture
async def house(binary: Binary, witness_kernel: Path, tmp_path: Path) -> AsyncIterator[HeldHouse]:
    made = HeldHouse(tmp_path, binary, witness_kernel)
    try:
        await made.start()
        yield made
    finally:
        made.release_all()
        await made.close()


@pytest.fixture
async def source(house: HeldHouse) -> Guest:
    """A source with a flat snapshot, `root`."""
    guest = await house.boot("src", MEMORY_MIB)
    await guest.dirty(REGION_MIB)
    await house.ready("src", snapshot_id="root")
    return guest


@dataclass
class InLine:
    """A layer whose window is over."""

    snapshot_id: str
    generation: int
    """Of all that the source can dirty."""
    end: asyncio.Task[branch_pb2.Branch]


async def begun(
    house: House, snapshot_id: str, stage: branch_pb2.BranchStage.ValueType
) -> asyncio.Task[branch_pb2.Branch]:
    """A LAYERED branch of the source, from when it has entered a stage (or ended)."""
    entered = asyncio.Event()

    async def follow() -> branch_pb2.Branch:
        last = branch_pb2.Branch()
        async for last in house.follow("src", layout=LAYERED, snapshot_id=snapshot_id):
            if any(entry.stage == stage for entry in last.stages):
                entered.set()
        entered.set()
        return last

    task = asyncio.create_task(follow())
    await entered.wait()
    return task


async def layer(house: House, source: Guest, snapshot_id: str, mib: int = REGION_MIB) -> InLine:
    """Writes, branches, and returns when the source runs again: it waits for nothing else."""
    generation = await source.dirty(mib)
    return InLine(snapshot_id, generation, await begun(house, snapshot_id, RESUMED))


async def holds(house: House, one: InLine) -> None:
    """A child of the snapshot has what its source had in that window."""
    child = await house.child(one.snapshot_id)
    expected = (one.generation, one.generation, 0, 0)
    assert await child.verify(REGION_MIB) == expected, one.snapshot_id
    await house.delete(child.id)


async def base_of(house: House) -> sandbox_pb2.DirtyBase:
    return (await house.get("src")).dirty_base


def staged_memory(house: House) -> list[Path]:
    """Memory files of windows, oldest first."""
    found = [Path(path) for path in house.half_made() if path.endswith(".m")]
    return sorted(found, key=lambda path: int(path.stem))


async def test_ten_windows_in_a_row_wait_for_no_store(house: HeldHouse, source: Guest) -> None:
    async with house.held("layer"):
        line = [await layer(house, source, f"layer-{number}") for number in range(10)]
        assert await snapshot_ids(house) == ["root"], "none is READY before the first"
        base = await base_of(house)
        assert (base.state, base.snapshot_id) == (VALID, "root")
        assert base.unmerged_bytes > 10 * REGION_MIB << 20
    ended = [await one.end for one in line]
    assert [branch.stage for branch in ended] == [READY_STAGE] * 10, ended
    assert [branch.snapshot.parent_snapshot_id for branch in ended] == [
        "root",
        *(f"layer-{number}" for number in range(9)),
    ]
    times = [branch.snapshot.create_time.ToNanoseconds() for branch in ended]
    assert times == sorted(times), "READY in the order of their windows"
    base = await base_of(house)
    assert (base.state, base.snapshot_id, base.unmerged_bytes) == (VALID, "layer-9", 0)
    for one in (line[0], line[4], line[9]):
        await holds(house, one)
    await nothing_is_staged(house)


async def nothing_is_staged(house: House) -> None:
    async def nothing() -> bool:
        return not house.half_made()

    await until(nothing)


async def test_what_is_flat_waits_for_the_layers_before_it(house: HeldHouse, source: Guest) -> None:
    async with house.held("layer"):
        first = await layer(house, source, "layer")
        flat = asyncio.create_task(house.branch("src", layout=FLAT, snapshot_id="flat"))
        full = asyncio.create_task(house.branch("src", mode=FULL, snapshot_id="full"))
        waiting = await begun(house, "behind", QUEUED)
    ended = [await each for each in (first.end, flat, full, waiting)]
    assert [branch.stage for branch in ended] == [READY_STAGE] * 4, ended
    assert ended[1].snapshot.parent_snapshot_id == "layer"
    ready = [branch.snapshot.create_time.ToNanoseconds() for branch in ended]
    windows = [branch.pause_window.start_time.ToNanoseconds() for branch in ended]
    assert windows[1] > ready[0], "a copy of a base needs the base"
    assert windows[2] > ready[1]
    child = await house.child("flat")
    assert await child.verify(REGION_MIB) == (first.generation, first.generation, 0, 0)


async def test_a_layer_that_can_not_be_stored_is_part_of_the_next(
    house: HeldHouse, source: Guest
) -> None:
    async with house.held("layer"):
        first = await layer(house, source, "first")
        second = await layer(house, source, "second", mib=2)
        in_its_place = house.data_dir / "snapshots" / "first"
        in_its_place.mkdir()
    assert stage_error(await first.end) == "WRITE_FAILED"
    branch = await second.end
    assert branch.stage == READY_STAGE, branch
    assert branch.snapshot.parent_snapshot_id == "root"
    assert branch.snapshot.disk_bytes > branch.pause_window.dirty_bytes + (12 << 20)
    assert await snapshot_ids(house) == ["root", "second"]
    child = await house.child("second")
    assert await child.verify(REGION_MIB) == await source.verify(REGION_MIB)
    base = await base_of(house)
    assert (base.state, base.snapshot_id, base.unmerged_bytes) == (VALID, "second", 0)
    in_its_place.rmdir()
    await nothing_is_staged(house)


@pytest.mark.parametrize("lost", [0, 1], ids=["the-first", "the-second"])
async def test_a_lost_diff_takes_those_above_it_along(
    house: HeldHouse, source: Guest, lost: int
) -> None:
    async with house.held("layer"):
        line = [await layer(house, source, f"layer-{number}") for number in range(3)]
        staged_memory(house)[lost].unlink()
    ended = [await one.end for one in line]
    assert [branch.stage for branch in ended[:lost]] == [READY_STAGE] * lost
    for branch in ended[lost:]:
        assert stage_error(branch) == "IMAGE_DAMAGED"
        assert f"the diff of branch {ended[lost].branch_id} is lost" in branch.error.message
    for one in line[:lost]:
        await holds(house, one)
    base = await base_of(house)
    assert base.state == INVALID
    await nothing_is_staged(house)
    await source.dirty(REGION_MIB)
    full = await house.ready("src", snapshot_id="full")
    assert full.mode == FULL, "nothing less helps"
    child = await house.child("full")
    assert await child.verify(REGION_MIB) == await source.verify(REGION_MIB)


async def test_a_lost_diff_ends_a_branch_whose_window_is_open(
    house: HeldHouse, source: Guest
) -> None:
    async with house.held("layer") as storing:
        first = await layer(house, source, "first")
        await storing.reached()
        await source.dirty(REGION_MIB)
        async with house.held("window") as window:
            opening = asyncio.create_task(house.branch("src", layout=LAYERED))
            await window.reached()
            staged_memory(house)[0].unlink()
            storing.release()
            assert stage_error(await first.end) == "IMAGE_DAMAGED"
    assert stage_error(await opening) == "IMAGE_DAMAGED"
    assert (await base_of(house)).state == INVALID
    assert (await house.get("src")).state == sandbox_pb2.SANDBOX_STATE_RUNNING
    await nothing_is_staged(house)
    assert (await house.ready("src")).mode == FULL


async def test_layers_are_stored_though_a_later_window_fails(
    house: HeldHouse, source: Guest
) -> None:
    async with house.held("layer"):
        line = [await layer(house, source, f"layer-{number}") for number in range(2)]
        await window_fails(house)
        base = await base_of(house)
        assert base.state == INVALID
        assert base.unmerged_bytes > 2 * REGION_MIB << 20, "they are stored all the same"
        await house.delete_snapshot("root")
    for one in line:
        assert (await one.end).stage == READY_STAGE
        await holds(house, one)
    base = await base_of(house)
    assert (base.state, base.snapshot_id, base.unmerged_bytes) == (INVALID, "", 0)
    await nothing_is_staged(house)


async def window_fails(house: HeldHouse) -> None:
    """Firecracker ends in the pause window of a branch."""
    async with house.held("window") as window:
        opening = asyncio.create_task(house.branch("src", layout=LAYERED))
        await window.reached()
        assert (await base_of(house)).state == PENDING
        for pid in house.vmm_pids():
            os.kill(pid, signal.SIGKILL)
    assert (await opening).stage == branch_pb2.BRANCH_STAGE_FAILED
    await stopped(house, "src")


@pytest.mark.parametrize("window", ["none", "open", "failed"])
async def test_a_killed_server_stores_the_layers_in_line(
    house: HeldHouse, source: Guest, window: str
) -> None:
    async with house.held("layer") as storing:
        line = [await layer(house, source, f"layer-{number}", 16 - number) for number in range(3)]
        await storing.reached()
        if window == "failed":
            await window_fails(house)
        elif window == "open":
            async with house.held("window") as held:
                opening = asyncio.create_task(house.branch("src", layout=LAYERED))
                await held.reached()
                await house.delete_snapshot("root")
                await crash(house, opening)
        if window != "open":
            await crash(house, line[2].end)
        await asyncio.gather(*(one.end for one in line), return_exceptions=True)
    await house.start()
    await until(lambda: all_are_ready(house, [one.snapshot_id for one in line]))
    await nothing_is_staged(house)
    base = await base_of(house)
    if window == "none":
        assert (base.state, base.snapshot_id, base.unmerged_bytes) == (VALID, "layer-2", 0)
        await house.ready("src", mode=FULL, snapshot_id="full")
        diff = await house.ready("src", mode=DIFF, layout=FLAT, snapshot_id="diff")
        assert diff.pause_window.dirty_bytes < 1 << 20
        child = await house.child("layer-2")
        assert await child.verify(REGION_MIB) == await source.verify(REGION_MIB)
    else:
        assert (base.state, base.snapshot_id, base.unmerged_bytes) == (INVALID, "", 0)
    child = await house.child("layer-0")
    generation = line[0].generation
    assert await child.verify(REGION_MIB) == (generation, generation, 0, 0)


async def all_are_ready(house: House, snapshots: list[str]) -> bool:
    return set(snapshots) <= set(await snapshot_ids(house))


async def test_a_deleted_source_waits_for_its_layers(house: HeldHouse, source: Guest) -> None:
    async with house.held("layer"):
        line = [await layer(house, source, f"layer-{number}") for number in range(3)]
        deleting = asyncio.create_task(house.delete("src"))
        await until(lambda: is_being_deleted(house))
    await deleting
    for one in line:
        assert (await one.end).stage == READY_STAGE
        await holds(house, one)
    await nothing_is_staged(house)


async def is_being_deleted(house: House) -> bool:
    return (await house.get("src")).state == sandbox_pb2.SANDBOX_STATE_DELETING


async def test_layers_in_line_hold_what_a_full_holds_page_by_page(
    house: HeldHouse, source: Guest
) -> None:
    async with house.held("layer"):
        line = [await layer(house, source, f"layer-{number}", 16 - number) for number in range(4)]
        await source.ask("z500,200")
        await pause(house, source)
        last = await begun(house, "last", RESUMED)
    for one in line:
        assert (await one.end).stage == READY_STAGE
    assert (await last).stage == READY_STAGE
    await house.ready("src", mode=FULL, snapshot_id="full")
    await house.child("last")
    pages = same_pages(house.memory_file("last"), house.memory_file("full"))
    assert pages == MEMORY_MIB * 256
