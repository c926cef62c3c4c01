"""BranchSandbox, WatchBranch, ForkSandboxes: what is admitted is followed, the rest is a status."""

from __future__ import annotations

import asyncio

import grpc
import pytest

from forkpoint.v1 import branch_pb2, fork_pb2, snapshot_pb2
from forkpoint.v1 import sandbox_service_pb2 as pb
from forkpointd import model
from forkpointd.model import BranchStage, ForkpointError, Reason
from tests.unit.rpc import samples
from tests.unit.rpc.harness import Edge, refused


async def test_a_branch_is_followed_to_its_end_and_the_stream_ends_ok(edge: Edge) -> None:
    edge.rooms.branches.feed.send(
        samples.branch_view(stage=BranchStage.QUEUED, sequence=1),
        samples.branch_view(stage=BranchStage.FAILED, sequence=2),
    )
    edge.rooms.branches.feed.end()
    call = edge.sandboxes.BranchSandbox(pb.BranchSandboxRequest(sandbox_id="agent-7"))
    seen = [(each.branch.sequence, each.branch.stage) async for each in call]
    assert seen == [(1, branch_pb2.BRANCH_STAGE_QUEUED), (2, branch_pb2.BRANCH_STAGE_FAILED)]
    assert await call.code() is grpc.StatusCode.OK


async def test_defaults_are_applied_to_a_branch(edge: Edge) -> None:
    edge.rooms.branches.feed.end()
    request = pb.BranchSandboxRequest(sandbox_id="agent-7")
    assert [each async for each in edge.sandboxes.BranchSandbox(request)] == []
    assert edge.rooms.branches.orders == [model.BranchOrder("agent-7")]


async def test_a_whole_branch_order_arrives(edge: Edge) -> None:
    edge.rooms.branches.feed.end()
    request = pb.BranchSandboxRequest(
        request_id="7C1F8A52-61f3-4f0e-9b0a-3f1f6d0c2a11",
        sandbox_id="agent-7",
        branch_id="b-1",
        snapshot_id="s-1",
        mode=snapshot_pb2.BRANCH_MODE_DIFF,
        layout=snapshot_pb2.LAYOUT_FLAT,
        labels={"a": "b"},
        fork=fork_pb2.ForkSpec(
            count=100,
            fork_id="f-1",
            labels={"c": "d"},
            on_failure=fork_pb2.FAILURE_ACTION_DELETE_ALL,
        ),
    )
    request.max_pause.FromMicroseconds(1_500_001)
    request.fork.ttl.FromMilliseconds(1_500)
    assert [each async for each in edge.sandboxes.BranchSandbox(request)] == []
    [order] = edge.rooms.branches.orders
    assert order.request is not None
    assert order.request.request_id == "7c1f8a52-61f3-4f0e-9b0a-3f1f6d0c2a11"
    assert order.request.method == "BranchSandbox"
    assert order == model.BranchOrder(
        "agent-7",
        "b-1",
        "s-1",
        model.BranchMode.DIFF,
        model.Layout.FLAT,
        1_500_001,
        {"a": "b"},
        model.ForkSpec(100, "f-1", {"c": "d"}, 1.5, on_failure=model.FailureAction.DELETE_ALL),
        order.request,
    )


async def test_the_fingerprint_sees_arguments_and_not_the_request_id(edge: Edge) -> None:
    ids = ["7c1f8a52-61f3-4f0e-9b0a-3f1f6d0c2a11", "8c1f8a52-61f3-4f0e-9b0a-3f1f6d0c2a11"]
    for request_id, sandbox in [(ids[0], "a"), (ids[1], "a"), (ids[0], "b")]:
        edge.rooms.branches.feed.end()
        request = pb.BranchSandboxRequest(request_id=request_id, sandbox_id=sandbox)
        assert [each async for each in edge.sandboxes.BranchSandbox(request)] == []
    first, second, third = (
        order.request.fingerprint for order in edge.rooms.branches.orders if order.request
    )
    assert first == second != third


@pytest.mark.parametrize("count", [0, 101, 10**9])
async def test_a_fork_of_too_few_or_too_many_is_refused(edge: Edge, count: int) -> None:
    spec = fork_pb2.ForkSpec(count=count)
    code, problem = await refused(
        edge.sandboxes.BranchSandbox(pb.BranchSandboxRequest(sandbox_id="agent-7", fork=spec))
    )
    assert code is grpc.StatusCode.INVALID_ARGUMENT
    assert [each.field for each in problem.fields] == ["fork.count"]
    assert "1 to 100" in problem.message
    code, problem = await refused(
        edge.sandboxes.ForkSandboxes(pb.ForkSandboxesRequest(snapshot_id="s", fork=spec))
    )
    assert [each.field for each in problem.fields] == ["fork.count"]
    assert edge.rooms.branches.orders == []
    assert edge.rooms.forks.orders == []


async def test_what_is_refused_at_admission_is_a_status_and_no_message(edge: Edge) -> None:
    edge.rooms.branches.fails_with = ForkpointError(
        Reason.BRANCH_QUEUE_FULL, "16 wait", retry_after_seconds=0.25
    )
    code, problem = await refused(
        edge.sandboxes.BranchSandbox(pb.BranchSandboxRequest(sandbox_id="agent-7"))
    )
    assert code is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert problem.reason is Reason.BRANCH_QUEUE_FULL
    assert problem.retry_after_seconds == 0.25


async def test_a_client_that_leaves_ends_its_watch(edge: Edge) -> None:
    feed = edge.rooms.branches.feed
    feed.send(samples.branch_view())
    call = edge.sandboxes.BranchSandbox(pb.BranchSandboxRequest(sandbox_id="agent-7"))
    await call.read()
    assert feed.watchers == 1
    call.cancel()
    await asyncio.wait_for(feed.left.wait(), 10)
    assert feed.watchers == 0


