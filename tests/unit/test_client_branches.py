"""Branches as a client sees them, over a real channel to a fake server."""

import asyncio
from collections.abc import AsyncIterator, Iterator
from datetime import timedelta
from pathlib import Path

import pytest
from google.rpc import code_pb2

import forkpoint
from forkpoint import BranchStage, errors
from forkpoint.v1 import snapshot_pb2
from tests.unit.client_fake import Fake, fresh_address
from tests.unit.client_fake_state import status_of


@pytest.fixture
def fake(tmp_path: Path) -> Iterator[Fake]:
    server = Fake(fresh_address(tmp_path))
    server.version = forkpoint.__version__
    server.start()
    server.add_sandbox("agent-7")
    yield server
    server.release()
    server.stop()


@pytest.fixture
async def fp(fake: Fake) -> AsyncIterator[forkpoint.Client]:
    async with forkpoint.connect(fake.address) as client:
        yield client


@pytest.fixture
async def source(fp: forkpoint.Client) -> forkpoint.Sandbox:
    return await fp.sandboxes.get("agent-7")


async def test_a_branch_is_awaited_for_its_snapshot(fake: Fake, source: forkpoint.Sandbox) -> None:
    snapshot = await source.branch(mode="diff", snapshot_id="snap", max_pause="50ms")
    assert (snapshot.id, snapshot.source_sandbox_id) == ("snap", "agent-7")
    request = fake.called("BranchSandbox")[0]
    assert request.max_pause.ToTimedelta() == timedelta(milliseconds=50)
    assert len(request.request_id) == 36
    assert await snapshot.refresh() is snapshot
    await snapshot.update(labels={"keep": "yes"})
    assert snapshot.labels == {"keep": "yes"}
    await snapshot.delete()
    await snapshot.delete()
    with pytest.raises(errors.SnapshotNotFound):
        await snapshot.refresh()


async def test_the_same_object_is_iterated_for_every_update(
    fake: Fake, source: forkpoint.Sandbox
) -> None:
    fake.hold_before = "PAUSED+RESUMED"
    branching = source.branch(mode="diff")
    seen = []
    async for update in branching:
        seen.append(update)
        if update.stage is BranchStage.PRECOPYING:
            assert update.precopy is not None
            assert update.precopy.total_bytes == 1000
            assert branching.pause is None
            fake.release()
    assert [each.sequence for each in seen] == sorted({each.sequence for each in seen})
    last = seen[-1]
    assert last.stage is BranchStage.READY
    assert last.stage.over
    assert last.stages[-1].stage is BranchStage.READY
    pause = branching.pause
    assert pause is not None
    assert pause.total == timedelta(milliseconds=4.2)
    assert pause.vmm_total == pause.pause + pause.snapshot + pause.resume
    assert (await branching).id == last.snapshot_id  # the same object, once more


async def test_nothing_is_sent_before_it_is_awaited(fake: Fake, source: forkpoint.Sandbox) -> None:
    branching = source.branch()
    assert fake.called("BranchSandbox") == []
    await branching
    await branching
    assert len(fake.called("BranchSandbox")) == 1


async def test_a_broken_stream_is_attached_again_where_it_was(
    fake: Fake, source: forkpoint.Sandbox
) -> None:
    fake.hold_before = "PRECOPYING"
    fake.cut_after = [1, 1]
    branching = source.branch()
    seen = [(await branching.started()).sequence]
    following = asyncio.create_task(branching.next())
    await asyncio.to_thread(fake.wait_for, lambda: len(fake.called("WatchBranch")) == 1)
    fake.hold("MERGING")
    seen.append((await following or pytest.fail()).sequence)
    following = asyncio.create_task(branching.next())
    await asyncio.to_thread(fake.wait_for, lambda: len(fake.called("WatchBranch")) == 2)
    fake.release()
    seen.append((await following or pytest.fail()).sequence)
    assert (await branching).id in fake.snapshots
    assert sorted(set(seen)) == seen
    assert len(fake.called("BranchSandbox")) == 1
    assert [each.after_sequence for each in fake.called("WatchBranch")] == seen[:2]


async def test_a_stream_that_breaks_before_its_first_message_is_begun_again(
    fake: Fake, source: forkpoint.Sandbox
) -> None:
    fake.cut_after = [0]
    snapshot = await source.branch()
    requests = fake.called("BranchSandbox")
    assert len(requests) == 2
    assert requests[0].request_id == requests[1].request_id
    assert list(fake.snapshots) == [snapshot.id]


