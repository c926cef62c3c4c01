"""Snapshots in memory: READY without a disk, there after a restart of the server, written back when
nobody waits for it, and LOST, not READY, when the memory is gone."""

from __future__ import annotations

import asyncio
import os
import shutil
from collections.abc import AsyncIterator
from pathlib import Path

import grpc
import grpc.aio
import pytest

from forkpoint.v1 import (
    branch_pb2,
    fork_pb2,
    sandbox_pb2,
    sandbox_service_pb2,
    snapshot_pb2,
    snapshot_service_pb2,
)
from forkpointd.model import MIB
from forkpointd.vmm import Binary
from tests.integration.refusals import (
    HeldHouse,
    nothing_half_made,
    refused,
    until,
)
from tests.integration.serving import DIFF, FULL, Guest, House, reason
from tests.integration.test_branching import pause, resume, same_pages

MEMORY_MIB = 96
REGION_MIB = 16
LAYERED = snapshot_pb2.LAYOUT_LAYERED
FLAT = snapshot_pb2.LAYOUT_FLAT
DISK = snapshot_pb2.DURABILITY_DISK
MEMORY = snapshot_pb2.DURABILITY_MEMORY
READY = snapshot_pb2.SNAPSHOT_STATE_READY
LOST = snapshot_pb2.SNAPSHOT_STATE_LOST
INVALID = sandbox_pb2.DIRTY_BASE_STATE_INVALID
VALID = sandbox_pb2.DIRTY_BASE_STATE_VALID


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
    guest = await house.boot("src", MEMORY_MIB)
    await guest.dirty(REGION_MIB)
    return guest


async def snapshot(house: House, snapshot_id: str) -> snapshot_pb2.Snapshot:
    request = snapshot_service_pb2.GetSnapshotRequest(snapshot_id=snapshot_id)
    return (await house.snapshots.GetSnapshot(request)).snapshot


async def states(house: House) -> dict[str, tuple[int, int]]:
    """State and durability of all snapshots."""
    listed = await house.snapshots.ListSnapshots(snapshot_service_pb2.ListSnapshotsRequest())
    return {each.snapshot_id: (each.state, each.durability) for each in listed.snapshots}


async def are(house: House, durability: int, *snapshots: str) -> None:
    """Waits until these are READY with this durability."""

    async def so() -> bool:
        found = await states(house)
        return all(found[each] == (READY, durability) for each in snapshots)

    await until(so)


def on_disk(house: House) -> list[str]:
    return sorted(os.listdir(house.data_dir / "snapshots"))


def in_memory(house: House) -> list[str]:
    return sorted(os.listdir(house.memory_images)) if house.memory_images.exists() else []


async def memory_is(house: House, names: list[str]) -> None:
    """Waits until these are the snapshots in memory: files go when nobody waits for it."""

    async def so() -> bool:
        return in_memory(house) == names

    await until(so)


async def holds(house: House, snapshot_id: str, generation: int) -> None:
    """A child of the snapshot has what its source had in that window."""
    child = await house.child(snapshot_id)
    assert await child.verify(REGION_MIB) == (generation, generation, 0, 0), snapshot_id
    await house.delete(child.id)


async def test_ready_waits_for_no_disk(house: HeldHouse, source: Guest) -> None:
    async with house.held("write-back") as hold:
        generation = await source.generation()
        first = await house.ready("src", durability=MEMORY, snapshot_id="first")
        assert first.durability == MEMORY
        assert (first.snapshot.state, first.snapshot.durability) == (READY, MEMORY)
        assert first.snapshot.disk_bytes >= REGION_MIB * MIB
        await hold.reached()
        assert (on_disk(house), in_memory(house)) == ([], ["first"])
        assert oct((house.memory_images / "first").stat().st_mode & 0o777) == "0o700"
        await holds(house, "first", generation)
        later = await source.dirty(REGION_MIB)
        await house.ready("src", durability=MEMORY, layout=FLAT, snapshot_id="second")
        await holds(house, "second", later)
        assert on_disk(house) == []
    await are(house, DISK, "first", "second")
    await memory_is(house, [])
    await nothing_half_made(house)
    assert on_disk(house) == ["first", "second"]
    await holds(house, "first", generation)
    await holds(house, "second", later)


