"""What every call goes through: garbage, faults of the server, limits of a message."""

from __future__ import annotations

import asyncio
import logging
from typing import Any

import grpc
import pytest

from forkpoint.v1 import sandbox_service_pb2 as pb
from forkpoint.v1 import sandbox_service_pb2_grpc
from forkpointd.model import Reason
from forkpointd.rpc import handlers, listener
from tests.unit.rpc.harness import Edge, refused

GARBAGE = b"\x0a\xff\xff\xff\xff\x0f"
SERVICE = "/forkpoint.v1.SandboxService"


def raw(data: bytes) -> bytes:
    return data


@pytest.mark.parametrize(
    "method",
    [method.name for method in listener.SANDBOX_SERVICE.methods if not method.client_streaming],
)
async def test_garbage_is_the_clients_error(edge: Edge, method: str) -> None:
    path = f"{SERVICE}/{method}"
    streams = listener.SANDBOX_SERVICE.methods_by_name[method].server_streaming
    make: Any = edge.channel.unary_stream if streams else edge.channel.unary_unary
    code, problem = await refused(make(path, raw, raw)(GARBAGE))
    assert code is grpc.StatusCode.INVALID_ARGUMENT
    assert problem.reason is Reason.UNDECODABLE_MESSAGE
    assert f"forkpoint.v1.{method}Request" in problem.message


async def test_text_that_is_no_utf8_is_the_clients_error(edge: Edge) -> None:
    call: Any = edge.channel.unary_unary(f"{SERVICE}/GetSandbox", raw, raw)
    code, problem = await refused(call(b"\x0a\x02\xff\xfe"))
    assert (code, problem.reason) == (
        grpc.StatusCode.INVALID_ARGUMENT,
        Reason.UNDECODABLE_MESSAGE,
    )


async def test_garbage_within_a_stream_is_the_clients_error(edge: Edge) -> None:
    for first in ([], [pb.AttachConsoleRequest(attach=pb.ConsoleAttach(sandbox_id="agent-7"))]):
        call: Any = edge.channel.stream_stream(f"{SERVICE}/AttachConsole", raw, raw)()
        for message in first:
            await call.write(message.SerializeToString())
        await call.write(GARBAGE)
        code, problem = await refused(call)
        assert code is grpc.StatusCode.INVALID_ARGUMENT
        assert problem.reason is Reason.UNDECODABLE_MESSAGE
    assert edge.rooms.consoles.current is None


async def test_a_fault_is_internal_with_an_incident_that_the_log_has(
    edge: Edge, caplog: pytest.LogCaptureFixture
) -> None:
    edge.rooms.sandboxes.fails_with = ZeroDivisionError("secret detail of the server")
    with caplog.at_level(logging.ERROR, handlers.logger.name):
        code, problem = await refused(
            edge.sandboxes.GetSandbox(pb.GetSandboxRequest(sandbox_id="agent-7"))
        )
    assert (code, problem.reason) == (grpc.StatusCode.INTERNAL, Reason.INTERNAL)
    assert "secret" not in str(problem)
    assert "Traceback" not in str(problem)
    [record] = [each for each in caplog.records if each.name == handlers.logger.name]
    assert problem.metadata["incident"] in record.getMessage()
    assert record.exc_info is not None
    assert "secret detail" in str(record.exc_info[1])


async def test_a_fault_within_a_stream_is_internal_too(edge: Edge) -> None:
    edge.rooms.branches.feed.send("no view")  # the fake trips over it
    code, problem = await refused(edge.sandboxes.WatchBranch(pb.WatchBranchRequest(branch_id="b")))
    assert (code, problem.reason) == (grpc.StatusCode.INTERNAL, Reason.INTERNAL)


async def test_a_timeout_of_ours_is_a_fault_and_not_a_drain(edge: Edge) -> None:
    edge.rooms.branches.fails_with = TimeoutError("a disk")
    code, problem = await refused(
        edge.sandboxes.BranchSandbox(pb.BranchSandboxRequest(sandbox_id="a"))
    )
    assert (code, problem.reason) == (grpc.StatusCode.INTERNAL, Reason.INTERNAL)


async def test_a_cancel_of_other_work_is_a_fault_and_the_client_hears_of_it(edge: Edge) -> None:
    edge.rooms.sandboxes.fails_with = asyncio.CancelledError()
    edge.rooms.branches.fails_with = asyncio.CancelledError()
    for call in (
        edge.sandboxes.GetSandbox(pb.GetSandboxRequest(sandbox_id="a"), timeout=10),
        edge.sandboxes.BranchSandbox(pb.BranchSandboxRequest(sandbox_id="a"), timeout=10),
    ):
        code, problem = await refused(call)
        assert (code, problem.reason) == (grpc.StatusCode.INTERNAL, Reason.INTERNAL)


async def test_an_unknown_method_is_gRPCs_own_error(edge: Edge) -> None:  # noqa: N802
    call: Any = edge.channel.unary_unary(f"{SERVICE}/Nothing", raw, raw)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call(b"")
    assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED


async def test_a_request_over_the_limit_is_gRPCs_own_error(edge: Edge) -> None:  # noqa: N802
    request = pb.WriteConsoleRequest(sandbox_id="agent-7", data=b"x" * (1024 * 1024 + 1))
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await edge.sandboxes.WriteConsole(request)
    assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED


def test_a_service_that_lacks_a_method_does_not_start() -> None:
    with pytest.raises(TypeError, match=r"lacks forkpoint.*GetServerInfo"):
        handlers.service_handler(listener.SERVER_SERVICE, object(), None)


def test_every_method_that_is_declared_is_tested_by_its_stub() -> None:
    """Only what is served is declared: each RPC of the stubs is one of the descriptors."""
    declared = {method.name for method in listener.SANDBOX_SERVICE.methods}
    assert declared == {
        name
        for name in vars(sandbox_service_pb2_grpc.SandboxServiceServicer)
        if not name.startswith("_")
    }
    declared |= {method.name for method in listener.SNAPSHOT_SERVICE.methods}
    assert declared >= handlers.MAKING
