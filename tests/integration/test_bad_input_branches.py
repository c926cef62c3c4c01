"""Branches that can't be: refused, cancelled or failed, with the source running all the while."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator
from typing import Any

import grpc
import grpc.aio
import pytest
from google.protobuf.duration_pb2 import Duration
from google.rpc import error_details_pb2

from forkpoint.v1 import branch_pb2, fork_pb2, sandbox_pb2, sandbox_service_pb2
from tests.integration.refusals import (
    MEMORY_MIB,
    REGION_MIB,
    RUNNING,
    HeldHouse,
    connected,
    crash,
    everyone_answers,
    nothing_half_made,
    problem_of,
    refused,
    served_with,
    snapshot_ids,
    stopped,
    traces,
    until,
)
from tests.integration.serving import AUTO, DIFF, FULL, READY_STAGE, Guest

Pb = sandbox_service_pb2
FAILED = branch_pb2.BRANCH_STAGE_FAILED
CANCELLED = branch_pb2.BRANCH_STAGE_CANCELLED
PRECOPYING = branch_pb2.BRANCH_STAGE_PRECOPYING
QUEUED = branch_pb2.BRANCH_STAGE_QUEUED


served = served_with(max_queued_branches=1)
"""A server for the whole module, with a queue of one."""


@pytest.fixture
async def house(served: HeldHouse) -> AsyncIterator[HeldHouse]:
    """The server, with nothing on it before and nothing of a test's work half made after it."""
    async with connected(served) as house:
        yield house
        house.release_all()
        try:
            await nothing_half_made(house)
            await everyone_answers(house)
        finally:
            await clear(house)


async def clear(house: HeldHouse) -> None:
    """Deletes everything; nothing is left then."""
    for sandbox_id in list((await traces(house)).sandboxes):
        await house.delete(sandbox_id)
    for snapshot_id in await snapshot_ids(house):
        await house.delete_snapshot(snapshot_id)

    async def empty() -> bool:
        left = await traces(house)
        return not (left.vmms or left.half_made or any(left.folders.values()))

    await until(empty)


@pytest.fixture
async def source(house: HeldHouse) -> Guest:
    """A sandbox that wrote something."""
    guest = await house.boot("src", MEMORY_MIB)
    await guest.dirty(REGION_MIB)
    return guest


async def get_branch(house: HeldHouse, branch_id: str) -> branch_pb2.Branch:
    return (await house.sandboxes.GetBranch(Pb.GetBranchRequest(branch_id=branch_id))).branch


async def cancel(house: HeldHouse, branch_id: str) -> branch_pb2.Branch:
    request = Pb.CancelBranchRequest(branch_id=branch_id)
    return (await house.sandboxes.CancelBranch(request)).branch


async def at_stage(house: HeldHouse, branch_id: str, stage: Any) -> None:
    """Waits until a branch has entered a stage."""

    async def there() -> bool:
        try:
            return bool((await get_branch(house, branch_id)).stage == stage)
        except grpc.aio.AioRpcError:
            return False

    await until(there)


async def next_diff_is_right(house: HeldHouse, source: Guest) -> None:
    """The source goes on, and its next DIFF holds its memory."""
    generation = await source.dirty(REGION_MIB)
    branch = await house.ready(source.id, mode=DIFF)
    child = await house.child(branch.snapshot_id)
    assert await child.verify(REGION_MIB) == (generation, generation, 0, 0)
    assert await source.verify(REGION_MIB) == (generation, generation, 0, 0)


# --- sources that aren't there -----------------------------------------------------------------


async def test_a_source_whose_vmm_was_killed(house: HeldHouse, source: Guest) -> None:
    await house.ready("src", snapshot_id="before")
    os.kill((await house.get("src")).pid, signal.SIGKILL)
    await stopped(house, "src")
    for mode in (AUTO, DIFF, FULL):
        async with refused(
            house,
            "FAILED_PRECONDITION",
            "SANDBOX_NOT_RUNNING",
            "its process has ended (ended by signal 9)",
            "delete it, or start another from a snapshot",
        ):
            await house.branch("src", mode=mode)
    assert (await house.fork("before")).ready_count == 1, "its snapshots are as good as ever"


