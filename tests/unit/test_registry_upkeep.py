"""Remembered requests, sequences, serials and retention of the registry."""

import asyncio
import itertools
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from forkpointd.model import (
    BranchStage,
    DirtyBase,
    ForkpointError,
    ForkStage,
    Reason,
    RememberedRequest,
    UnmergedDiff,
    now,
)
from forkpointd.registry import SEQUENCE_BLOCK, Registry, RequestSeen, Sequence
from forkpointd.registry.upkeep import SERIAL_BLOCK, STARTS_KEPT, ServerStart
from tests.unit.registry_making import at, branch, fork, key, sandbox


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "forkpoint.db"


@pytest.fixture
async def registry(path: Path) -> AsyncIterator[Registry]:
    registry = await Registry.open(path)
    yield registry
    await registry.close()


async def refused(reason: Reason, awaitable: Any) -> ForkpointError:
    with pytest.raises(ForkpointError) as caught:
        await awaitable
    assert caught.value.reason is reason
    return caught.value


# --- remembered requests ---


@pytest.mark.parametrize("kind", ["sandbox", "branch", "fork"])
async def test_a_repeat_makes_nothing_and_learns_what_was_made(
    registry: Registry, kind: str
) -> None:
    def insert(number: int, request: Any) -> Any:
        if kind == "sandbox":
            return registry.insert_sandboxes([sandbox(f"x-{number}")], request)
        if kind == "branch":
            return registry.insert_branch(branch(f"x-{number}"), fork(f"f{number}"), request)
        return registry.insert_fork(fork(f"x-{number}"), (), request)

    assert await registry.find_request("req-1") is None
    await insert(1, key("req-1"))
    remembered = RememberedRequest("req-1", "M", "f", "x-1")
    assert await registry.find_request("req-1") == remembered
    for number in (1, 2):  # with the same client-chosen id, and with a fresh one of the server
        with pytest.raises(RequestSeen) as seen:
            await insert(number, key("req-1"))
        assert seen.value.remembered == remembered
    for other in (key("req-1", fingerprint="g"), key("req-1", method="N")):
        await refused(Reason.REQUEST_ID_REUSED, insert(2, other))
    assert await registry.get_sandbox("x-2") is None
    assert await registry.get_branch("x-2") is None
    assert await registry.get_fork("x-2") is None
    await insert(2, key("req-2"))


async def test_of_many_repeats_at_once_one_makes_something(registry: Registry) -> None:
    outcomes = await asyncio.gather(
        *(registry.insert_sandboxes([sandbox(f"sb-{n}")], key("req-1")) for n in range(20)),
        return_exceptions=True,
    )
    assert sum(outcome is None for outcome in outcomes) == 1
    assert sum(isinstance(outcome, RequestSeen) for outcome in outcomes) == 19
    assert len(await registry.all_sandboxes()) == 1


async def test_a_refused_call_is_not_remembered(registry: Registry) -> None:
    await registry.insert_sandboxes([sandbox("sb-1")])
    await refused(Reason.ID_TAKEN, registry.insert_sandboxes([sandbox("sb-1")], key("req-1")))
    assert await registry.find_request("req-1") is None
    await registry.insert_sandboxes([sandbox("sb-2")], key("req-1"))


async def test_a_creation_that_left_nothing_can_be_forgotten(registry: Registry) -> None:
    await registry.insert_sandboxes([sandbox("x")], key("req-1"))
    await registry.insert_branch(branch("x"), None, key("req-2"))
    await registry.remove_sandboxes(["x"])
    assert await registry.find_request("req-1") is not None
    await registry.remove_sandboxes(["x"], forget_requests=True)
    assert await registry.find_request("req-1") is None
    assert await registry.find_request("req-2") is not None, "the branch of the same name's"


async def test_requests_are_kept_across_restarts_until_they_expire(path: Path) -> None:
    before = now()
    registry = await Registry.open(path)
    await registry.insert_sandboxes([sandbox("sb-1")], key("req-1"))
    await registry.close()
    registry = await Registry.open(path)
    assert await registry.expire_requests(before) == 0
    with pytest.raises(RequestSeen):
        await registry.insert_sandboxes([sandbox("sb-2")], key("req-1"))
    assert await registry.expire_requests(now()) == 1
    await registry.insert_sandboxes([sandbox("sb-2")], key("req-1"))
    await registry.close()


async def test_a_request_makes_one_sandbox(registry: Registry) -> None:
    with pytest.raises(ValueError, match="makes one sandbox"):
        await registry.insert_sandboxes([sandbox("a"), sandbox("b")], key())


# --- sequences and serials ---


async def test_a_restart_goes_on_above_all_that_was_ever_shown(path: Path) -> None:
    registry = await Registry.open(path)
    await registry.insert_branch(branch("open"))
    await registry.insert_branch(branch("ended", sequence=7, stage=BranchStage.READY))
    await registry.insert_fork(fork("open"))
    await registry.put_branch(branch("open", snapshot_id="snap-of-open", sequence=5))
    sequence = Sequence(5)
    shown = [sequence.next() for _ in range(1000)]
    await registry.close()
    for start in (1, 2):
        registry = await Registry.open(path)
        (row,) = await registry.unfinished_branches()
        assert row.sequence >= 5 + start * SEQUENCE_BLOCK
        assert row.sequence > max(number for number in shown if number is not None)
        assert await registry.get_branch("open") == row
        (children,) = await registry.unfinished_forks()
        assert children.sequence >= 1 + start * SEQUENCE_BLOCK
        ended = await registry.get_branch("ended")
        assert ended is not None and ended.sequence == 7, "its last message was stored"
        await registry.close()


