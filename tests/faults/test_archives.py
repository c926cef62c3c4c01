"""Imports that are killed at a step, or find the disk full: nothing half-made, then or later."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

import grpc
import grpc.aio
import pytest

from forkpointd.vmm import Binary
from tests.faults.test_full import FilledHouse, fill, reached, small_disk
from tests.faults.test_kill import KilledHouse
from tests.integration.serving import Guest, House, reason
from tests.integration.test_archives import KEPT, LAYERED, exported, imported, shown

MEMORY_MIB = 80
REGION_MIB = 8

ARCHIVES = "forkpointd.branching.archives"
STORE = "forkpointd.images.store:SnapshotStore"

STEPS = {
    "promised": "forkpointd.registry:Registry.promise_snapshots:after",
    "first-draft": f"{STORE}.draft:after",
    "second-draft": f"{STORE}.draft:after:2",
    "in-the-memory": "forkpointd.images.unpacking:write_all:after:3",
    "all-there": "forkpointd.images.unpacking:Unpacking.finish:after",
    "before-finalise": f"{STORE}.finalise:before",
    "one-of-two-finalised": f"{STORE}.finalise:after",
    "both-finalised": f"{STORE}.finalise:after:2",
    "committed": "forkpointd.registry:Registry.insert_imported:after",
}


async def layered_archive(house: House) -> bytes:
    """Of two images."""
    source = await house.boot("src", MEMORY_MIB)
    await source.dirty(REGION_MIB)
    await house.ready("src", snapshot_id="root")
    await source.dirty(REGION_MIB // 2)
    await house.ready("src", layout=LAYERED, snapshot_id="top")
    return await exported(house, "top", layout=KEPT)


def folders(house: House) -> list[str]:
    return sorted(os.listdir(house.data_dir / "snapshots"))


@pytest.mark.slow
@pytest.mark.timeout(400)
async def test_killed_in_an_import(binary: Binary, witness_kernel: Path, tmp_path: Path) -> None:
    house = KilledHouse(tmp_path, binary, witness_kernel)
    try:
        await house.start()
        archive = await layered_archive(house)
        before = folders(house)
        for step, point in STEPS.items():
            await house.kill()
            house.point = point
            await house.start()
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await imported(house, archive, snapshot_id="new")
            assert caught.value.code() == grpc.StatusCode.UNAVAILABLE, (step, house.log)
            assert house.process is not None
            await asyncio.to_thread(house.process.wait, 30)
            await house.disconnect()
            house.point = None
            await house.start()
            if step == "committed":
                assert "new" in await shown(house)
                child = await house.child("new")
                source = Guest(house, "src")
                assert await child.verify(REGION_MIB) == await source.verify(REGION_MIB)
                continue
            assert folders(house) == before, step
            assert await shown(house) == ["root", "top"], step
            assert (await imported(house, archive, snapshot_id="new")).snapshot_id == "new"
            await house.delete_snapshot("new")
            assert folders(house) == before, step
            assert house.half_made() == []
    finally:
        await house.close()


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small disk needs root")
async def test_a_disk_that_is_too_small_refuses_an_import_before_it_begins(
    binary: Binary, witness_kernel: Path, tmp_path: Path
) -> None:
    with small_disk(tmp_path / "disk", 6 * MEMORY_MIB) as disk:
        house = FilledHouse(tmp_path / "h", binary, witness_kernel)
        house.data_dir = disk / "data"
        try:
            await house.start()
            archive = await layered_archive(house)
            before = folders(house)
            filler = await asyncio.to_thread(fill, disk, REGION_MIB << 20)
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await imported(house, archive, snapshot_id="new")
            assert reason(caught.value) == "NO_DISK_SPACE"
            assert folders(house) == before
            filler.unlink()
            assert (await imported(house, archive, snapshot_id="new")).snapshot_id == "new"
        finally:
            await house.close()


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small disk needs root")
@pytest.mark.parametrize(
    "step", ["forkpointd.images.unpacking:write_all", f"{STORE}.finalise"], ids=["write", "end"]
)
async def test_a_disk_that_fills_up_meanwhile_leaves_nothing_of_an_import(
    binary: Binary, witness_kernel: Path, tmp_path: Path, step: str
) -> None:
    with small_disk(tmp_path / "disk", 6 * MEMORY_MIB) as disk:
        archive_house = House(tmp_path / "from", binary, witness_kernel)
        house = FilledHouse(tmp_path / "h", binary, witness_kernel)
        house.data_dir = disk / "data"
        held = house.hold_at(step)
        try:
            await archive_house.start()
            archive = await layered_archive(archive_house)
            await house.start()
            importing = asyncio.ensure_future(imported(house, archive, snapshot_id="new"))
            await reached(held)
            filler = await asyncio.to_thread(fill, disk)
            held.unlink()
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await importing
            assert reason(caught.value) in ("WRITE_FAILED", "NO_DISK_SPACE")
            assert folders(house) == []
            filler.unlink()
            assert (await imported(house, archive, snapshot_id="new")).snapshot_id == "new"
            assert await shown(house) == ["new"]
        finally:
            await archive_house.close()
            await house.close()
