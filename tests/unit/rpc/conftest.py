"""A real server on a Unix socket, with rooms of fakes behind it."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import grpc.aio
import pytest

from tests.unit.rpc.fakes import Rooms
from tests.unit.rpc.harness import Edge, make_server


@pytest.fixture
async def edge(tmp_path: Path) -> AsyncIterator[Edge]:
    root = tmp_path / "images"
    root.mkdir()
    (root / "vmlinux").write_bytes(b"\x7fELF")
    (root / "rootfs.ext4").write_bytes(b"ext4")
    rooms = Rooms()
    server = make_server(rooms, root)
    address = f"unix:{tmp_path}/s/api.sock"
    await server.start(address)
    async with grpc.aio.insecure_channel(address) as channel:
        yield Edge(server, rooms, channel, root, address)
    await server.stop(0)