async def test_a_sequence_never_goes_back(registry: Registry) -> None:
    work, children = branch("br-1", sequence=5), fork("f", sequence=5)
    await registry.insert_branch(work)
    await registry.insert_fork(children)
    with pytest.raises(AssertionError, match="sequence 4 after 5"):
        await registry.put_branch(replace(work, sequence=4))
    with pytest.raises(AssertionError, match="sequence 4 after 5"):
        await registry.put_fork(replace(children, sequence=4))
    await registry.put_branch(replace(work, mode_reason="the same sequence is fine"))


def test_memory_runs_ahead_of_the_row_by_a_block_at_most() -> None:
    sequence = Sequence(10)
    given = []
    while (number := sequence.next()) is not None:
        given.append(number)
    assert given == list(range(11, 10 + SEQUENCE_BLOCK + 1))
    assert sequence.value == given[-1]
    put = sequence.above()
    assert put > given[-1]
    with pytest.raises(AssertionError, match="after"):
        sequence.stored(given[-1] - 1)
    sequence.stored(put)
    assert sequence.next() == put + 1


async def test_serials_never_repeat(path: Path) -> None:
    seen: list[int] = []
    for _ in range(3):
        registry = await Registry.open(path)
        before = registry.writes.operations
        seen += await asyncio.gather(*(registry.next_serial() for _ in range(50)))
        assert registry.writes.operations - before == 1, "a commit a block, not a number"
        await registry.close()
    assert len(set(seen)) == 150
    assert min(seen) == 1


async def test_serials_go_on_after_a_block(registry: Registry) -> None:
    serials = [await registry.next_serial() for _ in range(2 * SERIAL_BLOCK + 1)]
    assert serials == list(range(1, 2 * SERIAL_BLOCK + 2))


async def test_a_caller_that_leaves_while_serials_are_taken_harms_nobody(
    registry: Registry,
) -> None:
    calls = [asyncio.create_task(registry.next_serial()) for _ in range(5)]
    await asyncio.sleep(0)
    calls[0].cancel()
    outcomes = await asyncio.gather(*calls, return_exceptions=True)
    assert isinstance(outcomes[0], asyncio.CancelledError)
    assert len({*outcomes[1:], await registry.next_serial()}) == 5


# --- upkeep ---


async def test_what_ended_long_ago_is_pruned(registry: Registry) -> None:
    for index in range(3):
        ended = at(index)
        await registry.insert_branch(
            replace(
                branch(f"br-{index}", stage=BranchStage.READY, fork_id=f"f-{index}x"),
                end_time=ended,
            ),
            replace(fork(f"f-{index}x", stage=ForkStage.READY), end_time=at(0)),
        )
    await registry.insert_fork(replace(fork("alone", stage=ForkStage.READY), end_time=at(0)))
    await registry.insert_branch(branch("running"))
    await registry.insert_fork(fork("running"))
    assert await registry.prune_ended(at(0)) == 0
    assert await registry.prune_ended(at(1.5)) == 5
    page = await registry.list_branches(page_size=10)
    assert [row.branch_id for row in page.items] == ["br-2", "running"]
    for fork_id, there in [("f-0x", 0), ("f-1x", 0), ("f-2x", 1), ("alone", 0), ("running", 1)]:
        assert (await registry.get_fork(fork_id) is not None) is bool(there), fork_id
    children = await registry.read(
        lambda c: c.execute("SELECT DISTINCT fork_id FROM fork_children").fetchall()
    )
    assert {row[0] for row in children} == {"f-2x", "running"}, "children go with their fork"


async def test_a_branch_whose_diff_a_sandbox_keeps_is_not_pruned(registry: Registry) -> None:
    for name in ("br-1", "br-2", "br-3"):
        await registry.insert_branch(
            replace(branch(name, stage=BranchStage.FAILED, fork_id=f"f-{name}"), end_time=at(0)),
            replace(fork(f"f-{name}", stage=ForkStage.FAILED), end_time=at(0)),
        )
    kept = tuple(UnmergedDiff(Path("/d"), Path("/e"), 1, name) for name in ("br-1", "br-3"))
    source = sandbox("sb-1", dirty_base=replace(DirtyBase.of("snap-0"), unmerged=kept))
    await registry.insert_sandboxes([source, sandbox("sb-2")])
    assert await registry.prune_ended(at(1)) == 2
    page = await registry.list_branches(page_size=9)
    assert [row.branch_id for row in page.items] == ["br-1", "br-3"]
    assert await registry.get_fork("f-br-1") is not None
    await registry.put_sandbox(replace(source, dirty_base=DirtyBase.of("snap-1")))
    assert await registry.prune_ended(at(1)) == 4
    assert (await registry.list_branches(page_size=9)).items == ()


async def test_a_thousand_are_pruned_in_parts(registry: Registry) -> None:
    def insert(connection: Any) -> None:
        connection.execute(
            "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < 1200)"
            " INSERT INTO forks SELECT 'f-' || i, 's', 1, 1, 'READY', '{}', '', NULL, NULL, ''"
            " FROM n"
        )

    await registry.write(insert)
    before = registry.writes.operations
    assert await registry.prune_ended(at(0)) == 1200
    assert registry.writes.operations - before == 4, "500, 500, 200, none"


async def test_the_start_before_this_one_is_known(path: Path) -> None:
    starts = [ServerStart(at(n), f"boot-{n}", "0.1.0", n) for n in range(STARTS_KEPT + 5)]
    registry = await Registry.open(path)
    assert await registry.note_start(starts[0]) is None
    await registry.close()
    registry = await Registry.open(path)
    for before, start in itertools.pairwise(starts):
        assert await registry.note_start(start) == before
    count = await registry.read(lambda c: c.execute("SELECT count(*) FROM server").fetchone()[0])
    assert count == STARTS_KEPT
    await registry.close()
