"""The registry's threads: many writes share a commit, each fails alone, a failed commit fails all,
and nothing of it happens on the event loop's thread."""

import asyncio
import logging
import os
import sqlite3
import sys
import threading
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any, TypeVar

import pytest

from forkpointd.model import ForkpointError, Reason
from forkpointd.registry import Registry, RegistryClosed, RegistryFault
from forkpointd.registry.lanes import WriteLane
from tests.unit.registry_making import sandbox

T = TypeVar("T")


@pytest.fixture
async def registry(tmp_path: Path) -> AsyncIterator[Registry]:
    registry = await Registry.open(tmp_path / "forkpoint.db")
    yield registry
    await registry.close()


class Gate:
    """An operation that keeps its lane busy until it is opened."""

    def __init__(self, registry_or_lane: Any) -> None:
        self._entered = asyncio.Event()
        self._open = threading.Event()
        self._loop = asyncio.get_running_loop()
        run = registry_or_lane.write if isinstance(registry_or_lane, Registry) else None
        self.task = asyncio.create_task((run or registry_or_lane.run)(self._wait))

    def _wait(self, connection: sqlite3.Connection) -> None:
        self._loop.call_soon_threadsafe(self._entered.set)
        assert self._open.wait(60)

    async def entered(self) -> None:
        await self._entered.wait()

    async def open(self) -> None:
        self._open.set()
        await self.task


async def settle(tasks: list[asyncio.Task[Any]]) -> None:
    """Lets tasks run up to where they wait."""
    for _ in range(3):
        await asyncio.sleep(0)
    assert all(not task.done() for task in tasks)


def fail(connection: sqlite3.Connection) -> None:
    connection.execute("DELETE FROM sandboxes")
    raise LookupError("mine alone")


def note(seen: list[T], what: T) -> Callable[[sqlite3.Connection], None]:
    return lambda connection: seen.append(what)


def break_the_commit(connection: sqlite3.Connection) -> None:
    """Leaves a violation that SQLite only looks for in COMMIT."""
    connection.execute("PRAGMA defer_foreign_keys = ON")
    connection.execute(
        "INSERT INTO fork_children (fork_id, child_index, sandbox_id, state)"
        " VALUES ('no-such-fork', 0, 'x', 'PENDING')"
    )


def ids(rows: list[Any]) -> list[str]:
    return sorted(row.sandbox_id for row in rows)


# --- group commit ---


async def test_a_hundred_writes_that_wait_share_one_commit(registry: Registry) -> None:
    gate = Gate(registry)
    await gate.entered()
    before = registry.writes.transactions
    writes = [
        asyncio.create_task(registry.insert_sandboxes([sandbox(f"sb-{index}")]))
        for index in range(100)
    ]
    await settle(writes)
    await gate.open()
    await asyncio.gather(*writes)
    assert registry.writes.transactions - before == 2  # the gate's, and theirs
    assert len(await registry.all_sandboxes()) == 100


async def test_a_hundred_concurrent_writes_need_few_commits(registry: Registry) -> None:
    """As above, but with nothing that holds them up."""
    before = registry.writes.transactions
    await asyncio.gather(
        *(registry.insert_sandboxes([sandbox(f"sb-{index}")]) for index in range(100))
    )
    assert 1 <= registry.writes.transactions - before <= 10


async def test_writes_run_in_the_order_in_which_they_were_handed_over(registry: Registry) -> None:
    seen: list[int] = []
    await asyncio.gather(*(registry.write(note(seen, number)) for number in range(50)))
    assert seen == list(range(50))


async def test_a_write_that_has_returned_is_there_for_every_reader(registry: Registry) -> None:
    for index in range(20):
        await registry.insert_sandboxes([sandbox(f"sb-{index}")])
        assert await registry.get_sandbox(f"sb-{index}") is not None


async def test_every_commit_is_synced_to_the_disk(registry: Registry) -> None:
    synchronous = await registry.write(lambda c: c.execute("PRAGMA synchronous").fetchone()[0])
    journal = await registry.write(lambda c: c.execute("PRAGMA journal_mode").fetchone()[0])
    foreign = await registry.write(lambda c: c.execute("PRAGMA foreign_keys").fetchone()[0])
    assert (synchronous, journal, foreign) == (2, "wal", 1)  # 2 is FULL


# --- failures ---


