"""Sandboxes and snapshots in the registry: inserted, replaced, listed, removed, and what keeps a
deleted snapshot's files."""

import sqlite3
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from forkpointd.model import (
    BranchStage,
    DirtyBase,
    ForkChildState,
    ForkpointError,
    ForkStage,
    Layout,
    Page,
    Reason,
    Sandbox,
    SandboxState,
    Snapshot,
    UnmergedDiff,
    WishedState,
)
from forkpointd.registry import Registry, branches, requests, sandboxes, snapshots
from tests.unit.registry_making import at, branch, fork, sandbox, snapshot


@pytest.fixture
async def registry(tmp_path: Path) -> AsyncIterator[Registry]:
    registry = await Registry.open(tmp_path / "forkpoint.db")
    yield registry
    await registry.close()


async def refused(reason: Reason, awaitable: Any) -> ForkpointError:
    with pytest.raises(ForkpointError) as caught:
        await awaitable
    assert caught.value.reason is reason
    return caught.value


# --- sandboxes ---


async def test_a_sandbox_is_found_as_it_was_inserted_and_put(registry: Registry) -> None:
    first = sandbox("sb-1", labels={"a": "1"})
    await registry.insert_sandboxes([first])
    assert await registry.get_sandbox("sb-1") == first
    second = replace(first, wished_state=WishedState.PAUSED, dirty_base=DirtyBase.invalid("why"))
    await registry.put_sandbox(second)
    assert await registry.get_sandbox("sb-1") == second
    assert await registry.all_sandboxes() == [second]
    assert await registry.get_sandbox("sb-2") is None


async def test_a_taken_id_refuses_all_of_an_insert(registry: Registry) -> None:
    await registry.insert_sandboxes([sandbox("sb-2", labels={"old": ""})])
    error = await refused(
        Reason.ID_TAKEN, registry.insert_sandboxes([sandbox("sb-1"), sandbox("sb-2")])
    )
    assert error.problem.metadata == {"sandbox_id": "sb-2"}
    assert "sb-2" in str(error)
    assert await registry.all_sandboxes() == [sandbox("sb-2", labels={"old": ""})]


async def test_an_id_twice_in_one_insert_is_taken(registry: Registry) -> None:
    await refused(Reason.ID_TAKEN, registry.insert_sandboxes([sandbox("a"), sandbox("a")]))
    assert await registry.all_sandboxes() == []


async def test_a_late_change_does_not_bring_a_removed_sandbox_back(registry: Registry) -> None:
    await registry.insert_sandboxes([sandbox("sb-1"), sandbox("sb-2")])
    assert await registry.remove_sandboxes(["sb-1", "never"]) == 1
    paused = sandbox("sb-2", state=SandboxState.PAUSED)
    error = await refused(
        Reason.SANDBOX_NOT_FOUND, registry.put_sandboxes([paused, sandbox("sb-1")])
    )
    assert error.problem.metadata == {"sandbox_id": "sb-1"}
    assert await registry.all_sandboxes() == [sandbox("sb-2")], "all or none"


async def test_thousands_are_removed_at_once(registry: Registry) -> None:
    names = [f"sb-{index}" for index in range(2500)]
    await registry.insert_sandboxes([sandbox(name) for name in names])
    assert await registry.remove_sandboxes(names) == 2500
    assert await registry.all_sandboxes() == []


async def test_the_id_of_a_child_that_a_fork_will_start_is_taken(registry: Registry) -> None:
    """So that the ids that were fixed at admission are there when the children start."""
    waiting = fork("f", count=2)
    await registry.insert_fork(waiting)
    error = await refused(Reason.ID_TAKEN, registry.insert_sandboxes([sandbox("f-1")]))
    assert "started by fork f" in str(error)
    await refused(Reason.ID_TAKEN, registry.insert_sandboxes([sandbox("f-1", fork_id="other")]))
    await registry.insert_sandboxes([sandbox("f-1", fork_id="f")])
    children = tuple(replace(child, state=ForkChildState.FAILED) for child in waiting.children)
    ended = replace(waiting, sequence=2, stage=ForkStage.FAILED, children=children, end_time=at(1))
    await registry.put_fork(ended)
    await registry.insert_sandboxes([sandbox("f-0")])


async def test_the_id_of_a_child_that_will_not_be_started_any_more_is_free(
    registry: Registry,
) -> None:
    row = fork("f", count=2)
    await registry.insert_fork(row)
    failed = replace(row.children[0], state=ForkChildState.FAILED)
    row = replace(row, sequence=2, children=(failed, row.children[1]))
    await registry.put_fork(row)
    await registry.insert_sandboxes([sandbox("f-0")])
    await refused(Reason.ID_TAKEN, registry.insert_sandboxes([sandbox("f-1")]))
    await registry.put_fork(replace(row, sequence=3, stage=ForkStage.FAILED, end_time=at(1)))
    await registry.insert_sandboxes([sandbox("f-1")])


