"""Branches, end to end: a real server, a real VMM, and memory compared page by page."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterator
from pathlib import Path

import grpc
import grpc.aio
import pytest

from forkpoint.v1 import branch_pb2, fork_pb2, sandbox_pb2, sandbox_service_pb2
from forkpointd.model import MIB
from forkpointd.vmm import Binary
from tests.integration.serving import (
    DIFF,
    FULL,
    READY_STAGE,
    Guest,
    House,
    reason,
    stage_error,
)

MEMORY_MIB = 128
REGION_MIB = 32


@pytest.fixture
async def house(
    request: pytest.FixtureRequest, binary: Binary, witness_kernel: Path, tmp_path: Path
) -> AsyncIterator[House]:
    """A server that serves, with the settings that a test's parameters name."""
    made = House(tmp_path, binary, witness_kernel, **getattr(request, "param", {}))
    try:
        await made.start()
        yield made
    finally:
        await made.close()


def stage_names(branch: branch_pb2.Branch) -> list[str]:
    """The stages that a branch entered, without their prefix."""
    return [
        branch_pb2.BranchStage.Name(entry.stage).removeprefix("BRANCH_STAGE_")
        for entry in branch.stages
    ]


async def pause(house: House, guest: Guest) -> None:
    await house.sandboxes.PauseSandbox(sandbox_service_pb2.PauseSandboxRequest(sandbox_id=guest.id))


async def resume(house: House, guest: Guest) -> None:
    await house.sandboxes.ResumeSandbox(
        sandbox_service_pb2.ResumeSandboxRequest(sandbox_id=guest.id)
    )


async def test_a_child_has_the_memory_its_source_had_in_the_window(house: House) -> None:
    source = await house.boot("src", MEMORY_MIB)
    generation = await source.dirty(REGION_MIB)
    branch = await house.ready("src", snapshot_id="first")
    assert branch.mode == DIFF, "a freshly booted sandbox has a valid base, the empty image"
    assert stage_names(branch) == [
        "QUEUED",
        "PRECOPYING",
        "PAUSED",
        "RESUMED",
        "MERGING",
        "FINALIZING",
        "READY",
    ]
    window = branch.pause_window
    assert window.dirty_bytes >= REGION_MIB << 20
    assert window.total.ToMicroseconds() >= window.vmm_total.ToMicroseconds() > 0
    assert branch.snapshot.snapshot_id == "first"

    later = await source.dirty(REGION_MIB)
    child = await house.child("first")
    assert await child.verify(REGION_MIB) == (generation, generation, 0, 0)
    assert await source.verify(REGION_MIB) == (later, later, 0, 0)
    assert (await house.get("src")).state == sandbox_pb2.SANDBOX_STATE_RUNNING


async def test_diffs_in_a_row_hold_what_a_full_holds_page_by_page(house: House) -> None:
    source = await house.boot("src", MEMORY_MIB)
    for turn in range(4):
        await source.dirty(REGION_MIB - turn)
        await source.ask(f"p{1000 + 37 * turn},3")
        await source.ask(f"z{500 * turn},200")
        if turn == 3:
            await pause(house, source)
        branch = await house.ready("src", mode=DIFF, snapshot_id=f"diff-{turn}")
        assert branch.mode == DIFF
    full = await house.ready("src", mode=FULL, snapshot_id="full")
    assert full.pause_window.was_paused
    await resume(house, source)
    assert same_pages(house.memory_file("diff-3"), house.memory_file("full")) == MEMORY_MIB * 256
    after = await house.ready("src", mode=DIFF)
    child = await house.child(after.snapshot_id)
    assert await child.verify(REGION_MIB) == await source.verify(REGION_MIB)


ON_TMPFS = {"staging_bytes": 4 * MEMORY_MIB << 20}
ON_DISK = {"staging_bytes": 0}


@pytest.mark.parametrize("house", [ON_TMPFS, ON_DISK], indirect=True, ids=["tmpfs", "disk"])
async def test_a_full_image_has_every_page_and_takes_room_for_those_that_were_touched(
    house: House,
) -> None:
    source = await house.boot("src", MEMORY_MIB)
    generation = await source.dirty(REGION_MIB)
    full = await house.ready("src", mode=FULL, snapshot_id="full")
    on_disk = house.settings == ON_DISK
    assert full.pause_window.staging == (
        branch_pb2.STAGING_KIND_DISK if on_disk else branch_pb2.STAGING_KIND_TMPFS
    )
    assert full.pause_window.dirty_bytes == MEMORY_MIB << 20
    assert REGION_MIB << 20 <= full.snapshot.disk_bytes < (REGION_MIB + 4) << 20
    child = await house.child("full")
    assert await child.verify(REGION_MIB) == (generation, generation, 0, 0)

    # Zeros over what was data: a diff has them, and so has its image.
    await source.ask(f"z0,{REGION_MIB * 128}")
    await house.ready("src", mode=DIFF, snapshot_id="diff")
    again = await house.ready("src", mode=FULL, snapshot_id="again")
    pages = same_pages(house.memory_file("diff"), house.memory_file("again"))
    assert pages == MEMORY_MIB * 256
    assert again.snapshot.disk_bytes < full.snapshot.disk_bytes


