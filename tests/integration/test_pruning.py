"""The server's prune policy, end to end."""

from __future__ import annotations

from pathlib import Path

from forkpointd.vmm import Binary
from tests.integration.refusals import MEMORY_MIB, REGION_MIB, HeldHouse, snapshot_ids, until


async def test_all_but_the_newest_of_each_source_go(
    binary: Binary, witness_kernel: Path, tmp_path: Path
) -> None:
    house = HeldHouse(tmp_path, binary, witness_kernel)
    try:
        await house.start()
        generation = 0
        for source_id in ("one", "other"):
            source = await house.boot(source_id, MEMORY_MIB)
            generation = await source.dirty(REGION_MIB)
            for number in range(3):
                await house.ready(source_id, snapshot_id=f"{source_id}-{number}")
        child = await house.child("other-0")
        await house.stop()
        house.settings["prune_keep_last"] = 2
        await house.start()

        async def pruned() -> bool:
            return sorted(await snapshot_ids(house)) == ["one-1", "one-2", "other-1", "other-2"]

        await until(pruned)
        assert await child.verify(REGION_MIB) == (generation, generation, 0, 0)
        await house.ready(child.id, snapshot_id="of-child")
        await house.ready("one", snapshot_id="one-3")

        async def pruned_again() -> bool:
            found = sorted(await snapshot_ids(house))
            return found == ["of-child", "one-2", "one-3", "other-1", "other-2"]

        await until(pruned_again)
    finally:
        await house.close()


async def test_what_is_old_goes_and_the_rest_stays(
    binary: Binary, witness_kernel: Path, tmp_path: Path
) -> None:
    house = HeldHouse(
        tmp_path, binary, witness_kernel, prune_older_than_seconds=2, prune_keep_last=1
    )
    try:
        await house.start()
        await house.boot("src", MEMORY_MIB)
        await house.ready("src", snapshot_id="old")
        await house.ready("src", snapshot_id="new")

        async def pruned() -> bool:
            return await snapshot_ids(house) == ["new"]

        await until(pruned)
    finally:
        await house.close()
