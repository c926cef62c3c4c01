"""Extents: what SEEK_DATA says, and the file that remembers it."""

from __future__ import annotations

import errno
import os
import struct
import zlib
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from forkpointd.images import (
    Extent,
    Extents,
    ImageError,
    data_extents,
    data_extents_of,
    find_extents_of,
    first_of,
    load_extents,
    save_extents,
    total_bytes,
)
from forkpointd.images.fs import Fs

PAGE = 4096
MIB = 1 << 20

quick = settings(
    max_examples=60,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


def runs_of(pages: set[int]) -> tuple[Extent, ...]:
    runs: list[Extent] = []
    for page in sorted(pages):
        if runs and runs[-1].end_bytes == page * PAGE:
            runs[-1] = Extent(runs[-1].offset_bytes, runs[-1].length_bytes + PAGE)
        else:
            runs.append(Extent(page * PAGE, PAGE))
    return tuple(runs)


def write_pages(path: Path, size_bytes: int, pages: set[int], content: bytes) -> None:
    with path.open("wb") as file:
        file.truncate(size_bytes)
        for page in pages:
            file.seek(page * PAGE)
            file.write(content)


@st.composite
def extents_of_memory(draw: st.DrawFn) -> tuple[list[Extent], int]:
    """Extents of whole pages or of odd bytes, small or beyond 16 TiB, and their memory's size."""
    unit = draw(st.sampled_from([1, PAGE]))
    limit = draw(st.sampled_from([4, 1 << 20, 1 << 33]))
    gaps = draw(st.lists(st.tuples(st.integers(0, limit), st.integers(1, limit)), max_size=20))
    extents: list[Extent] = []
    end = 0
    for gap, length in gaps:
        extents.append(Extent(end + gap * unit, length * unit))
        end = extents[-1].end_bytes
    return extents, end + draw(st.integers(0, limit))


@quick
@given(pages=st.sets(st.integers(0, 255)), zeros=st.booleans())
def test_data_extents_are_the_pages_that_were_written_zeros_included(
    tmp_path: Path, shm: Path, pages: set[int], zeros: bool
) -> None:
    content = bytes(PAGE) if zeros else b"x" * PAGE
    for folder in (tmp_path, shm):
        path = folder / "memory"
        write_pages(path, MIB, pages, content)
        assert data_extents_of(path, MIB) == runs_of(pages)


def test_data_extents_end_at_the_size_that_was_asked_for(tmp_path: Path) -> None:
    path = tmp_path / "memory"
    write_pages(path, MIB, {0, 1, 2, 200}, b"x" * PAGE)
    with path.open("rb") as file:
        assert data_extents(file.fileno(), 2 * PAGE) == (Extent(0, 2 * PAGE),)
        assert data_extents(file.fileno(), 100 * PAGE) == (Extent(0, 3 * PAGE),)
        assert data_extents(file.fileno(), 0) == ()


def test_a_file_of_another_size_has_no_extents_of_ours(tmp_path: Path) -> None:
    path = tmp_path / "memory"
    write_pages(path, MIB, {1}, b"x" * PAGE)
    with pytest.raises(ImageError, match=f"{path} has {MIB} bytes, not {2 * MIB}"):
        data_extents_of(path, 2 * MIB)


@given(extents_of_memory(), st.integers(0, 25), st.integers(0, 25))
def test_the_compact_form_is_a_sequence_like_any_other(
    memory: tuple[list[Extent], int], first: int, last: int
) -> None:
    extents, _ = memory
    compact = Extents.of(extents)
    assert Extents.of(compact) is compact
    assert list(compact) == extents
    assert compact == extents
    assert compact[first:last] == extents[first:last]
    assert compact != [*extents, Extent(0, 1)]
    assert compact == Extents.of(tuple(extents))
    assert total_bytes(compact) == total_bytes(extents)
    for index, extent in enumerate(extents):
        assert compact[index] == extent
        assert compact[index].end_bytes == extent.end_bytes
    with pytest.raises(IndexError):
        compact[len(extents)]


def test_found_extents_can_be_saved_as_they_are(tmp_path: Path) -> None:
    write_pages(tmp_path / "1.m", MIB, {1, 2, 9}, b"x" * PAGE)
    found = find_extents_of(tmp_path / "1.m", MIB)
    save_extents(tmp_path / "1.x", found, MIB, sync=False)
    assert load_extents(tmp_path / "1.x").extents == found
    assert found == data_extents_of(tmp_path / "1.m", MIB)


@quick
@given(extents_of_memory())
def test_what_was_saved_is_loaded(tmp_path: Path, memory: tuple[list[Extent], int]) -> None:
    extents, memory_bytes = memory
    path = tmp_path / "1.x"
    path.unlink(missing_ok=True)
    save_extents(path, extents, memory_bytes, sync=False)
    stored = load_extents(path)
    assert list(stored.extents) == extents
    assert stored.memory_bytes == memory_bytes
    assert total_bytes(stored.extents) == sum(extent.length_bytes for extent in extents)


def test_extents_of_pages_take_eight_bytes_each(tmp_path: Path) -> None:
    extents = [Extent(2 * page * PAGE, PAGE) for page in range(1000)]
    save_extents(tmp_path / "1.x", extents, 8 * MIB, sync=False)
    assert (tmp_path / "1.x").stat().st_size == 40 + 8 * 1000


def test_every_altered_byte_and_every_cut_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "1.x"
    save_extents(path, [Extent(PAGE, PAGE), Extent(3 * PAGE, 2 * PAGE)], MIB, sync=False)
    good = path.read_bytes()
    bad = [good[:length] for length in range(len(good))] + [good + b"\0"]
    for position in range(len(good)):
        flipped = bytearray(good)
        flipped[position] ^= 0x10
        bad.append(bytes(flipped))
    for content in bad:
        path.write_bytes(content)
        with pytest.raises(ImageError, match=str(path)):
            load_extents(path)


def with_right_crc(content: bytes) -> bytes:
    zeroed = content[:12] + bytes(4) + content[16:]
    return content[:12] + struct.pack("<I", zlib.crc32(zeroed)) + content[16:]


def test_a_newer_format_is_refused_by_its_number(tmp_path: Path) -> None:
    path = tmp_path / "1.x"
    save_extents(path, [Extent(0, PAGE)], MIB, sync=False)
    content = path.read_bytes()
    path.write_bytes(with_right_crc(content[:8] + struct.pack("<I", 2) + content[12:]))
    with pytest.raises(ImageError, match="format 2 is not known"):
        load_extents(path)


@pytest.mark.parametrize(
    "lie",
    [
        pytest.param((24, struct.pack("<Q", 0)), id="memory-smaller-than-extents"),
        pytest.param((32, struct.pack("<Q", 1 << 40)), id="count-beyond-the-file"),
        pytest.param((20, struct.pack("<I", 3)), id="no-such-width"),
        pytest.param((44, struct.pack("<I", 0)), id="an-empty-extent"),
        pytest.param((16, struct.pack("<I", 0)), id="units-of-nothing"),
    ],
)
def test_a_file_that_lies_under_a_right_checksum_is_refused(
    tmp_path: Path, lie: tuple[int, bytes]
) -> None:
    path = tmp_path / "1.x"
    save_extents(path, [Extent(0, PAGE), Extent(2 * PAGE, PAGE)], MIB, sync=False)
    content = path.read_bytes()
    offset, value = lie
    path.write_bytes(with_right_crc(content[:offset] + value + content[offset + len(value) :]))
    with pytest.raises(ImageError):
        load_extents(path)


@pytest.mark.parametrize(
    "extents",
    [
        [Extent(0, 0)],
        [Extent(PAGE, -PAGE)],
        [Extent(-PAGE, PAGE)],
        [Extent(0, 2 * PAGE), Extent(PAGE, PAGE)],
        [Extent(2 * PAGE, PAGE), Extent(0, PAGE)],
        [Extent(MIB - PAGE, 2 * PAGE)],
    ],
)
def test_impossible_extents_are_not_saved(tmp_path: Path, extents: list[Extent]) -> None:
    with pytest.raises(ImageError):
        save_extents(tmp_path / "1.x", extents, MIB, sync=True)
    assert os.listdir(tmp_path) == []


def test_extents_are_stored_once(tmp_path: Path) -> None:
    path = tmp_path / "1.x"
    save_extents(path, [Extent(0, PAGE)], MIB, sync=False)
    with pytest.raises(FileExistsError):
        save_extents(path, [], MIB, sync=False)
    assert load_extents(path).extents == (Extent(0, PAGE),)


class FsOnPaper(Fs):
    """Writes down each step, and fails one of them."""

    def __init__(self, fail_at: int | None = None) -> None:
        self.steps: list[str] = []
        self._fail_at = fail_at

    def _step(self, name: str, path: Path) -> None:
        self.steps.append(f"{name} {path.name}")
        if len(self.steps) == self._fail_at:
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))

    def write_new(self, path: Path, content: bytes) -> None:
        super().write_new(path, content)
        self._step("write", path)

    def fsync_file(self, path: Path) -> None:
        self._step("fsync", path)
        super().fsync_file(path)

    def rename(self, old: Path, new: Path) -> None:
        self._step("rename", old)
        super().rename(old, new)

    def fsync_folder(self, path: Path) -> None:
        self._step("fsync folder", path)
        super().fsync_folder(path)


