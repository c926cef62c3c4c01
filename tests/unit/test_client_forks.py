"""Forks as a client sees them, over a real channel to a fake server."""

import asyncio
from collections.abc import AsyncIterator, Iterator
from datetime import timedelta
from pathlib import Path

import pytest

import forkpoint
from forkpoint import BranchStage, errors, sync
from tests.unit.client_fake import Fake, fresh_address


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


async def test_children_come_as_they_are_ready_and_go_with_the_block(
    fake: Fake, source: forkpoint.Sandbox
) -> None:
    fake.hold_before = "child-1"
    seen: list[forkpoint.Sandbox] = []
    async with source.fork(3, ttl="10m", labels={"a": "b"}) as children:
        async for child in children:
            if not seen:
                assert fake.hold_before == "child-1"  # the others are not there yet
                fake.release()
            seen.append(child)
            assert child.source_sandbox_id == "agent-7"
        assert children.pause is not None
        assert children.pause.total == timedelta(milliseconds=4.2)
        assert children.failed == []
        assert children.ready == seen
        assert children.snapshot is not None
        assert children.snapshot.id in fake.snapshots
        assert [each async for each in children] == seen  # once more from the start
    assert [child.id for child in seen] == [f"{seen[0].fork_id}-{n}" for n in range(3)]
    assert list(fake.sandboxes) == ["agent-7"]
    assert fake.snapshots == {}
    spec = fake.called("BranchSandbox")[0].fork
    assert (spec.count, spec.ttl.ToTimedelta(), dict(spec.labels)) == (
        3,
        timedelta(minutes=10),
        {"a": "b"},
    )


async def test_kept_children_stay(fake: Fake, source: forkpoint.Sandbox) -> None:
    async with source.fork(2) as children:
        children.keep()
        assert len(await children.wait()) == 2
    assert len(fake.sandboxes) == 3
    assert len(fake.snapshots) == 1
    async with source.fork(2) as children:
        children.keep(snapshot=False)
        await children.wait()
    assert len(fake.sandboxes) == 5
    assert len(fake.snapshots) == 1


async def test_only_the_good_children_are_handed_out(fake: Fake, source: forkpoint.Sandbox) -> None:
    fake.failing_children = {0, 2}
    async with source.fork(4) as children:
        good = [child.id async for child in children]
        assert [each.id for each in children.failed] == [f"{good[0][:-2]}-0", f"{good[0][:-2]}-2"]
        assert all(each.error is not None for each in children.failed)
        assert len(good) == 2
    assert list(fake.sandboxes) == ["agent-7"]


@pytest.mark.parametrize("iterate", [True, False])
async def test_strict_raises_all_that_failed(
    fake: Fake, source: forkpoint.Sandbox, iterate: bool
) -> None:
    fake.failing_children = {0, 2}
    with pytest.raises(ExceptionGroup, match="2 of 4 children") as caught:
        async with source.fork(4, strict=True) as children:
            if iterate:
                async for _ in children:
                    pass
    assert [str(each) for each in caught.value.exceptions] == ["child 0 broke", "child 2 broke"]
    assert list(fake.sandboxes) == ["agent-7"]
    assert fake.snapshots == {}


async def test_all_or_nothing_raises_the_forks_error(fake: Fake, source: forkpoint.Sandbox) -> None:
    fake.failing_children = {1}
    with pytest.raises(errors.Aborted) as caught:
        async with source.fork(2, on_failure="delete_all") as children:
            await children.wait()
    assert caught.value.reason == "CHILDREN_FAILED"


async def test_leaving_early_waits_for_no_straggler_to_appear_later(
    fake: Fake, source: forkpoint.Sandbox
) -> None:
    fake.hold_before = "child-2"
    async with source.fork(3) as children:
        async for _ in children:
            break
        asyncio.get_running_loop().call_later(0.1, fake.release)
    assert list(fake.sandboxes) == ["agent-7"]
    assert fake.snapshots == {}
    assert len(fake.called("CancelBranch")) == 1


async def test_leaving_before_the_window_cancels_the_branch(
    fake: Fake, source: forkpoint.Sandbox
) -> None:
    fake.hold_before = "PAUSED+RESUMED"
    async with source.fork(3) as children:
        assert children.branch is not None
    assert fake.branches[children.branch.id].stage == 10  # CANCELLED
    assert list(fake.sandboxes) == ["agent-7"]


