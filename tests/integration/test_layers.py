"""Layered snapshots, end to end: windows that wait for no copy, children that have all pages."""

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
from forkpointd.images import can_reflink
from forkpointd.model import MIB
from forkpointd.vmm import Binary
from tests.integration.refusals import HeldHouse, until
from tests.integration.serving import DIFF, FULL, Guest, House, reason, stage_error
from tests.integration.test_branching import pause, resume, same_pages, stage_names

MEMORY_MIB = 128
REGION_MIB = 32
LAYERED = snapshot_pb2.LAYOUT_LAYERED
FLAT = snapshot_pb2.LAYOUT_FLAT


@pytest.fixture
async def house(binary: Binary, witness_kernel: Path, tmp_path: Path) -> AsyncIterator[HeldHouse]:
    made = HeldHouse(tmp_path, binary, witness_kernel)
    try:
        await made.start()
        yield made
    finally:
        made.release_all()
        await made.close()


async def written_source(house: House) -> Guest:
    """A source with a flat snapshot, `root`."""
    source = await house.boot("src", MEMORY_MIB)
    await source.dirty(REGION_MIB)
    await house.ready("src", snapshot_id="root")
    return source


async def layers(house: House, source: Guest, count: int) -> list[int]:
    """So many layers in a row, `layer-0` and on; returns the generation of each."""
    generations = []
    for number in range(count):
        generations.append(await source.dirty(REGION_MIB - number))
        await source.ask(f"z{500 * number},200")
        branch = await house.ready(source.id, layout=LAYERED, snapshot_id=f"layer-{number}")
        assert branch.layout == branch.snapshot.layout == LAYERED, branch
    return generations


async def get_snapshot(house: House, snapshot_id: str) -> snapshot_pb2.Snapshot:
    request = snapshot_service_pb2.GetSnapshotRequest(snapshot_id=snapshot_id)
    return (await house.snapshots.GetSnapshot(request)).snapshot


def files_of(house: House, snapshot_id: str) -> list[str]:
    """Without the checksums, which come in their own time."""
    names = {path.name for path in (house.data_dir / "snapshots" / snapshot_id).iterdir()}
    return sorted(names - {"checksums", "checksums.part"})


async def is_one_file(house: House, snapshot_id: str) -> None:
    """Waits until a snapshot that was flattened has no layer any more."""

    async def so() -> bool:
        return files_of(house, snapshot_id) == ["manifest.json", "memory", "vmstate"]

    await until(so)


async def folders_are(house: House, names: list[str]) -> None:
    """Waits until these are the snapshots on the disk: files go when nobody waits for it."""

    async def so() -> bool:
        return sorted(os.listdir(house.data_dir / "snapshots")) == names

    await until(so)


async def test_a_layer_copies_nothing_of_its_parent(house: House) -> None:
    source = await written_source(house)
    await source.ask(f"p100,{2 * MIB // 4096}")
    branch = await house.ready("src", layout=LAYERED, snapshot_id="layer")
    assert stage_names(branch) == ["QUEUED", "PAUSED", "RESUMED", "MERGING", "FINALIZING", "READY"]
    assert not branch.HasField("precopy")
    assert branch.requested_layout == LAYERED
    assert branch.snapshot.parent_snapshot_id == "root"
    assert 2 * MIB <= branch.pause_window.dirty_bytes < 4 * MIB
    assert branch.merge.done_bytes == branch.pause_window.dirty_bytes
    assert branch.snapshot.disk_bytes < branch.pause_window.dirty_bytes + MIB
    assert files_of(house, "layer") == ["layer", "manifest.json", "vmstate"]


async def test_layers_in_a_row_hold_what_a_full_holds_page_by_page(house: House) -> None:
    source = await written_source(house)
    await layers(house, source, 3)
    await pause(house, source)
    await house.ready("src", layout=LAYERED, snapshot_id="last")
    await house.ready("src", mode=FULL, snapshot_id="full")
    await resume(house, source)
    child = await house.child("last")
    await is_one_file(house, "last")
    assert same_pages(house.memory_file("last"), house.memory_file("full")) == MEMORY_MIB * 256
    assert await child.verify(REGION_MIB) == await source.verify(REGION_MIB)
    assert (await get_snapshot(house, "last")).layout == FLAT
    assert (await get_snapshot(house, "layer-2")).layout == LAYERED, "what lies below stays"
    # What was flattened is a base like any other, for the child and for the source.
    await child.dirty(3)
    await house.ready(child.id, layout=LAYERED, snapshot_id="of-child")
    grandchild = await house.child("of-child")
    assert await grandchild.verify(REGION_MIB) == await child.verify(REGION_MIB)


