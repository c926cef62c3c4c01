"""What every call goes through, from its bytes to its status.

Services are registered from their descriptors: an object needs a method of the RPC's name, an
`async def` of request and context that returns the response (unary) or writes its responses with
`context.write` (streams). Around it: our own decoding, so that bytes that are no message are the
client's error; errors with a reason become statuses; anything else is a fault of the server, which
the client sees as INTERNAL with the number of an incident, and the log with its trace. A
CancelledError (the client left, its deadline passed) goes through untouched.
"""

from __future__ import annotations

import logging
import uuid
from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager, AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, TypeVar

import grpc
import grpc.aio
from google.protobuf.descriptor import MethodDescriptor, ServiceDescriptor
from google.protobuf.message import DecodeError, Message
from google.protobuf.message_factory import GetMessageClass

from forkpointd.model import ForkpointError, Problem, Reason
from forkpointd.rpc.drain import Gate
from forkpointd.rpc.status import to_grpc

logger = logging.getLogger(__name__)

T = TypeVar("T")

Context = grpc.aio.ServicerContext[Any, Any]
"""Of a call. Only `write`, `read` and `time_remaining` are for services; they raise, rather than
abort."""

MAKING = frozenset({"CreateSandbox", "BranchSandbox", "ForkSandboxes"})
"""Methods that make something: refused while the server drains."""


@dataclass(frozen=True, slots=True)
class Undecodable:
    """Bytes that are not the message they should be."""

    message: str


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
    decode = _decoder(method)
    name = method.full_name

    async def unary(request: Any, context: Context) -> Any:
        async def work() -> Any:
            with _call(gate):
                if gate is not None and method.name in MAKING:
                    gate.must_be_open()
                return await behaviour(_decoded(request), context)

        return await _answer(work(), context, name)

    async def unary_stream(request: Any, context: Context) -> None:
        async def work() -> None:
            with _call(gate):
                async with _stream(gate):
                    await behaviour(_decoded(request), context)

        await _answer(work(), context, name)

    async def stream_stream(_requests: object, context: Context) -> None:
        async def work() -> None:
            with _call(gate):
                async with _stream(gate):
                    await behaviour(Requests(context), context)

        await _answer(work(), context, name)

    if method.client_streaming and not method.server_streaming:
        raise TypeError(f"{name}: no such kind of method is served")
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


def _call(gate: Gate | None) -> AbstractContextManager[None]:
    return nullcontext() if gate is None else gate.call()


def _stream(gate: Gate | None) -> AbstractAsyncContextManager[None]:
    return nullcontext() if gate is None else gate.stream()


class Requests:
    """The requests of a stream, one at a time, so that a slow reader slows its client down."""

    def __init__(self, context: Context) -> None:
        self._context = context

    async def next(self) -> Any | None:
        """The next message; None once the client has closed its half. UNDECODABLE_MESSAGE."""
        request = await self._context.read()
        return None if request is grpc.aio.EOF else _decoded(request)


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


def _decoded(request: Any) -> Any:
    if isinstance(request, Undecodable):
        raise ForkpointError(Reason.UNDECODABLE_MESSAGE, request.message)
    return request


async def _answer(work: Awaitable[T], context: Context, method: str) -> T:
    try:
        return await work
    except grpc.aio.AbortError:
        raise
    except ForkpointError as error:
        problem = error.problem
    except Exception as error:
        if isinstance(error, grpc.aio.BaseError) and context.done():
            raise  # a write found that the client is gone; gRPC knows
        incident = uuid.uuid4().hex
        logger.exception("%s failed, incident %s", method, incident)
        problem = _incident(incident)
    await context.abort_with_status(to_grpc(problem))
    raise AssertionError("abort_with_status returned")


def _incident(incident: str) -> Problem:
    """A fault of the server: the client gets its number in the log, not its trace."""
    return Problem(
        Reason.INTERNAL,
        f"a fault of the server: its log has the cause under incident {incident}",
        {"incident": incident},
    )
