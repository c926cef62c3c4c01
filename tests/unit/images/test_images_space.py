"""Room is promised once: whatever order reservations come, land and go in."""

from __future__ import annotations

import os
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from forkpointd.images import (
    Budget,
    NoRoom,
    Reservation,
    Room,
    StagingArea,
    StagingRoom,
    choose_staging,
    low_water,
    quota,
    space,
)
from forkpointd.model import StagingKind

MIB = 1 << 20
GIB = 1 << 30


class Disk:
    """A disk on paper: `free` bytes, as statvfs would tell."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, free: int) -> None:
        self.free = free
        monkeypatch.setattr(os, "statvfs", self._statvfs)

    def _statvfs(self, path: Path) -> SimpleNamespace:
        return SimpleNamespace(f_bavail=self.free, f_frsize=1, f_bfree=self.free * 2)


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Disk:
    return Disk(monkeypatch, 100)


# --- reservations ------------------------------------------------------------------------------


def test_what_is_reserved_is_not_free(disk: Disk, tmp_path: Path) -> None:
    room = Room(tmp_path)
    first = room.reserve(60, "the first")
    assert room.free_bytes() == 40
    with pytest.raises(NoRoom) as caught:
        room.reserve(41, "the second")
    error = caught.value
    assert (error.what, error.needed_bytes, error.free_bytes, error.reserved_bytes) == (
        "the second",
        41,
        100,
        60,
    )
    assert error.path == tmp_path
    assert "the second" in str(error)
    assert "41" in str(error)
    room.reserve(40, "exactly the rest")
    assert room.free_bytes() == 0
    first.release()
    assert room.free_bytes() == 60


def test_bytes_that_landed_are_not_counted_twice(disk: Disk, tmp_path: Path) -> None:
    room = Room(tmp_path)
    reservation = room.reserve(60, "an image")
    for _ in range(6):
        reservation.consume(10)
        disk.free -= 10
        assert room.free_bytes() == 40
    assert reservation.left_bytes == 0
    reservation.consume(1000)
    assert reservation.left_bytes == 0
    reservation.release()
    assert room.free_bytes() == 40


def test_a_release_counts_once_and_ends_the_reservation(disk: Disk, tmp_path: Path) -> None:
    room = Room(tmp_path)
    with room.reserve(60, "one"), room.reserve(30, "other") as other:
        assert room.free_bytes() == 10
        other.release()
        other.release()
        other.consume(5)
        assert other.left_bytes == 0
        assert room.free_bytes() == 40
    assert room.free_bytes() == 100


def test_a_failed_block_gives_its_room_back(disk: Disk, tmp_path: Path) -> None:
    room = Room(tmp_path)
    with pytest.raises(KeyError), room.reserve(60, "one"):
        raise KeyError
    assert room.free_bytes() == 100


def test_free_is_never_negative_though_others_fill_the_disk(disk: Disk, tmp_path: Path) -> None:
    room = Room(tmp_path)
    room.reserve(80, "one")
    disk.free = 10
    assert room.free_bytes() == 0
    with pytest.raises(NoRoom):
        room.reserve(1, "other")


@pytest.mark.parametrize("count", [-1, -GIB])
def test_negative_bytes_are_a_mistake(disk: Disk, tmp_path: Path, count: int) -> None:
    room = Room(tmp_path)
    with pytest.raises(ValueError, match=str(count)):
        room.reserve(count, "one")
    with pytest.raises(ValueError, match=str(count)):
        room.reserve(1, "one").consume(count)


def test_what_is_for_root_alone_is_not_free(tmp_path: Path) -> None:
    answer = os.statvfs(tmp_path)
    # Others write to this disk too: the two readings are moments apart.
    assert abs(Room(tmp_path).free_bytes() - answer.f_bavail * answer.f_frsize) < GIB


@settings(max_examples=100, deadline=None)
@given(
    steps=st.lists(
        st.tuples(st.sampled_from(["reserve", "consume", "release"]), st.integers(0, 60)),
        max_size=40,
    )
)
def test_no_order_of_steps_promises_what_is_not_there(steps: list[tuple[str, int]]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        disk = Disk(patch, 100)
        room = Room(Path("/"))
        live: list[tuple[Reservation, int]] = []
        for step, number in steps:
            if step == "reserve":
                promised = sum(left for _, left in live)
                if number <= disk.free - promised:
                    live.append((room.reserve(number, "x"), number))
                else:
                    with pytest.raises(NoRoom):
                        room.reserve(number, "x")
            elif live:
                index = number % len(live)
                reservation, left = live.pop(index)
                if step == "consume":
                    landed = min(number, left)
                    reservation.consume(landed)
                    disk.free -= landed
                    live.append((reservation, left - landed))
                else:
                    reservation.release()
            assert room.free_bytes() == disk.free - sum(left for _, left in live)


def test_threads_together_get_no_more_than_there_is(disk: Disk, tmp_path: Path) -> None:
    room = Room(tmp_path)
    start = threading.Barrier(8)
    got: list[Reservation] = []

    def grab() -> None:
        start.wait()
        for _ in range(50):
            try:
                got.append(room.reserve(3, "a thread"))
            except NoRoom:
                return

    threads = [threading.Thread(target=grab) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(got) == 33
    assert room.free_bytes() == 1


def test_what_is_kept_free_is_nobodys(disk: Disk, tmp_path: Path) -> None:
    room = Room(tmp_path, limits=[low_water("kept", 30)])
    assert room.free_bytes() == 70
    room.reserve(60, "one")
    with pytest.raises(NoRoom, match="70 free within kept") as caught:
        room.reserve(11, "other")
    assert caught.value.limited_by == "kept"
    room.reserve(10, "other")
    disk.free = 20
    assert room.free_bytes() == 0


def test_a_quota_counts_what_is_used_and_what_is_reserved(disk: Disk, tmp_path: Path) -> None:
    used = [15]
    room = Room(tmp_path, limits=[quota("the quota", 50, lambda: used[0])])
    first = room.reserve(30, "one")
    with pytest.raises(NoRoom, match="within the quota") as caught:
        room.reserve(6, "other")
    assert (caught.value.free_bytes, caught.value.reserved_bytes) == (35, 30)
    first.consume(10)
    used[0] += 10
    assert room.free_bytes() == 5
    used[0] = 60
    assert room.free_bytes() == 0


def test_the_nearest_limit_is_named(disk: Disk, tmp_path: Path) -> None:
    limits = [low_water("kept", 30), quota("the quota", 80, lambda: 40)]
    room = Room(tmp_path, limits=limits)
    assert room.free_bytes() == 40
    disk.free = 60
    with pytest.raises(NoRoom) as caught:
        room.reserve(41, "one")
    assert caught.value.limited_by == "kept"
    disk.free = 1000
    with pytest.raises(NoRoom) as caught:
        room.reserve(41, "one")
    assert caught.value.limited_by == "the quota"
    with pytest.raises(NoRoom) as caught:
        Room(tmp_path).reserve(1001, "one")
    assert caught.value.limited_by == ""


# --- where a window is staged ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("full", "tmpfs_free", "expected", "kind", "reserved"),
    [
        pytest.param(False, 4 * GIB, 100, StagingKind.TMPFS, 100, id="diff-that-fits"),
        pytest.param(False, 4 * GIB, None, StagingKind.TMPFS, 4 * GIB, id="diff-unknown"),
        pytest.param(False, 4 * GIB, 9 * GIB, StagingKind.TMPFS, 4 * GIB, id="diff-too-large"),
        pytest.param(False, 4 * GIB - 1, 100, StagingKind.DISK, 100, id="memory-does-not-fit"),
        pytest.param(False, None, None, StagingKind.DISK, 4 * GIB, id="no-tmpfs"),
        pytest.param(True, 12 * GIB, 100, StagingKind.TMPFS, 4 * GIB, id="full-three-times"),
        pytest.param(True, 12 * GIB - 1, 100, StagingKind.DISK, 0, id="full-not-three-times"),
        pytest.param(True, None, None, StagingKind.DISK, 0, id="full-no-tmpfs"),
    ],
)
def test_staging_is_chosen_as_the_design_says(
    full: bool, tmpfs_free: int | None, expected: int | None, kind: StagingKind, reserved: int
) -> None:
    choice = choose_staging(
        memory_bytes=4 * GIB, expected_bytes=expected, full=full, tmpfs_free_bytes=tmpfs_free
    )
    assert (choice.kind, choice.bytes_to_reserve) == (kind, reserved)
    assert choice.reason


@pytest.fixture
def memory(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """MemAvailable on paper."""
    machine = SimpleNamespace(available=10 * GIB)
    monkeypatch.setattr(space, "available_memory_bytes", lambda: machine.available)
    return machine


def test_tmpfs_has_what_its_size_the_memory_and_the_budget_leave(
    disk: Disk, memory: SimpleNamespace, tmp_path: Path
) -> None:
    disk.free = 8 * GIB
    free = StagingRoom(tmp_path, None, disk=Room(tmp_path)).free_bytes
    assert free() == 8 * GIB
    memory.available = 5 * GIB
    assert free() == 5 * GIB
    assert StagingRoom(tmp_path, 3 * GIB, disk=Room(tmp_path)).free_bytes() == 3 * GIB
    assert StagingRoom(None, 3 * GIB, disk=Room(tmp_path)).free_bytes() == 0


def test_the_budget_is_for_all_that_is_staged_together(
    disk: Disk, memory: SimpleNamespace, shm: Path, tmp_path: Path
) -> None:
    disk.free = 8 * GIB
    room = StagingRoom(shm, 64 * MIB, disk=Room(tmp_path))
    names = StagingArea(shm).create(1, 32 * MIB)
    with names.memory.open("r+b") as file:
        file.write(b"x" * MIB)
    assert room.free_bytes() == 63 * MIB
    kind, held = room.choose(63 * MIB, expected_bytes=5 * MIB, full=False, what="a window")
    assert kind is StagingKind.TMPFS
    assert room.free_bytes() == 58 * MIB
    kind, _ = room.choose(59 * MIB, expected_bytes=MIB, full=False, what="another")
    assert kind is StagingKind.DISK
    held.release()
    assert room.free_bytes() == 63 * MIB


def test_neither_tmpfs_nor_disk_is_no_room_with_the_disks_figures(
    disk: Disk, memory: SimpleNamespace, tmp_path: Path
) -> None:
    disk.free = GIB
    disk_room = Room(tmp_path)
    disk_room.reserve(GIB, "an image")
    for tmpfs in (None, tmp_path):
        room = StagingRoom(tmpfs, None, disk=disk_room)
        with pytest.raises(NoRoom) as caught:
            room.choose(2 * GIB, expected_bytes=MIB, full=False, what="a window")
        assert (caught.value.path, caught.value.reserved_bytes) == (tmp_path, GIB)


def test_staging_and_images_on_one_file_system_share_their_promises(
    disk: Disk, memory: SimpleNamespace, tmp_path: Path
) -> None:
    disk.free = 4 * GIB
    images = Room(tmp_path)
    staging = StagingRoom(tmp_path, None, disk=images)
    images.reserve(3 * GIB, "an image")
    assert staging.free_bytes() == GIB
    staging.choose(GIB, expected_bytes=GIB, full=False, what="a window")
    assert images.free_bytes() == 0


def test_memory_is_read_from_the_kernel(tmp_path: Path) -> None:
    assert 0 < space.available_memory_bytes() < os.sysconf("SC_PHYS_PAGES") * 4096
    odd = tmp_path / "meminfo"
    odd.write_text("MemTotal: 5 kB\nMemAvailable:    3 kB\n")
    assert space.available_memory_bytes(odd) == 3072
    odd.write_text("MemTotal: 5 kB\n")
    with pytest.raises(OSError, match="MemAvailable"):
        space.available_memory_bytes(odd)


def test_a_budget_gives_what_there_is_and_takes_it_back() -> None:
    budget = Budget(100)
    first = budget.take_up_to(70, "the first")
    second = budget.take_up_to(70, "the second")
    third = budget.take_up_to(1, "the third")
    assert [given.reserved_bytes for given in (first, second, third)] == [70, 30, 0]
    assert budget.taken_bytes == 100
    first.release()
    first.release()
    assert budget.taken_bytes == 30
    assert budget.take_up_to(50, "the fourth").reserved_bytes == 50