async def test_a_source_that_was_deleted(house: HeldHouse, source: Guest) -> None:
    await house.delete("src")
    async with refused(house, "NOT_FOUND", "SANDBOX_NOT_FOUND", "forkpoint sandbox list"):
        await house.branch("src")


async def test_a_source_that_is_being_deleted(house: HeldHouse, source: Guest) -> None:
    async with house.held("remove") as hold:
        deleting = asyncio.ensure_future(house.delete("src"))
        await hold.reached()
        async with refused(house, "FAILED_PRECONDITION", "SANDBOX_DELETED", "src is being deleted"):
            await house.branch("src")
        async with refused(house, "FAILED_PRECONDITION", "SANDBOX_DELETED"):
            await house.sandboxes.PauseSandbox(Pb.PauseSandboxRequest(sandbox_id="src"))
    await deleting
    assert (await traces(house)).folders["sandboxes"] == []
    assert house.vmm_pids() == []


async def test_a_source_that_is_being_made(house: HeldHouse) -> None:
    async with house.held("boot") as hold:
        making = asyncio.ensure_future(house.boot("new", MEMORY_MIB))
        await hold.reached()
        async with refused(
            house,
            "FAILED_PRECONDITION",
            "SANDBOX_NOT_RUNNING",
            "new is still being made",
            "once it is RUNNING",
        ):
            await house.branch("new")
    await making
    assert (await house.ready("new")).stage == READY_STAGE


# --- queues and names --------------------------------------------------------------------------


async def test_more_branches_than_may_wait(house: HeldHouse, source: Guest) -> None:
    async with house.held("precopy") as hold:
        first = asyncio.ensure_future(house.branch("src", branch_id="q-first"))
        await hold.reached()
        second = asyncio.ensure_future(house.branch("src", branch_id="q-second"))
        await at_stage(house, "q-second", QUEUED)
        async with refused(
            house, "RESOURCE_EXHAUSTED", "BRANCH_QUEUE_FULL", "limit of 1", "retry when one has"
        ) as refusal:
            await house.branch("src")
        assert refusal.detail(error_details_pb2.RetryInfo).retry_delay.ToMilliseconds() > 0
        quota = refusal.detail(error_details_pb2.QuotaFailure)
        assert quota.violations[0].subject == "branch_queue"
    assert (await first).stage == (await second).stage == READY_STAGE


async def test_the_queues_limit_holds_for_branches_that_come_at_once(
    house: HeldHouse, source: Guest
) -> None:
    async with house.held("precopy") as hold:
        calls = [asyncio.ensure_future(house.branch("src")) for _ in range(6)]
        await hold.reached()

        async def refused_ones() -> bool:
            return sum(call.done() for call in calls) >= 4

        await until(refused_ones)
    ended = await asyncio.gather(*calls, return_exceptions=True)
    assert sum(not isinstance(each, BaseException) for each in ended) == 2, ended


async def test_a_snapshots_id_that_a_running_branch_will_use(
    house: HeldHouse, source: Guest
) -> None:
    async with house.held("precopy") as hold:
        running = asyncio.ensure_future(
            house.branch("src", branch_id="promised-br", snapshot_id="promised")
        )
        await hold.reached()
        async with refused(
            house, "ALREADY_EXISTS", "ID_TAKEN", "promised is being made by branch promised-br"
        ):
            await house.branch("src", snapshot_id="promised")
        async with refused(house, "ALREADY_EXISTS", "ID_TAKEN", "a branch promised-br exists"):
            await house.branch("src", branch_id="promised-br")
        async with refused(house, "NOT_FOUND", "SNAPSHOT_NOT_FOUND", "no READY snapshot promised"):
            await house.fork("promised")
    assert (await running).stage == READY_STAGE


