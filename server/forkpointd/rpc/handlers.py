"""What every call goes through, from its bytes to its status.

Services are registered from their descriptors: an object needs a method of the RPC's name, an
`async def` of request and `Call` that returns the response (unary), or writes its responses with
`call.write` (streams; of `Call` alone where the client streams).

Around it: our own decoding, so that bytes that are no message are the client's error; errors with
a reason become statuses; anything else is a fault of the server, which the client sees as INTERNAL
with the number of an incident, and the log with its trace. A call's own CancelledError (the client
left, its deadline passed) goes through untouched.
"""

from __future__ import annotations

import asyncio
import logging
import uuid
from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager, AbstractContextManager, nullcontext
from typing import Any, TypeVar

import grpc
import grpc.aio
from google.protobuf.descriptor import MethodDescriptor, ServiceDescriptor
from google.protobuf.message import DecodeError, Message
from google.protobuf.message_factory import GetMessageClass

from forkpointd.model import ForkpointError, Problem, Reason
from forkpointd.rpc.call import Call, Context, Undecodable, decoded
from forkpointd.rpc.drain import Gate
from forkpointd.rpc.status import to_grpc

logger = logging.getLogger(__name__)

T = TypeVar("T")

MAKING = frozenset({"CreateSandbox", "BranchSandbox", "ForkSandboxes", "ImportSnapshot"})
"""Methods that make something: refused while the server drains."""


def service_handler(
    service: ServiceDescriptor,
    implementation: object,
    gate: Gate | None,
    *,
    name: str | None = None,
) -> grpc.GenericRpcHandler:
    """All methods of a service. `TypeError` when the implementation lacks one.

    Without a gate a drain doesn't touch them. `name` is another one to serve it under.
    """
    handlers: dict[str, grpc.RpcMethodHandler[Any, Any]] = {}
    for method in service.methods:
        behaviour = getattr(implementation, method.name, None)
        if behaviour is None:
            raise TypeError(f"{type(implementation).__name__} lacks {method.full_name}")
        handlers[method.name] = _method_handler(method, behaviour, gate)
    return grpc.method_handlers_generic_handler(name or service.full_name, handlers)


def _method_handler(
    method: MethodDescriptor, behaviour: Callable[..., Awaitable[Any]], gate: Gate | None
) -> grpc.RpcMethodHandler[Any, Any]:
    async def unary(request: Any, context: Context) -> Any:
        call = Call(context)

        async def work() -> Any:
            with _counted(gate):
                if gate is not None and method.name in MAKING:
                    gate.must_be_open()
                return await behaviour(decoded(request), call)

        return await _answer(work(), call, method.full_name)

    async def unary_stream(request: Any, context: Context) -> None:
        call = Call(context)

        async def work() -> None:
            async with _ended_by(gate):
                await behaviour(decoded(request), call)

        await _answer(work(), call, method.full_name)

    async def stream_stream(_requests: object, context: Context) -> None:
        call = Call(context)

        async def work() -> None:
            async with _ended_by(gate):
                await behaviour(call)

        await _answer(work(), call, method.full_name)

    async def stream_unary(_requests: object, context: Context) -> Any:
        call = Call(context)

        async def work() -> Any:
            async with _ended_by(gate):
                return await behaviour(call)

        return await _answer(work(), call, method.full_name)

    decode = _decoder(method)
    if method.client_streaming and not method.server_streaming:
        return grpc.stream_unary_rpc_method_handler(
            stream_unary, request_deserializer=decode, response_serializer=_encode
        )
    if method.client_streaming:
        return grpc.stream_stream_rpc_method_handler(
            stream_stream, request_deserializer=decode, response_serializer=_encode
        )
    if method.server_streaming:
        return grpc.unary_stream_rpc_method_handler(
            unary_stream, request_deserializer=decode, response_serializer=_encode
        )
    return grpc.unary_unary_rpc_method_handler(
        unary, request_deserializer=decode, response_serializer=_encode
    )


def _counted(gate: Gate | None) -> AbstractContextManager[None]:
    return nullcontext() if gate is None else gate.call()


def _ended_by(gate: Gate | None) -> AbstractAsyncContextManager[None]:
    return nullcontext() if gate is None else gate.stream()


def _decoder(method: MethodDescriptor) -> Callable[[bytes], Message | Undecodable]:
    kind = GetMessageClass(method.input_type)

    def decode(data: bytes) -> Message | Undecodable:
        try:
            return kind.FromString(data)
        except DecodeError:
            return Undecodable(
                f"{len(data)} bytes that are no {method.input_type.full_name}: "
                "check that client and server have the same contract"
            )

    return decode


def _encode(message: Message) -> bytes:
    return message.SerializeToString()


async def _answer(work: Awaitable[T], call: Call, method: str) -> T:
    try:
        answer = await work
        await call.settled()
        return answer
    except grpc.aio.AbortError:
        raise
    except ForkpointError as error:
        problem = error.problem
    except asyncio.CancelledError:
        task = asyncio.current_task()
        if task is not None and task.cancelling():
            raise
        # Not this call's: some work it waited for was cancelled. As a cancel it would end the call
        # without a status, and its client would wait for good.
        problem = _incident(method)
    except Exception as error:
        if isinstance(error, grpc.aio.BaseError) and call.context.done():
            raise  # a write found that the client is gone; gRPC knows
        problem = _incident(method)
    await call.settled()
    await call.context.abort_with_status(to_grpc(problem))
    raise AssertionError("abort_with_status returned")


def _incident(method: str) -> Problem:
    """A fault of the server, in an `except` clause: its trace is logged, a number is answered."""
    incident = uuid.uuid4().hex
    logger.error("%s failed, incident %s", method, incident, exc_info=True)  # noqa: LOG014
    return Problem(
        Reason.INTERNAL,
        f"a fault of the server: its log has the cause under incident {incident}",
        {"incident": incident},
    )
