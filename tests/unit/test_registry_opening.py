"""Opening the registry's file: made, brought up to date, or refused with reason and remedy."""

import asyncio
import os
import sqlite3
import stat
import threading
from pathlib import Path

import pytest

from forkpointd.registry import Registry, RegistryUnusable
from forkpointd.registry.opening import connect_writer
from forkpointd.registry.schema import APPLICATION_ID, MIGRATIONS, migrate, schema_version
from tests.unit.registry_making import sandbox


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "forkpoint.db"


async def fill(path: Path, *sandbox_ids: str) -> None:
    registry = await Registry.open(path)
    await registry.insert_sandboxes([sandbox(sandbox_id) for sandbox_id in sandbox_ids])
    await registry.close()


async def stored(path: Path) -> list[str]:
    registry = await Registry.open(path)
    try:
        return [row.sandbox_id for row in await registry.all_sandboxes()]
    finally:
        await registry.close()


def contents(path: Path) -> bytes | None:
    return path.read_bytes() if path.is_file() else None


def write(path: Path, content: bytes) -> None:
    path.write_bytes(content)


async def refusal(path: Path) -> str:
    """Why the file is refused. Nothing is left running, the file is left as it was."""
    threads = set(threading.enumerate())
    before = contents(path)
    with pytest.raises(RegistryUnusable) as caught:
        await Registry.open(path)
    assert {thread for thread in threading.enumerate() if thread.is_alive()} <= threads
    assert contents(path) == before
    message = str(caught.value)
    assert str(path) in message
    return message


# --- a file that can be used ---


async def test_what_was_written_is_there_after_a_restart(path: Path) -> None:
    await fill(path, "sb-1", "sb-2")
    assert await stored(path) == ["sb-1", "sb-2"]


async def test_the_file_and_its_log_are_private(path: Path) -> None:
    old = os.umask(0)
    try:
        registry = await Registry.open(path)
        await registry.insert_sandboxes([sandbox()])
        modes = {file.name: stat.S_IMODE(file.stat().st_mode) for file in path.parent.iterdir()}
        await registry.close()
    finally:
        os.umask(old)
    assert modes == {f"forkpoint.db{end}": 0o600 for end in ("", "-wal", "-shm")}


@pytest.mark.parametrize(
    "folder",
    [b"d" * 200, b"q?mode=memory", b"h#ash", b"per%63ent", b"sp ace", b"\xff\xfe", "ü".encode()],
    ids=["long", "question mark", "hash", "percent", "space", "no UTF-8", "umlaut"],
)
async def test_any_folder_name_works(tmp_path: Path, folder: bytes) -> None:
    path = Path(os.fsdecode(os.path.join(os.fsencode(tmp_path), folder))) / "forkpoint.db"
    path.parent.mkdir()
    await fill(path, "sb-1")
    assert await stored(path) == ["sb-1"]
    assert [file.name for file in path.parent.iterdir()] == ["forkpoint.db"]


async def test_a_relative_path_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    await fill(Path("forkpoint.db"), "sb-1")
    assert await stored(tmp_path / "forkpoint.db") == ["sb-1"]


# --- migrations ---


def write_version(path: Path, version: int) -> None:
    """A file as the release with so many migrations left it."""
    connection = sqlite3.connect(path, isolation_level=None)
    if version:
        migrate(connection, MIGRATIONS[:version])
    connection.close()


@pytest.mark.parametrize("version", range(len(MIGRATIONS) + 1))
async def test_a_file_of_every_older_release_is_brought_up_to_date(
    path: Path, tmp_path: Path, version: int
) -> None:
    write_version(path, version)
    new = tmp_path / "new.db"
    for each in (path, new):
        await fill(each, "sb-1")
    assert await stored(path) == ["sb-1"]
    schemas = []
    for each in (path, new):
        connection = sqlite3.connect(each)
        assert schema_version(connection) == len(MIGRATIONS)
        schemas.append(
            sorted(connection.execute("SELECT type, name, sql FROM sqlite_master"), key=repr)
        )
        connection.close()
    assert schemas[0] == schemas[1]


OLD = (("CREATE TABLE notes (text TEXT)",),)
NEXT = (*OLD, ("ALTER TABLE notes ADD COLUMN size INTEGER", "UPDATE notes SET size = 7"))
BROKEN = (*NEXT, ("UPDATE notes SET size = 8", "SELECT * FROM missing"))


