"""ServerService: the server itself."""

from __future__ import annotations

from forkpoint.v1 import server_service_pb2 as pb
from forkpointd.rpc import convert
from forkpointd.rpc.call import Call
from forkpointd.rpc.ports import ServerPort


class ServerService:
    """The server's facts."""

    def __init__(self, *, server: ServerPort) -> None:
        self._server = server

    async def GetServerInfo(
        self, _request: pb.GetServerInfoRequest, _: Call
    ) -> pb.GetServerInfoResponse:
        """Versions, the VMM, and what this host can do."""
        return convert.server_info(await self._server.facts())
