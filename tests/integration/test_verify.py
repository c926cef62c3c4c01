"""VerifySnapshot, end to end: what is as it was, and what is found where it isn't."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from pathlib import Path

import grpc
import grpc.aio
import pytest

from forkpoint.v1 import snapshot_pb2, snapshot_service_pb2
from forkpointd.vmm import Binary
from tests.integration.refusals import HeldHouse, crash, told, until
from tests.integration.serving import Guest, House

MEMORY_MIB = 96
REGION_MIB = 16
MIB = 1 << 20
LAYERED = snapshot_pb2.LAYOUT_LAYERED


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
    """A source with a flat snapshot, `root`, and two layers on it."""
    guest = await house.boot("src", MEMORY_MIB)
    await guest.dirty(REGION_MIB)
    await house.ready("src", snapshot_id="root")
    for number in range(2):
        await guest.dirty(REGION_MIB - 4)
        await house.ready("src", layout=LAYERED, snapshot_id=f"layer-{number}")
    return guest


async def verify(
    house: House, snapshot_id: str
) -> list[snapshot_service_pb2.VerifySnapshotResponse]:
    request = snapshot_service_pb2.VerifySnapshotRequest(snapshot_id=snapshot_id)
    return [each async for each in house.snapshots.VerifySnapshot(request)]


async def get(house: House, snapshot_id: str) -> snapshot_pb2.Snapshot:
    request = snapshot_service_pb2.GetSnapshotRequest(snapshot_id=snapshot_id)
    return (await house.snapshots.GetSnapshot(request)).snapshot


async def has_digest(house: House, snapshot_id: str) -> bool:
    return (await get(house, snapshot_id)).digest != ""


def path_of(house: House, snapshot_id: str, name: str) -> Path:
    return house.data_dir / "snapshots" / snapshot_id / name


def flip(path: Path, offset: int) -> None:
    """One bit."""
    os.chmod(path, 0o600)
    with path.open("r+b") as file:
        was = os.pread(file.fileno(), 1, offset)
        os.pwrite(file.fileno(), bytes([was[0] ^ 4]), offset)


async def is_damaged(house: House, snapshot_id: str, *words: str) -> dict[str, str]:
    """What the error says of the place."""
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await verify(house, snapshot_id)
    return told(caught.value, "DATA_LOSS", "IMAGE_DAMAGED", *words).metadata


async def test_a_layer_is_read_with_all_that_it_stands_on(house: House, source: Guest) -> None:
    seen = await verify(house, "layer-1")
    last = seen[-1]
    assert last.verified
    assert (last.snapshot_id, last.done_bytes) == ("layer-1", last.total_bytes)
    assert last.total_bytes > (REGION_MIB + 2 * (REGION_MIB - 4)) * MIB
    assert not any(each.verified for each in seen[:-1])
    for snapshot_id in ("root", "layer-0", "layer-1"):
        digest = (await get(house, snapshot_id)).digest
        assert digest.startswith("blake3:")
        assert len(digest) == len("blake3:") + 64
    assert len({(await get(house, each)).digest for each in ("root", "layer-0", "layer-1")}) == 3


async def test_checksums_come_without_being_asked_for(house: House, source: Guest) -> None:
    for snapshot_id in ("root", "layer-0", "layer-1"):
        await until(lambda each=snapshot_id: has_digest(house, each))
        assert path_of(house, snapshot_id, "checksums").exists()
    assert (await get(house, "root")).disk_bytes == sum(
        path.stat().st_blocks * 512 for path in path_of(house, "root", "").iterdir()
    )


async def test_one_bit_in_what_a_layer_stands_on_is_found(house: House, source: Guest) -> None:
    await verify(house, "layer-1")
    place = 66 * MIB + 5  # of the witness's region, which begins at 64 MiB
    flip(path_of(house, "layer-0", "layer"), place)
    expected = {
        "snapshot_id": "layer-0",
        "file": "layer",
        "offset_bytes": str(66 * MIB),
        "length_bytes": str(MIB),
    }
    assert await is_damaged(house, "layer-1", "layer-0", "first bad range") == expected
    assert await is_damaged(house, "layer-0") == expected
    assert (await verify(house, "root"))[-1].verified


@pytest.mark.parametrize("name", ["memory", "vmstate", "manifest.json", "checksums"])
async def test_one_bit_in_any_file_is_found(house: House, source: Guest, name: str) -> None:
    await verify(house, "root")
    flip(path_of(house, "root", name), 100)
    assert (await is_damaged(house, "root", "root"))["snapshot_id"] == "root"


@pytest.mark.parametrize("name", ["memory", "vmstate", "manifest.json", "checksums"])
async def test_a_file_that_is_gone_is_damage(house: House, source: Guest, name: str) -> None:
    await verify(house, "root")
    path_of(house, "root", name).unlink()
    await is_damaged(house, "root", name)


async def test_a_flatten_makes_other_checksums(house: House, source: Guest) -> None:
    await verify(house, "layer-1")
    before = (await get(house, "layer-1")).digest
    await house.child("layer-1")
    assert (await get(house, "layer-1")).layout == snapshot_pb2.LAYOUT_FLAT
    assert (await verify(house, "layer-1"))[-1].verified
    assert (await get(house, "layer-1")).digest != before
    flip(path_of(house, "layer-1", "memory"), 70 * MIB)
    assert (await is_damaged(house, "layer-1"))["file"] == "memory"


async def test_a_flatten_meanwhile_is_no_damage(house: HeldHouse, source: Guest) -> None:
    await verify(house, "layer-1")
    async with house.held("compare") as hold:
        verifying = asyncio.create_task(verify(house, "layer-1"))
        await hold.reached()
        await house.child("layer-1")
    assert (await verifying)[-1].verified
    assert (await verify(house, "layer-1"))[-1].verified


async def test_a_killed_server_computes_them_again(house: HeldHouse, source: Guest) -> None:
    async with house.held("compute") as hold:
        verifying = asyncio.create_task(verify(house, "layer-1"))
        await hold.reached()
        await crash(house, verifying)
    await house.start()
    assert (await verify(house, "layer-1"))[-1].verified


async def test_one_deleted_meanwhile_is_read_to_its_end(house: HeldHouse, source: Guest) -> None:
    await verify(house, "layer-1")
    async with house.held("compare") as hold:
        verifying = asyncio.create_task(verify(house, "layer-1"))
        await hold.reached()
        await house.delete("src")
        for snapshot_id in ("root", "layer-0", "layer-1"):
            await house.delete_snapshot(snapshot_id)
    assert (await verifying)[-1].verified
    with pytest.raises(grpc.aio.AioRpcError) as gone:
        await verify(house, "layer-1")
    told(gone.value, "NOT_FOUND", "SNAPSHOT_NOT_FOUND")

    async def nothing_left() -> bool:
        return not list((house.data_dir / "snapshots").iterdir())

    await until(nothing_left)


async def test_whoever_leaves_ends_the_reading(house: HeldHouse, source: Guest) -> None:
    await verify(house, "root")
    async with house.held("compare") as hold:
        request = snapshot_service_pb2.VerifySnapshotRequest(snapshot_id="root")
        call = house.snapshots.VerifySnapshot(request)
        await call.read()
        await hold.reached()
        call.cancel()
        await house.delete("src")
        await house.delete_snapshot("layer-1")
        await house.delete_snapshot("layer-0")
        await house.delete_snapshot("root")

    async def nothing_left() -> bool:
        return not list((house.data_dir / "snapshots").iterdir())

    await until(nothing_left)
