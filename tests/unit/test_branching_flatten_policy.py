"""Which layers the server flattens by itself."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime, timedelta

import pytest

from forkpointd.branching import flatten_policy
from forkpointd.branching.flatten_policy import FlattenPolicy, flatten_as_due
from forkpointd.model import ForkpointError, LayeredRow, Reason

START = datetime(2026, 1, 1, tzinfo=UTC)
NEVER = timedelta(0)
HOUR = timedelta(hours=1)


def row(name: str, parent: str, *, held: int = 10, deleted: bool = False) -> LayeredRow:
    return LayeredRow(name, parent, held, START, deleted)


def chain(length: int) -> list[LayeredRow]:
    """`l1` on `root`, `l2` on `l1`, and so on."""
    return [row(f"l{n}", f"l{n - 1}" if n > 1 else "root") for n in range(1, length + 1)]


def due(rows: list[LayeredRow], **policy: object) -> list[str]:
    settings = {"max_depth": 0, "max_chain_bytes": 0, "max_age": NEVER, **policy}
    return FlattenPolicy(**settings).due(rows, START + HOUR)  # type: ignore[arg-type]


def test_without_a_reason_nothing_is_due() -> None:
    assert due(chain(1000)) == []
    assert due([], max_depth=1, max_chain_bytes=1, max_age=HOUR) == []


@pytest.mark.parametrize(
    ("length", "expected"),
    [(31, []), (32, ["l32"]), (33, ["l32"]), (100, ["l32", "l64", "l96"])],
)
def test_the_depth_of_a_chain_is_bounded(length: int, expected: list[str]) -> None:
    assert due(chain(length), max_depth=32) == expected


def test_the_order_of_the_rows_does_not_matter() -> None:
    assert due(chain(100)[::-1], max_depth=32) == ["l32", "l64", "l96"]


def test_a_chain_that_holds_much_is_flattened_where_it_does() -> None:
    rows = [row("l1", "root", held=40), row("l2", "l1", held=59), row("l3", "l2", held=1)]
    assert due([*rows, row("l4", "l3", held=99)], max_chain_bytes=100) == ["l3"]


def test_of_an_old_chain_only_the_end_is_due() -> None:
    assert due(chain(5), max_age=HOUR) == ["l5"]
    assert due(chain(5), max_age=HOUR + timedelta(seconds=1)) == []


def test_a_deleted_end_is_nothing_to_be_ready_for_but_counts_in_its_chain() -> None:
    rows = [*chain(3), row("l4", "l3", deleted=True)]
    assert due(rows, max_age=HOUR) == []
    assert due(rows, max_depth=4) == ["l4"]


def test_branches_of_a_chain_are_chains_of_their_own() -> None:
    rows = [*chain(3), row("other", "l2"), row("more", "other")]
    assert sorted(due(rows, max_depth=3)) == ["l3", "other"]
    assert sorted(due(rows, max_age=HOUR)) == ["l3", "more"]


class Parts:
    """The registry and the flattener, as the policy sees them."""

    def __init__(self, rows: list[LayeredRow]) -> None:
        self.rows = rows
        self.asked: list[str] = []
        self.fails: dict[str, Exception] = {}
        self.looks = 0
        self.broken = False

    async def layered_snapshots(self) -> list[LayeredRow]:
        self.looks += 1
        if self.broken:
            raise OSError("no registry")
        return self.rows

    async def flatten(self, snapshot_id: str) -> None:
        self.asked.append(snapshot_id)
        if snapshot_id in self.fails:
            raise self.fails[snapshot_id]
        self.rows = [each for each in self.rows if each.snapshot_id != snapshot_id]


async def looked(parts: Parts, times: int) -> None:
    """Runs the policy until it has looked so often once more."""
    policy = FlattenPolicy(max_depth=2, max_chain_bytes=0, max_age=NEVER)
    task = asyncio.create_task(flatten_as_due(policy, parts, parts))  # type: ignore[arg-type]
    async with asyncio.timeout(10):
        while parts.looks < times + 1:
            await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


@pytest.fixture
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flatten_policy, "LOOK_SECONDS", 0)


@pytest.mark.usefixtures("at_once")
async def test_what_failed_is_left_for_a_while_and_the_rest_is_done(
    caplog: pytest.LogCaptureFixture,
) -> None:
    parts = Parts([*chain(2), row("a1", "a"), row("a2", "a1")])
    parts.fails["a2"] = ForkpointError(Reason.NO_DISK_SPACE, "no room")
    await looked(parts, 3)
    assert sorted(parts.asked) == ["a2", "l2"]
    assert caplog.messages == ["layered snapshot a2 stays so: no room"]


@pytest.mark.usefixtures("at_once")
async def test_what_failed_is_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flatten_policy, "RETRY_SECONDS", 0)
    parts = Parts(chain(2))
    parts.fails["l2"] = RuntimeError("what nobody thought of")
    await looked(parts, 3)
    assert parts.asked[:2] == ["l2", "l2"]


@pytest.mark.usefixtures("at_once")
async def test_a_snapshot_that_is_gone_is_no_failure(caplog: pytest.LogCaptureFixture) -> None:
    parts = Parts(chain(2))
    parts.fails["l2"] = ForkpointError(Reason.SNAPSHOT_NOT_FOUND, "gone")
    await looked(parts, 2)
    assert not caplog.messages


@pytest.mark.usefixtures("at_once")
async def test_a_registry_that_fails_does_not_end_the_policy() -> None:
    parts = Parts(chain(2))
    parts.broken = True
    await looked(parts, 2)
    parts.broken = False
    await looked(parts, parts.looks + 1)
    assert parts.asked == ["l2"]
