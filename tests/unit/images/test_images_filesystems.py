"""The same copies on the file systems that people have: XFS and btrfs, which share blocks, and
what goes between them and tmpfs."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from forkpointd.images import (
    Extent,
    can_reflink,
    copy_image,
    copy_whole,
    data_bytes_of,
    data_extents_of,
    merge_diff,
)
from forkpointd.model import CopyMethod
from tests.unit.images.filesystems import Mount

MIB = 1 << 20
PAGE = 4096
SIZE = 32 * MIB


def write_random(path: Path, mib: int) -> bytes:
    """The first `mib` are data, the rest a hole."""
    data = os.urandom(mib * MIB)
    with path.open("wb") as file:
        file.write(data)
        file.truncate(SIZE)
        os.fsync(file.fileno())
    return data + bytes(SIZE - len(data))


def never(count: int) -> None:
    raise AssertionError(f"{count} bytes were moved by a reflink")


def free() -> dict[str, Any]:
    return {"progress": lambda _: None, "should_stop": lambda: False, "gate": lambda: None}


@pytest.mark.parametrize("kind", ["xfs", "btrfs"])
def test_an_image_shares_its_blocks_with_its_base_until_one_is_written(
    mount: Mount, shm: Path, kind: str
) -> None:
    folder = mount(kind, mkfs=["-q"])
    assert can_reflink(folder)
    assert os.listdir(folder) == []
    content = write_random(folder / "base", 16)
    totals: list[int] = []
    before = os.statvfs(folder).f_bfree
    result = copy_image(
        folder / "base",
        folder / "image",
        SIZE,
        progress=never,
        should_stop=lambda: False,
        gate=lambda: None,
        on_total=totals.append,
    )
    used = (before - os.statvfs(folder).f_bfree) * os.statvfs(folder).f_frsize
    assert used < 4 * MIB
    assert (result.method, result.total_bytes) == (CopyMethod.REFLINK, SIZE)
    assert result.copied_bytes + result.hole_bytes == SIZE
    assert abs(result.copied_bytes - 16 * MIB) < MIB
    assert totals == [0]
    assert (folder / "image").read_bytes() == content

    diff = shm / "1.m"
    with diff.open("wb") as file:
        file.truncate(SIZE)
        file.seek(5 * PAGE)
        file.write(b"d" * PAGE)
        file.seek(20 * MIB)
        file.write(bytes(PAGE))
    merge_diff(diff, data_extents_of(diff, SIZE), folder / "image", **free())
    merged = content[: 5 * PAGE] + b"d" * PAGE + content[6 * PAGE :]
    assert (folder / "image").read_bytes() == merged
    assert (folder / "base").read_bytes() == content, "the base is never changed"


def test_xfs_without_reflink_and_ext4_copy(mount: Mount) -> None:
    for folder in (mount("xfs", mkfs=["-q", "-m", "reflink=0"]), mount("ext4", mkfs=["-q"])):
        assert not can_reflink(folder)
        content = write_random(folder / "base", 4)
        result = copy_image(folder / "base", folder / "image", SIZE, **free())
        assert (result.method, result.copied_bytes) == (CopyMethod.COPY, 4 * MIB)
        assert (folder / "image").read_bytes() == content
        assert (folder / "image").stat().st_blocks * 512 < 5 * MIB


@pytest.mark.parametrize("kind", ["xfs", "btrfs", "ext4"])
def test_between_tmpfs_and_a_disk_holes_stay_holes(mount: Mount, shm: Path, kind: str) -> None:
    folder = mount(kind, mkfs=["-q"])
    content = write_random(shm / "staged", 4)
    result = copy_whole(shm / "staged", folder / "image", **free())
    assert (result.method, result.copied_bytes) == (CopyMethod.COPY, 4 * MIB)
    assert data_extents_of(folder / "image", SIZE) == (Extent(0, 4 * MIB),)
    back = copy_whole(folder / "image", shm / "back", **free())
    assert back.copied_bytes == 4 * MIB
    assert (shm / "back").read_bytes() == content
    assert data_bytes_of(folder) < 5 * MIB


def test_a_diff_staged_on_the_image_disk_is_merged_there(mount: Mount) -> None:
    folder = mount("xfs", mkfs=["-q"])
    content = write_random(folder / "image", 8)
    with (folder / "1.m").open("wb") as file:
        file.truncate(SIZE)
        for page in range(1, 200, 2):
            file.seek(page * PAGE)
            file.write(bytes([page]) * PAGE)
    extents = data_extents_of(folder / "1.m", SIZE)
    assert len(extents) == 100
    merge_diff(folder / "1.m", extents, folder / "image", **free())
    (folder / "1.m").unlink()
    merged = bytearray(content)
    for page in range(1, 200, 2):
        merged[page * PAGE : (page + 1) * PAGE] = bytes([page]) * PAGE
    assert (folder / "image").read_bytes() == bytes(merged)