async def test_a_killed_server_keeps_what_is_in_memory(house: HeldHouse, source: Guest) -> None:
    async with house.held("write-back") as hold:
        await house.ready("src", durability=MEMORY, snapshot_id="first")
        generation = await source.dirty(REGION_MIB)
        await house.ready("src", durability=MEMORY, layout=LAYERED, snapshot_id="second")
        await hold.reached()
        await house.restart()
        assert await states(house) == {"first": (READY, MEMORY), "second": (READY, MEMORY)}
        assert on_disk(house) == []
        base = (await house.get("src")).dirty_base
        assert (base.state, base.snapshot_id) == (VALID, "second")
        later = await source.dirty(2)
        diff = await house.ready("src", mode=DIFF, durability=MEMORY, layout=FLAT)
        child = await house.child(diff.snapshot_id)
        assert await child.verify(2) == (later, later, 0, 0)
        assert await child.verify(REGION_MIB) == await source.verify(REGION_MIB)
    await holds(house, "second", generation)


@pytest.mark.parametrize("layout", [FLAT, LAYERED], ids=["flat", "layered"])
@pytest.mark.parametrize("mode", [DIFF, FULL], ids=["diff", "full"])
async def test_what_is_written_back_is_equal_page_by_page(
    house: HeldHouse,
    source: Guest,
    layout: snapshot_pb2.Layout.ValueType,
    mode: snapshot_pb2.BranchMode.ValueType,
) -> None:
    await house.ready("src", durability=MEMORY, snapshot_id="base")
    await source.dirty(5)
    await source.ask("z500,200")
    await pause(house, source)
    await house.ready("src", durability=MEMORY, layout=layout, mode=mode, snapshot_id="it")
    await house.ready("src", mode=FULL, snapshot_id="full")
    await resume(house, source)
    await are(house, DISK, "base", "it")
    it = await snapshot(house, "it")
    assert it.layout == (LAYERED if (layout, mode) == (LAYERED, DIFF) else FLAT)
    if it.layout == LAYERED:
        assert it.disk_bytes < 12 * MIB, "no more than was written"
    await house.child("it")
    await memory_is(house, [])
    pages = same_pages(house.memory_file("it"), house.memory_file("full"))
    assert pages == MEMORY_MIB * 256


async def test_what_a_layer_stands_on_is_written_back_first(
    house: HeldHouse, source: Guest
) -> None:
    async with house.held("write-back") as hold:
        await house.ready("src", durability=MEMORY, snapshot_id="root")
        generations = []
        for number in range(3):
            generations.append(await source.dirty(REGION_MIB))
            await house.ready(
                "src", durability=MEMORY, layout=LAYERED, snapshot_id=f"layer-{number}"
            )
        await hold.reached()
        flattening = asyncio.create_task(flatten(house, "layer-2"))
        seen: list[str] = []
        hold.release()
        while not flattening.done():
            seen += [name for name in on_disk(house) if name not in seen and name[0] != "."]
            await asyncio.sleep(0)
    assert (await flattening).layout == FLAT
    seen += [name for name in on_disk(house) if name not in seen]
    assert seen == ["root", "layer-0", "layer-1", "layer-2"]
    assert set((await states(house)).values()) == {(READY, DISK)}
    for number, generation in enumerate(generations):
        await holds(house, f"layer-{number}", generation)


async def flatten(house: House, snapshot_id: str) -> snapshot_pb2.Snapshot:
    request = snapshot_service_pb2.FlattenSnapshotRequest(snapshot_id=snapshot_id)
    last = snapshot_pb2.Snapshot()
    async for response in house.snapshots.FlattenSnapshot(request):
        last = response.snapshot
    return last


async def test_a_layer_on_the_disk_is_ready_after_its_parent_in_memory(
    house: HeldHouse, source: Guest
) -> None:
    async with house.held("write-back") as hold:
        await house.ready("src", durability=MEMORY, snapshot_id="parent")
        generation = await source.dirty(REGION_MIB)
        branching = asyncio.create_task(house.ready("src", layout=LAYERED, snapshot_id="layer"))
        await hold.reached()

        async def finalizing() -> bool:
            request = sandbox_service_pb2.ListBranchesRequest(sandbox_id="src")
            last = (await house.sandboxes.ListBranches(request)).branches[-1]
            return bool(last.stage == branch_pb2.BRANCH_STAGE_FINALIZING)

        await until(finalizing)
        assert list(await states(house)) == ["parent"]
        await source.generation()  # it runs
    await branching
    assert await states(house) == {"parent": (READY, DISK), "layer": (READY, DISK)}
    await house.kill()
    shutil.rmtree(house.memory_images)
    await house.start()
    assert await states(house) == {"parent": (READY, DISK), "layer": (READY, DISK)}
    await holds(house, "layer", generation)