async def test_an_operation_that_fails_is_undone_alone(registry: Registry) -> None:
    await registry.insert_sandboxes([sandbox("sb-old")])
    gate = Gate(registry)
    await gate.entered()
    tasks = [
        asyncio.create_task(registry.insert_sandboxes([sandbox("sb-a")])),
        asyncio.create_task(registry.write(fail)),
        asyncio.create_task(registry.insert_sandboxes([sandbox("sb-b")])),
    ]
    await settle(tasks)
    before = registry.writes.transactions
    await gate.open()
    outcomes = await asyncio.gather(*tasks, return_exceptions=True)
    assert registry.writes.transactions - before == 2
    assert [type(outcome) for outcome in outcomes] == [type(None), LookupError, type(None)]
    assert ids(await registry.all_sandboxes()) == ["sb-a", "sb-b", "sb-old"]


async def test_a_commit_that_fails_fails_all_of_its_group_and_no_other(registry: Registry) -> None:
    await registry.insert_sandboxes([sandbox("sb-old")])
    gate = Gate(registry)
    await gate.entered()
    tasks: list[asyncio.Task[Any]] = [
        asyncio.create_task(registry.insert_sandboxes([sandbox("sb-a")])),
        asyncio.create_task(registry.write(break_the_commit)),
        asyncio.create_task(registry.write(fail)),
    ]
    await settle(tasks)
    await gate.open()
    outcomes = await asyncio.gather(*tasks, return_exceptions=True)
    assert [type(outcome) for outcome in outcomes] == [RegistryFault, RegistryFault, LookupError]
    assert registry.writes.failed_transactions == 1
    assert ids(await registry.all_sandboxes()) == ["sb-old"]
    await registry.insert_sandboxes([sandbox("sb-a")])
    assert ids(await registry.all_sandboxes()) == ["sb-a", "sb-old"]


async def test_an_operation_that_ends_the_transaction_itself_takes_nobody_with_it(
    registry: Registry,
) -> None:
    """A mistake of ours must not become a lane that hangs or a success that isn't one."""
    with pytest.raises(RegistryFault):
        await registry.write(lambda c: c.execute("ROLLBACK"))
    await registry.insert_sandboxes([sandbox("sb-a")])
    assert ids(await registry.all_sandboxes()) == ["sb-a"]


async def test_a_full_file_is_no_disk_space_and_leaves_what_was_there(registry: Registry) -> None:
    await registry.insert_sandboxes([sandbox("sb-old")])
    await registry.write(lambda c: c.execute("PRAGMA max_page_count = 1").fetchall())
    large = sandbox("sb-large", labels={"a": "x" * 1_000_000})
    with pytest.raises(ForkpointError, match=r"disk .* is full") as caught:
        await registry.insert_sandboxes([large])
    assert caught.value.reason is Reason.NO_DISK_SPACE
    assert ids(await registry.all_sandboxes()) == ["sb-old"]
    await registry.write(lambda c: c.execute("PRAGMA max_page_count = 1000000").fetchall())
    await registry.insert_sandboxes([large])
    assert ids(await registry.all_sandboxes()) == ["sb-large", "sb-old"]


async def test_an_operation_may_raise_anything(registry: Registry) -> None:
    def stop(connection: sqlite3.Connection) -> None:
        raise StopIteration

    def leave(connection: sqlite3.Connection) -> None:
        raise SystemExit(3)

    with pytest.raises(RuntimeError, match="StopIteration"):
        await registry.write(stop)
    with pytest.raises(RuntimeError, match="SystemExit"):
        await registry.read(leave)
    assert await registry.all_sandboxes() == []


async def test_a_reader_can_change_nothing(registry: Registry) -> None:
    with pytest.raises(RegistryFault, match="can't be read: attempt to write"):
        await registry.read(lambda c: c.execute("DELETE FROM sandboxes"))


async def test_a_wrong_query_fails_its_caller_alone(registry: Registry) -> None:
    await registry.insert_sandboxes([sandbox("sb-a")])
    outcomes = await asyncio.gather(
        registry.read(lambda c: c.execute("SELECT nonsense")),
        registry.all_sandboxes(),
        return_exceptions=True,
    )
    assert isinstance(outcomes[0], RegistryFault)
    assert outcomes[1] == [sandbox("sb-a")]


# --- the event loop ---


async def test_reads_do_not_wait_for_a_write(registry: Registry) -> None:
    await registry.insert_sandboxes([sandbox("sb-a")])
    gate = Gate(registry)
    await gate.entered()
    late = asyncio.create_task(registry.insert_sandboxes([sandbox("sb-b")]))
    await settle([late])
    assert ids(await registry.all_sandboxes()) == ["sb-a"]
    assert not gate.task.done()
    await gate.open()
    await late
    assert ids(await registry.all_sandboxes()) == ["sb-a", "sb-b"]


