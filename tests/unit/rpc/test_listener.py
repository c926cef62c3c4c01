"""The server as a whole: what it serves beside ours, and its drain."""

# ruff: noqa: ASYNC240 - a test may look at a folder itself

from __future__ import annotations

import asyncio
import os
import threading
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf.descriptor_pool import DescriptorPool
from grpc_channelz.v1 import channelz_pb2, channelz_pb2_grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import (
    ProtoReflectionDescriptorDatabase,
)

from forkpoint.v1 import fork_pb2
from forkpoint.v1 import sandbox_service_pb2 as pb
from forkpointd.model import Reason
from tests.unit.rpc import samples
from tests.unit.rpc.fakes import Rooms
from tests.unit.rpc.harness import (
    Edge,
    make_server,
    problem_of,
    refused,
    serving,
    until,
    version_at,
)

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING
SERVICES = [
    "forkpoint.v1.SandboxService",
    "forkpoint.v1.SnapshotService",
    "forkpoint.v1.ServerService",
]


# --- what is served beside ours -----------------------------------------------------------------


async def test_health_knows_the_server_and_each_service(edge: Edge) -> None:
    stub: Any = health_pb2_grpc.HealthStub(edge.channel)
    for name in ["", *SERVICES]:
        answer = await stub.Check(health_pb2.HealthCheckRequest(service=name))
        assert answer.status == SERVING
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await stub.Check(health_pb2.HealthCheckRequest(service="nobody"))
    assert caught.value.code() is grpc.StatusCode.NOT_FOUND
    listed = await stub.List(health_pb2.HealthListRequest())  # type: ignore[attr-defined]
    assert {name: each.status for name, each in listed.statuses.items()} == dict.fromkeys(
        ["", *SERVICES], SERVING
    )


async def test_health_watchers_see_the_drain_though_others_left(edge: Edge) -> None:
    stub: Any = health_pb2_grpc.HealthStub(edge.channel)
    calls: list[Any] = [stub.Watch(health_pb2.HealthCheckRequest()) for _ in range(3)]
    unknown: Any = stub.Watch(health_pb2.HealthCheckRequest(service="nobody"))
    for call in calls:
        assert (await call.read()).status == SERVING
    assert (await unknown.read()).status == health_pb2.HealthCheckResponse.SERVICE_UNKNOWN
    calls[0].cancel()
    edge.server.drain()
    for call in calls[1:]:
        assert (await call.read()).status == NOT_SERVING
    assert (await stub.Check(health_pb2.HealthCheckRequest())).status == NOT_SERVING
    late: Any = stub.Watch(health_pb2.HealthCheckRequest())
    assert (await late.read()).status == NOT_SERVING
    stopping = asyncio.create_task(edge.server.stop(60))
    for call in [*calls[1:], late, unknown]:
        assert await call.read() is grpc.aio.EOF
    await asyncio.wait_for(stopping, 10)


@pytest.mark.parametrize("version", ["v1", "v1alpha"])
async def test_reflection_answers_under_both_names(edge: Edge, version: str) -> None:
    call: Any = edge.channel.stream_stream(
        f"/grpc.reflection.{version}.ServerReflection/ServerReflectionInfo",
        reflection_pb2.ServerReflectionRequest.SerializeToString,
        reflection_pb2.ServerReflectionResponse.FromString,
    )()
    await call.write(reflection_pb2.ServerReflectionRequest(list_services="*"))
    answer = await call.read()
    names = {each.name for each in answer.list_services_response.service}
    assert {*SERVICES, "grpc.health.v1.Health", "grpc.channelz.v1.Channelz"} <= names
    for symbol in ["forkpoint.v1.SandboxService", "google.rpc.ErrorInfo", "google.rpc.RetryInfo"]:
        await call.write(reflection_pb2.ServerReflectionRequest(file_containing_symbol=symbol))
        answer = await call.read()
        assert answer.file_descriptor_response.file_descriptor_proto, symbol
    await call.done_writing()
    assert await call.read() is grpc.aio.EOF


async def test_an_open_reflection_stream_does_not_hold_up_a_stop(edge: Edge) -> None:
    call: Any = edge.channel.stream_stream(
        "/grpc.reflection.v1.ServerReflection/ServerReflectionInfo",
        reflection_pb2.ServerReflectionRequest.SerializeToString,
        reflection_pb2.ServerReflectionResponse.FromString,
    )()
    await call.write(reflection_pb2.ServerReflectionRequest(list_services="*"))
    await call.read()
    stopping = asyncio.create_task(edge.server.stop(60))
    assert (await refused(call))[1].reason is Reason.SERVER_DRAINING
    await asyncio.wait_for(stopping, 10)


