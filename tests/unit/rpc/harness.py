"""What a test of the edge holds, and how it looks at errors."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest
from google.protobuf.message import Message
from grpc_status import rpc_status

from forkpoint.v1 import (
    sandbox_service_pb2_grpc,
    server_service_pb2_grpc,
    snapshot_service_pb2_grpc,
)
from forkpoint.v1 import server_service_pb2 as ipb
from forkpointd.model import Problem
from forkpointd.rpc import status
from forkpointd.rpc.listener import RpcServer
from tests.unit.rpc.fakes import Rooms


@dataclass
class Edge:
    """What a test holds: the server, the rooms behind it, and stubs that reach it."""

    server: RpcServer
    rooms: Rooms
    channel: grpc.aio.Channel
    image_root: Path
    address: str

    def __post_init__(self) -> None:
        self.sandboxes = sandbox_service_pb2_grpc.SandboxServiceStub(self.channel)
        self.snapshots = snapshot_service_pb2_grpc.SnapshotServiceStub(self.channel)
        self.info = server_service_pb2_grpc.ServerServiceStub(self.channel)


def make_server(rooms: Rooms, image_root: Path) -> RpcServer:
    return RpcServer(
        rooms.ports(), max_fork_count=100, max_memory_mib=8192, image_roots=[image_root]
    )


@asynccontextmanager
async def serving(path: Path) -> AsyncIterator[RpcServer]:
    server = make_server(Rooms(), path.parent)
    await server.start(f"unix:{path}")
    try:
        yield server
    finally:
        await server.stop(0)


async def version_at(address: str) -> str:
    async with grpc.aio.insecure_channel(address) as channel:
        stub = server_service_pb2_grpc.ServerServiceStub(channel)
        answer = await stub.GetServerInfo(ipb.GetServerInfoRequest(), timeout=10)
        return answer.version


async def until(condition: Callable[[], object]) -> None:
    """Waits for a state that only the fakes show."""
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0)


async def refused(call: Any) -> tuple[grpc.StatusCode, Problem]:
    """How a call fails: its code, and what its details say."""
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        if hasattr(call, "read"):
            while await call.read() is not grpc.aio.EOF:
                pass
        else:
            await call
    return caught.value.code(), problem_of(caught.value)


def problem_of(error: grpc.aio.AioRpcError) -> Problem:
    found = rpc_status.from_call(error)  # type: ignore[arg-type]
    assert found is not None, f"no details: {error}"
    return status.from_status(found)


def detail(error: grpc.aio.AioRpcError, kind: Callable[[], Message]) -> Any:
    found = rpc_status.from_call(error)  # type: ignore[arg-type]
    for each in found.details:
        message = kind()
        if each.Unpack(message):
            return message
    raise AssertionError(f"{error} has no {kind}")