async def test_the_id_of_a_deleted_snapshot_that_a_source_stands_on(
    house: HeldHouse, source: Guest
) -> None:
    await house.ready("src", snapshot_id="base")
    await house.delete_snapshot("base")
    assert house.memory_file("base").exists(), "the next diff stands on it"
    async with refused(
        house, "ALREADY_EXISTS", "ID_TAKEN", "base was deleted, but sandboxes still stand on it"
    ):
        await house.branch("src", snapshot_id="base")
    async with refused(house, "NOT_FOUND", "SNAPSHOT_NOT_FOUND"):
        await house.delete_snapshot("base")
    await next_diff_is_right(house, source)


async def test_a_file_where_the_snapshots_folder_should_be(house: HeldHouse, source: Guest) -> None:
    obstacle = house.data_dir / "snapshots" / "obstructed"
    obstacle.write_text("not ours")
    try:
        branch = await house.branch("src", snapshot_id="obstructed")
        assert branch.stage == FAILED
        problem_of(branch.error, "WRITE_FAILED", str(obstacle), "put away what is in the way")
        assert (await house.get("src")).state == RUNNING
        await next_diff_is_right(house, source)
        assert obstacle.read_text() == "not ours"
    finally:
        obstacle.unlink()


async def test_a_kept_diff_keeps_its_turn_while_others_come_and_go(
    house: HeldHouse, source: Guest
) -> None:
    obstacle = house.data_dir / "snapshots" / "in-the-way"
    obstacle.write_text("")
    async with house.held("keep") as merging_kept:
        await house.branch("src", snapshot_id="in-the-way")
        obstacle.unlink()
        await merging_kept.reached()
        async with house.held("precopy") as precopying:
            first = asyncio.ensure_future(house.branch("src", branch_id="k-first"))
            await at_stage(house, "k-first", QUEUED)
            assert (await cancel(house, "k-first")).stage == CANCELLED
            await first
            second = asyncio.ensure_future(house.branch("src", branch_id="k-second"))
            await at_stage(house, "k-second", QUEUED)
            merging_kept.release()
            await precopying.reached()
            base = (await house.get("src")).dirty_base
            assert not base.unmerged_bytes, "the second branch began before the merge had ended"
    branch = await second
    assert branch.stage == READY_STAGE
    child = await house.child(branch.snapshot_id)
    assert await child.verify(REGION_MIB) == await source.verify(REGION_MIB)


# --- modes and pauses --------------------------------------------------------------------------


@pytest.mark.parametrize(
    "max_pause", [Duration(), Duration(nanos=999_999), Duration(seconds=3601), Duration(seconds=-1)]
)
async def test_a_max_pause_out_of_bounds(
    house: HeldHouse, source: Guest, max_pause: Duration
) -> None:
    async with refused(
        house, "INVALID_ARGUMENT", "INVALID_FIELD", "1 ms to 1 h; leave it out"
    ) as refusal:
        await house.branch("src", max_pause=max_pause)
    assert refusal.wrong_fields == ["max_pause"]


@pytest.mark.parametrize("mode", [AUTO, DIFF, FULL], ids=["auto", "diff", "full"])
async def test_a_max_pause_that_no_window_keeps(house: HeldHouse, source: Guest, mode: Any) -> None:
    async with refused(
        house, "FAILED_PRECONDITION", "PAUSE_TOO_LONG", "more than 1 ms", "a larger max_pause"
    ) as refusal:
        await house.branch("src", mode=mode, max_pause=Duration(nanos=1_000_000))
    assert float(refusal.metadata["predicted_pause_ms"]) > 1
    assert refusal.metadata["max_pause_ms"] == "1.0"


