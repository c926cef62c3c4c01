"""Exports and imports of the client, async and sync, and of the command line."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

import forkpoint
import forkpoint.sync
from forkpoint import errors
from forkpoint.cli.app import app
from forkpoint.cli.archives import archive_to
from forkpoint.v1 import snapshot_pb2
from forkpoint.v1 import snapshot_service_pb2 as p
from tests.unit.client_fake import Fake, fresh_address


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Fake]:
    server = Fake(fresh_address(tmp_path))
    server.version = forkpoint.__version__
    server.snapshots["snap-1"] = snapshot_pb2.Snapshot(snapshot_id="snap-1")
    server.start()
    monkeypatch.setenv("FORKPOINT_ADDRESS", server.address)
    yield server
    server.stop()


async def test_an_export_is_written_with_its_progress(fake: Fake) -> None:
    file = io.BytesIO()
    seen: list[forkpoint.Progress] = []
    async with forkpoint.connect() as fp:
        written = await fp.snapshots.export_to(
            file, "snap-1", layout="KEPT", level=5, on_progress=seen.append
        )
    assert file.getvalue() == b"archive of snap-1"
    assert written == 17
    assert [(each.done_bytes, each.total_bytes) for each in seen] == [(0, 20), (10, 20), (20, 20)]
    (request,) = fake.called("ExportSnapshot")
    assert (request.layout, request.level) == (p.ARCHIVE_LAYOUT_KEPT, 5)


async def test_an_export_that_fails_says_why(fake: Fake) -> None:
    fake.exports_to_break = 1
    async with forkpoint.connect() as fp:
        with pytest.raises(errors.DataLoss, match="a file is gone"):
            await fp.snapshots.export_to(io.BytesIO(), "snap-1")
        with pytest.raises(ValueError, match="level"):
            await fp.snapshots.export_to(io.BytesIO(), "snap-1", level=0)


async def test_an_import_sends_all_of_a_file(fake: Fake) -> None:
    archive = b"archive of " + b"s" * 60
    sent: list[int] = []
    async with forkpoint.connect() as fp:
        made = await fp.snapshots.import_from(
            io.BytesIO(archive), labels={"a": "b"}, on_progress=sent.append
        )
        assert (made.id, made.labels) == ("s" * 60, {"a": "b"})
        named = await fp.snapshots.import_from(io.BytesIO(archive), snapshot_id="mine")
        assert named.id == "mine"
        with pytest.raises(errors.InvalidArgument, match="it is no archive"):
            await fp.snapshots.import_from(io.BytesIO(b"x" * (3 << 20)))
    assert sent == [len(archive)]


class Broken(io.BytesIO):
    def read(self, size: int | None = -1) -> bytes:
        raise OSError(5, "the disk is broken")


async def test_a_file_that_cannot_be_read_is_what_an_import_says(fake: Fake) -> None:
    async with forkpoint.connect() as fp:
        with pytest.raises(OSError, match="the disk is broken"):
            await fp.snapshots.import_from(Broken())


def test_the_same_without_await(fake: Fake) -> None:
    file = io.BytesIO()
    with forkpoint.sync.connect() as fp:
        assert fp.snapshots.export_to(file, "snap-1") == 17
        file.seek(0)
        assert fp.snapshots.import_from(file, snapshot_id="mine").id == "mine"
        with pytest.raises(errors.InvalidArgument, match="it is no archive"):
            fp.snapshots.import_from(io.BytesIO(b"x" * 100))


# --- the command line ---


def command(*arguments: str, stdin: bytes | None = None) -> Result:
    return CliRunner().invoke(app, ["snapshot", *arguments], input=stdin)


def test_export_to_a_file_and_import_from_it(fake: Fake, tmp_path: Path) -> None:
    file = tmp_path / "out" / "snap-1.forkpoint"
    file.parent.mkdir()
    done = command("export", "snap-1", "-o", str(file), "--layout", "kept", "--json")
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["bytes"] == 17
    assert os.listdir(file.parent) == [file.name]
    made = command("import", str(file), "--id", "mine", "-l", "a=b", "--json")
    assert made.exit_code == 0, made.output
    assert json.loads(made.stdout)["id"] == "mine"


def test_pipes(fake: Fake) -> None:
    done = command("export", "snap-1")
    assert done.stdout_bytes == b"archive of snap-1"
    assert command("import", "-", "--id", "mine", stdin=done.stdout_bytes).exit_code == 0


def test_a_failed_export_leaves_no_file_and_keeps_the_old_one(fake: Fake, tmp_path: Path) -> None:
    fake.exports_to_break = 2
    file = tmp_path / "out" / "a"
    file.parent.mkdir()
    assert command("export", "snap-1", "-o", str(file)).exit_code == 1
    assert os.listdir(file.parent) == []
    file.write_bytes(b"the old one")
    assert command("export", "snap-1", "-o", str(file)).exit_code == 1
    assert file.read_bytes() == b"the old one"
    assert os.listdir(file.parent) == ["a"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("import", "/no/such/file"), "No such file"),
        (("export", "snap-1", "-o", "/no/such/folder/x"), "No such file"),
        (("export", "snap-1", "-o", "/tmp"), "is a folder"),
        (("export", "snap-1", "--layout", "round"), "round"),
    ],
)
def test_what_is_wrong_on_the_command_line(
    fake: Fake, arguments: tuple[str, ...], words: str
) -> None:
    done = command(*arguments)
    assert done.exit_code == 2, done.output
    assert words.lower() in done.output.lower()
    assert "snap-1" in fake.snapshots


def test_an_archive_is_not_written_to_a_terminal(
    fake: Fake, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Terminal:
        def isatty(self) -> bool:
            return True

    monkeypatch.setattr("forkpoint.cli.archives.sys.stdout", Terminal())
    with pytest.raises(ValueError, match="terminal"), archive_to("-"):
        raise AssertionError("nothing is opened")
    assert fake.called("ExportSnapshot") == []
