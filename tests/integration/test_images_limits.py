"""A quota of the images, and what stays free of their disk: refused before anything is begun."""

from __future__ import annotations

import os
from pathlib import Path

from forkpoint.v1 import server_service_pb2, snapshot_pb2, snapshot_service_pb2
from forkpointd.vmm import Binary
from tests.integration.refusals import MEMORY_MIB, REGION_MIB, HeldHouse, refused, until
from tests.integration.serving import House

MIB = 1 << 20


async def facts(house: House) -> server_service_pb2.GetServerInfoResponse:
    return await house.server.GetServerInfo(server_service_pb2.GetServerInfoRequest())


async def test_what_would_cross_the_quota_is_refused(
    binary: Binary, witness_kernel: Path, tmp_path: Path
) -> None:
    """Two images of REGION_MIB fit beside the room for a whole memory, three don't."""
    limit = (MEMORY_MIB + 2 * REGION_MIB + REGION_MIB // 2) * MIB
    house = HeldHouse(tmp_path, binary, witness_kernel, images_quota_bytes=limit)
    try:
        await house.start()
        source = await house.boot("src", MEMORY_MIB)
        for number in range(3):
            await source.dirty(REGION_MIB)
            await house.ready("src", layout=snapshot_pb2.LAYOUT_FLAT, snapshot_id=f"snap-{number}")
        found = await facts(house)
        assert found.images_quota_bytes == limit
        assert 3 * REGION_MIB * MIB <= found.image_used_bytes < limit
        async with refused(
            house, "RESOURCE_EXHAUSTED", "NO_DISK_SPACE", "images_quota_bytes", "prune"
        ) as refusal:
            await house.branch("src")
        assert refusal.metadata["limited_by"] == "images_quota_bytes"
        await house.delete_snapshot("snap-0")

        async def there_is_room() -> bool:
            return (await facts(house)).image_free_bytes >= MEMORY_MIB * MIB

        await until(there_is_room)
        await house.ready("src")
    finally:
        await house.close()


async def test_a_layer_is_not_flattened_beyond_the_quota(
    binary: Binary, witness_kernel: Path, tmp_path: Path
) -> None:
    house = HeldHouse(tmp_path, binary, witness_kernel)
    try:
        await house.start()
        source = await house.boot("src", MEMORY_MIB)
        await source.dirty(REGION_MIB)
        await house.ready("src", snapshot_id="root")
        await source.dirty(REGION_MIB)
        await house.ready("src", layout=snapshot_pb2.LAYOUT_LAYERED, snapshot_id="layer")
        await house.stop()
        house.settings["images_quota_bytes"] = (MEMORY_MIB + REGION_MIB) * MIB
        await house.start()
        request = snapshot_service_pb2.FlattenSnapshotRequest(snapshot_id="layer")
        async with refused(house, "RESOURCE_EXHAUSTED", "NO_DISK_SPACE", "images_quota_bytes"):
            _ = [each async for each in house.snapshots.FlattenSnapshot(request)]
        fork = await house.fork("layer")
        assert fork.ready_count == 0
        assert "images_quota_bytes" in fork.children[0].error.message
    finally:
        await house.close()


async def test_so_much_of_the_disk_stays_free(
    binary: Binary, witness_kernel: Path, tmp_path: Path
) -> None:
    answer = os.statvfs(tmp_path)
    free = answer.f_bavail * answer.f_frsize
    house = HeldHouse(tmp_path, binary, witness_kernel, images_low_water_bytes=free)
    try:
        await house.start()
        await house.boot("src", MEMORY_MIB)
        async with refused(house, "RESOURCE_EXHAUSTED", "NO_DISK_SPACE", "images_low_water_bytes"):
            await house.branch("src")
        assert (await facts(house)).images_low_water_bytes == free
        await house.stop()
        house.settings["images_low_water_bytes"] = free // 2
        await house.start()
        await house.ready("src")
    finally:
        await house.close()
