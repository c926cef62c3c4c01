"""Reflection: clients such as grpcurl learn the contract from the server.

Served under two names. Clients ask for v1 first; the library has v1alpha, whose messages are the
same bytes.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable
from typing import Any

from google.protobuf import descriptor_pool
from grpc_reflection.v1alpha import _async as reflection
from grpc_reflection.v1alpha import reflection_pb2 as pb

from forkpointd.rpc.call import Call

SERVICE: Any = pb.DESCRIPTOR.services_by_name["ServerReflection"]
V1 = "grpc.reflection.v1.ServerReflection"
V1ALPHA: str = SERVICE.full_name


class _Pool:
    """The contract's descriptors, with methods as symbols: Python's pool finds services only, so
    `grpcurl describe forkpoint.v1.SandboxService.GetSandbox` would find nothing."""

    def __init__(self) -> None:
        self._pool: Any = descriptor_pool.Default()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._pool, name)

    def FindFileContainingSymbol(self, symbol: str) -> Any:
        """The file of a message, an enum, a service or one of its methods. Raises KeyError."""
        try:
            return self._pool.FindFileContainingSymbol(symbol)
        except KeyError:
            service, _, method = symbol.rpartition(".")
            found = self._pool.FindServiceByName(service)
            found.methods_by_name[method]
            return found.file


class ReflectionService:
    """The library's answers, written as ours are, so that a drain ends these streams too."""

    def __init__(self, services: Iterable[str]) -> None:
        self._library = reflection.ReflectionServicer(services, pool=_Pool())

    async def ServerReflectionInfo(self, call: Call) -> None:
        """Files and symbols, one answer a question, until the client closes its half."""

        async def questions() -> AsyncIterator[pb.ServerReflectionRequest]:
            while (request := await call.next_request()) is not None:
                yield request

        answers: Any = self._library.ServerReflectionInfo(questions(), call.context)
        async for answer in answers:
            await call.write(answer)
