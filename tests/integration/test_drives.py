"""Writable drives, end to end: each sandbox writes to a file of its own, each snapshot keeps them
as they were in its window.

The witness has no driver for block devices, so what a guest would write is written here, into the
sandbox's own file; what a guest sees of its drives is shown by `make test-linux`.
"""

from __future__ import annotations

import asyncio
import json
import os
import stat
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
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
from tests.integration.drives import (
    DRIVE_BYTES,
    FIRST,
    REGION_MIB,
    booted,
    clone_in,
    drive_of,
    head,
    make_image,
    plain,
    write,
    xfs,
)
from tests.integration.refusals import HeldHouse, nothing_half_made, refused
from tests.integration.serving import DIFF, FULL, House, error_info, reason
from tests.integration.test_branching import pause, resume
from tests.integration.vmms import wait_for

__all__ = ["plain", "xfs"]

LAYERED = snapshot_pb2.LAYOUT_LAYERED


@asynccontextmanager
async def housed(root: Path, binary: Binary, kernel: Path) -> AsyncIterator[HeldHouse]:
    house = HeldHouse(root, binary, kernel)
    try:
        await house.start()
        yield house
    finally:
        house.release_all()
        await house.close()
        await wait_for(lambda: not house.vmm_pids(), "its file system is in use no more")
        print(house.log)  # shown where a test fails: its folder is gone by then


_number = iter(range(10_000))


@pytest.fixture
async def house(binary: Binary, witness_kernel: Path, xfs: Path) -> AsyncIterator[HeldHouse]:
    async with housed(xfs / f"house-{next(_number)}", binary, witness_kernel) as made:
        yield made


@pytest.fixture
async def plain_house(
    binary: Binary, witness_kernel: Path, plain: Path
) -> AsyncIterator[HeldHouse]:
    async with housed(plain / "house", binary, witness_kernel) as made:
        yield made


async def test_each_child_writes_to_a_drive_of_its_own(house: HeldHouse) -> None:
    image = make_image(house)
    source = await booted(house)
    own = drive_of(house, "src")
    assert not own.is_symlink()
    write(own, b"of the source 01")
    branch = await house.ready("src", snapshot_id="one")
    window = branch.pause_window
    parts = window.vmm_total.ToMicroseconds() + window.drive_clone.ToMicroseconds()
    assert 0 < window.drive_clone.ToMicroseconds() < parts <= window.total.ToMicroseconds()
    write(own, b"of the source 02")
    fork = await house.fork("one", count=2)
    assert fork.ready_count == 2, fork
    for number in range(2):
        child = drive_of(house, fork.children[number].sandbox_id)
        assert head(child) == b"of the source 01"
        write(child, b"of child %7d" % number)
    assert head(own) == b"of the source 02"
    assert head(clone_in(house, "one")) == b"of the source 01"
    assert head(image) == FIRST, "the image is never written to"
    names = {head(drive_of(house, child.sandbox_id)) for child in fork.children}
    assert names == {b"of child       0", b"of child       1"}
    assert await source.ask("t")
    grand = await house.ready(fork.children[1].sandbox_id, snapshot_id="two")
    assert grand.snapshot.parent_snapshot_id == "one"
    assert head(clone_in(house, "two")) == b"of child       1"


async def test_a_snapshot_with_drives_is_described_sealed_and_goes_whole(house: HeldHouse) -> None:
    await booted(house)
    branch = await house.ready("src", snapshot_id="one")
    folder = house.data_dir / "snapshots" / "one"
    names = set(os.listdir(folder)) - {"checksums", "checksums.part"}  # these come later
    assert names == {"drive-data", "manifest.json", "memory", "vmstate"}
    assert stat.S_IMODE(clone_in(house, "one").stat().st_mode) == 0o400
    (drive,) = json.loads((folder / "manifest.json").read_text())["drives"]
    assert (drive["read_only"], drive["size_bytes"]) == (False, DRIVE_BYTES)
    assert [each.read_only for each in branch.snapshot.drives] == [False]
    await house.delete("src")
    assert not drive_of(house, "src").exists()
    child = await house.child("one")
    assert drive_of(house, child.id).exists()
    await house.delete_snapshot("one")
    await house.delete(child.id)
    await nothing_half_made(house)


@pytest.mark.parametrize("layout", [snapshot_pb2.LAYOUT_FLAT, LAYERED])
@pytest.mark.parametrize("mode", [DIFF, FULL])
async def test_drives_and_memory_are_of_one_window(
    house: HeldHouse, mode: snapshot_pb2.BranchMode.ValueType, layout: snapshot_pb2.Layout.ValueType
) -> None:
    source = await booted(house)
    await house.ready("src", snapshot_id="root")
    for number in range(3):
        generation = await source.dirty(REGION_MIB)
        write(drive_of(house, "src"), b"generation %5d" % generation)
        await house.ready("src", mode=mode, layout=layout, snapshot_id=f"snap-{number}")
    for number in range(3):
        child = await house.child(f"snap-{number}")
        low, high, _, misplaced = await child.verify(REGION_MIB)
        assert (low, misplaced) == (high, 0)
        assert head(drive_of(house, child.id)) == b"generation %5d" % low


async def test_a_source_that_its_owner_paused_stays_paused(house: HeldHouse) -> None:
    source = await booted(house)
    await pause(house, source)
    branch = await house.ready("src", snapshot_id="one")
    assert branch.pause_window.was_paused
    assert (await house.get("src")).state == sandbox_pb2.SANDBOX_STATE_PAUSED
    await resume(house, source)
    assert await source.ask("t")
    assert head(clone_in(house, "one")) == FIRST


