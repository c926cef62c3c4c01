"""Staging: a folder is used only where SEEK_DATA tells the truth; a serial is used once."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import pytest

from forkpointd.images import (
    Extent,
    ImageError,
    StagingArea,
    Stopped,
    data_extents_of,
    probe_staging,
    save_extents,
    staging,
    syscalls,
)
from forkpointd.images.staging import ALLOCATE_BYTES
from tests.unit.images.filesystems import Failing, Mount

MIB = 1 << 20
PAGE = 4096

# --- the probe ---------------------------------------------------------------------------------


def test_plain_tmpfs_is_fit_and_its_pages_can_be_allocated_ahead(shm: Path) -> None:
    probe = probe_staging(shm)
    assert (probe.ok, probe.filesystem, probe.reason, probe.remedy) == (True, "tmpfs", "", "")
    assert probe.preallocates
    assert probe.bytes_checked >= 8 * MIB
    assert probe.pages_written > 50


def test_the_disk_of_the_tests_is_fit_or_says_why(tmp_path: Path) -> None:
    probe = probe_staging(tmp_path)
    if probe.filesystem in ("ext4", "btrfs", "tmpfs", "overlay"):
        assert probe.ok, probe.reason
    assert probe.ok == (probe.reason == "") == (probe.remedy == "")


def test_the_probe_leaves_nothing_whatever_comes_of_it(tmp_path: Path, failing: Failing) -> None:
    probe_staging(tmp_path)
    failing.watch("ftruncate", "pwrite", "fsync", "lseek", "fallocate")
    failing.at(None, 0)
    probe_staging(tmp_path)
    for call in range(1, failing.calls + 1, 7):
        failing.at(call, errno.ENOSPC)
        with pytest.raises(OSError, match="No space left") as caught:
            probe_staging(tmp_path)
        assert caught.value.filename == str(tmp_path)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("huge", ["always", "within_size"])
def test_tmpfs_with_huge_pages_is_refused(mount: Mount, huge: str) -> None:
    probe = probe_staging(mount("tmpfs", f"size=64m,huge={huge}"))
    assert not probe.ok
    assert probe.filesystem == "tmpfs"
    assert "SEEK_DATA" in probe.reason
    assert "huge=never" in probe.remedy


def test_tmpfs_without_huge_pages_is_fit(mount: Mount) -> None:
    assert probe_staging(mount("tmpfs", "size=64m,huge=never")).ok


def test_xfs_with_blocks_of_16_kib_is_refused(mount: Mount) -> None:
    probe = probe_staging(mount("xfs", mkfs=["-q", "-b", "size=16384"]))
    assert not probe.ok
    assert probe.filesystem == "xfs"
    assert "size=4096" in probe.remedy


@pytest.mark.parametrize("kind", ["xfs", "btrfs", "ext4"])
def test_file_systems_with_blocks_of_a_page_are_fit(mount: Mount, kind: str) -> None:
    probe = probe_staging(mount(kind, mkfs=["-q"]))
    assert probe.ok, probe.reason
    assert probe.filesystem == kind


def test_a_file_system_that_makes_holes_of_zeros_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.pwrite

    def forgetful(fd: int, data: bytes, offset: int) -> int:
        return real(fd, data, offset) if any(data) else len(data)

    monkeypatch.setattr(syscalls, "pwrite", forgetful)
    probe = probe_staging(tmp_path)
    assert not probe.ok
    assert "SEEK_DATA" in probe.reason


def test_a_file_system_that_knows_no_holes_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def everything(fd: int, offset: int, whence: int) -> int:  # lseek(2): a permitted answer
        return offset if whence == os.SEEK_DATA else staging.PROBE_BYTES

    monkeypatch.setattr(syscalls, "lseek", everything)
    assert not probe_staging(tmp_path).ok

    def never(fd: int, offset: int, whence: int) -> int:
        raise OSError(errno.EINVAL, "")

    monkeypatch.setattr(syscalls, "lseek", never)
    assert probe_staging(tmp_path).reason == "the file system knows no SEEK_DATA"


def test_allocated_pages_that_read_as_data_make_tmpfs_unfit_and_a_disk_only_less_useful(
    tmp_path: Path, shm: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def eager(fd: int, offset: int, length: int) -> None:
        os.pwrite(fd, bytes(PAGE), offset + length - PAGE)

    monkeypatch.setattr(syscalls, "fallocate", eager)
    assert not probe_staging(shm).ok
    on_disk = probe_staging(tmp_path)
    if on_disk.filesystem != "tmpfs":
        assert on_disk.ok
        assert not on_disk.preallocates


def test_a_folder_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        probe_staging(tmp_path / "no")


# --- the area ----------------------------------------------------------------------------------


def test_a_window_has_short_names_and_a_sparse_private_file_of_the_right_size(
    tmp_path: Path,
) -> None:
    names = StagingArea(tmp_path).create(17, 64 * MIB)
    assert [path.name for path in (names.memory, names.vmstate, names.extents)] == [
        "17.m",
        "17.v",
        "17.x",
    ]
    found = names.memory.stat()
    assert (found.st_size, found.st_blocks, found.st_mode & 0o777) == (64 * MIB, 0, 0o600)
    assert os.listdir(tmp_path) == ["17.m"]


@pytest.mark.parametrize("suffix", ["m", "v", "x"])
def test_a_serial_of_which_anything_exists_is_refused_and_nothing_touched(
    tmp_path: Path, suffix: str
) -> None:
    (tmp_path / f"17.{suffix}").write_text("late")
    with pytest.raises(ImageError, match="17"):
        StagingArea(tmp_path).create(17, MIB)
    assert os.listdir(tmp_path) == [f"17.{suffix}"]
    assert (tmp_path / f"17.{suffix}").read_text() == "late"


def free() -> dict[str, Any]:
    """What `allocate` is called with when nobody looks."""
    return {"progress": lambda _: None, "should_stop": lambda: False, "gate": lambda: None}


def test_pages_allocated_ahead_are_holes_until_they_are_written(shm: Path) -> None:
    area = StagingArea(shm)
    names = area.create(1, 4 * MIB)
    told: list[int] = []
    ahead = [Extent(0, 16 * PAGE), Extent(MIB, 2 * MIB)]
    allocated = area.allocate(1, ahead, **{**free(), "progress": told.append})
    assert allocated == sum(told) == 16 * PAGE + 2 * MIB
    assert names.memory.stat().st_blocks * 512 == allocated
    assert names.memory.stat().st_size == 4 * MIB
    assert data_extents_of(names.memory, 4 * MIB) == ()
    with names.memory.open("r+b") as file:
        for page in (3, 700):
            file.seek(page * PAGE)
            file.write(bytes(PAGE))
    assert [tuple(extent) for extent in data_extents_of(names.memory, 4 * MIB)] == [
        (3 * PAGE, PAGE),
        (700 * PAGE, PAGE),
    ]


def test_where_there_is_no_room_ahead_the_window_has_to_find_it(mount: Mount) -> None:
    small = mount("tmpfs", "size=1m")
    area = StagingArea(small)
    names = area.create(1, 4 * MIB)
    assert area.allocate(1, [Extent(0, 4 * MIB)], **free()) == 0
    assert names.memory.stat().st_size == 4 * MIB
    assert data_extents_of(names.memory, 4 * MIB) == ()


@pytest.mark.parametrize("number", [errno.EOPNOTSUPP, errno.ENOSPC, errno.EIO])
def test_allocating_that_fails_is_an_error_only_where_the_file_is_bad(
    tmp_path: Path, failing: Failing, number: int
) -> None:
    area = StagingArea(tmp_path)
    area.create(1, 4 * ALLOCATE_BYTES)
    failing.watch("fallocate")
    failing.at(3, number)
    ahead = [Extent(0, 4 * ALLOCATE_BYTES)]
    if number == errno.EIO:
        with pytest.raises(OSError, match=r"1\.m"):
            area.allocate(1, ahead, **free())
    else:
        assert area.allocate(1, ahead, **free()) == 2 * ALLOCATE_BYTES
    assert failing.calls == 3


def test_allocating_asks_before_each_chunk_whether_it_is_to_stop(tmp_path: Path) -> None:
    area = StagingArea(tmp_path)
    names = area.create(1, 4 * ALLOCATE_BYTES)
    answers = iter([False, True])
    asked: list[str] = []
    with pytest.raises(Stopped):
        area.allocate(
            1,
            [Extent(0, 4 * ALLOCATE_BYTES)],
            progress=lambda _: None,
            should_stop=lambda: next(answers),
            gate=lambda: asked.append("gate"),
        )
    assert asked == ["gate", "gate"]
    assert names.memory.exists()


def test_a_window_is_removed_once_or_often(tmp_path: Path) -> None:
    area = StagingArea(tmp_path)
    names = area.create(3, MIB)
    names.vmstate.write_text("state")
    save_extents(names.extents, [], MIB, sync=False)
    (tmp_path / "3.x.part").touch()
    area.create(4, MIB)
    area.remove(3)
    area.remove(3)
    assert os.listdir(tmp_path) == ["4.m"]


def test_leftovers_are_ours_alone_in_order_of_their_serials(tmp_path: Path) -> None:
    ours = ["2.m", "10.m", "10.v", "10.x", "11.x.part", ".probe-abc"]
    for name in [*ours, "notes.txt", "m", "x.m", "3.mm", "lost+found"]:
        (tmp_path / name).touch()
    area = StagingArea(tmp_path)
    assert [path.name for path in area.leftovers()] == [
        ".probe-abc",
        "2.m",
        "10.m",
        "10.v",
        "10.x",
        "11.x.part",
    ]
    assert StagingArea(tmp_path / "gone").leftovers() == ()


def test_used_bytes_are_those_that_take_room(shm: Path) -> None:
    area = StagingArea(shm)
    names = area.create(1, 16 * MIB)
    assert area.used_bytes() == 0
    with names.memory.open("r+b") as file:
        file.write(b"x" * MIB)
    assert area.used_bytes() == MIB


def test_a_serial_is_never_negative(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="-1"):
        StagingArea(tmp_path).names(-1)