async def test_a_server_that_stops_takes_no_call(edge: Edge) -> None:
    """Also not on a connection that is open already."""
    edge.rooms.sandboxes.add("agent-7")
    sandboxes = edge.rooms.sandboxes
    sandboxes.may_finish.clear()
    making = edge.sandboxes.CreateSandbox(pb.CreateSandboxRequest(snapshot_id="s"))
    await sandboxes.creating.wait()
    stopping = asyncio.create_task(edge.server.stop(60))
    await until(lambda: not edge.server.serving)
    code, problem = await refused(
        edge.sandboxes.GetSandbox(pb.GetSandboxRequest(sandbox_id="agent-7"))
    )
    assert (code, problem.reason) == (grpc.StatusCode.UNAVAILABLE, Reason.SERVER_DRAINING)
    sandboxes.may_finish.set()
    await making
    await asyncio.wait_for(stopping, 10)


async def test_a_client_without_our_stubs_can_call_by_reflection(edge: Edge) -> None:
    """What grpcurl does: learn the messages from the server, then call with them."""
    edge.rooms.sandboxes.add("agent-7")

    def explore() -> tuple[list[str], dict[str, Any]]:
        from google.protobuf.json_format import MessageToDict
        from google.protobuf.message_factory import GetMessageClass

        with grpc.insecure_channel(edge.address) as channel:
            database = ProtoReflectionDescriptorDatabase(channel)
            pool = DescriptorPool(database)
            service = pool.FindServiceByName("forkpoint.v1.SandboxService")
            method = service.FindMethodByName("GetSandbox")
            assert method is not None
            request_kind = GetMessageClass(method.input_type)
            answer_kind = GetMessageClass(method.output_type)
            call = channel.unary_unary(
                "/forkpoint.v1.SandboxService/GetSandbox",
                request_kind.SerializeToString,
                answer_kind.FromString,
            )
            answer = call(request_kind(sandbox_id="agent-7"), timeout=10)
            return list(database.get_services()), MessageToDict(answer)

    services, answer = await asyncio.to_thread(explore)
    assert set(SERVICES) <= set(services)
    assert answer["sandbox"]["sandboxId"] == "agent-7"
    assert answer["sandbox"]["state"] == "SANDBOX_STATE_STOPPED"
    assert answer["sandbox"]["ttl"] == "90.500s"


async def test_channelz_knows_the_server(edge: Edge) -> None:
    stub: Any = channelz_pb2_grpc.ChannelzStub(edge.channel)  # type: ignore[arg-type]
    servers = (await stub.GetServers(channelz_pb2.GetServersRequest())).server
    assert servers
    assert all(each.data.calls_started >= 0 for each in servers)


# --- the drain ----------------------------------------------------------------------------------


async def test_a_drain_ends_every_stream_and_refuses_what_makes_something(edge: Edge) -> None:
    rooms = edge.rooms
    rooms.branches.feed.send(samples.branch_view())
    rooms.forks.feed.send(samples.fork())
    branch = edge.sandboxes.BranchSandbox(pb.BranchSandboxRequest(sandbox_id="agent-7"))
    fork = edge.sandboxes.WatchFork(pb.WatchForkRequest(fork_id="f"))
    reading = edge.sandboxes.ReadConsole(pb.ReadConsoleRequest(sandbox_id="agent-7", follow=True))
    console = edge.sandboxes.AttachConsole()
    await console.write(pb.AttachConsoleRequest(attach=pb.ConsoleAttach(sandbox_id="agent-7")))
    streams: list[Any] = [branch, fork, reading, console]
    for call in streams:
        assert await call.read() is not grpc.aio.EOF
    edge.server.drain()
    edge.server.drain()
    spec = fork_pb2.ForkSpec(count=1)
    for call in [
        *streams,
        edge.sandboxes.CreateSandbox(pb.CreateSandboxRequest(snapshot_id="s")),
        edge.sandboxes.BranchSandbox(pb.BranchSandboxRequest(sandbox_id="agent-7")),
        edge.sandboxes.ForkSandboxes(pb.ForkSandboxesRequest(snapshot_id="s", fork=spec)),
        edge.sandboxes.WatchBranch(pb.WatchBranchRequest(branch_id="b")),
    ]:
        code, problem = await refused(call)
        assert (code, problem.reason) == (grpc.StatusCode.UNAVAILABLE, Reason.SERVER_DRAINING)
        assert problem.retry_after_seconds == 1.0
    assert rooms.branches.feed.watchers == 0
    assert rooms.forks.feed.watchers == 0
    assert rooms.consoles.readers == 0
    assert rooms.consoles.current is None
    assert rooms.sandboxes.orders == []
    rooms.sandboxes.add("agent-7")
    await edge.sandboxes.GetSandbox(pb.GetSandboxRequest(sandbox_id="agent-7"))


