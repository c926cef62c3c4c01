"""Free memory that the host takes back: whether it does, and making it ready."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from forkpointd.images import Stopped, free_pages_are_cold, syscalls, warm
from forkpointd.images.cold_pages import WARM_BYTES
from forkpointd.model import MIB


def balloon(folder: Path, number: int, bits: str) -> None:
    device = folder / f"virtio{number}"
    device.mkdir()
    (device / "features").write_text(bits.ljust(64, "0") + "\n")


def test_a_balloon_that_reports_free_pages_makes_them_cold(tmp_path: Path) -> None:
    assert not free_pages_are_cold(tmp_path / "none")
    balloon(tmp_path, 0, "011")
    assert not free_pages_are_cold(tmp_path)
    balloon(tmp_path, 3, "011001")
    assert free_pages_are_cold(tmp_path)


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def test_touched_memory_is_had_in_the_block_and_given_back_after_it() -> None:
    before = resident_bytes()
    with syscalls.touched_memory(64 * MIB):
        assert resident_bytes() - before > 60 * MIB
    assert resident_bytes() - before < 30 * MIB


def test_memory_that_the_kernel_does_not_give_is_done_without() -> None:
    with syscalls.touched_memory(1 << 62):
        pass


def test_warming_takes_it_all_at_once_and_looks_between_chunks() -> None:
    before = resident_bytes()
    peaks: list[int] = []
    warm(
        2 * WARM_BYTES + MIB,
        should_stop=lambda: False,
        gate=lambda: peaks.append(resident_bytes() - before),
    )
    assert len(peaks) == 3
    assert peaks[2] > 1.8 * WARM_BYTES
    assert resident_bytes() - before < WARM_BYTES


def test_warming_stops_when_it_is_told_to() -> None:
    before = resident_bytes()
    answers = iter([False, True])
    with pytest.raises(Stopped):
        warm(4 * WARM_BYTES, should_stop=lambda: next(answers), gate=lambda: None)
    assert resident_bytes() - before < WARM_BYTES


def test_nothing_is_warmed_where_nothing_is_expected() -> None:
    def never() -> bool:
        raise OSError(errno.EIO, "asked")

    warm(0, should_stop=never, gate=lambda: None)
