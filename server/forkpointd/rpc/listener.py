"""The server of the edge: its socket, its services, its end.

Beside ours it serves grpc.health.v1, reflection (v1 and v1alpha), and channelz.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import grpc
import grpc.aio
from grpc_channelz.v1 import _async as channelz
from grpc_channelz.v1 import channelz_pb2, channelz_pb2_grpc

from forkpoint.v1 import sandbox_service_pb2, server_service_pb2, snapshot_service_pb2
from forkpointd.rpc import health_service, reflection_service
from forkpointd.rpc.drain import Gate
from forkpointd.rpc.handlers import service_handler
from forkpointd.rpc.health_service import HealthService
from forkpointd.rpc.ports import (
    ArchivePort,
    BranchPort,
    ConsolePort,
    ForkPort,
    SandboxPort,
    ServerPort,
    SnapshotPort,
)
from forkpointd.rpc.reflection_service import ReflectionService
from forkpointd.rpc.rules import Limits
from forkpointd.rpc.sandbox_service import SandboxService
from forkpointd.rpc.server_service import ServerService
from forkpointd.rpc.snapshot_service import SnapshotService
from forkpointd.rpc.unix_socket import UnixSocket

logger = logging.getLogger(__name__)

MAX_REQUEST_BYTES = 1024 * 1024
"""The largest requests are console input and pieces of an archive, of which clients are told."""
MAX_RESPONSE_BYTES = 4 * 1024 * 1024
"""What clients take by default. Pages end at half of it."""

LINGER_SECONDS = 0.1
"""Between the last answer and the end of the connections. gRPC closes a connection together with
its last stream, and a client that is just writing loses what it has not read by then: its answer,
or the status that tells it to ask again."""

OPTIONS: Sequence[tuple[str, int]] = (
    ("grpc.so_reuseport", 0),
    ("grpc.max_receive_message_length", MAX_REQUEST_BYTES),
    ("grpc.max_send_message_length", MAX_RESPONSE_BYTES),
    # A client that is gone without a word (a stopped machine behind a tunnel) is noticed.
    ("grpc.keepalive_time_ms", 60_000),
    ("grpc.keepalive_timeout_ms", 20_000),
    ("grpc.keepalive_permit_without_calls", 1),
    # Clients that watch for hours may ask whether we are there.
    ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
    ("grpc.http2.max_ping_strikes", 0),
    ("grpc.enable_channelz", 1),
)

SANDBOX_SERVICE = sandbox_service_pb2.DESCRIPTOR.services_by_name["SandboxService"]
SNAPSHOT_SERVICE = snapshot_service_pb2.DESCRIPTOR.services_by_name["SnapshotService"]
SERVER_SERVICE = server_service_pb2.DESCRIPTOR.services_by_name["ServerService"]
CHANNELZ = channelz_pb2.DESCRIPTOR.services_by_name["Channelz"].full_name


@dataclass(frozen=True, slots=True)
class Ports:
    """The rooms behind the edge."""

    sandboxes: SandboxPort
    branches: BranchPort
    forks: ForkPort
    snapshots: SnapshotPort
    archives: ArchivePort
    consoles: ConsolePort
    server: ServerPort


class RpcServer:
    """The gRPC server: `start`, `drain`, `stop`, in this order."""

    def __init__(
        self,
        ports: Ports,
        *,
        max_fork_count: int,
        max_memory_mib: int,
        image_roots: Sequence[Path],
    ) -> None:
        self._ports = ports
        self._limits = Limits(max_fork_count=max_fork_count, max_memory_mib=max_memory_mib)
        self._image_roots = tuple(image_roots)
        self._gate: Gate | None = None
        self._server: grpc.aio.Server | None = None
        self._socket: UnixSocket | None = None

    async def start(self, listen: str) -> None:
        """Takes calls at `listen` (`unix:PATH`).

        Raises `ListenError`, and leaves nothing behind, where the socket can't be had.
        """
        gate = Gate()
        server = grpc.aio.server(options=OPTIONS)
        self._add_services(server, gate)
        socket = UnixSocket.parse(listen)
        try:
            await asyncio.to_thread(socket.prepare)
            socket.bind(server.add_insecure_port)
            await server.start()
        except BaseException:
            await server.stop(None)
            await asyncio.to_thread(socket.release)
            raise
        self._gate, self._server, self._socket = gate, server, socket
        logger.info("listening at %s", listen)

    @property
    def serving(self) -> bool:
        """Whether new work is taken: from the start to the drain."""
        return self._gate is not None and not self._gate.draining.is_set()

    def drain(self) -> None:
        """Health says NOT_SERVING, nothing new is made, streams end with SERVER_DRAINING.

        Calls that are at work go on. Idempotent.
        """
        if self._gate is not None:
            self._gate.drain()

    async def stop(self, grace_seconds: float) -> None:
        """Drains, waits up to `grace_seconds` for the calls at work, and gives the socket free."""
        if self._gate is None or self._server is None:
            return
        self._gate.stop()
        with suppress(TimeoutError):
            async with asyncio.timeout(grace_seconds):
                await self._gate.calls.idle()
                await self._gate.streams.idle()
        # What is left is a call out of time, or a stream whose client doesn't read its end.
        await asyncio.sleep(min(LINGER_SECONDS, grace_seconds))
        await self._server.stop(None)
        if self._socket is not None:
            await asyncio.to_thread(self._socket.release)
            self._socket = None

    def _add_services(self, server: grpc.aio.Server, gate: Gate) -> None:
        implementations = {
            SANDBOX_SERVICE: SandboxService(
                sandboxes=self._ports.sandboxes,
                branches=self._ports.branches,
                forks=self._ports.forks,
                consoles=self._ports.consoles,
                limits=self._limits,
                image_roots=self._image_roots,
            ),
            SNAPSHOT_SERVICE: SnapshotService(
                snapshots=self._ports.snapshots,
                archives=self._ports.archives,
                limits=self._limits,
            ),
            SERVER_SERVICE: ServerService(server=self._ports.server),
        }
        ours = [service.full_name for service in implementations]
        listed = [*ours, health_service.SERVICE.full_name, CHANNELZ]
        listed += [reflection_service.V1, reflection_service.V1ALPHA]
        reflection = ReflectionService(listed)
        server.add_generic_rpc_handlers(
            [
                *(service_handler(each, it, gate) for each, it in implementations.items()),
                service_handler(health_service.SERVICE, HealthService(ours, gate), None),
                *(
                    service_handler(reflection_service.SERVICE, reflection, gate, name=name)
                    for name in (reflection_service.V1, reflection_service.V1ALPHA)
                ),
            ]
        )
        channelz_pb2_grpc.add_ChannelzServicer_to_server(channelz.ChannelzServicer(), server)
