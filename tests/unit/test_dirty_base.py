"""What a source's next diff stands on, through any order of windows, stores and failures."""

from __future__ import annotations

from pathlib import Path

import hypothesis.strategies as st
import pytest
from hypothesis import given

from forkpointd.model import DirtyBase, DirtyBaseState, UnmergedDiff

VALID, PENDING, INVALID = DirtyBaseState.VALID, DirtyBaseState.PENDING, DirtyBaseState.INVALID


def diff(branch_id: str) -> UnmergedDiff:
    return UnmergedDiff(Path(f"{branch_id}.m"), Path(f"{branch_id}.x"), 4096, branch_id)


def ids(base: DirtyBase) -> list[str]:
    return [each.branch_id for each in base.unmerged]


def test_a_stored_layer_takes_the_place_of_all_below_it() -> None:
    base = DirtyBase.of("root").over(diff("kept")).over(diff("a")).over(diff("b"))
    assert ids(base) == ["kept", "a", "b"]
    stored = base.pending("c").stored("a", "snap-a")
    assert (stored.state, stored.branch_id) == (PENDING, "c"), "the open window goes on"
    assert (stored.snapshot_id, ids(stored)) == ("snap-a", ["b"])
    below = base.below("b")
    assert below is not None
    assert (below.state, below.snapshot_id, ids(below)) == (VALID, "root", ["kept", "a"])
    assert base.below("nobody") is None


def test_what_is_lost_takes_all_above_it_along() -> None:
    base = DirtyBase.of("root").over(diff("a")).over(diff("b")).over(diff("c")).pending("d")
    cut = base.cut_at("b", "it is gone")
    assert (cut.state, cut.branch_id, cut.invalid_reason) == (INVALID, None, "it is gone")
    assert (cut.snapshot_id, ids(cut)) == ("root", ["a"])


def test_an_invalid_base_keeps_what_is_being_stored() -> None:
    base = DirtyBase.of("root").over(diff("a")).pending("b").unusable("the window failed")
    assert (base.state, base.snapshot_id, ids(base)) == (INVALID, "root", ["a"])
    assert base.stored("a", "snap-a") == DirtyBase(
        INVALID, "snap-a", invalid_reason="the window failed"
    )


def test_a_diff_that_is_not_there_is_not_stored() -> None:
    with pytest.raises(AssertionError):
        DirtyBase.of("root").stored("a", "snap-a")


@given(st.lists(st.sampled_from(["window", "store", "fail"]), max_size=30))
def test_snapshot_and_diffs_are_always_all_windows_in_order(steps: list[str]) -> None:
    """Whatever is stored or fails, by the front of the line: base and diffs together are every
    window there was."""
    base, line, held = DirtyBase.of("root"), list[str](), {"root": list[str]()}
    windows: list[str] = []
    for number, step in enumerate(steps):
        if step == "window":
            branch_id = f"br-{number}"
            base = base.pending(branch_id).over(diff(branch_id))
            windows.append(branch_id)
            line.append(branch_id)
        elif line:
            branch_id = line.pop(0)
            below = base.below(branch_id)
            assert below is not None and below.snapshot_id is not None
            if step == "store":
                held[branch_id] = [*held[below.snapshot_id], *ids(below), branch_id]
                base = base.stored(branch_id, branch_id)
        assert base.snapshot_id is not None
        assert [*held[base.snapshot_id], *ids(base)] == windows
        assert base.state is VALID
