"""What happens when a sandbox's time is over: deleted, paused or branched, and never against a
later wish of its owner."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from typing import Any

import grpc
import grpc.aio
import pytest
from google.protobuf.duration_pb2 import Duration
from google.protobuf.field_mask_pb2 import FieldMask

from forkpoint.v1 import branch_pb2, sandbox_pb2, sandbox_service_pb2
from tests.integration.refusals import (
    MEMORY_MIB,
    PAUSED,
    REGION_MIB,
    RUNNING,
    HeldHouse,
    connected,
    crash,
    nothing_half_made,
    problem_of,
    served_with,
    snapshot_ids,
    traces,
    until,
)
from tests.integration.serving import Guest

Pb = sandbox_service_pb2
DELETE = sandbox_pb2.EXPIRY_ACTION_DELETE
PAUSE = sandbox_pb2.EXPIRY_ACTION_PAUSE
BRANCH = sandbox_pb2.EXPIRY_ACTION_BRANCH
SECOND = Duration(seconds=1)
HOUR = Duration(seconds=3600)


served = served_with(auto_full_max_pause_seconds=0)
"""A server for the whole module, that refuses AUTO where it would be FULL."""


@pytest.fixture
async def house(served: HeldHouse) -> AsyncIterator[HeldHouse]:
    """The server."""
    async with connected(served) as house:
        yield house
        house.release_all()


async def update(house: HeldHouse, sandbox_id: str, **fields: Any) -> sandbox_pb2.Sandbox:
    request = Pb.UpdateSandboxRequest(
        sandbox_id=sandbox_id, update_mask=FieldMask(paths=list(fields)), **fields
    )
    return (await house.sandboxes.UpdateSandbox(request)).sandbox


async def pause(house: HeldHouse, sandbox_id: str) -> sandbox_pb2.Sandbox:
    request = Pb.PauseSandboxRequest(sandbox_id=sandbox_id)
    return (await house.sandboxes.PauseSandbox(request)).sandbox


async def resume(house: HeldHouse, sandbox_id: str) -> sandbox_pb2.Sandbox:
    request = Pb.ResumeSandboxRequest(sandbox_id=sandbox_id)
    return (await house.sandboxes.ResumeSandbox(request)).sandbox


async def gone(house: HeldHouse, *sandbox_ids: str) -> None:
    """Waits until these are no more."""

    async def none_left() -> bool:
        return not set(sandbox_ids) & set((await traces(house)).sandboxes)

    await until(none_left)


async def is_paused(house: HeldHouse, sandbox_id: str) -> None:
    """Waits until it is PAUSED, and wished so."""

    async def paused() -> bool:
        return (await traces(house)).sandboxes[sandbox_id] == (
            PAUSED,
            sandbox_pb2.WISHED_STATE_PAUSED,
        )

    await until(paused)


async def branches_of(house: HeldHouse, sandbox_id: str) -> list[branch_pb2.Branch]:
    response = await house.sandboxes.ListBranches(Pb.ListBranchesRequest(sandbox_id=sandbox_id))
    return list(response.branches)


async def test_each_goes_as_it_was_told_to(house: HeldHouse) -> None:
    await house.boot("none", MEMORY_MIB)
    await house.boot("still", MEMORY_MIB, ttl=SECOND, on_expiry=DELETE)
    assert not (await pause(house, "still")).HasField("expire_time")
    await house.boot("longer", MEMORY_MIB, ttl=SECOND)
    extended = await update(house, "longer", ttl=HOUR)
    await house.boot("freed", MEMORY_MIB, ttl=SECOND)
    assert not (await update(house, "freed", ttl=None)).HasField("expire_time")
    guest = await house.boot("kept", MEMORY_MIB, ttl=HOUR, on_expiry=BRANCH)
    generation = await guest.dirty(REGION_MIB)
    await update(house, "kept", ttl=SECOND)
    await house.boot("default", MEMORY_MIB, ttl=SECOND)
    await house.boot("paused", MEMORY_MIB, ttl=SECOND, on_expiry=PAUSE)

    await gone(house, "default", "kept")
    await is_paused(house, "paused")
    (branch,) = await branches_of(house, "kept")
    child = await house.child(branch.snapshot.snapshot_id)
    assert await child.verify(REGION_MIB) == (generation, generation, 0, 0)
    for name in ("none", "longer", "freed"):
        assert (await house.get(name)).state == RUNNING
        assert (await Guest(house, name).ask("t"))[0] == "T"
    assert (await house.get("longer")).expire_time == extended.expire_time
    assert (await house.get("still")).state == PAUSED, "a paused sandbox does not expire"

    # What was paused at its expiry has its ttl anew once it is resumed.
    await update(house, "paused", on_expiry=DELETE)
    resumed = await resume(house, "paused")
    assert resumed.expire_time.ToDatetime() > branch.create_time.ToDatetime()
    assert (await resume(house, "still")).HasField("expire_time")
    await gone(house, "paused", "still")

    for name in ("none", "longer", "freed", child.id):
        await house.delete(name)
    await house.delete_snapshot(branch.snapshot.snapshot_id)
    await nothing_half_made(house)
    left = await traces(house)
    assert (left.vmms, left.sandboxes) == ([], {})
    assert left.folders == {"sandboxes": [], "snapshots": []}


async def test_children_expire_too(house: HeldHouse) -> None:
    await house.boot("parent", MEMORY_MIB)
    await house.ready("parent", snapshot_id="seed")
    fork = await house.fork("seed", 3, fork_id="brief", ttl=SECOND)
    assert fork.ready_count == 3
    await gone(house, "brief-0", "brief-1", "brief-2")
    await house.delete("parent")
    await house.delete_snapshot("seed")


async def test_a_branch_that_fails_or_is_refused_at_expiry_pauses_instead(
    house: HeldHouse,
) -> None:
    disk = house.images / "disk"
    disk.write_bytes(b"\0" * 4096)
    boot = Pb.BootSource(
        kernel_image=str(house.kernel),
        memory_mib=MEMORY_MIB,
        drives=[sandbox_pb2.Drive(drive_id="data", path=str(disk), read_only=True)],
    )
    await house.sandboxes.CreateSandbox(
        Pb.CreateSandboxRequest(sandbox_id="no-disk", boot=boot, ttl=HOUR, on_expiry=BRANCH)
    )
    await house.boot("no-base", MEMORY_MIB, ttl=HOUR, on_expiry=BRANCH)
    async with house.held("window") as hold:
        branching = asyncio.ensure_future(house.branch("no-base"))
        await hold.reached()
        await crash(house, branching)
    await house.start()
    disk.unlink()
    await update(house, "no-disk", ttl=SECOND)
    await update(house, "no-base", ttl=SECOND)
    await is_paused(house, "no-disk")
    await is_paused(house, "no-base")
    (failed,) = await branches_of(house, "no-disk")
    problem_of(failed.error, "DRIVE_CHANGED", "put the file back")
    assert "PAUSE_TOO_LONG" not in str(await branches_of(house, "no-base")), "it was refused"
    assert "no-base can't be branched at its expiry" in house.log
    await house.delete("no-disk")
    await house.delete("no-base")


async def test_an_owner_who_gives_more_time_during_the_last_branch_is_heard(
    house: HeldHouse,
) -> None:
    guest = await house.boot("saved", MEMORY_MIB, ttl=SECOND, on_expiry=BRANCH)
    async with house.held("precopy") as hold:
        await hold.reached()
        await update(house, "saved", ttl=HOUR)

    async def ready() -> bool:
        return bool(await snapshot_ids(house))

    await until(ready)
    # The next one to expire is looked at after this one was let go.
    await house.boot("later", MEMORY_MIB, ttl=SECOND)
    await gone(house, "later")
    assert (await house.get("saved")).state == RUNNING
    assert (await guest.ask("t"))[0] == "T"
    await house.delete("saved")
    for snapshot_id in await snapshot_ids(house):
        await house.delete_snapshot(snapshot_id)


async def test_what_expired_while_no_server_ran_goes_at_the_next_start(house: HeldHouse) -> None:
    await house.boot("missed", MEMORY_MIB, ttl=SECOND, on_expiry=DELETE)
    await house.boot("waits", MEMORY_MIB, ttl=SECOND, on_expiry=DELETE)
    await pause(house, "waits")
    due = (await house.get("missed")).expire_time.ToDatetime(tzinfo=UTC)
    await house.kill()
    while datetime.now(UTC) < due:
        await asyncio.sleep(0.01)
    await house.start()
    await gone(house, "missed")
    assert (await house.get("waits")).state == PAUSED
    await house.delete("waits")


@pytest.mark.parametrize("ttl", [Duration(), Duration(nanos=999_999_999), Duration(seconds=-5)])
async def test_a_ttl_out_of_bounds(house: HeldHouse, ttl: Duration) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await house.boot("never", MEMORY_MIB, ttl=ttl)
    assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT
    assert (await traces(house)).sandboxes == {}