@pytest.mark.parametrize(
    "house", [{}, {"preallocate_bytes": 0}, {"preallocate_bytes": 4 << 20}], indirect=True
)
async def test_pages_allocated_ahead_are_never_taken_for_pages_that_were_written(
    house: House,
) -> None:
    source = await house.boot("src", MEMORY_MIB)
    await source.dirty(REGION_MIB)
    await house.ready("src")
    # Next to nothing is written where 32 MiB are allocated now, then a part, then zeros.
    few = await house.ready("src", mode=DIFF)
    assert few.pause_window.dirty_bytes < MIB
    assert few.pause_window.staging == branch_pb2.STAGING_KIND_TMPFS
    await source.dirty(REGION_MIB)
    await house.ready("src", mode=DIFF)
    await source.ask(f"z100,{2 * MIB // 4096}")
    part = await house.ready("src", mode=DIFF, snapshot_id="part")
    assert 2 * MIB <= part.pause_window.dirty_bytes < 3 * MIB
    await house.ready("src", mode=FULL, snapshot_id="full")
    pages = same_pages(house.memory_file("part"), house.memory_file("full"))
    assert pages == MEMORY_MIB * 256
    child = await house.child("part")
    assert await child.verify(REGION_MIB) == await source.verify(REGION_MIB)
    assert house.half_made() == []


def same_pages(one: Path, other: Path) -> int:
    """How many pages were compared; fails at the first that differs."""
    pages = 0
    with one.open("rb") as first, other.open("rb") as second:
        while block := first.read(1 << 20):
            theirs = second.read(1 << 20)
            if block != theirs:
                bad = next(
                    n
                    for n in range(0, len(block), 4096)
                    if block[n : n + 4096] != theirs[n : n + 4096]
                )
                raise AssertionError(f"page {pages + bad // 4096} differs")
            pages += len(block) // 4096
        assert not second.read(1)
    return pages


async def test_a_writing_source_is_caught_at_one_moment(house: House) -> None:
    source = await house.boot("src", MEMORY_MIB)
    await source.ask(f"f{REGION_MIB}")
    for turn in range(3):
        branch = await house.ready("src", snapshot_id=f"torn-{turn}")
        child = await house.child(branch.snapshot_id)
        await child.ask("")  # stops the child's writer
        low, high, changes, misplaced = await child.verify(REGION_MIB)
        # One page may have its generation and not yet its index: the writer was caught in it.
        assert changes <= 1 and high - low <= 1 and misplaced <= 1