async def test_a_stream_that_ends_too_early_is_attached_again(
    fake: Fake, source: forkpoint.Sandbox
) -> None:
    fake.cut_after, fake.end_early, fake.hold_before = [1], True, "MERGING"
    branching = source.branch()
    await branching.started()
    while branching.pause is None:
        await branching.next()
    fake.release()
    await branching
    assert len(fake.called("BranchSandbox")) == 1
    assert len(fake.called("WatchBranch")) == 1


async def test_a_branch_outlives_a_restart_of_the_server(
    fake: Fake, source: forkpoint.Sandbox
) -> None:
    fake.hold_before = "MERGING"
    branching = source.branch()
    await branching.started()
    await asyncio.to_thread(fake.stop)
    waiting = asyncio.create_task(branching.wait())
    await asyncio.to_thread(fake.start)
    fake.release()
    assert (await waiting).id in fake.snapshots


async def test_a_refusal_is_raised_with_its_reason(fake: Fake, source: forkpoint.Sandbox) -> None:
    fake.refusal = status_of(
        code_pb2.FAILED_PRECONDITION, "DIRTY_BASE_INVALID", "branch it with mode FULL once"
    )
    with pytest.raises(errors.DirtyBaseInvalid, match="FULL once"):
        await source.branch(mode="diff")


async def test_a_failed_branch_shows_its_end_and_raises_why(
    fake: Fake, source: forkpoint.Sandbox
) -> None:
    fake.run = ("PRECOPYING", "FAILED")
    fake.branch_error = status_of(code_pb2.ABORTED, "SERVER_RESTARTED", "ask again")
    seen = []
    with pytest.raises(errors.Aborted, match="ask again") as caught:
        async for update in source.branch():
            seen += [update.stage]
    assert seen[-1] is BranchStage.FAILED
    assert caught.value.reason == "SERVER_RESTARTED"


async def test_a_branch_is_cancelled_before_its_window(
    fake: Fake, source: forkpoint.Sandbox, fp: forkpoint.Client
) -> None:
    fake.hold_before = "PAUSED+RESUMED"
    branching = source.branch()
    assert (await branching.cancel()).stage is BranchStage.CANCELLED
    with pytest.raises(errors.Cancelled):
        await branching
    fake.release()
    done = source.branch()
    await done
    assert done.id is not None
    with pytest.raises(errors.BranchNotCancellable):
        await fp.branches.cancel(done.id)


async def test_giving_up_waiting_leaves_the_branch_and_can_be_taken_back(
    fake: Fake, source: forkpoint.Sandbox
) -> None:
    fake.hold_before = "MERGING"
    branching = source.branch()
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.2):
            await branching
    fake.release()
    assert (await branching).id in fake.snapshots
    assert len(fake.called("BranchSandbox")) == 1


async def test_a_branch_that_takes_too_long_is_left_to_the_server(
    fake: Fake, source: forkpoint.Sandbox
) -> None:
    fake.hold_before = "MERGING"
    with pytest.raises(errors.DeadlineExceeded, match="goes on in the server") as caught:
        await source.branch(timeout=0.2)
    assert isinstance(caught.value, TimeoutError)


async def test_branches_are_listed_looked_at_and_watched(
    fake: Fake, source: forkpoint.Sandbox, fp: forkpoint.Client
) -> None:
    await source.branch(branch_id="b-1")
    assert [each.id async for each in fp.branches.list(source="agent-7", stages=["ready"])] == [
        "b-1"
    ]
    assert [each.id async for each in fp.branches.list(stages=["failed"])] == []
    assert (await fp.branches.get("b-1")).stage is BranchStage.READY
    assert (await fp.branches.watch("b-1")).source_sandbox_id == "agent-7"
    with pytest.raises(errors.BranchNotFound):
        await fp.branches.watch("b-2")


async def test_a_flatten_is_followed_across_a_lost_connection(
    fake: Fake, fp: forkpoint.Client, source: forkpoint.Sandbox
) -> None:
    snapshot = await source.branch(layout="layered", snapshot_id="layer")
    assert fake.called("BranchSandbox")[0].layout == snapshot_pb2.LAYOUT_LAYERED
    fake.flattens_to_break = 1
    seen = [update async for update in fp.snapshots.flatten("layer")]
    assert [update.progress.done_bytes for update in seen] == [0, 6, 0, 6, 10]
    assert [update.over for update in seen] == [False] * 4 + [True]
    assert (await snapshot.flatten()).layout is forkpoint.Layout.FLAT
    with pytest.raises(errors.SnapshotNotFound):
        _ = [update async for update in fp.snapshots.flatten("no-such")]