async def test_children_of_a_restarted_server_have_drives(house: HeldHouse) -> None:
    await booted(house)
    write(drive_of(house, "src"), b"before a restart")
    await house.ready("src", snapshot_id="one")
    await house.restart()
    child = await house.child("one")
    assert head(drive_of(house, child.id)) == b"before a restart"


async def test_drives_are_no_part_of_what_is_kept_in_memory(house: HeldHouse) -> None:
    await booted(house)
    async with refused(house, "FAILED_PRECONDITION", "WRITABLE_DRIVE", "durability DISK"):
        await house.branch("src", durability=snapshot_pb2.DURABILITY_MEMORY)


async def test_the_clones_of_drives_are_verified_too(house: HeldHouse) -> None:
    await booted(house)
    await house.ready("src", snapshot_id="snap")
    request = snapshot_service_pb2.VerifySnapshotRequest(snapshot_id="snap")
    seen = [each async for each in house.snapshots.VerifySnapshot(request)]
    assert seen[-1].verified
    (clone,) = (house.data_dir / "snapshots" / "snap").glob("drive-*")
    clone.chmod(0o600)
    with clone.open("r+b") as file:
        file.seek(4096)
        file.write(b"altered")
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        _ = [each async for each in house.snapshots.VerifySnapshot(request)]
    assert error_info(caught.value).metadata["file"] == clone.name


# --- where blocks can't be shared ---


async def test_a_branch_is_cancelled_before_its_drives_are_flushed(house: HeldHouse) -> None:
    source = await booted(house)
    async with house.held("drives") as hold:
        branching = asyncio.create_task(house.branch("src", branch_id="br"))
        await hold.reached()
        request = sandbox_service_pb2.CancelBranchRequest(branch_id="br")
        cancelling = house.sandboxes.CancelBranch(request)
        hold.release()
        await cancelling
        branch = await branching
    assert branch.stage == branch_pb2.BRANCH_STAGE_CANCELLED
    await nothing_half_made(house)
    assert (await source.ask("t"))[0] == "T"
    await house.ready("src", snapshot_id="next")


async def refusal(call: object) -> tuple[grpc.StatusCode, str, str]:
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await call  # type: ignore[misc]
    error = refused.value
    return error.code(), reason(error), error.details() or ""


async def test_without_reflink_writable_drives_are_refused_with_the_remedy(
    plain_house: HeldHouse,
) -> None:
    house = plain_house
    code, why, words = await refusal(booted(house))
    assert (code, why) == (grpc.StatusCode.FAILED_PRECONDITION, "WRITABLE_DRIVE")
    assert "XFS or btrfs" in words
    assert "allow_drive_copy" in words
    await booted(house, allow_drive_copy=True)
    code, why, words = await refusal(house.branch("src"))
    assert (code, why) == (grpc.StatusCode.FAILED_PRECONDITION, "WRITABLE_DRIVE")
    await house.ready("src", snapshot_id="one", allow_drive_copy=True)
    for call in (house.fork("one"), from_snapshot(house, "one")):
        code, why, words = await refusal(call)
        assert (code, why) == (grpc.StatusCode.FAILED_PRECONDITION, "WRITABLE_DRIVE")
        assert "allow_drive_copy" in words
    assert len(house.vmm_pids()) == 1
    await nothing_half_made(house)


async def from_snapshot(house: House, snapshot_id: str, **fields: object) -> object:
    request = sandbox_service_pb2.CreateSandboxRequest(
        sandbox_id="of-snapshot",
        snapshot_id=snapshot_id,
        **fields,  # type: ignore[arg-type]
    )
    return await house.sandboxes.CreateSandbox(request)


async def test_with_leave_drives_are_copied_and_holes_stay_holes(plain_house: HeldHouse) -> None:
    house = plain_house
    source = await booted(house, allow_drive_copy=True)
    write(drive_of(house, "src"), b"a copy of all of it", at=6 * MIB)
    branch = await house.ready("src", snapshot_id="one", allow_drive_copy=True)
    assert branch.pause_window.drive_clone.ToMicroseconds() > 0
    clone = clone_in(house, "one")
    assert (head(clone), head(clone, 19, 6 * MIB)) == (FIRST, b"a copy of all of it")
    assert clone.stat().st_size == DRIVE_BYTES
    assert clone.stat().st_blocks * 512 < MIB
    fork = await house.fork("one", count=2, allow_drive_copy=True)
    assert fork.ready_count == 2
    write(drive_of(house, fork.children[0].sandbox_id), b"of its own")
    assert head(drive_of(house, fork.children[1].sandbox_id)) == FIRST
    await from_snapshot(house, "one", allow_drive_copy=True)
    assert head(drive_of(house, "of-snapshot"), 19, 6 * MIB) == b"a copy of all of it"
    assert await source.ask("t")


async def test_children_of_a_branch_may_be_copied_where_the_branch_may(
    plain_house: HeldHouse,
) -> None:
    await booted(plain_house, allow_drive_copy=True)
    branch = await plain_house.ready(
        "src", allow_drive_copy=True, fork=fork_pb2.ForkSpec(count=2, fork_id="kids")
    )
    assert branch.fork.ready_count == 2
    assert head(drive_of(plain_house, "kids-1")) == FIRST


async def test_a_snapshot_whose_drive_was_cut_is_refused(house: HeldHouse) -> None:
    await booted(house)
    await house.ready("src", snapshot_id="one")
    clone = clone_in(house, "one")
    clone.chmod(0o600)
    os.truncate(clone, DRIVE_BYTES - 1)
    code, why, words = await refusal(house.fork("one"))
    assert (code, why) == (grpc.StatusCode.DATA_LOSS, "IMAGE_DAMAGED")
    assert "drive-data" in words