async def test_a_flat_snapshot_over_layers_is_whole(house: House) -> None:
    source = await written_source(house)
    await layers(house, source, 3)
    await pause(house, source)
    flat = await house.ready("src", mode=DIFF, layout=FLAT, snapshot_id="flat")
    await house.ready("src", mode=FULL, snapshot_id="full")
    await resume(house, source)
    assert flat.snapshot.parent_snapshot_id == "layer-2"
    assert flat.precopy.done_bytes == flat.precopy.total_bytes <= (REGION_MIB + 4) * MIB
    assert same_pages(house.memory_file("flat"), house.memory_file("full")) == MEMORY_MIB * 256


async def test_what_has_no_parent_is_flat(house: House) -> None:
    source = await house.boot("src", MEMORY_MIB)
    await source.dirty(REGION_MIB)
    first = await house.ready("src", layout=LAYERED)
    full = await house.ready("src", layout=LAYERED, mode=FULL)
    for branch in (first, full):
        assert (branch.requested_layout, branch.layout, branch.snapshot.layout) == (
            LAYERED,
            FLAT,
            FLAT,
        )


async def test_deleting_frees_what_nobody_stands_on_and_only_that(house: House) -> None:
    source = await written_source(house)
    generations = await layers(house, source, 3)
    folder = house.data_dir / "snapshots"
    for snapshot_id in ("root", "layer-0", "layer-1"):
        await house.delete_snapshot(snapshot_id)
    everything = ["layer-0", "layer-1", "layer-2", "root"]
    assert sorted(os.listdir(folder)) == everything
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await get_snapshot(house, "layer-1")
    assert reason(refused.value) == "SNAPSHOT_NOT_FOUND"
    await house.restart()
    assert sorted(os.listdir(folder)) == everything, "a restart knows it, too"
    child = await house.child("layer-2")
    low, high, _, _ = await child.verify(REGION_MIB - 2)
    assert (low, high) == (0, generations[2]), "pages of zeros were written over some"
    await folders_are(house, ["layer-2"])
    await house.delete_snapshot("layer-2")
    assert os.listdir(folder) == ["layer-2"], "source and child stand on it"
    await house.delete("src")
    await house.delete(child.id)
    await folders_are(house, [])


async def test_forks_at_once_share_one_flatten(house: House) -> None:
    source = await written_source(house)
    await layers(house, source, 2)
    forks = await asyncio.gather(*(house.fork("layer-1", 3) for _ in range(4)))
    assert [fork.ready_count for fork in forks] == [3] * 4
    assert house.log.count("snapshot layer-1 is flat: it had 2 layers") == 1
    expected = await source.verify(REGION_MIB)
    for fork in forks:
        assert await Guest(house, fork.children[2].sandbox_id).verify(REGION_MIB) == expected


async def test_a_fork_shows_the_flatten_that_it_waits_for(house: HeldHouse) -> None:
    source = await written_source(house)
    await layers(house, source, 1)
    request = sandbox_service_pb2.ForkSandboxesRequest(
        snapshot_id="layer-0", fork=fork_pb2.ForkSpec(count=2, fork_id="kids")
    )
    async with house.held("flatten") as hold:
        seen = []
        call = house.sandboxes.ForkSandboxes(request)
        async for response in call:
            seen.append(response.fork)
            if response.fork.HasField("flatten"):
                await hold.reached()
                hold.release()
    assert any(fork.HasField("flatten") for fork in seen)
    assert not seen[-1].HasField("flatten"), "it is over"
    assert seen[-1].ready_count == 2
    sequences = [fork.sequence for fork in seen]
    assert sequences == sorted(set(sequences))
    flat = await house.fork("layer-0")
    assert not flat.HasField("flatten")


