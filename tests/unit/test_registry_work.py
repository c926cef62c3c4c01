"""Branches and forks in the registry: what is committed together, which ids are taken."""

from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from forkpointd.model import (
    Branch,
    BranchStage,
    BranchView,
    DirtyBase,
    Fork,
    ForkChild,
    ForkChildState,
    ForkpointError,
    ForkStage,
    Page,
    Problem,
    Reason,
    SandboxState,
)
from forkpointd.registry import Registry
from tests.unit.registry_making import START, at, branch, fork, key, sandbox, snapshot


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


def later(row: Branch, stage: BranchStage, **changes: Any) -> Branch:
    return replace(
        row,
        stage=stage,
        sequence=row.sequence + 1,
        end_time=at(1) if stage.ended else None,
        **changes,
    )


# --- branches ---


async def test_a_branch_is_found_as_it_was_inserted_and_put(registry: Registry) -> None:
    first = branch("br-1")
    await registry.insert_branch(first)
    assert await registry.get_branch("br-1") == first
    second = replace(first.entering(BranchStage.PRECOPYING, at(1)), sequence=2)
    await registry.put_branch(second)
    assert await registry.get_branch("br-1") == second
    assert await registry.get_branch("br-2") is None
    await refused(Reason.BRANCH_NOT_FOUND, registry.put_branch(branch("br-2")))


async def test_ready_commits_snapshot_base_fork_and_stage_together(registry: Registry) -> None:
    source, children = sandbox("sb-1"), fork("f", snapshot_id="snap-1")
    work = branch("br-1", snapshot_id="snap-1", stage=BranchStage.FINALIZING, fork_id="f")
    await registry.insert_sandboxes([source])
    await registry.insert_branch(work, children)
    made, forking = snapshot("snap-1"), later(work, BranchStage.FORKING)
    based = replace(source, dirty_base=DirtyBase.of("snap-1"))
    starting = replace(children, stage=ForkStage.STARTING, sequence=2)
    await registry.put_branch(forking, sandbox=based, snapshot=made, fork=starting)
    assert await registry.get_branch("br-1") == forking
    assert await registry.get_snapshot("snap-1") == made
    assert await registry.get_sandbox("sb-1") == based
    assert await registry.get_fork("f") == starting


async def test_a_part_that_is_refused_keeps_all_parts_back(registry: Registry) -> None:
    source = sandbox("sb-1")
    work = branch("br-1", snapshot_id="snap-1", stage=BranchStage.FINALIZING)
    await registry.insert_sandboxes([source])
    await registry.insert_branch(work)
    await refused(
        Reason.FORK_NOT_FOUND,
        registry.put_branch(
            later(work, BranchStage.READY),
            sandbox=replace(source, dirty_base=DirtyBase.of("snap-1")),
            snapshot=snapshot("snap-1"),
            fork=fork("never"),
        ),
    )
    assert await registry.get_branch("br-1") == work
    assert await registry.get_snapshot("snap-1") is None
    assert await registry.get_sandbox("sb-1") == source


async def test_a_branch_ends_without_a_source_that_was_deleted_meanwhile(
    registry: Registry,
) -> None:
    work = branch("br-1", snapshot_id="snap-1", stage=BranchStage.FINALIZING)
    await registry.insert_branch(work)
    await registry.put_branch(
        later(work, BranchStage.READY), sandbox=sandbox("sb-1"), snapshot=snapshot("snap-1")
    )
    assert await registry.get_sandbox("sb-1") is None
    assert await registry.get_snapshot("snap-1") is not None


async def test_a_taken_branch_id_is_refused(registry: Registry) -> None:
    await registry.insert_branch(branch("br-1", snapshot_id="a", stage=BranchStage.FAILED))
    error = await refused(Reason.ID_TAKEN, registry.insert_branch(branch("br-1", snapshot_id="b")))
    assert error.problem.metadata == {"branch_id": "br-1"}


