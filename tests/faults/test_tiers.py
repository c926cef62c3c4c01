"""Images in memory on a bad day: `kill -9` at every step of the write-back, a full disk, full
memory. What is READY stays READY, and nothing half-made is left."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

import pytest

from forkpoint.v1 import branch_pb2, sandbox_pb2, sandbox_service_pb2
from forkpointd.vmm import Binary
from tests.faults.test_full import FilledHouse, fill, reached, small_disk
from tests.faults.test_kill import STORE, KilledHouse
from tests.integration.refusals import nothing_half_made, until
from tests.integration.serving import DIFF, START_SECONDS, Guest, House, stage_error
from tests.integration.test_tiers import (
    DISK,
    LAYERED,
    MEMORY,
    READY,
    are,
    holds,
    in_memory,
    memory_is,
    on_disk,
    states,
)

MEMORY_MIB = 96
REGION_MIB = 16

STEPS = {
    "before": f"{STORE}.write_back:before",
    "first-file": "forkpointd.branching.write_back:copy_to_disk:after",
    "all-files": "forkpointd.branching.write_back:copy_to_disk:after:3",
    "renamed": f"{STORE}.write_back:before>forkpointd.images.fs:Fs.rename:after",
    "written": f"{STORE}.write_back:after",
    "row": "forkpointd.registry:Registry.snapshot_is_on_disk:after",
    "before-removal": f"{STORE}.remove_from_memory:before",
    "half-removed": f"{STORE}.remove_from_memory:before>forkpointd.images.fs:Fs.rename:after",
    "removed": f"{STORE}.remove_from_memory:after",
}
ROOT = pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small disk needs root")


@pytest.mark.parametrize("step", STEPS)
async def test_a_kill_in_the_write_back_loses_nothing(
    binary: Binary, witness_kernel: Path, tmp_path: Path, step: str
) -> None:
    # The kill is to come after the client has heard of READY.
    house = KilledHouse(tmp_path, binary, witness_kernel, write_back_delay_seconds=0.5)
    house.point = STEPS[step]
    try:
        await house.start()
        source = await house.boot("src", MEMORY_MIB)
        generation = await source.dirty(REGION_MIB)
        await house.ready("src", durability=MEMORY, snapshot_id="it")
        assert house.process is not None
        await asyncio.to_thread(house.process.wait, START_SECONDS)
        await house.disconnect()
        house.point = None
        await house.start()
        assert (await states(house))["it"][0] == READY
        await are(house, DISK, "it")
        await memory_is(house, [])
        await nothing_half_made(house)
        assert on_disk(house) == ["it"]
        await holds(house, "it", generation)
        assert await source.verify(REGION_MIB) == (generation, generation, 0, 0)
        branch = await house.ready("src", mode=DIFF)
        assert branch.pause_window.dirty_bytes < 1 << 20, "it is the base still"
    finally:
        await house.close()


@ROOT
async def test_a_full_disk_leaves_it_in_memory_until_room_returns(
    binary: Binary, witness_kernel: Path, tmp_path: Path
) -> None:
    with small_disk(tmp_path / "disk", 6 * MEMORY_MIB) as disk:
        house = FilledHouse(tmp_path / "h", binary, witness_kernel)
        house.data_dir = disk / "data"
        step = house.hold_at(f"{STORE}.write_back")
        try:
            await house.start()
            source = await house.boot("src", MEMORY_MIB)
            generation = await source.dirty(REGION_MIB)
            await house.ready("src", durability=MEMORY, snapshot_id="it")
            await reached(step)
            filler = await asyncio.to_thread(fill, disk)
            step.unlink()
            await until(lambda: says(house, "snapshot it stays in memory"))
            assert "No space left" in house.log
            assert await states(house) == {"it": (READY, MEMORY)}
            filler.unlink()
            await nothing_half_made(house)
            assert (on_disk(house), in_memory(house)) == ([], ["it"])
            await holds(house, "it", generation)
            # Whoever needs it on the disk doesn't wait for the next try.
            later = await source.dirty(2)
            await house.ready("src", layout=LAYERED, snapshot_id="layer")
            assert (await states(house))["it"] == (READY, DISK)
            await memory_is(house, [])
            child = await house.child("layer")
            assert await child.verify(2) == (later, later, 0, 0)
        finally:
            await house.close()


async def says(house: House, words: str) -> bool:
    return words in house.log


@ROOT
async def test_a_layer_whose_parent_stays_in_memory_is_kept_with_its_source(
    binary: Binary, witness_kernel: Path, tmp_path: Path
) -> None:
    with small_disk(tmp_path / "disk", 6 * MEMORY_MIB) as disk:
        house = FilledHouse(tmp_path / "h", binary, witness_kernel)
        house.data_dir = disk / "data"
        step = house.hold_at(f"{STORE}.write_back")
        try:
            await house.start()
            source = await house.boot("src", MEMORY_MIB)
            await source.dirty(REGION_MIB)
            await house.ready("src", durability=MEMORY, snapshot_id="parent")
            await reached(step)
            await source.dirty(1)
            branching = asyncio.create_task(house.branch("src", layout=LAYERED))
            await until(lambda: is_finalizing(house))
            filler = await asyncio.to_thread(fill, disk)
            step.unlink()
            failed = await branching
            assert stage_error(failed) in ("WRITE_FAILED", "NO_DISK_SPACE"), failed
            filler.unlink()
            base = (await house.get("src")).dirty_base
            assert base.state == sandbox_pb2.DIRTY_BASE_STATE_VALID
            assert base.unmerged_bytes >= 1 << 20, "its pages are kept"
            again = await house.ready("src", mode=DIFF, layout=LAYERED)
            child = await house.child(again.snapshot_id)
            assert await child.verify(REGION_MIB) == await source.verify(REGION_MIB)
        finally:
            await house.close()


async def is_finalizing(house: House) -> bool:
    request = sandbox_service_pb2.ListBranchesRequest(sandbox_id="src")
    last = (await house.sandboxes.ListBranches(request)).branches[-1]
    return bool(last.stage == branch_pb2.BRANCH_STAGE_FINALIZING)


@ROOT
async def test_full_memory_keeps_the_pages_for_the_next_branch(
    binary: Binary, witness_kernel: Path, tmp_path: Path
) -> None:
    with small_disk(tmp_path / "memory", 3 * MEMORY_MIB) as memory:
        house = FilledHouse(tmp_path / "h", binary, witness_kernel, memory_images_dir=memory)
        step = house.hold_at("forkpointd.branching.life:merge_staged_diff")
        try:
            await house.start()
            source = await house.boot("src", MEMORY_MIB)
            await source.dirty(REGION_MIB)
            branching = asyncio.create_task(house.branch("src", durability=MEMORY))
            await reached(step)
            filler = await asyncio.to_thread(fill, memory)
            step.unlink()
            failed = await branching
            assert stage_error(failed) == "WRITE_FAILED", failed
            await check_runs(source)
            base = (await house.get("src")).dirty_base
            assert base.state == sandbox_pb2.DIRTY_BASE_STATE_VALID
            filler.unlink()
            again = await house.ready("src", mode=DIFF, durability=MEMORY)
            assert again.pause_window.dirty_bytes < 1 << 20
            child = await house.child(again.snapshot_id)
            assert await child.verify(REGION_MIB) == await source.verify(REGION_MIB)
        finally:
            await house.close()


async def check_runs(source: Guest) -> None:
    sandbox = await source.house.get(source.id)
    assert sandbox.state == sandbox_pb2.SANDBOX_STATE_RUNNING
    assert (await source.ask("t"))[0] == "T"
