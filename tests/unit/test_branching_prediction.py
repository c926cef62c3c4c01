"""What the next window is expected to write, and how long it is expected to be."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest

from forkpointd.branching.admission import expected_diff_bytes
from forkpointd.branching.prediction import ALWAYS_US, GIB, PausePredictor
from forkpointd.images import Extents
from forkpointd.model import (
    MIB,
    BranchMode,
    PauseWindow,
    ProcessRecord,
    Sandbox,
    StagingKind,
)
from forkpointd.sandboxes.live import LastDiff
from forkpointd.vmm import resident_bytes
from tests.unit.registry_making import START, sandbox

PROCESS = ProcessRecord("boot", 17, 1, Path("/firecracker"), 1, 1)


@pytest.fixture
def row() -> Sandbox:
    made = sandbox("sb", process=PROCESS)
    return replace(made, machine=replace(made.machine, memory_mib=128))


def last(resident_mib: int) -> LastDiff:
    return LastDiff(Extents.of(()), resident_mib * MIB)


@pytest.mark.parametrize(
    ("last_mib", "resident_then", "resident_now", "expected_mib"),
    [
        (None, None, 50, 50),
        (None, None, 5_000, 128),
        (3, None, 90, 3),
        (3, 50, 52, 3),
        (3, 50, 90, 40),
        (3, 50, 10, 3),
        (3, 50, 5_000, 128),
    ],
    ids=[
        "before the first window all that it holds",
        "and no more than it can",
        "after a restart what the last one wrote",
        "what the last one wrote",
        "what it has grown by since",
        "a balloon took some back",
        "never more than its memory",
    ],
)
def test_the_next_diff_is_expected_to_be(
    row: Sandbox,
    last_mib: int | None,
    resident_then: int | None,
    resident_now: int,
    expected_mib: int,
) -> None:
    row = replace(row, last_diff_bytes=None if last_mib is None else last_mib * MIB)
    expected = expected_diff_bytes(
        row,
        None if resident_then is None else last(resident_then),
        lambda pid: resident_now * MIB if pid == PROCESS.pid else 0,
    )
    assert expected == expected_mib * MIB


def test_resident_memory_is_what_the_process_wrote() -> None:
    before = resident_bytes(os.getpid())
    block = bytearray(b"x") * (64 * MIB)
    assert len(block) <= resident_bytes(os.getpid()) - before < 80 * MIB
    del block
    assert resident_bytes(2**22 + 1) == 0


# --- its length --------------------------------------------------------------------------------


def window(total_us: int, dirty_bytes: int, *, was_paused: bool = False) -> PauseWindow:
    return PauseWindow(START, total_us, 0, 0, 0, dirty_bytes, StagingKind.TMPFS, was_paused)


def predict(predictor: PausePredictor, memory_gib: int, data_mib: int) -> int:
    return predictor.predict_us(
        BranchMode.DIFF,
        StagingKind.TMPFS,
        memory_bytes=memory_gib * GIB,
        data_bytes=data_mib * MIB,
    )


def test_a_larger_guest_and_a_larger_diff_take_longer() -> None:
    predictor = PausePredictor()
    assert ALWAYS_US < predict(predictor, 1, 0) < predict(predictor, 8, 0) < 20_000
    assert predict(predictor, 8, 100) > predict(predictor, 8, 0) + 10_000


def test_a_prediction_comes_to_be_right_on_a_host_of_another_speed() -> None:
    predictor = PausePredictor()
    for _ in range(30):
        predictor.observe(BranchMode.DIFF, window(9_300, 0), memory_bytes=4 * GIB)
        predictor.observe(BranchMode.DIFF, window(29_300, 100 * MIB), memory_bytes=4 * GIB)
    assert predict(predictor, 4, 0) == pytest.approx(9_300, rel=0.01)
    assert predict(predictor, 4, 100) == pytest.approx(29_300, rel=0.01)
    assert predict(predictor, 8, 50) == pytest.approx(ALWAYS_US + 16_000 + 10_000, rel=0.01)


def test_one_window_on_a_busy_machine_is_not_believed() -> None:
    predictor = PausePredictor()
    before = predict(predictor, 4, 0)
    predictor.observe(BranchMode.DIFF, window(60_000_000, 0), memory_bytes=4 * GIB)
    assert before < predict(predictor, 4, 0) < 2 * before


def test_a_window_of_a_paused_source_says_nothing() -> None:
    predictor = PausePredictor()
    before = predict(predictor, 4, 100)
    predictor.observe(BranchMode.DIFF, window(1, 100 * MIB, was_paused=True), memory_bytes=4 * GIB)
    assert predict(predictor, 4, 100) == before


def test_a_full_window_teaches_what_writing_costs_and_nothing_about_diffs() -> None:
    predictor = PausePredictor()
    diff = predict(predictor, 4, 100)
    for _ in range(30):
        predictor.observe(
            BranchMode.FULL, window(ALWAYS_US + 409_600, 4 * GIB), memory_bytes=4 * GIB
        )
    full = predictor.predict_us(
        BranchMode.FULL, StagingKind.TMPFS, memory_bytes=8 * GIB, data_bytes=8 * GIB
    )
    assert full == pytest.approx(ALWAYS_US + 819_200, rel=0.01)
    assert predict(predictor, 4, 100) == diff
