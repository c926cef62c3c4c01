"""Consoles: attach, half-close, the one writer, input that waits, offsets."""

from __future__ import annotations

import asyncio
from typing import Any

import grpc
import pytest

from forkpoint.v1 import sandbox_service_pb2 as pb
from forkpointd.model import ForkpointError, Reason
from tests.unit.rpc.harness import Edge, refused, until


def attach(**fields: Any) -> pb.AttachConsoleRequest:
    return pb.AttachConsoleRequest(attach=pb.ConsoleAttach(sandbox_id="agent-7", **fields))


async def test_the_first_answer_says_where_and_the_next_what_comes(edge: Edge) -> None:
    call: Any = edge.sandboxes.AttachConsole()
    await call.write(attach())
    assert await call.read() == pb.AttachConsoleResponse(offset=150)
    edge.rooms.consoles.more.put_nowait(b"hello")
    assert await call.read() == pb.AttachConsoleResponse(offset=150, data=b"hello")
    edge.rooms.consoles.more.put_nowait(None)
    assert await call.read() is grpc.aio.EOF
    assert await call.code() is grpc.StatusCode.OK
    assert edge.rooms.consoles.current is None
    assert edge.rooms.consoles.readers == 0


@pytest.mark.parametrize(
    ("fields", "offset", "data"),
    [
        ({"from_offset": 100}, 100, b"x" * 50),
        ({"from_offset": 149}, 149, b"x"),
        ({"tail_bytes": 10}, 140, b"x" * 10),
        ({"tail_bytes": 1000}, 100, b"x" * 50),
        ({"tail_bytes": 2**64 - 1}, 100, b"x" * 50),
    ],
)
async def test_where_the_output_starts(
    edge: Edge, fields: dict[str, int], offset: int, data: bytes
) -> None:
    call: Any = edge.sandboxes.AttachConsole()
    await call.write(attach(read_only=True, **fields))
    assert await call.read() == pb.AttachConsoleResponse(offset=offset)
    assert await call.read() == pb.AttachConsoleResponse(offset=offset, data=data)
    call.cancel()
    reading = edge.sandboxes.ReadConsole(pb.ReadConsoleRequest(sandbox_id="agent-7", **fields))  # type: ignore[arg-type]
    assert [(each.offset, each.data) async for each in reading] == [(offset, data)]


@pytest.mark.parametrize("offset", [0, 99, 151, 2**64 - 1])
async def test_an_offset_that_is_not_there(edge: Edge, offset: int) -> None:
    call: Any = edge.sandboxes.AttachConsole()
    await call.write(attach(from_offset=offset))
    code, problem = await refused(call)
    assert (code, problem.reason) == (grpc.StatusCode.OUT_OF_RANGE, Reason.CONSOLE_OFFSET)
    assert problem.metadata == {"first_offset": "100", "end_offset": "150"}
    assert edge.rooms.consoles.current is None
    request = pb.ReadConsoleRequest(sandbox_id="agent-7", from_offset=offset)
    assert (await refused(edge.sandboxes.ReadConsole(request)))[0] is code


async def test_input_reaches_the_guest_and_a_half_close_ends_the_input_only(edge: Edge) -> None:
    consoles = edge.rooms.consoles
    call: Any = edge.sandboxes.AttachConsole()
    await call.write(attach())
    await call.read()
    await call.write(pb.AttachConsoleRequest(input=b"t\n"))
    await call.write(pb.AttachConsoleRequest(input=b"v\n"))
    await call.done_writing()
    await asyncio.wait_for(consoles.free.wait(), 10)
    assert consoles.input == [b"t\n", b"v\n"]
    consoles.more.put_nowait(b"T 1 1\n")
    assert (await call.read()).data == b"T 1 1\n"
    consoles.more.put_nowait(None)
    assert await call.read() is grpc.aio.EOF
    assert await call.code() is grpc.StatusCode.OK


async def test_a_half_close_right_after_attach_still_shows_the_output(edge: Edge) -> None:
    """What grpcurl does."""
    call: Any = edge.sandboxes.AttachConsole()
    await call.write(attach(tail_bytes=5, read_only=True))
    await call.done_writing()
    assert (await call.read()).offset == 145
    assert (await call.read()).data == b"xxxxx"
    edge.rooms.consoles.more.put_nowait(None)
    assert await call.read() is grpc.aio.EOF
    assert await call.code() is grpc.StatusCode.OK