async def test_a_child_costs_what_it_has_written(house: House) -> None:
    source = await house.boot("src", MEMORY_MIB)
    await source.dirty(REGION_MIB)
    await house.ready("src", snapshot_id="first")
    child = await house.child("first")
    await child.verify(REGION_MIB)  # reads all of it
    before = (await house.get(child.id)).memory
    assert before.private_bytes < (REGION_MIB // 2) * MIB
    assert before.shared_bytes >= REGION_MIB * MIB
    await child.dirty(REGION_MIB)
    after = (await house.get(child.id)).memory
    assert after.private_bytes >= before.private_bytes + REGION_MIB * MIB
    assert (await house.get("src")).memory.private_bytes >= REGION_MIB * MIB
    listed = await house.sandboxes.ListSandboxes(sandbox_service_pb2.ListSandboxesRequest())
    assert [each.HasField("memory") for each in listed.sandboxes] == [False, False]


async def test_children_are_part_of_the_branch_and_deleting_its_snapshot_breaks_none(
    house: House,
) -> None:
    source = await house.boot("src", MEMORY_MIB)
    generation = await source.dirty(REGION_MIB)
    branch = await house.ready(
        "src", snapshot_id="s1", fork=fork_pb2.ForkSpec(count=5, fork_id="kids")
    )
    assert branch.fork.ready_count == 5
    ids = [child.sandbox_id for child in branch.fork.children]
    assert ids == [f"kids-{n}" for n in range(5)]
    await house.delete_snapshot("s1")
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await house.fork("s1")
    assert reason(caught.value) == "SNAPSHOT_NOT_FOUND"
    for child_id in ids:
        child = Guest(house, child_id)
        assert await child.verify(REGION_MIB) == (generation, generation, 0, 0)
    # A child that has not branched yet stands on the deleted snapshot: its first diff needs it.
    grandchild = await house.child((await house.ready("kids-0", mode=DIFF)).snapshot_id)
    assert await grandchild.verify(REGION_MIB) == (generation, generation, 0, 0)
    for child_id in [*ids, "src"]:
        await house.delete(child_id)
    async with asyncio.timeout(10):
        while house.memory_file("s1").exists():
            await asyncio.sleep(0.02)


async def test_a_second_branch_of_one_source_waits_and_both_are_right(house: House) -> None:
    source = await house.boot("src", MEMORY_MIB)
    await source.dirty(REGION_MIB)
    first, second = await asyncio.gather(
        house.ready("src", snapshot_id="a"), house.ready("src", snapshot_id="b")
    )
    assert {first.stage, second.stage} == {READY_STAGE}
    for snapshot_id in ("a", "b"):
        child = await house.child(snapshot_id)
        assert await child.verify(REGION_MIB) == await source.verify(REGION_MIB)


async def test_an_owners_pause_stands_over_a_branch(house: House) -> None:
    source = await house.boot("src", MEMORY_MIB)
    await source.dirty(REGION_MIB)
    await pause(house, source)
    branch = await house.ready("src")
    assert branch.pause_window.was_paused
    assert (await house.get("src")).state == sandbox_pb2.SANDBOX_STATE_PAUSED
    await resume(house, source)
    assert (await source.verify(REGION_MIB))[2:] == (0, 0)


async def test_a_repeat_joins_and_other_arguments_are_refused(house: House) -> None:
    await house.boot("src", MEMORY_MIB)
    request_id = str(uuid.uuid4())
    one, two = await asyncio.gather(
        house.ready("src", request_id=request_id), house.ready("src", request_id=request_id)
    )
    assert one.branch_id == two.branch_id
    assert (await house.ready("src", request_id=request_id)).branch_id == one.branch_id
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await house.branch("src", request_id=request_id, mode=FULL)
    assert reason(caught.value) == "REQUEST_ID_REUSED"


async def test_a_restarted_server_knows_its_sandboxes_and_their_bases(house: House) -> None:
    source = await house.boot("src", MEMORY_MIB)
    generation = await source.dirty(REGION_MIB)
    await house.ready("src", snapshot_id="before")
    await house.restart()
    sandbox = await house.get("src")
    assert sandbox.state == sandbox_pb2.SANDBOX_STATE_RUNNING
    assert sandbox.dirty_base.snapshot_id == "before"
    assert await source.verify(REGION_MIB) == (generation, generation, 0, 0)
    branch = await house.ready("src", mode=DIFF)
    child = await house.child(branch.snapshot_id)
    assert await child.verify(REGION_MIB) == (generation, generation, 0, 0)


async def test_a_damaged_base_costs_one_branch_and_no_page(house: House) -> None:
    source = await house.boot("src", MEMORY_MIB)
    await source.dirty(REGION_MIB)
    await house.ready("src", snapshot_id="base")
    memory = house.memory_file("base")
    memory.chmod(0o600)
    with memory.open("r+b") as file:
        file.truncate(MEMORY_MIB << 19)
    branch = await house.branch("src", mode=DIFF)
    assert stage_error(branch) == "IMAGE_DAMAGED"
    base = (await house.get("src")).dirty_base
    assert base.state == sandbox_pb2.DIRTY_BASE_STATE_INVALID
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await house.branch("src", mode=DIFF)
    assert reason(caught.value) == "DIRTY_BASE_INVALID"
    full = await house.ready("src", mode=FULL)
    child = await house.child(full.snapshot_id)
    assert await child.verify(REGION_MIB) == await source.verify(REGION_MIB)


async def test_a_create_whose_caller_leaves_is_whole_or_not_there(house: House) -> None:
    for number in range(8):
        request = sandbox_service_pb2.CreateSandboxRequest(
            sandbox_id=f"left-{number}",
            boot=sandbox_service_pb2.BootSource(
                kernel_image=str(house.kernel), memory_mib=MEMORY_MIB
            ),
        )
        call = house.sandboxes.CreateSandbox(request)
        await asyncio.sleep(0.002 * number)  # somewhere in its middle
        call.cancel()
    await house.boot("stays", MEMORY_MIB)
    creating = sandbox_pb2.SANDBOX_STATE_CREATING
    async with asyncio.timeout(20):
        while True:
            response = await house.sandboxes.ListSandboxes(
                sandbox_service_pb2.ListSandboxesRequest()
            )
            if all(sandbox.state != creating for sandbox in response.sandboxes):
                break
    shown = {sandbox.pid for sandbox in response.sandboxes}
    assert shown == set(house.vmm_pids())
