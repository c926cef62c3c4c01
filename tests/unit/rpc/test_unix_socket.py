"""The socket: where it may be bound, who may reach it, whose it is."""

# ruff: noqa: ASYNC240 - a test may look at a folder itself

from __future__ import annotations

import asyncio
import os
import socket
import stat
from pathlib import Path

import pytest

from forkpointd.rpc.listener import OPTIONS
from forkpointd.rpc.unix_socket import ListenError
from tests.unit.rpc.fakes import Rooms
from tests.unit.rpc.harness import make_server, serving, version_at


async def test_the_socket_is_its_owners_alone_in_a_folder_of_its_own(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        path = tmp_path / "run" / "api.sock"
        async with serving(path):
            assert stat.S_IMODE(path.stat().st_mode) == 0o600
            assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
            assert os.umask(0) == 0
            assert await version_at(f"unix:{path}") == "0.1.0"
        assert list(path.parent.iterdir()) == []
    finally:
        os.umask(before)


async def test_a_folder_that_is_there_stays_as_it_is(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tmp_path.chmod(0o777)
    async with serving(tmp_path / "api.sock"):
        assert stat.S_IMODE(tmp_path.stat().st_mode) == 0o777
    assert "others may write" in caplog.text


@pytest.mark.parametrize("name", ["with space", "100%", "ü", "a#b?c", "%20"])
async def test_odd_names_work(tmp_path: Path, name: str) -> None:
    path = tmp_path / name / f"{name}.sock"
    async with serving(path):
        assert stat.S_ISSOCK(path.stat().st_mode)
        with socket.socket(socket.AF_UNIX) as probe:
            probe.connect(str(path))


@pytest.mark.parametrize("depth", [80, 200, 1000])
async def test_a_deep_folder_works(tmp_path: Path, depth: int) -> None:
    path = tmp_path
    while len(str(path)) < depth:
        path = path / "deep-folder-of-somebody"
    path = path / "api.sock"
    async with serving(path) as server:
        assert stat.S_ISSOCK(path.stat().st_mode)
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        folder = os.open(path.parent, os.O_PATH)
        try:
            assert await version_at(f"unix:/proc/self/fd/{folder}/api.sock") == "0.1.0"
        finally:
            os.close(folder)
        with pytest.raises(ListenError, match="another server is there"):
            await make_server(Rooms(), tmp_path).start(f"unix:{path}")
        assert server is not None
    assert list(path.parent.iterdir()) == []


async def test_a_name_that_no_address_can_hold_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ListenError, match="too long"):
        await make_server(Rooms(), tmp_path).start(f"unix:{tmp_path}/{'n' * 100}.sock")
    assert list(tmp_path.iterdir()) == []


async def test_a_second_server_is_refused_and_the_first_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "api.sock"
    async with serving(path):
        with pytest.raises(ListenError, match="another server is there"):
            await make_server(Rooms(), tmp_path).start(f"unix:{path}")
        assert await version_at(f"unix:{path}") == "0.1.0"


async def test_a_server_of_others_is_not_replaced(tmp_path: Path) -> None:
    path = tmp_path / "api.sock"
    with socket.socket(socket.AF_UNIX) as other:
        other.bind(str(path))
        other.listen(1)
        with pytest.raises(ListenError, match="another server is there"):
            await make_server(Rooms(), tmp_path).start(f"unix:{path}")
        with socket.socket(socket.AF_UNIX) as probe:
            probe.connect(str(path))
    assert [each.name for each in tmp_path.iterdir()] == ["api.sock"]


async def test_a_socket_that_nobody_listens_on_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "api.sock"
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))
    (tmp_path / "api.sock.lock").touch()
    async with serving(path):
        assert await version_at(f"unix:{path}") == "0.1.0"


@pytest.mark.parametrize("kind", ["file", "folder", "link"])
async def test_what_is_no_socket_is_left_alone(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "api.sock"
    match kind:
        case "file":
            path.write_text("precious")
        case "folder":
            path.mkdir()
        case "link":
            path.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ListenError, match="no socket"):
        await make_server(Rooms(), tmp_path).start(f"unix:{path}")
    assert [each.name for each in tmp_path.iterdir()] == ["api.sock"]
    if kind == "file":
        assert path.read_text() == "precious"


async def test_a_file_where_a_folder_should_be(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(ListenError, match="is a file where a folder should be"):
        await make_server(Rooms(), tmp_path).start(f"unix:{tmp_path}/file/api.sock")


@pytest.mark.parametrize(
    "listen",
    ["127.0.0.1:50051", "tcp:1", "[::1]:50051", "localhost:1", "unix-abstract:x", "dns:///a:1"],
)
async def test_anything_but_a_unix_socket_is_refused(tmp_path: Path, listen: str) -> None:
    with pytest.raises(ListenError, match="Unix sockets only"):
        await make_server(Rooms(), tmp_path).start(listen)


@pytest.mark.parametrize("listen", ["unix:", "unix:/", "unix:///tmp/", "unix:///"])
async def test_an_address_without_a_socket_is_refused(tmp_path: Path, listen: str) -> None:
    with pytest.raises(ListenError, match="give a socket"):
        await make_server(Rooms(), tmp_path).start(listen)


async def test_of_servers_that_start_at_once_one_wins(tmp_path: Path) -> None:
    path = tmp_path / "api.sock"
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))
    servers = [make_server(Rooms(), tmp_path) for _ in range(6)]
    outcomes = await asyncio.gather(
        *(server.start(f"unix:{path}") for server in servers), return_exceptions=True
    )
    assert sorted(type(each).__name__ for each in outcomes) == ["ListenError"] * 5 + ["NoneType"]
    assert await version_at(f"unix:{path}") == "0.1.0"
    await asyncio.gather(*(server.stop(0) for server in servers))
    assert list(tmp_path.iterdir()) == []


async def test_a_socket_that_became_another_servers_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "api.sock"
    with socket.socket(socket.AF_UNIX) as other:
        async with serving(path):
            path.unlink()
            other.bind(str(path))
            other.listen()
            there = path.lstat().st_ino
            with socket.socket(socket.AF_UNIX) as probe:
                probe.connect(str(path))
        if path.exists():
            assert path.lstat().st_ino == there


async def test_a_server_can_be_started_again_at_its_place(tmp_path: Path) -> None:
    for _ in range(3):
        async with serving(tmp_path / "api.sock"):
            assert await version_at(f"unix:{tmp_path}/api.sock") == "0.1.0"


def test_ports_are_never_shared() -> None:
    assert ("grpc.so_reuseport", 0) in OPTIONS