async def test_what_memory_has_lost_is_lost(house: HeldHouse, source: Guest) -> None:
    async with house.held("write-back") as hold:
        await house.ready("src", snapshot_id="disk")
        await source.dirty(REGION_MIB)
        await house.ready("src", durability=MEMORY, layout=LAYERED, snapshot_id="parent")
        child = await house.boot("other", MEMORY_MIB)
        await house.ready("other", durability=MEMORY, snapshot_id="flat")
        await house.ready("src", durability=MEMORY, layout=LAYERED, snapshot_id="layer")
        await hold.reached()
        await house.kill()
        shutil.rmtree(house.memory_images / "parent")
        shutil.rmtree(house.memory_images / "flat")
        await house.start()
        lost = {"parent": (LOST, MEMORY), "layer": (LOST, MEMORY), "flat": (LOST, MEMORY)}
        assert await states(house) == {"disk": (READY, DISK), **lost}
    for sandbox, base_id in (("src", "layer"), (child.id, "flat")):
        base = (await house.get(sandbox)).dirty_base
        assert base.state == INVALID
        assert f"snapshot {base_id} is LOST" in base.invalid_reason
    fork = sandbox_service_pb2.ForkSandboxesRequest(
        snapshot_id="layer", fork=fork_pb2.ForkSpec(count=1)
    )
    async with refused(house, "FAILED_PRECONDITION", "SNAPSHOT_LOST", "layer", "Delete it"):
        await house.sandboxes.ForkSandboxes(fork).read()
    create = sandbox_service_pb2.CreateSandboxRequest(snapshot_id="parent")
    async with refused(house, "FAILED_PRECONDITION", "SNAPSHOT_LOST", "parent"):
        await house.sandboxes.CreateSandbox(create)
    async with refused(house, "FAILED_PRECONDITION", "SNAPSHOT_LOST", "layer"):
        await flatten(house, "layer")
    async with refused(house, "FAILED_PRECONDITION", "SNAPSHOT_LOST", "layer"):
        await house.snapshots.VerifySnapshot(
            snapshot_service_pb2.VerifySnapshotRequest(snapshot_id="layer")
        ).read()
    with pytest.raises(grpc.aio.AioRpcError) as invalid:
        await house.branch("src", mode=DIFF)
    assert reason(invalid.value) == "DIRTY_BASE_INVALID"
    await house.restart()
    assert (await states(house))["layer"] == (LOST, MEMORY), "durably"
    generation = await source.dirty(REGION_MIB)
    await house.ready("src", mode=FULL, snapshot_id="full")
    await holds(house, "full", generation)
    await house.child("disk")
    for each in ("parent", "layer", "flat"):
        await house.delete_snapshot(each)
    await memory_is(house, [])
    assert on_disk(house) == ["disk", "full"]


async def test_a_deleted_snapshot_is_written_back_for_those_that_stand_on_it(
    house: HeldHouse, source: Guest
) -> None:
    async with house.held("write-back") as hold:
        await house.ready("src", durability=MEMORY, snapshot_id="parent")
        generation = await source.dirty(REGION_MIB)
        await house.ready("src", durability=MEMORY, layout=LAYERED, snapshot_id="layer")
        await house.ready((await house.boot("other", MEMORY_MIB)).id, durability=MEMORY)
        await hold.reached()
        await house.delete_snapshot("parent")
        await house.delete("src")
        assert {"parent", "layer"} <= set(in_memory(house))
    await are(house, DISK, "layer")
    await holds(house, "layer", generation)
    await house.delete_snapshot("layer")

    async def gone() -> bool:
        return not {"parent", "layer"} & {*on_disk(house), *in_memory(house)}

    await until(gone)


async def test_what_is_written_back_may_be_deleted_meanwhile(
    house: HeldHouse, source: Guest
) -> None:
    async with house.held("write-back") as hold:
        await house.ready("src", durability=MEMORY, snapshot_id="it")
        await hold.reached()
        await house.delete_snapshot("it")
        await house.delete("src")
        assert in_memory(house) == ["it"], "it is being read"

    async def gone() -> bool:
        return not (on_disk(house) or in_memory(house))

    await until(gone)
    await nothing_half_made(house)


async def test_what_is_verified_is_written_back_first(house: HeldHouse, source: Guest) -> None:
    async with house.held("write-back") as hold:
        await house.ready("src", durability=MEMORY, snapshot_id="it")
        request = snapshot_service_pb2.VerifySnapshotRequest(snapshot_id="it")
        verifying = house.snapshots.VerifySnapshot(request)
        await hold.reached()
    seen = [each async for each in verifying]
    assert seen[-1].verified
    assert (await snapshot(house, "it")).durability == DISK
    assert (await source.ask("t"))[0] == "T"


