"""The server itself."""

from __future__ import annotations

import warnings

from forkpoint import _wire
from forkpoint._async._calls import Calls
from forkpoint._versions import mismatch
from forkpoint.errors import VersionMismatchWarning
from forkpoint.v1.server_service_pb2 import GetServerInfoRequest
from forkpoint.views import ServerInfo


class Server:
    """The server that a client is connected to."""

    def __init__(self, calls: Calls) -> None:
        self._calls = calls

    async def info(self) -> ServerInfo:
        """Which versions run, on which VMM, what the host can do and, if it can't, why.

        Warns, once a process and version, when the server's version is not the client's.
        """
        calls = self._calls
        response = await calls.unary(calls.server.GetServerInfo, GetServerInfoRequest())
        info = _wire.server_info(response)
        message = mismatch(info)
        if message is not None:
            warnings.warn(message, VersionMismatchWarning, stacklevel=3)
        return info