async def test_a_snapshot_id_is_taken_from_the_admission_of_its_branch_to_its_files_end(
    registry: Registry,
) -> None:
    work = branch("br-1", snapshot_id="snap-1", stage=BranchStage.FINALIZING)
    rival = branch("br-2", snapshot_id="snap-1")
    await registry.insert_branch(work)
    error = await refused(Reason.ID_TAKEN, registry.insert_branch(rival))
    assert error.problem.metadata == {"snapshot_id": "snap-1"}
    assert "made by branch br-1" in str(error)
    await refused(Reason.ID_TAKEN, registry.insert_snapshot(snapshot("snap-1")))
    await registry.put_branch(later(work, BranchStage.READY), snapshot=snapshot("snap-1"))
    await refused(Reason.ID_TAKEN, registry.insert_branch(rival))
    await registry.mark_snapshot_deleted("snap-1")
    await refused(Reason.ID_TAKEN, registry.insert_branch(rival))
    assert await registry.get_branch("br-2") is None
    await registry.remove_snapshot_row("snap-1")
    await registry.insert_branch(rival)


async def test_the_snapshot_id_of_a_branch_that_failed_is_free(registry: Registry) -> None:
    work = branch("br-1", snapshot_id="snap-1")
    await registry.insert_branch(work)
    await registry.put_branch(later(work, BranchStage.FAILED))
    await registry.insert_branch(branch("br-2", snapshot_id="snap-1"))


async def test_a_branch_whose_fork_is_refused_is_not_inserted(registry: Registry) -> None:
    await registry.insert_sandboxes([sandbox("f-1")])
    error = await refused(Reason.ID_TAKEN, registry.insert_branch(branch("br-1"), fork("f"), key()))
    assert error.problem.metadata == {"sandbox_id": "f-1"}
    await registry.insert_fork(fork("g"))
    error = await refused(Reason.ID_TAKEN, registry.insert_branch(branch("br-1"), fork("g")))
    assert error.problem.metadata == {"fork_id": "g"}
    assert await registry.get_branch("br-1") is None
    assert await registry.get_fork("f") is None
    assert await registry.find_request("req-1") is None, "refused: not remembered"


async def test_branches_are_listed_by_source_and_stage(registry: Registry) -> None:
    stages = [BranchStage.READY, BranchStage.FAILED, BranchStage.QUEUED, BranchStage.PAUSED]
    for index, stage in enumerate(stages):
        await registry.insert_branch(
            branch(f"br-{index}", sandbox_id=f"sb-{index % 2}", stage=stage, create_time=START)
        )

    async def found(**filters: Any) -> list[str]:
        page = await registry.list_branches(page_size=10, after=None, **filters)
        return [row.branch_id for row in page.items]

    assert await found() == ["br-0", "br-1", "br-2", "br-3"]
    assert await found(sandbox_id="sb-1") == ["br-1", "br-3"]
    assert await found(stages=frozenset({BranchStage.READY, BranchStage.PAUSED})) == [
        "br-0",
        "br-3",
    ]
    assert await found(sandbox_id="sb-0", stages=frozenset({BranchStage.PAUSED})) == []
    assert [row.branch_id for row in await registry.unfinished_branches()] == ["br-2", "br-3"]
    page = await registry.list_branches(page_size=1, sandbox_id="sb-1")
    page = await registry.list_branches(page_size=1, sandbox_id="sb-1", after=page.next_position)
    assert [row.branch_id for row in page.items] == ["br-3"]
    assert page.next_position is None