async def test_children_keep_what_they_have_mapped(house: HeldHouse, source: Guest) -> None:
    async with house.held("write-back") as hold:
        generation = await source.generation()
        await house.ready("src", durability=MEMORY, snapshot_id="it")
        await hold.reached()
        early = await house.child("it")
    await are(house, DISK, "it")
    late = await house.child("it")
    await house.restart()
    assert in_memory(house) == ["it"], "its pages stay as long as it is mapped, so they are counted"
    for child in (early, late):
        assert await child.verify(REGION_MIB) == (generation, generation, 0, 0)
        await child.dirty(REGION_MIB)
    await house.delete(late.id)
    await house.delete(early.id)
    await memory_is(house, [])
    await holds(house, "it", generation)


# --- room ---


async def test_without_room_in_memory_it_is_refused_before_its_window(
    binary: Binary, witness_kernel: Path, tmp_path: Path
) -> None:
    limit_bytes = (MEMORY_MIB - 16) * MIB
    house = HeldHouse(tmp_path, binary, witness_kernel, memory_images_bytes=limit_bytes)
    try:
        await house.start()
        source = await house.boot("src", MEMORY_MIB)
        await source.dirty(REGION_MIB)
        words = ("image of sandbox src in memory", "memory_images_bytes", "durability DISK")
        async with refused(house, "RESOURCE_EXHAUSTED", "NO_MEMORY_SPACE", *words) as refusal:
            await house.branch("src", durability=MEMORY)
        assert refusal.metadata["needed_bytes"] == str(MEMORY_MIB * MIB)
        assert refusal.metadata["free_bytes"] == str(limit_bytes)
        await house.ready("src", snapshot_id="disk")
        generation = await source.dirty(2)
        layer = await house.ready("src", durability=MEMORY, layout=LAYERED, snapshot_id="layer")
        assert layer.layout == LAYERED, "what a window writes has room"
        child = await house.child("layer")
        assert await child.verify(2) == (generation, generation, 0, 0)
    finally:
        await house.close()


async def test_a_server_that_keeps_none_in_memory_says_so(
    binary: Binary, witness_kernel: Path, tmp_path: Path
) -> None:
    house = HeldHouse(tmp_path, binary, witness_kernel, memory_images_bytes=0)
    try:
        await house.start()
        await house.boot("src", MEMORY_MIB)
        words = ("keeps no images in memory", "durability DISK")
        async with refused(house, "RESOURCE_EXHAUSTED", "NO_MEMORY_SPACE", *words):
            await house.branch("src", durability=MEMORY)
        await house.ready("src")
    finally:
        await house.close()


async def test_an_image_that_crosses_the_memory_budget_is_refused(
    binary: Binary, witness_kernel: Path, tmp_path: Path
) -> None:
    budget_bytes = (2 * MEMORY_MIB) * MIB  # the window takes one half of it, the image the other
    house = HeldHouse(tmp_path, binary, witness_kernel, memory_budget_bytes=budget_bytes)
    try:
        await house.start()
        source = await house.boot("src", MEMORY_MIB)
        await source.dirty(REGION_MIB)
        words = ("staged or kept in memory", "memory_budget_bytes", "durability DISK")
        async with refused(house, "RESOURCE_EXHAUSTED", "NO_MEMORY", *words) as refusal:
            await house.branch("src", durability=MEMORY)
        assert refusal.metadata["budget_bytes"] == str(budget_bytes)
        assert int(refusal.metadata["staging_bytes"]) >= budget_bytes
        await house.ready("src")
        small = await house.ready("src", durability=MEMORY, layout=LAYERED)
        assert small.layout == LAYERED
    finally:
        await house.close()


async def test_what_is_deleted_before_it_is_due_never_comes_to_the_disk(
    binary: Binary, witness_kernel: Path, tmp_path: Path
) -> None:
    house = HeldHouse(tmp_path, binary, witness_kernel, write_back_delay_seconds=3600)
    try:
        await house.start()
        source = await house.boot("src", MEMORY_MIB)
        generation = await source.dirty(REGION_MIB)
        await house.ready("src", durability=MEMORY, snapshot_id="it")
        await holds(house, "it", generation)
        await house.restart()
        assert await states(house) == {"it": (READY, MEMORY)}
        await house.delete("src")
        await house.delete_snapshot("it")
        await memory_is(house, [])
        assert on_disk(house) == []
        assert "it is on the disk" not in house.log
        assert await house.stop() == 0
        assert not house.memory_images.exists(), "an empty folder goes"
    finally:
        await house.close()
