"""A real server on a Unix socket, with rooms of fakes behind it."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator
from pathlib import Path

import grpc.aio
import pytest

from tests.unit.rpc.fakes import Rooms
from tests.unit.rpc.harness import Edge, make_server


@pytest.fixture
async def edge(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> AsyncIterator[Edge]:
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
    silent = ("grpc", "asyncio")  # what they call an error is one of ours
    errors = [
        each
        for each in caplog.get_records("call")
        if each.name.startswith(silent) and each.levelno >= logging.ERROR
    ]
    assert errors == []