async def test_a_view_holds_what_the_branch_made_and_nothing_of_another(
    registry: Registry,
) -> None:
    failed = branch("br-1", snapshot_id="snap-1", stage=BranchStage.FAILED)
    work = branch("br-2", snapshot_id="snap-1", stage=BranchStage.FINALIZING, fork_id="f")
    made, children = snapshot("snap-1", branch_id="br-2"), fork("f", snapshot_id="snap-1")
    await registry.insert_branch(failed)
    await registry.insert_branch(work, children)
    assert await registry.get_branch_view("br-2") == BranchView(work, None, children)
    work = later(work, BranchStage.FORKING)
    await registry.put_branch(work, snapshot=made)
    view = BranchView(work, made, children)
    assert await registry.get_branch_view("br-1") == BranchView(failed, None, None)
    assert await registry.get_branch_view("br-2") == view
    assert await registry.get_branch_view("br-3") is None
    await registry.mark_snapshot_deleted("snap-1")
    gone = replace(view, snapshot=replace(made, deleted=True))
    page = await registry.list_branch_views(page_size=1)
    assert page.items == (BranchView(failed, None, None),)
    page = await registry.list_branch_views(page_size=1, after=page.next_position)
    assert page == Page((gone,), None)
    page = await registry.list_branch_views(page_size=9, stages=frozenset({BranchStage.FAILED}))
    assert [each.branch for each in page.items] == [failed]


@pytest.mark.parametrize("stage", list(BranchStage))
async def test_a_branch_is_unfinished_until_it_has_ended(
    registry: Registry, stage: BranchStage
) -> None:
    await registry.insert_branch(branch("br-1", stage=stage))
    assert bool(await registry.unfinished_branches()) is not stage.ended


# --- forks ---


def outcome(row: Fork, index: int, child: ForkChild) -> Fork:
    children = list(row.children)
    children[index] = child
    return replace(row, sequence=row.sequence + 1, children=tuple(children))


async def test_a_fork_is_found_with_its_children_in_order(registry: Registry) -> None:
    row = fork("f", count=12)
    rows = [sandbox(f"f-{index}", fork_id="f") for index in range(12)]
    await registry.insert_fork(row, rows)
    assert await registry.get_fork("f") == row
    assert len(await registry.all_sandboxes()) == 12
    problem = Problem(Reason.VMM_FAILED, "no", {"sandbox_id": "f-3"})
    row = outcome(row, 3, ForkChild("f-3", ForkChildState.FAILED, problem))
    row = outcome(row, 10, ForkChild("f-10", ForkChildState.READY, start_us=2200))
    await registry.put_fork(row)
    assert await registry.get_fork("f") == row
    assert await registry.get_fork("g") is None


async def test_outcomes_and_rows_of_children_are_put_together(registry: Registry) -> None:
    row = fork("f", count=2)
    rows = [sandbox(f"f-{i}", fork_id="f", state=SandboxState.CREATING) for i in range(2)]
    await registry.insert_fork(row, rows)
    await registry.remove_sandboxes(["f-1"])
    ready = outcome(row, 0, ForkChild("f-0", ForkChildState.READY))
    running = [replace(each, state=SandboxState.RUNNING) for each in rows]
    await registry.put_fork(ready, sandboxes=running)
    assert await registry.get_fork("f") == ready
    assert await registry.all_sandboxes() == running[:1], "a removed child does not come back"
    with pytest.raises(AssertionError, match="admitted with 2 children"):
        await registry.put_fork(replace(ready, sequence=9, children=ready.children[:1]))
    assert await registry.get_fork("f") == ready


async def test_a_fork_is_refused_whole(registry: Registry) -> None:
    await registry.insert_fork(fork("f"))
    error = await refused(Reason.ID_TAKEN, registry.insert_fork(fork("f")))
    assert error.problem.metadata == {"fork_id": "f"}
    await registry.insert_sandboxes([sandbox("g-1")])
    rows = [sandbox("g-0", fork_id="g")]
    error = await refused(Reason.ID_TAKEN, registry.insert_fork(fork("g"), rows))
    assert error.problem.metadata == {"sandbox_id": "g-1"}
    assert await registry.get_fork("g") is None
    assert await registry.get_sandbox("g-0") is None
    await refused(Reason.FORK_NOT_FOUND, registry.put_fork(fork("never")))


@pytest.mark.parametrize("stage", list(ForkStage))
async def test_a_fork_is_unfinished_until_it_has_ended(
    registry: Registry, stage: ForkStage
) -> None:
    row = fork("f", stage=stage)
    await registry.insert_fork(row)
    assert await registry.unfinished_forks() == ([] if stage.ended else [row])