def test_a_migration_keeps_what_is_there() -> None:
    connection = sqlite3.connect(":memory:", isolation_level=None)
    assert migrate(connection, OLD) == 1
    connection.execute("INSERT INTO notes VALUES ('kept')")
    assert migrate(connection, NEXT) == 1
    assert connection.execute("SELECT * FROM notes").fetchall() == [("kept", 7)]
    assert migrate(connection, NEXT) == 0
    connection.close()


def test_a_migration_that_fails_leaves_the_version_before_it() -> None:
    connection = sqlite3.connect(":memory:", isolation_level=None)
    migrate(connection, OLD)
    connection.execute("INSERT INTO notes VALUES ('kept')")
    with pytest.raises(sqlite3.OperationalError, match="missing"):
        migrate(connection, BROKEN)
    assert schema_version(connection) == 2
    assert connection.execute("SELECT * FROM notes").fetchall() == [("kept", 7)]
    connection.close()


# --- a file that can't ---


async def test_a_newer_releases_file_is_refused_and_left_alone(path: Path) -> None:
    await fill(path, "sb-1")
    connection = sqlite3.connect(path)
    connection.execute(f"PRAGMA user_version = {len(MIGRATIONS) + 1}")
    connection.commit()
    connection.close()
    message = await refusal(path)
    assert "newer forkpoint" in message
    assert f"schema {len(MIGRATIONS) + 1}" in message
    assert "--data-dir" in message


async def test_another_programs_database_is_refused(path: Path) -> None:
    connection = sqlite3.connect(path)
    connection.execute("CREATE TABLE bookmarks (url TEXT)")
    connection.commit()
    connection.close()
    assert "another program" in await refusal(path)


async def test_an_empty_database_that_another_program_marked_is_refused(path: Path) -> None:
    connection = sqlite3.connect(path)
    connection.execute(f"PRAGMA application_id = {APPLICATION_ID + 1}")
    connection.commit()
    connection.close()
    assert "another program" in await refusal(path)


async def test_a_file_that_is_no_database_is_refused_with_the_remedy(path: Path) -> None:
    write(path, b"not a database, but long enough to have a header " * 100)
    message = await refusal(path)
    assert "damaged or no SQLite database" in message
    assert "move forkpoint.db, forkpoint.db-wal and forkpoint.db-shm away" in message


@pytest.mark.parametrize("first_damaged", [1, -1], ids=["all but the header", "one page of rows"])
async def test_a_damaged_file_is_refused_with_the_remedy(path: Path, first_damaged: int) -> None:
    """Also where the damage is in rows that opening has no need to look at."""
    await fill(path, *(f"sb-{index}" for index in range(300)))
    whole = contents(path)
    assert whole is not None
    pages = [whole[start : start + 4096] for start in range(0, len(whole), 4096)]
    pages[first_damaged:] = [b"\xa5" * 64 + page[64:] for page in pages[first_damaged:]]
    write(path, b"".join(pages))
    message = await refusal(path)
    assert "damaged" in message
    assert "backup" in message


async def test_a_folder_in_its_place_is_refused(path: Path) -> None:
    os.mkdir(path)
    assert "it is a folder" in await refusal(path)


async def test_a_missing_folder_is_refused(tmp_path: Path) -> None:
    assert "No such file" in await refusal(tmp_path / "missing" / "forkpoint.db")


async def test_a_file_that_may_not_be_written_is_refused(path: Path) -> None:
    """Not even by root: a file of /proc."""
    os.symlink("/proc/version", path)
    message = await refusal(path)
    assert "check its owner, its mode" in message


async def test_a_file_that_another_program_holds_locked_is_refused(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("forkpointd.registry.opening.BUSY_SECONDS", 0.05)
    await fill(path, "sb-1")
    other = sqlite3.connect(path, isolation_level=None)
    other.execute("PRAGMA locking_mode = EXCLUSIVE")
    other.execute("BEGIN EXCLUSIVE")
    assert "holds it locked" in await refusal(path)
    other.close()
    assert await stored(path) == ["sb-1"]


async def test_an_old_sqlite_is_refused(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sqlite3, "sqlite_version_info", (3, 30, 1))
    with pytest.raises(RegistryUnusable, match="newer Python"):
        connect_writer(path)
    assert contents(path) is None


async def test_an_opening_that_is_cancelled_leaves_nothing_open(path: Path) -> None:
    threads = set(threading.enumerate())
    opening = asyncio.create_task(Registry.open(path))
    await asyncio.sleep(0)
    opening.cancel()
    with pytest.raises(asyncio.CancelledError):
        await opening
    assert set(threading.enumerate()) == threads
    assert await stored(path) == []