# --- snapshots ---


async def test_a_snapshot_is_found_until_it_is_deleted(registry: Registry) -> None:
    row = snapshot("snap-1", parent_snapshot_id="snap-0")
    await registry.insert_snapshot(row)
    assert await registry.get_snapshot("snap-1") == row
    labelled = replace(row, labels={"a": "b"})
    await registry.put_snapshot(labelled)
    await registry.mark_snapshot_deleted("snap-1")
    await registry.mark_snapshot_deleted("snap-1")
    assert await registry.get_snapshot("snap-1") is None
    tombstone = replace(labelled, deleted=True)
    assert await registry.get_snapshot("snap-1", include_deleted=True) == tombstone
    assert (await registry.list_snapshots(page_size=10)).items == ()
    await refused(Reason.SNAPSHOT_NOT_FOUND, registry.put_snapshot(row))
    error = await refused(Reason.ID_TAKEN, registry.insert_snapshot(row))
    assert "still stand on it" in str(error)
    await registry.remove_snapshot_row("snap-1")
    await registry.remove_snapshot_row("snap-1")
    assert await registry.get_snapshot("snap-1", include_deleted=True) is None
    await registry.insert_snapshot(row)
    await refused(Reason.ID_TAKEN, registry.insert_snapshot(row))


async def test_a_snapshot_that_is_not_there_can_not_be_changed(registry: Registry) -> None:
    await refused(Reason.SNAPSHOT_NOT_FOUND, registry.put_snapshot(snapshot()))
    await refused(Reason.SNAPSHOT_NOT_FOUND, registry.mark_snapshot_deleted("snap-1"))


async def test_the_row_of_a_living_snapshot_is_never_removed(registry: Registry) -> None:
    await registry.insert_snapshot(snapshot("snap-1"))
    with pytest.raises(AssertionError, match="no tombstone"):
        await registry.remove_snapshot_row("snap-1")
    assert await registry.get_snapshot("snap-1") is not None


DIFF = UnmergedDiff(Path("/d"), Path("/e"), 1, "br-1")


@pytest.mark.parametrize(
    ("base", "needed"),
    [
        (DirtyBase.of("snap-1"), True),
        (DirtyBase.of("snap-1").pending("br-1"), True),
        (replace(DirtyBase.of("snap-1"), unmerged=(DIFF,)), True),
        (DirtyBase.of("snap-2"), False),
        (DirtyBase.empty(), False),
        (DirtyBase.invalid("gone"), False),
    ],
)
@pytest.mark.parametrize("state", list(SandboxState))
async def test_a_deleted_snapshot_stays_while_a_sandbox_stands_on_it(
    registry: Registry, base: DirtyBase, needed: bool, state: SandboxState
) -> None:
    await registry.insert_snapshot(snapshot("snap-1"))
    await registry.insert_sandboxes([sandbox("sb-1", state=state, dirty_base=base)])
    assert await registry.snapshots_nobody_needs() == [], "it is not deleted"
    await registry.mark_snapshot_deleted("snap-1")
    assert await registry.snapshots_nobody_needs() == ([] if needed else ["snap-1"])
    await registry.remove_sandboxes(["sb-1"])
    assert await registry.snapshots_nobody_needs() == ["snap-1"]


async def test_a_deleted_snapshot_goes_when_the_last_of_its_children_has_branched(
    registry: Registry,
) -> None:
    await registry.insert_snapshot(snapshot("snap-1"))
    children = [sandbox(f"sb-{index}", dirty_base=DirtyBase.of("snap-1")) for index in range(2)]
    await registry.insert_sandboxes(children)
    await registry.mark_snapshot_deleted("snap-1")
    for index, left in enumerate([[], ["snap-1"]]):
        await registry.put_sandbox(replace(children[index], dirty_base=DirtyBase.of("snap-2")))
        assert await registry.snapshots_nobody_needs() == left


def layer(number: int) -> Snapshot:
    """`snap-1` and on, each on the one before; `snap-0` is flat."""
    parent = f"snap-{number - 1}"
    layout = Layout.LAYERED if number else Layout.FLAT
    return snapshot(f"snap-{number}", layout=layout, parent_snapshot_id=parent)


