"""How much the page cache may take before running guests lose pages."""

from __future__ import annotations

from pathlib import Path

import pytest

from forkpointd.branching.page_cache import PageCache
from forkpointd.vmm import MemoryCgroup

MIB = 1 << 20
MEMINFO = """MemTotal:       25000000 kB
MemFree:           {free} kB
MemAvailable:   1 kB
Active(file):      2048 kB
Inactive(file):    4096 kB
Mapped:            3072 kB
HugePages_Total:       0
"""


@pytest.fixture
def meminfo(tmp_path: Path) -> Path:
    path = tmp_path / "meminfo"
    path.write_text(MEMINFO.format(free=10 * 1024))
    return path


def group(
    folder: Path, version: int, limit: str, use_mib: int, cache_mib: int, mapped_mib: int
) -> None:
    """The files of one control group."""
    folder.mkdir(exist_ok=True)
    prefix, mapped, use = ("total_", "total_mapped_file", "memory.usage_in_bytes")
    if version == 2:
        prefix, mapped, use = ("", "file_mapped", "memory.current")
    (folder / ("memory.max" if version == 2 else "memory.limit_in_bytes")).write_text(limit)
    (folder / use).write_text(f"{use_mib * MIB}\n")
    half = cache_mib * MIB // 2
    (folder / "memory.stat").write_text(
        f"{prefix}active_file {half}\n{prefix}inactive_file {half}\n"
        f"{mapped} {mapped_mib * MIB}\nother 17\n"
    )


def test_what_is_free_or_caches_what_nobody_has_mapped(meminfo: Path) -> None:
    cache = PageCache(None, meminfo)
    assert cache.room_bytes() == (10 + 2 + 4 - 3) * MIB
    assert not cache.is_crowded_by(13 * MIB)
    assert cache.is_crowded_by(13 * MIB + 1)


def test_a_host_whose_mapped_pages_are_most_has_no_room(meminfo: Path) -> None:
    meminfo.write_text(MEMINFO.format(free=0).replace("3072", "30720"))
    assert PageCache(None, meminfo).room_bytes() == 0


@pytest.mark.parametrize("version", [1, 2])
def test_the_nearest_limit_of_a_control_group_counts(
    tmp_path: Path, meminfo: Path, version: int
) -> None:
    outer, inner = tmp_path / "outer", tmp_path / "outer" / "inner"
    group(outer, version, f"{100 * MIB}", use_mib=97, cache_mib=8, mapped_mib=2)
    group(inner, version, "max" if version == 2 else f"{2**62}", 50, cache_mib=20, mapped_mib=1)
    cache = PageCache(MemoryCgroup(inner, outer, version), meminfo)
    assert cache.room_bytes() == (100 - (97 - 8) - 2) * MIB
    group(inner, version, f"{40 * MIB}", use_mib=40, cache_mib=6, mapped_mib=4)
    assert cache.room_bytes() == (40 - (40 - 6) - 4) * MIB


def test_a_group_without_such_files_has_no_limit(tmp_path: Path, meminfo: Path) -> None:
    (tmp_path / "root").mkdir()
    cache = PageCache(MemoryCgroup(tmp_path / "root", tmp_path / "root", 2), meminfo)
    assert cache.room_bytes() == 13 * MIB