async def test_an_error_in_the_block_is_what_comes_out_and_all_is_cleaned_up(
    fake: Fake, source: forkpoint.Sandbox
) -> None:
    with pytest.raises(ZeroDivisionError):
        async with source.fork(2) as children:
            async for _ in children:
                raise ZeroDivisionError
    assert list(fake.sandboxes) == ["agent-7"]


async def test_a_cancelled_block_is_cleaned_up(fake: Fake, source: forkpoint.Sandbox) -> None:
    inside = asyncio.Event()

    async def work() -> None:
        async with source.fork(2) as children:
            await children.wait()
            inside.set()
            await asyncio.Event().wait()

    task = asyncio.create_task(work())
    await inside.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert list(fake.sandboxes) == ["agent-7"]
    assert fake.snapshots == {}


async def test_a_block_that_is_cancelled_while_it_is_entered_leaves_nothing(
    fake: Fake, source: forkpoint.Sandbox
) -> None:
    fake.silent_before_first = True

    async def work() -> None:
        async with source.fork(2):
            pytest.fail("it was never entered")

    task = asyncio.create_task(work())
    await asyncio.to_thread(fake.wait_for, lambda: len(fake.branches) == 1)
    task.cancel()
    fake.silent_before_first = False
    with pytest.raises(asyncio.CancelledError):
        await task
    assert list(fake.sandboxes) == ["agent-7"]
    assert fake.snapshots == {}
    assert len(fake.branches) == 1


async def test_what_could_not_be_cleaned_up_is_added_to_the_error_in_the_block(
    fake: Fake,
) -> None:
    async with forkpoint.connect(fake.address, reconnect=0.2) as fp:
        source = await fp.sandboxes.get("agent-7")
        with pytest.raises(ZeroDivisionError) as caught:
            async with source.fork(1) as children:
                await children.wait()
                await asyncio.to_thread(fake.stop)
                raise ZeroDivisionError
        assert "cleaning up failed" in caught.value.__notes__[0]


async def test_a_fork_of_a_snapshot_leaves_the_snapshot(
    fake: Fake, source: forkpoint.Sandbox, fp: forkpoint.Client
) -> None:
    snapshot = await source.branch()
    fake.cut_after, fake.hold_before = [1], "child-1"
    async with snapshot.fork(3, fork_id="try") as children:
        while not children.ready:
            await children.next()
        while not fake.called("WatchFork"):
            fake.release()
            await children.next()
        assert [child.id async for child in children] == ["try-0", "try-1", "try-2"]
        assert children.pause is None
        assert children.snapshot == snapshot
        assert (await fp.forks.get("try")).ready_count == 3
        assert [each.ready_count async for each in fp.forks.watch("try")][-1] == 3
    assert len(fake.called("ForkSandboxes")) == 1
    assert list(fake.sandboxes) == ["agent-7"]
    assert list(fake.snapshots) == [snapshot.id]


async def test_a_child_that_vanished_at_once_counts_as_failed(
    fake: Fake, source: forkpoint.Sandbox
) -> None:
    fake.hold_before = "child-0"
    async with source.fork(1, fork_id="try") as children:
        fake.vanishing.add("try-0")
        fake.release()
        assert await children.wait() == []
        assert [each.id for each in children.failed] == ["try-0"]


def test_the_sync_client_branches_and_forks(fake: Fake) -> None:
    with sync.connect(fake.address) as fp:
        source = fp.sandboxes.get("agent-7")
        snapshot = source.branch(mode="diff")
        assert isinstance(snapshot, sync.Snapshot)
        fake.cut_after = [1, 1]
        stages = [update.stage for update in source.branching(mode="full")]
        assert stages[-1] is BranchStage.READY
        fake.failing_children = {1}
        with source.fork(3) as children:
            ids = [child.id for child in children]
            assert len(ids) == 2
            assert len(children.failed) == 1
            assert children.pause is not None
        with pytest.raises(ExceptionGroup), snapshot.fork(3, strict=True) as children:
            children.wait()
        assert list(fake.sandboxes) == ["agent-7"]
        fake.hold_before = "MERGING"
        with pytest.raises(errors.DeadlineExceeded):
            source.branch(timeout=0.2)