def test_a_synced_file_is_durable_before_it_has_its_name(tmp_path: Path) -> None:
    folder = tmp_path / "staging"
    folder.mkdir()
    fs = FsOnPaper()
    save_extents(folder / "1.x", [Extent(0, PAGE)], MIB, sync=True, fs=fs)
    assert fs.steps == [
        "write 1.x.part",
        "fsync 1.x.part",
        "rename 1.x.part",
        "fsync folder staging",
    ]


@pytest.mark.parametrize("step", [1, 2, 3, 4])
def test_a_failure_at_any_step_leaves_no_file(tmp_path: Path, step: int) -> None:
    with pytest.raises(OSError, match="Input/output error"):
        save_extents(tmp_path / "1.x", [Extent(0, PAGE)], MIB, sync=True, fs=FsOnPaper(step))
    assert os.listdir(tmp_path) == []


def pages_of(extent: Extent) -> range:
    return range(extent.offset_bytes, extent.end_bytes, PAGE)


@given(
    lengths=st.lists(st.integers(1, 9), max_size=8),
    limit_pages=st.integers(0, 60),
    limit_count=st.integers(0, 10),
)
def test_the_first_extents_are_as_many_as_fit_and_the_last_is_cut(
    lengths: list[int], limit_pages: int, limit_count: int
) -> None:
    whole, offset = [], 0
    for length in lengths:
        whole.append(Extent(offset, length * PAGE))
        offset += (length + 2) * PAGE
    pages = [at for extent in whole[:limit_count] for at in pages_of(extent)]
    first = first_of(Extents.of(whole), limit_pages * PAGE + 100, limit_count)
    found = [at for extent in first for at in pages_of(extent)]
    assert found == pages[:limit_pages]
    assert len(first) <= limit_count
    assert tuple(whole) == tuple(Extents.of(whole))