async def test_many_read_and_one_writes(edge: Edge) -> None:
    writer: Any = edge.sandboxes.AttachConsole()
    await writer.write(attach())
    await writer.read()
    second: Any = edge.sandboxes.AttachConsole()
    await second.write(attach())
    code, problem = await refused(second)
    assert (code, problem.reason) == (
        grpc.StatusCode.FAILED_PRECONDITION,
        Reason.CONSOLE_BUSY,
    )
    reader: Any = edge.sandboxes.AttachConsole()
    await reader.write(attach(read_only=True))
    await reader.read()
    await until(lambda: edge.rooms.consoles.readers == 2)
    code, _ = await refused(
        edge.sandboxes.WriteConsole(pb.WriteConsoleRequest(sandbox_id="agent-7", data=b"x"))
    )
    assert code is grpc.StatusCode.FAILED_PRECONDITION
    writer.cancel()
    await asyncio.wait_for(edge.rooms.consoles.free.wait(), 10)
    await until(lambda: edge.rooms.consoles.readers == 1)
    third: Any = edge.sandboxes.AttachConsole()
    await third.write(attach())
    await third.read()


async def test_input_of_a_reader_is_refused(edge: Edge) -> None:
    call: Any = edge.sandboxes.AttachConsole()
    await call.write(attach(read_only=True))
    await call.read()
    await call.write(pb.AttachConsoleRequest(input=b"x"))
    code, problem = await refused(call)
    assert code is grpc.StatusCode.INVALID_ARGUMENT
    assert [each.field for each in problem.fields] == ["input"]


@pytest.mark.parametrize(
    ("messages", "field"),
    [
        ([], "attach"),
        ([pb.AttachConsoleRequest()], "attach"),
        ([pb.AttachConsoleRequest(input=b"x")], "attach"),
        ([pb.AttachConsoleRequest(attach=pb.ConsoleAttach())], "attach.sandbox_id"),
        ([attach(), attach()], "attach"),
        ([attach(), pb.AttachConsoleRequest()], "attach"),
        ([attach(), pb.AttachConsoleRequest(input=b"x" * 32769)], "input"),
    ],
)
async def test_messages_out_of_order(
    edge: Edge, messages: list[pb.AttachConsoleRequest], field: str
) -> None:
    code, problem = await refused(edge.sandboxes.AttachConsole(iter(messages)))
    assert code is grpc.StatusCode.INVALID_ARGUMENT
    assert [each.field for each in problem.fields] == [field]
    assert edge.rooms.consoles.current is None
    assert edge.rooms.consoles.readers == 0


async def test_an_unknown_sandbox_has_no_console(edge: Edge) -> None:
    call: Any = edge.sandboxes.AttachConsole()
    await call.write(pb.AttachConsoleRequest(attach=pb.ConsoleAttach(sandbox_id="b")))
    assert (await refused(call))[0] is grpc.StatusCode.NOT_FOUND
    request = pb.ReadConsoleRequest(sandbox_id="b")
    assert (await refused(edge.sandboxes.ReadConsole(request)))[0] is grpc.StatusCode.NOT_FOUND
    write = pb.WriteConsoleRequest(sandbox_id="b")
    assert (await refused(edge.sandboxes.WriteConsole(write)))[0] is grpc.StatusCode.NOT_FOUND


async def test_input_waits_while_the_guest_does_not_read_and_output_goes_on(edge: Edge) -> None:
    consoles = edge.rooms.consoles
    consoles.reads.clear()
    call: Any = edge.sandboxes.AttachConsole()
    await call.write(attach())
    await call.read()
    for index in range(3):
        await call.write(pb.AttachConsoleRequest(input=b"%d" % index))
    await asyncio.wait_for(consoles.waiting.wait(), 10)
    consoles.more.put_nowait(b"out")
    assert (await call.read()).data == b"out"
    assert consoles.input == []
    consoles.reads.set()
    await until(lambda: len(consoles.input) == 3)
    assert consoles.input == [b"0", b"1", b"2"]
    call.cancel()
    await asyncio.wait_for(consoles.free.wait(), 10)


async def test_for_a_deaf_guest_one_message_is_held_and_no_more_are_read(edge: Edge) -> None:
    """What is sent then stays with gRPC's flow control, which stops the client."""
    consoles = edge.rooms.consoles
    consoles.reads.clear()
    call: Any = edge.sandboxes.AttachConsole()
    await call.write(attach())
    await call.read()
    sent = 0

    async def send() -> None:
        nonlocal sent
        while True:
            await call.write(pb.AttachConsoleRequest(input=b"x" * 32768))
            sent += 1

    task = asyncio.create_task(send())
    await until(lambda: sent >= 2 and consoles.waiting.is_set())
    assert consoles.writes_begun == 1
    task.cancel()
    await asyncio.wait([task])
    call.cancel()
    await asyncio.wait_for(consoles.free.wait(), 10)
    assert consoles.writes_begun == 1
    assert consoles.input == []


