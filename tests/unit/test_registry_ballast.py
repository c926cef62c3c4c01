"""The room that a registry keeps for the day on which its disk is full."""

from __future__ import annotations

import os
import sqlite3
from pathlib import Path

import pytest

from forkpointd.model import ForkpointError, Reason
from forkpointd.registry import Registry
from forkpointd.registry.ballast import BALLAST_BYTES, Ballast


async def test_a_write_that_finds_the_disk_full_drops_the_ballast_and_is_tried_again(
    tmp_path: Path,
) -> None:
    registry = await Registry.open(tmp_path / "forkpoint.db")
    ballast = tmp_path / "forkpoint.db-ballast"
    try:
        assert not ballast.exists()
        assert await registry.restore_ballast()
        assert os.stat(ballast).st_blocks * 512 >= BALLAST_BYTES

        def write(connection: sqlite3.Connection) -> bool:
            if ballast.exists():
                raise ForkpointError(Reason.NO_DISK_SPACE, "full")
            connection.execute("CREATE TABLE room (id)")
            return True

        assert await registry.write(write)
        assert not ballast.exists()
        with pytest.raises(ForkpointError, match="full for good"):
            await registry.write(_full)
        assert await registry.restore_ballast()
    finally:
        await registry.close()


def _full(_: sqlite3.Connection) -> None:
    raise ForkpointError(Reason.NO_DISK_SPACE, "full for good")


def test_ballast_is_not_taken_from_a_disk_that_has_little_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ballast = Ballast(tmp_path / "forkpoint.db")
    real = os.statvfs(tmp_path)
    small = os.statvfs_result((*real[:4], 2 * BALLAST_BYTES // real.f_frsize - 1, *real[5:10]))
    monkeypatch.setattr(os, "statvfs", lambda _: small)
    assert not ballast.restore()
    assert list(tmp_path.iterdir()) == []
    ballast.drop()