async def test_a_deleted_snapshot_stays_while_a_layer_stands_on_it(registry: Registry) -> None:
    for number in range(4):
        await registry.insert_snapshot(layer(number))
    for number in (0, 1, 2):
        await registry.mark_snapshot_deleted(f"snap-{number}")
    assert await registry.snapshots_nobody_needs() == []
    await registry.snapshot_is_flat("snap-2", disk_bytes=77)
    assert await registry.snapshots_nobody_needs() == ["snap-1"], "what it stood on is next"
    flat = await registry.get_snapshot("snap-2", include_deleted=True)
    assert flat is not None
    assert (flat.layout, flat.disk_bytes, flat.deleted) == (Layout.FLAT, 77, True)
    await registry.remove_snapshot_row("snap-1")
    assert await registry.snapshots_nobody_needs() == ["snap-0"]
    await registry.mark_snapshot_deleted("snap-3")
    assert await registry.snapshots_nobody_needs() == ["snap-0", "snap-3"]


async def test_a_deleted_snapshot_stays_while_a_branch_makes_a_layer_over_it(
    registry: Registry,
) -> None:
    await registry.insert_snapshot(snapshot("snap-1"))
    merging = branch(
        "br-1", stage=BranchStage.MERGING, layout=Layout.LAYERED, base_snapshot_id="snap-1"
    )
    await registry.insert_branch(merging)
    await registry.mark_snapshot_deleted("snap-1")
    assert await registry.snapshots_nobody_needs() == []
    await registry.put_branch(replace(merging, layout=Layout.FLAT, sequence=2))
    assert await registry.snapshots_nobody_needs() == ["snap-1"], "what is copied needs it no more"
    await registry.put_branch(replace(merging, sequence=3))
    ended = replace(merging, sequence=4, stage=BranchStage.FAILED, end_time=at(1))
    await registry.put_branch(ended)
    assert await registry.snapshots_nobody_needs() == ["snap-1"]


async def test_the_chain_of_a_snapshot_ends_at_what_is_flat(registry: Registry) -> None:
    for number in range(1001):
        await registry.insert_snapshot(layer(number))
    await registry.mark_snapshot_deleted("snap-500")
    chain = await registry.chain_of_snapshot("snap-1000")
    assert chain == [f"snap-{number}" for number in range(1000, -1, -1)]
    await registry.snapshot_is_flat("snap-997", disk_bytes=1)
    assert await registry.chain_of_snapshot("snap-999") == ["snap-999", "snap-998", "snap-997"]
    assert await registry.chain_of_snapshot("no-such") == []
    each = layer(1).disk_bytes
    assert each > 1
    assert await registry.bytes_of_chain("snap-999") == 2 * each + 1
    assert await registry.bytes_of_chain("no-such") == 0


async def test_a_deleted_snapshot_stays_while_a_fork_will_start_children_from_it(
    registry: Registry,
) -> None:
    await registry.insert_snapshot(snapshot("snap-1"))
    starting = fork("f", count=1, snapshot_id="snap-1", stage=ForkStage.STARTING)
    await registry.insert_fork(starting)
    await registry.mark_snapshot_deleted("snap-1")
    assert await registry.snapshots_nobody_needs() == []
    await registry.put_fork(replace(starting, sequence=2, stage=ForkStage.READY, end_time=at(1)))
    assert await registry.snapshots_nobody_needs() == ["snap-1"]


# --- pages ---


async def all_pages(registry: Registry, page_size: int, **filters: Any) -> list[Page[Sandbox]]:
    pages = [await registry.list_sandboxes(page_size=page_size, after=None, **filters)]
    while (position := pages[-1].next_position) is not None:
        pages.append(await registry.list_sandboxes(page_size=page_size, after=position, **filters))
    return pages


@settings(
    max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    times=st.lists(st.integers(0, 3), max_size=12),
    page_size=st.integers(1, 5),
)
async def test_pages_hold_everything_once_in_order(
    registry: Registry, times: list[int], page_size: int
) -> None:
    """Also where many were made at the same moment."""
    rows = [sandbox(f"sb-{i:02}", create_time=at(seconds)) for i, seconds in enumerate(times)]
    await registry.remove_sandboxes([row.sandbox_id for row in await registry.all_sandboxes()])
    await registry.insert_sandboxes(rows[::-1])
    pages = await all_pages(registry, page_size)
    expected = sorted(rows, key=lambda row: (row.create_time, row.sandbox_id))
    assert [row for page in pages for row in page.items] == expected
    assert all(len(page.items) == page_size for page in pages[:-1])
    assert len(pages[-1].items) > 0 or not rows, "no empty page at the end"


async def test_what_is_made_and_removed_between_two_pages_shifts_nothing(
    registry: Registry,
) -> None:
    rows = [sandbox(f"sb-{index}", create_time=at(0)) for index in range(4)]
    await registry.insert_sandboxes(rows)
    first = await registry.list_sandboxes(page_size=2)
    await registry.remove_sandboxes(["sb-0", "sb-1"])
    await registry.insert_sandboxes([sandbox("sb-00", create_time=at(0))])
    second = await registry.list_sandboxes(page_size=2, after=first.next_position)
    assert second.items == tuple(rows[2:])