@pytest.mark.parametrize("reflinks", [False, True])
async def test_auto_is_layered_for_a_large_base_without_reflink(
    binary: Binary, witness_kernel: Path, tmp_path: Path, reflinks: bool
) -> None:
    if can_reflink(tmp_path) is not reflinks:
        pytest.skip(f"{tmp_path} {'has no' if reflinks else 'has'} reflink")
    house = House(tmp_path, binary, witness_kernel, auto_layered_bytes=(REGION_MIB // 2) * MIB)
    try:
        await house.start()
        source = await house.boot("src", MEMORY_MIB)
        await source.dirty(1)
        layouts = [(await house.ready("src")).layout for _ in range(2)]
        assert layouts == [FLAT, FLAT], "no base, then a small one"
        generation = await source.dirty(REGION_MIB)
        assert (await house.ready("src", snapshot_id="large")).layout == FLAT, "over a small one"
        last = await house.ready("src", snapshot_id="last")
        assert last.requested_layout == snapshot_pb2.LAYOUT_AUTO
        assert last.layout == last.snapshot.layout == (FLAT if reflinks else LAYERED)
        on_layer = await house.ready("src")
        assert on_layer.layout == (FLAT if reflinks else LAYERED), "what is below counts"
        asked = await house.ready("src", layout=FLAT)
        assert asked.layout == FLAT
        child = await house.child("last")
        assert await child.verify(REGION_MIB) == (generation, generation, 0, 0)
    finally:
        await house.close()


async def test_a_chain_that_grew_too_deep_is_flattened_unasked(
    binary: Binary, witness_kernel: Path, tmp_path: Path
) -> None:
    house = House(tmp_path, binary, witness_kernel, flatten_depth=3)
    try:
        await house.start()
        source = await written_source(house)
        generations = await layers(house, source, 4)

        async def so() -> bool:
            return (await get_snapshot(house, "layer-2")).layout == FLAT

        await until(so)
        layouts = [(await get_snapshot(house, f"layer-{n}")).layout for n in (0, 1, 3)]
        assert layouts == [LAYERED] * 3
        child = await house.child("layer-2")
        low, high, _, _ = await child.verify(REGION_MIB - 2)
        assert (low, high) == (0, generations[2]), "pages of zeros were written over some"
    finally:
        await house.close()


async def test_a_flatten_is_asked_for_and_followed(house: House) -> None:
    source = await written_source(house)
    await layers(house, source, 2)
    await house.ready("src", mode=FULL, snapshot_id="full")
    request = snapshot_service_pb2.FlattenSnapshotRequest(snapshot_id="layer-1")
    seen = [each async for each in house.snapshots.FlattenSnapshot(request)]
    last = seen[-1]
    assert [each.snapshot.layout for each in seen[:-1]] == [LAYERED] * (len(seen) - 1)
    assert last.snapshot.layout == FLAT
    assert last.done_bytes == last.total_bytes >= REGION_MIB << 20
    assert last.snapshot.disk_bytes >= REGION_MIB << 20
    assert same_pages(house.memory_file("layer-1"), house.memory_file("full"))
    again = [each async for each in house.snapshots.FlattenSnapshot(request)]
    assert [(each.snapshot.layout, each.total_bytes) for each in again] == [(FLAT, 0)]


async def test_nobody_who_flattens_waits_for_the_end_of_what_it_frees(house: HeldHouse) -> None:
    source = await written_source(house)
    (generation,) = await layers(house, source, 1)
    await house.delete_snapshot("root")
    async with house.held("delete") as hold:
        child = await house.child("layer-0")
        assert await child.verify(REGION_MIB - 2) == (0, generation, 1, 0)
        await hold.reached()
        assert "root" in os.listdir(house.data_dir / "snapshots")
    await folders_are(house, ["layer-0"])


async def test_a_layer_is_forked_in_the_branch_that_makes_it(house: House) -> None:
    source = await written_source(house)
    generation = await source.dirty(REGION_MIB)
    spec = {"count": 2, "fork_id": "kids"}
    branch = await house.ready("src", layout=LAYERED, fork=spec)
    assert branch.fork.ready_count == 2
    assert await Guest(house, "kids-1").verify(REGION_MIB) == (generation, generation, 0, 0)


@pytest.mark.parametrize("layout", [LAYERED, FLAT], ids=["layered", "flat"])
async def test_a_layer_whose_parent_is_gone_is_damaged(
    house: House, layout: snapshot_pb2.Layout.ValueType
) -> None:
    source = await written_source(house)
    await layers(house, source, 2)
    shutil.rmtree(house.data_dir / "snapshots" / "layer-0")
    fork = await house.fork("layer-1", 2)
    assert fork.ready_count == 0
    assert "layer-1 stands on layer-0" in fork.children[0].error.message
    failed = await house.branch("src", mode=DIFF, layout=layout)
    assert failed.stage == branch_pb2.BRANCH_STAGE_FAILED
    assert stage_error(failed) == "IMAGE_DAMAGED"
    assert not failed.HasField("pause_window"), "the source did not stand still for it"
    base = (await house.get("src")).dirty_base
    assert base.state == sandbox_pb2.DIRTY_BASE_STATE_INVALID
    await source.dirty(REGION_MIB)
    full = await house.ready("src", layout=LAYERED, snapshot_id="full")
    assert (full.mode, full.layout) == (FULL, FLAT), "AUTO: nothing less helps"
    child = await house.child("full")
    assert await child.verify(REGION_MIB) == await source.verify(REGION_MIB)


async def test_a_layer_keeps_its_parent_until_it_is_ready(house: HeldHouse) -> None:
    source = await written_source(house)
    generation = await source.dirty(REGION_MIB)
    async with house.held("layer") as hold:
        branching = asyncio.create_task(house.ready("src", layout=LAYERED, snapshot_id="layer"))
        await hold.reached()
        await house.delete_snapshot("root")
        deleting = asyncio.create_task(house.delete("src"))
        await deleted_state(house, "src")
        await house.ready((await house.boot("other", MEMORY_MIB)).id)  # and collects
        assert "root" in os.listdir(house.data_dir / "snapshots")
        assert not deleting.done()
    await branching
    await deleting
    child = await house.child("layer")
    assert await child.verify(REGION_MIB) == (generation, generation, 0, 0)


async def test_a_restart_in_the_middle_of_a_layer_keeps_its_parent(house: HeldHouse) -> None:
    source = await written_source(house)
    generation = await source.dirty(REGION_MIB)
    async with house.held("layer") as hold:
        branching = asyncio.create_task(house.branch("src", layout=LAYERED, snapshot_id="layer"))
        await hold.reached()
        await house.delete_snapshot("root")
        assert house.process is not None
        house.process.kill()
        with pytest.raises(grpc.aio.AioRpcError):
            await branching  # before the connection is closed from this side
        await house.kill()
    await house.start()

    async def ready() -> bool:
        listed = await house.snapshots.ListSnapshots(snapshot_service_pb2.ListSnapshotsRequest())
        return [each.snapshot_id for each in listed.snapshots] == ["layer"]

    await until(ready)
    child = await house.child("layer")
    assert await child.verify(REGION_MIB) == (generation, generation, 0, 0)


async def test_what_is_flattened_may_be_deleted_meanwhile(house: HeldHouse) -> None:
    source = await written_source(house)
    await layers(house, source, 2)
    request = snapshot_service_pb2.FlattenSnapshotRequest(snapshot_id="layer-1")
    async with house.held("flatten") as hold:
        flattening = house.snapshots.FlattenSnapshot(request)
        await flattening.read()
        await hold.reached()
        await house.delete_snapshot("layer-1")
        await house.delete("src")
        assert "layer-1" in os.listdir(house.data_dir / "snapshots")
    with pytest.raises(grpc.aio.AioRpcError) as gone:
        while await flattening.read() is not grpc.aio.EOF:
            pass
    assert reason(gone.value) == "SNAPSHOT_NOT_FOUND"
    await folders_are(house, ["layer-0", "root"])
    fork = await house.fork("layer-0")
    assert fork.ready_count == 1


async def deleted_state(house: House, sandbox_id: str) -> None:
    """Waits until a sandbox is being deleted."""

    async def so() -> bool:
        return (await house.get(sandbox_id)).state == sandbox_pb2.SANDBOX_STATE_DELETING

    await until(so)


async def test_a_damaged_snapshot_does_not_keep_the_server_from_starting(house: HeldHouse) -> None:
    source = await written_source(house)
    await layers(house, source, 3)
    await house.child("layer-2")
    snapshots = house.data_dir / "snapshots"
    (snapshots / "layer-0" / "manifest.json").unlink()
    (snapshots / "layer-2" / "layer").write_bytes(b"of a flatten that was broken off")
    (snapshots / "layer-2" / "vmstate").unlink()
    await house.restart()
    failed = await house.fork("layer-1")
    assert failed.ready_count == 0
    await source.dirty(1)
    assert (await house.branch("src", layout=LAYERED)).stage == branch_pb2.BRANCH_STAGE_FAILED
    await house.ready("src", mode=FULL)