async def test_a_call_at_work_is_finished_within_the_grace(edge: Edge) -> None:
    sandboxes = edge.rooms.sandboxes
    sandboxes.may_finish.clear()
    call = edge.sandboxes.CreateSandbox(pb.CreateSandboxRequest(snapshot_id="s"))
    await sandboxes.creating.wait()
    stopping = asyncio.create_task(edge.server.stop(60))
    await until(lambda: not edge.server.serving)
    sandboxes.may_finish.set()
    assert (await call).sandbox.sandbox_id == "chosen"
    await asyncio.wait_for(stopping, 10)
    assert not Path(edge.address.removeprefix("unix:")).exists()


async def test_a_call_that_takes_longer_than_the_grace_is_cancelled(edge: Edge) -> None:
    sandboxes = edge.rooms.sandboxes
    sandboxes.may_finish.clear()
    call = edge.sandboxes.CreateSandbox(pb.CreateSandboxRequest(snapshot_id="s"))
    await sandboxes.creating.wait()
    await asyncio.wait_for(edge.server.stop(0.05), 10)
    with pytest.raises(grpc.aio.AioRpcError):
        await call
    assert sandboxes.cancelled == 1


async def test_a_client_that_leaves_in_the_very_moment_of_the_drain(edge: Edge) -> None:
    """Whichever cancel comes first, every watch ends, and nothing else is touched."""
    feed = edge.rooms.branches.feed
    feed.send(samples.branch_view())
    request = pb.WatchBranchRequest(branch_id="b")
    calls: list[Any] = [edge.sandboxes.WatchBranch(request) for _ in range(20)]
    for call in calls:
        await call.read()
    assert feed.watchers == 20
    for call in calls[:10]:
        call.cancel()
    edge.server.drain()
    for call in calls[10:]:
        assert (await refused(call))[1].reason is Reason.SERVER_DRAINING
    await until(lambda: not feed.watchers)


async def test_stopping_twice_and_stopping_what_never_ran(edge: Edge, tmp_path: Path) -> None:
    await edge.server.stop(0)
    await edge.server.stop(0)
    await make_server(Rooms(), tmp_path).stop(0)


async def test_no_threads_or_descriptors_pile_up(tmp_path: Path) -> None:
    async with serving(tmp_path / "api.sock"):
        await version_at(f"unix:{tmp_path}/api.sock")
    before = len(os.listdir("/proc/self/fd")), threading.active_count()
    for _ in range(5):
        async with serving(tmp_path / "api.sock"):
            await version_at(f"unix:{tmp_path}/api.sock")
    after = len(os.listdir("/proc/self/fd")), threading.active_count()
    assert after[0] - before[0] < 5
    assert after[1] - before[1] < 5


async def test_a_drain_in_the_middle_of_the_first_write_waits_for_it(edge: Edge) -> None:
    """A write that is cancelled goes on in gRPC's core, which then refuses the status."""
    edge.rooms.branches.feed.send(samples.branch_view())
    edge.rooms.branches.before_yield = edge.server.drain
    call: Any = edge.sandboxes.WatchBranch(pb.WatchBranchRequest(branch_id="b"))
    assert (await call.read()).branch.branch_id == "branch-1"
    assert (await refused(call))[1].reason is Reason.SERVER_DRAINING


async def test_a_drain_of_a_stream_that_flow_control_holds_waits_for_its_client(edge: Edge) -> None:
    feed = edge.rooms.branches.feed
    feed.send(*[samples.branch_view(sequence=i, mode_reason="x" * 500_000) for i in range(20)])
    call: Any = edge.sandboxes.WatchBranch(pb.WatchBranchRequest(branch_id="b"))
    seen = [(await call.read()).branch.sequence]  # then flow control holds the next
    edge.server.drain()
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        while True:
            seen.append((await call.read()).branch.sequence)
    assert problem_of(caught.value).reason is Reason.SERVER_DRAINING
    assert seen == list(range(len(seen)))
    assert len(seen) < 20
    assert feed.watchers == 0


async def test_a_client_that_does_not_read_does_not_hold_up_a_stop(edge: Edge) -> None:
    edge.rooms.branches.feed.send(*[samples.branch_view(mode_reason="x" * 500_000)] * 20)
    call: Any = edge.sandboxes.WatchBranch(pb.WatchBranchRequest(branch_id="b"))
    await call.read()
    await asyncio.wait_for(edge.server.stop(60), 10)
    assert edge.rooms.branches.feed.watchers == 0