async def test_a_queued_branch_is_held_to_its_max_pause_at_its_turn(
    house: HeldHouse, source: Guest
) -> None:
    async with house.held("precopy") as hold:
        first = asyncio.ensure_future(house.branch("src"))
        await hold.reached()
        second = asyncio.ensure_future(
            house.branch("src", branch_id="late", max_pause=Duration(nanos=1_000_000))
        )
        await at_stage(house, "late", QUEUED)
    assert (await first).stage == READY_STAGE
    ended = await second
    assert ended.stage == FAILED
    problem_of(ended.error, "PAUSE_TOO_LONG", "more than 1 ms")


async def test_diff_without_a_valid_base(house: HeldHouse, source: Guest) -> None:
    await house.ready("src", snapshot_id="old")
    generation = await source.dirty(REGION_MIB)
    async with house.held("window") as hold:
        branching = asyncio.ensure_future(house.branch("src"))
        await hold.reached()
        await crash(house, branching)  # the base is PENDING, and no request was sent
    await house.start()
    base = (await house.get("src")).dirty_base
    assert base.state == sandbox_pb2.DIRTY_BASE_STATE_INVALID
    await nothing_half_made(house)
    async with refused(
        house, "FAILED_PRECONDITION", "DIRTY_BASE_INVALID", "mode FULL", "src"
    ) as refusal:
        await house.branch("src", mode=DIFF)
    assert refusal.metadata["dirty_base"] == "INVALID"
    async with refused(
        house, "FAILED_PRECONDITION", "PAUSE_TOO_LONG", "mode: FULL", "more than 2 ms", "would take"
    ) as refusal:
        await house.branch("src", mode=AUTO, max_pause=Duration(nanos=2_000_000))
    assert float(refusal.metadata["predicted_pause_ms"]) > 2
    full = await house.ready("src", mode=FULL)
    child = await house.child(full.snapshot_id)
    assert await child.verify(REGION_MIB) == (generation, generation, 0, 0)
    await next_diff_is_right(house, source)


async def test_auto_takes_full_where_the_base_is_invalid_and_says_why(
    house: HeldHouse, source: Guest
) -> None:
    async with house.held("window") as hold:
        branching = asyncio.ensure_future(house.branch("src"))
        await hold.reached()
        await crash(house, branching)
    await house.start()
    branch = await house.ready("src", mode=AUTO)
    assert branch.mode == FULL
    assert "the server ended in the pause window" in branch.mode_reason
    await next_diff_is_right(house, source)


# --- cancelling and deleting on the way --------------------------------------------------------


async def test_a_branch_is_cancelled_before_its_window_and_not_after(
    house: HeldHouse, source: Guest
) -> None:
    async with house.held("precopy") as hold:
        first = asyncio.ensure_future(house.branch("src", branch_id="c-first"))
        await hold.reached()
        await at_stage(house, "c-first", PRECOPYING)
        second = asyncio.ensure_future(house.branch("src", branch_id="c-second"))
        await at_stage(house, "c-second", QUEUED)
        cancelled = await cancel(house, "c-second")
        assert cancelled.stage == CANCELLED
        problem_of(cancelled.error, "BRANCH_CANCELLED", "before its pause window")
        assert (await second).stage == CANCELLED
        cancelling = asyncio.ensure_future(cancel(house, "c-first"))
        await house.get("src")  # answered after the cancel was taken: it came first
        hold.release()
        assert (await cancelling).stage == CANCELLED
    assert (await first).stage == CANCELLED
    assert (await cancel(house, "c-first")).stage == CANCELLED, "a repeat finds it so"
    await nothing_half_made(house)
    assert await snapshot_ids(house) == []

    async with house.held("merge") as hold:
        third = asyncio.ensure_future(house.branch("src", branch_id="c-third", snapshot_id="s3"))
        await hold.reached()
        async with refused(
            house, "FAILED_PRECONDITION", "BRANCH_NOT_CANCELLABLE", "delete its snapshot s3"
        ):
            await cancel(house, "c-third")
    assert (await third).stage == READY_STAGE
    async with refused(
        house, "FAILED_PRECONDITION", "BRANCH_NOT_CANCELLABLE", "READY", "delete its snapshot s3"
    ):
        await cancel(house, "c-third")
    await next_diff_is_right(house, source)


