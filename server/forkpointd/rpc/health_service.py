"""grpc.health.v1: whether the server takes calls, for the server ("") and for each service.

Not the servicer of grpcio-health-checking: there, one watcher's leaving drops the others of the
same service from what is notified, and its watches would hold up a stop until the end of its grace.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import grpc
from google.protobuf.message_factory import GetMessageClass
from grpc_health.v1 import health_pb2 as pb

from forkpointd.rpc.call import Call
from forkpointd.rpc.drain import Gate

SERVICE: Any = pb.DESCRIPTOR.services_by_name["Health"]

_ListResponse: Any = GetMessageClass(SERVICE.methods_by_name["List"].output_type)
"""By its descriptor, since the published type hints don't know it yet."""


class HealthService:
    """SERVING until the drain, NOT_SERVING from there on."""

    def __init__(self, services: Iterable[str], gate: Gate) -> None:
        self._services = frozenset({"", *services})
        self._gate = gate

    async def Check(self, request: pb.HealthCheckRequest, call: Call) -> pb.HealthCheckResponse:
        """The status of one service; NOT_FOUND for others, as the protocol says."""
        if request.service not in self._services:
            await call.context.abort(grpc.StatusCode.NOT_FOUND, "this server has no such service")
        return self._status()

    async def List(self, _request: object, _: Call) -> Any:
        """The status of all services."""
        response = _ListResponse()
        for service in self._services:
            response.statuses[service].CopyFrom(self._status())
        return response

    async def Watch(self, request: pb.HealthCheckRequest, call: Call) -> None:
        """The status of one service, and its change; ends when the server stops."""
        if request.service not in self._services:
            unknown = pb.HealthCheckResponse.SERVICE_UNKNOWN
            await call.write(pb.HealthCheckResponse(status=unknown))
        else:
            await call.write(self._status())
            if not self._gate.draining.is_set():
                await self._gate.draining.wait()
                await call.write(self._status())
        await self._gate.stopping.wait()

    def _status(self) -> pb.HealthCheckResponse:
        if self._gate.draining.is_set():
            return pb.HealthCheckResponse(status=pb.HealthCheckResponse.NOT_SERVING)
        return pb.HealthCheckResponse(status=pb.HealthCheckResponse.SERVING)