async def test_a_writer_that_leaves_while_its_input_waits_gives_the_console_free(
    edge: Edge,
) -> None:
    consoles = edge.rooms.consoles
    consoles.reads.clear()
    call: Any = edge.sandboxes.AttachConsole()
    await call.write(attach())
    await call.read()
    await call.write(pb.AttachConsoleRequest(input=b"x"))
    await asyncio.wait_for(consoles.waiting.wait(), 10)
    call.cancel()
    await asyncio.wait_for(consoles.free.wait(), 10)
    await until(lambda: consoles.readers == 0)


@pytest.mark.parametrize("reason", [Reason.SANDBOX_NOT_RUNNING, Reason.SANDBOX_DELETED])
async def test_a_sandbox_that_ends_under_its_input_ends_the_call_by_its_output(
    edge: Edge, reason: Reason
) -> None:
    consoles = edge.rooms.consoles
    consoles.write_fails = ForkpointError(reason, "it ended")
    call: Any = edge.sandboxes.AttachConsole()
    await call.write(attach())
    await call.read()
    await call.write(pb.AttachConsoleRequest(input=b"x"))
    await asyncio.wait_for(consoles.free.wait(), 10)
    consoles.more.put_nowait(b"last words")
    assert (await call.read()).data == b"last words"
    consoles.more.put_nowait(None)
    assert await call.read() is grpc.aio.EOF
    assert await call.code() is grpc.StatusCode.OK


async def test_another_failure_of_the_input_ends_the_call_with_it(edge: Edge) -> None:
    consoles = edge.rooms.consoles
    consoles.write_fails = ForkpointError(Reason.SANDBOX_UNRESPONSIVE, "no answer")
    call: Any = edge.sandboxes.AttachConsole()
    await call.write(attach())
    await call.read()
    await call.write(pb.AttachConsoleRequest(input=b"x"))
    code, problem = await refused(call)
    assert (code, problem.reason) == (
        grpc.StatusCode.UNAVAILABLE,
        Reason.SANDBOX_UNRESPONSIVE,
    )
    assert consoles.current is None
    assert consoles.readers == 0


async def test_read_console_from_its_oldest_byte_and_on(edge: Edge) -> None:
    request = pb.ReadConsoleRequest(sandbox_id="agent-7", follow=True)
    call = edge.sandboxes.ReadConsole(request)
    assert await call.read() == pb.ReadConsoleResponse(offset=100, data=b"x" * 50)
    edge.rooms.consoles.more.put_nowait(b"more")
    assert await call.read() == pb.ReadConsoleResponse(offset=150, data=b"more")
    call.cancel()
    await until(lambda: edge.rooms.consoles.readers == 0)


async def test_write_console_takes_all_or_tells_how_much(edge: Edge) -> None:
    consoles = edge.rooms.consoles
    request = pb.WriteConsoleRequest(sandbox_id="agent-7", data=b"hello")
    answer = await edge.sandboxes.WriteConsole(request)
    assert answer == pb.WriteConsoleResponse(accepted_bytes=5, offset=150)
    assert consoles.current is None
    consoles.takes = 2
    code, problem = await refused(edge.sandboxes.WriteConsole(request))
    assert (code, problem.reason) == (
        grpc.StatusCode.RESOURCE_EXHAUSTED,
        Reason.CONSOLE_FULL,
    )
    assert problem.metadata == {"accepted_bytes": "2"}
    assert consoles.input == [b"hello", b"he"]
    assert consoles.current is None
    assert consoles.waits == [2.0, 2.0]


async def test_a_write_waits_less_than_its_callers_deadline(edge: Edge) -> None:
    request = pb.WriteConsoleRequest(sandbox_id="agent-7", data=b"hello")
    await edge.sandboxes.WriteConsole(request, timeout=1)
    [wait] = edge.rooms.consoles.waits
    assert 0 < wait < 0.75  # not the usual two seconds


async def test_wrong_input_in_the_middle_of_a_write_of_output_is_told(edge: Edge) -> None:
    consoles = edge.rooms.consoles
    call: Any = edge.sandboxes.AttachConsole()
    await call.write(attach())
    await call.read()
    for _ in range(100):
        consoles.more.put_nowait(b"x" * 65536)  # more than flow control lets through
    await call.write(pb.AttachConsoleRequest())
    code, problem = await refused(call)
    assert (code, problem.reason) == (grpc.StatusCode.INVALID_ARGUMENT, Reason.INVALID_FIELD)
    assert consoles.current is None
    assert consoles.readers == 0