_watched_thread: int | None = None
_events: list[str] = []


def _audit(event: str, arguments: tuple[Any, ...]) -> None:
    if _watched_thread == threading.get_ident() and event.startswith(("open", "sqlite3", "os.")):
        _events.append(event)


async def test_nothing_is_opened_or_read_on_the_loops_thread(tmp_path: Path) -> None:
    global _watched_thread
    sys.addaudithook(_audit)
    threads: set[int] = set()
    _events.clear()
    _watched_thread = threading.get_ident()
    try:
        registry = await Registry.open(tmp_path / "forkpoint.db")
        await registry.insert_sandboxes([sandbox("sb-a")])
        await registry.get_sandbox("sb-a")
        await registry.next_serial()
        await registry.write(lambda c: threads.add(threading.get_ident()))
        await registry.read(lambda c: threads.add(threading.get_ident()))
        await registry.close()
    finally:
        _watched_thread = None
    assert _events == []
    assert len(threads) == 2
    assert threading.get_ident() not in threads


# --- callers that leave, bounds, the end ---


async def test_a_caller_that_is_cancelled_does_not_undo_its_write(registry: Registry) -> None:
    gate = Gate(registry)
    await gate.entered()
    write = asyncio.create_task(registry.insert_sandboxes([sandbox("sb-a")]))
    await settle([write])
    write.cancel()
    await gate.open()
    with pytest.raises(asyncio.CancelledError):
        await write
    await registry.write(lambda c: None)
    assert ids(await registry.all_sandboxes()) == ["sb-a"]


async def test_a_failure_that_nobody_waits_for_is_logged(
    registry: Registry, caplog: pytest.LogCaptureFixture
) -> None:
    gate = Gate(registry)
    await gate.entered()
    write = asyncio.create_task(registry.write(fail))
    await settle([write])
    write.cancel()
    with caplog.at_level(logging.WARNING, "forkpointd.registry"):
        await gate.open()
        await registry.write(lambda c: None)
    assert "failed after its caller left" in caplog.text
    assert "mine alone" in caplog.text


async def test_the_queue_is_bounded_and_who_waits_for_room_can_still_leave() -> None:
    lane = WriteLane(
        "small", lambda: sqlite3.connect(":memory:", isolation_level=None), queue_limit=2
    )
    await lane.start()
    ran: list[str] = []
    gate = Gate(lane)
    await gate.entered()
    handed_over = asyncio.create_task(lane.run(note(ran, "handed over")))
    waiting = [
        asyncio.create_task(lane.run(note(ran, name))) for name in ("first", "second", "third")
    ]
    await settle([handed_over, *waiting])
    handed_over.cancel()
    waiting[1].cancel()
    await gate.open()
    await asyncio.gather(handed_over, *waiting, return_exceptions=True)
    await lane.close()
    assert ran == ["handed over", "first", "third"]
    assert waiting[1].cancelled()


async def test_close_finishes_what_was_handed_over_and_takes_no_more(tmp_path: Path) -> None:
    registry = await Registry.open(tmp_path / "forkpoint.db")
    gate = Gate(registry)
    await gate.entered()
    writes = [
        asyncio.create_task(registry.insert_sandboxes([sandbox(f"sb-{index}")]))
        for index in range(1500)  # more than the queue holds
    ]
    await settle(writes)
    closing = asyncio.create_task(registry.close())
    await settle([closing])
    with pytest.raises(RegistryClosed):
        await registry.insert_sandboxes([sandbox("sb-late")])
    await gate.open()
    await asyncio.gather(closing, *writes)
    with pytest.raises(RegistryClosed):
        await registry.all_sandboxes()
    await registry.close()
    assert os.listdir(tmp_path) == ["forkpoint.db"], "the log is emptied"
    reopened = await Registry.open(tmp_path / "forkpoint.db")
    assert len(await reopened.all_sandboxes()) == 1500
    await reopened.close()


async def test_no_thread_is_left(tmp_path: Path) -> None:
    before = set(threading.enumerate())
    registry = await Registry.open(tmp_path / "forkpoint.db")
    assert {thread.name for thread in set(threading.enumerate()) - before} == {
        "registry writer",
        "registry reader",
    }
    await registry.close()
    assert set(threading.enumerate()) == before