async def test_a_deadline_ends_the_stream_and_its_watch(edge: Edge) -> None:
    feed = edge.rooms.branches.feed
    feed.send(samples.branch_view())
    call = edge.sandboxes.WatchBranch(pb.WatchBranchRequest(branch_id="b"), timeout=0.2)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        async for _ in call:
            pass
    assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    await asyncio.wait_for(feed.left.wait(), 10)
    assert feed.watchers == 0


async def test_a_client_that_leaves_while_it_reads_nothing_ends_its_watch(edge: Edge) -> None:
    """The generator is then suspended at its yield, under a write that flow control holds."""
    feed = edge.rooms.branches.feed
    call = edge.sandboxes.WatchBranch(pb.WatchBranchRequest(branch_id="b"))
    big = samples.branch_view(mode_reason="x" * 500_000)
    feed.send(*[big] * 40)
    await call.read()
    call.cancel()
    await asyncio.wait_for(feed.left.wait(), 10)
    assert feed.watchers == 0


async def test_watch_passes_the_sequence_on(edge: Edge) -> None:
    edge.rooms.branches.feed.end()
    request = pb.WatchBranchRequest(branch_id="b", after_sequence=2**63)
    assert [each async for each in edge.sandboxes.WatchBranch(request)] == []
    assert edge.rooms.branches.feed.after_sequence == 2**63


async def test_watch_of_an_unknown_branch_is_not_found(edge: Edge) -> None:
    edge.rooms.branches.fails_with = ForkpointError(Reason.BRANCH_NOT_FOUND, "no branch b")
    code, problem = await refused(edge.sandboxes.WatchBranch(pb.WatchBranchRequest(branch_id="b")))
    assert code is grpc.StatusCode.NOT_FOUND
    assert problem.reason is Reason.BRANCH_NOT_FOUND


async def test_get_and_cancel_a_branch(edge: Edge) -> None:
    edge.rooms.branches.there["b"] = samples.branch_view("b")
    found = await edge.sandboxes.GetBranch(pb.GetBranchRequest(branch_id="b"))
    assert found.branch.branch_id == "b"
    assert found.branch.snapshot.snapshot_id == "snap-2"
    assert found.branch.fork.ready_count == 2
    cancelled = await edge.sandboxes.CancelBranch(pb.CancelBranchRequest(branch_id="b"))
    assert cancelled.branch == found.branch
    code, _ = await refused(edge.sandboxes.GetBranch(pb.GetBranchRequest(branch_id="c")))
    assert code is grpc.StatusCode.NOT_FOUND


async def test_branches_are_listed_by_source_and_stage(edge: Edge) -> None:
    edge.rooms.branches.there["b"] = samples.branch_view("b")
    request = pb.ListBranchesRequest(
        sandbox_id="agent-7", stages=[branch_pb2.BRANCH_STAGE_READY, branch_pb2.BRANCH_STAGE_QUEUED]
    )
    answer = await edge.sandboxes.ListBranches(request)
    assert [each.branch_id for each in answer.branches] == ["b"]
    assert edge.rooms.branches.filters == [
        ("agent-7", frozenset({BranchStage.READY, BranchStage.QUEUED}))
    ]


async def test_a_page_of_large_branches_ends_before_clients_refuse_it(edge: Edge) -> None:
    for index in range(8):
        name = f"b-{index}"
        edge.rooms.branches.there[name] = samples.branch_view(
            name, create_time=samples.at(index), mode_reason="x" * 700_000
        )
    seen: list[str] = []
    request = pb.ListBranchesRequest()
    while True:
        answer = await edge.sandboxes.ListBranches(request)
        assert answer.ByteSize() < 2 * 1024 * 1024 + 1024
        seen += [each.branch_id for each in answer.branches]
        if not answer.next_page_token:
            break
        request.page_token = answer.next_page_token
    assert seen == [f"b-{index}" for index in range(8)]


async def test_a_fork_is_followed_to_its_end(edge: Edge) -> None:
    edge.rooms.forks.feed.send(samples.fork(sequence=1), samples.fork(sequence=2))
    edge.rooms.forks.feed.end()
    request = pb.ForkSandboxesRequest(snapshot_id="s-1", fork=fork_pb2.ForkSpec(count=3))
    seen = [each.fork.sequence async for each in edge.sandboxes.ForkSandboxes(request)]
    assert seen == [1, 2]
    assert edge.rooms.forks.orders == [model.ForkOrder("s-1", model.ForkSpec(3))]


async def test_watch_and_get_a_fork(edge: Edge) -> None:
    edge.rooms.forks.there["f"] = samples.fork("f")
    found = await edge.sandboxes.GetFork(pb.GetForkRequest(fork_id="f"))
    assert found.fork.failed_count == 1
    edge.rooms.forks.feed.send(samples.fork("f"))
    edge.rooms.forks.feed.end()
    request = pb.WatchForkRequest(fork_id="f", after_sequence=4)
    assert [each.fork.fork_id async for each in edge.sandboxes.WatchFork(request)] == ["f"]
    assert edge.rooms.forks.feed.after_sequence == 4
    code, _ = await refused(edge.sandboxes.GetFork(pb.GetForkRequest(fork_id="g")))
    assert code is grpc.StatusCode.NOT_FOUND


async def test_a_fork_without_its_spec_is_refused(edge: Edge) -> None:
    code, problem = await refused(
        edge.sandboxes.ForkSandboxes(pb.ForkSandboxesRequest(snapshot_id="s-1"))
    )
    assert code is grpc.StatusCode.INVALID_ARGUMENT
    assert [each.field for each in problem.fields] == ["fork"]