async def test_a_list_is_filtered_by_all_labels_and_any_state(registry: Registry) -> None:
    odd = 'it\'s "odd" $.x[0] % _'
    await registry.insert_sandboxes(
        [
            sandbox("a", labels={"k": "v", odd: odd}),
            sandbox("b", labels={"k": "v"}, state=SandboxState.PAUSED),
            sandbox("c", labels={"k": "w", "v": "k"}),
            sandbox("d", labels={"k": "v"}, state=SandboxState.STOPPED),
        ]
    )

    async def found(labels: dict[str, str], *states: SandboxState) -> str:
        page = await registry.list_sandboxes(page_size=10, labels=labels, states=frozenset(states))
        return "".join(row.sandbox_id for row in page.items)

    assert await found({}) == "abcd"
    assert await found({"k": "v"}) == "abd"
    assert await found({"k": "v", odd: odd}) == "a"
    assert await found({"k": "v", "v": "k"}) == ""
    assert await found({}, SandboxState.PAUSED, SandboxState.STOPPED) == "bd"
    assert await found({"k": "v"}, SandboxState.RUNNING) == "a"
    page = await registry.list_sandboxes(page_size=1, labels={"k": "v"})
    rest = await registry.list_sandboxes(page_size=9, after=page.next_position, labels={"k": "v"})
    assert [row.sandbox_id for row in rest.items] == ["b", "d"]


async def test_snapshots_are_listed_by_source_and_labels(registry: Registry) -> None:
    for index in range(4):
        await registry.insert_snapshot(
            snapshot(
                f"snap-{index}",
                source_sandbox_id=f"sb-{index % 2}",
                create_time=at(-index),
                labels={"third": str(index // 3)},
            )
        )

    async def found(**filters: Any) -> list[str]:
        page = await registry.list_snapshots(page_size=10, after=None, **filters)
        return [row.snapshot_id for row in page.items]

    assert await found() == ["snap-3", "snap-2", "snap-1", "snap-0"]
    assert await found(source_sandbox_id="sb-0") == ["snap-2", "snap-0"]
    assert await found(labels={"third": "1"}) == ["snap-3"]
    assert await found(labels={"third": "1"}, source_sandbox_id="sb-0") == []
    await registry.mark_snapshot_deleted("snap-2")
    assert await found(source_sandbox_id="sb-0") == ["snap-0"]


async def test_a_page_of_nothing_is_a_mistake(registry: Registry) -> None:
    with pytest.raises(ValueError, match="a page of 0 items"):
        await registry.list_sandboxes(page_size=0)


# --- plans ---


def plans(connection: sqlite3.Connection, operation: Callable[..., object]) -> list[str]:
    """The steps by which SQLite carries out the queries of an operation."""
    queries: list[str] = []
    connection.set_trace_callback(queries.append)
    operation(connection)
    connection.set_trace_callback(None)
    assert queries
    return [
        row[3] for query in queries for row in connection.execute(f"EXPLAIN QUERY PLAN {query}")
    ]


POSITION = (at(0), "x")


@pytest.mark.parametrize(
    ("operation", "index"),
    [
        (lambda c: sandboxes.list_some(c, 5, POSITION, {}, frozenset()), "sandboxes_in_order"),
        (lambda c: snapshots.list_some(c, 5, POSITION, {}, None), "snapshots_in_order"),
        (lambda c: snapshots.list_some(c, 5, POSITION, {}, "sb-1"), "snapshots_of_source"),
        (lambda c: branches.list_some(c, 5, POSITION, None, frozenset()), "branches_in_order"),
        (lambda c: branches.list_some(c, 5, POSITION, "sb-1", frozenset()), "branches_of_sandbox"),
        (snapshots.nobody_needs, "snapshots_deleted"),
        (snapshots.nobody_needs, "sandboxes_on_base"),
        (snapshots.nobody_needs, "forks_unfinished"),
        (snapshots.nobody_needs, "layers_on_parent"),
        (lambda c: snapshots.check_id(c, "snap-1", None), "branches_of_snapshot"),
        (lambda c: sandboxes.check_id(c, "sb-1", None), "fork_children_by_id"),
        (lambda c: requests.find(c, "req-1"), "sqlite_autoindex_requests"),
    ],
)
async def test_every_list_and_look_up_has_its_index(
    registry: Registry, operation: Callable[..., object], index: str
) -> None:
    # On the connection that has the ids of running imports.
    steps = await registry.write(lambda c: plans(c, operation))
    assert any(index in step for step in steps), steps
    assert not [step for step in steps if "TEMP B-TREE" in step]
    assert not [step for step in steps if step.startswith("SCAN") and "USING" not in step]