async def test_a_failed_branch_has_nothing_to_cancel_or_delete(
    house: HeldHouse, source: Guest
) -> None:
    (house.data_dir / "snapshots" / "blocked").write_text("")
    await house.branch("src", branch_id="f-br", snapshot_id="blocked")
    (house.data_dir / "snapshots" / "blocked").unlink()
    async with refused(
        house, "FAILED_PRECONDITION", "BRANCH_NOT_CANCELLABLE", "f-br has FAILED already"
    ) as refusal:
        await cancel(house, "f-br")
    assert "delete" not in refusal.words
    await next_diff_is_right(house, source)


async def test_a_source_that_is_deleted_before_the_window(house: HeldHouse, source: Guest) -> None:
    async with house.held("precopy") as hold:
        first = asyncio.ensure_future(
            house.branch("src", branch_id="d-first", fork=fork_pb2.ForkSpec(count=2, fork_id="dk"))
        )
        await hold.reached()
        second = asyncio.ensure_future(house.branch("src", branch_id="d-second"))
        await at_stage(house, "d-second", QUEUED)
        deleting = asyncio.ensure_future(house.delete("src"))

        async def being_deleted() -> bool:
            return (await house.get("src")).state == sandbox_pb2.SANDBOX_STATE_DELETING

        await until(being_deleted)
        hold.release()
        await deleting
    for branch in (await first, await second):
        assert branch.stage == FAILED
        problem_of(branch.error, "SANDBOX_DELETED", "sandbox src")
    assert (await first).fork.stage == fork_pb2.FORK_STAGE_FAILED
    left = await traces(house)
    assert (left.vmms, left.half_made, left.sandboxes, left.snapshots) == ([], [], {}, [])
    assert left.folders == {"sandboxes": [], "snapshots": []}


@pytest.mark.parametrize("step", ["merge", "finalise"])
async def test_a_source_that_is_deleted_after_the_window(
    house: HeldHouse, source: Guest, step: str
) -> None:
    generation = await source.generation()
    async with house.held(step) as hold:
        branching = asyncio.ensure_future(house.branch("src", snapshot_id="orphan"))
        await hold.reached()
        await house.delete("src")
        assert house.vmm_pids() == []
    assert (await branching).stage == READY_STAGE
    child = await house.child("orphan")
    assert await child.verify(REGION_MIB) == (generation, generation, 0, 0)


async def test_a_source_killed_after_the_window_leaves_a_good_snapshot(
    house: HeldHouse, source: Guest
) -> None:
    generation = await source.generation()
    async with house.held("merge") as hold:
        branching = asyncio.ensure_future(house.branch("src", snapshot_id="last"))
        await hold.reached()
        os.kill((await house.get("src")).pid, signal.SIGKILL)
        await stopped(house, "src")
    assert (await branching).stage == READY_STAGE
    child = await house.child("last")
    assert await child.verify(REGION_MIB) == (generation, generation, 0, 0)


async def test_a_source_killed_before_the_window(house: HeldHouse, source: Guest) -> None:
    async with house.held("precopy") as hold:
        branching = asyncio.ensure_future(house.branch("src"))
        await hold.reached()
        os.kill((await house.get("src")).pid, signal.SIGKILL)
        await stopped(house, "src")
    branch = await branching
    assert branch.stage == FAILED
    problem_of(branch.error, "SANDBOX_NOT_RUNNING", "its process has ended")


async def test_a_source_killed_in_the_window(house: HeldHouse, source: Guest) -> None:
    async with house.held("window") as hold:
        branching = asyncio.ensure_future(house.branch("src"))
        await hold.reached()
        os.kill((await house.get("src")).pid, signal.SIGKILL)
    branch = await branching
    assert branch.stage == FAILED
    problem_of(branch.error, "VMM_EXITED", "ended")
    await stopped(house, "src")
    await nothing_half_made(house)
