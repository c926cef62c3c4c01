"""A FULL image without its zeros reads as the file that Firecracker wrote, byte by byte."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from forkpointd.images import ImageError, Stopped, copy_full, data_extents_of, punch_zeros
from forkpointd.images.zeros import BLOCK_BYTES
from forkpointd.model import CopyMethod
from tests.unit.images.filesystems import Failing

PAGE = 4096
BLOCKS = 12
SIZE = BLOCKS * BLOCK_BYTES

quick = settings(
    max_examples=60,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
marks = st.sets(st.integers(0, SIZE - 1), max_size=8)
"""Offsets of the bytes that aren't zero."""


def nobody(_: int) -> None:
    """Who is told bytes."""


def free(**instead: Any) -> dict[str, Any]:
    """What is passed where nobody looks."""
    return {
        "progress": nobody,
        "should_stop": lambda: False,
        "gate": lambda: None,
        **instead,
    }


def memory_of(marked: set[int]) -> bytes:
    content = bytearray(SIZE)
    for offset in marked:
        content[offset] = 1 + offset % 255
    return bytes(content)


def blocks_of(marked: set[int]) -> set[int]:
    return {offset // BLOCK_BYTES for offset in marked}


def data_blocks(path: Path) -> set[int]:
    """The blocks of a file in which there is data."""
    return {
        at // BLOCK_BYTES
        for extent in data_extents_of(path, SIZE)
        for at in range(extent.offset_bytes, extent.end_bytes, PAGE)
    }


@quick
@given(marked=marks, chunk_blocks=st.integers(1, 5))
@example(marked=set(), chunk_blocks=4)
@example(marked={0, SIZE - 1}, chunk_blocks=BLOCKS)
@example(marked={BLOCK_BYTES - 1, BLOCK_BYTES}, chunk_blocks=3)
@example(marked={block * BLOCK_BYTES + 5 for block in range(BLOCKS)}, chunk_blocks=5)
def test_both_ways_keep_every_byte_and_leave_out_every_block_of_zeros(
    tmp_path: Path, shm: Path, marked: set[int], chunk_blocks: int
) -> None:
    content, chunk_bytes = memory_of(marked), chunk_blocks * BLOCK_BYTES
    data_bytes = BLOCK_BYTES * len(blocks_of(marked))
    (shm / "1.m").write_bytes(content)
    written: list[int] = []
    left_out: list[int] = []
    result = copy_full(
        shm / "1.m",
        tmp_path / "image",
        **free(progress=written.append),
        left_out=left_out.append,
        chunk_bytes=chunk_bytes,
    )
    assert (tmp_path / "image").read_bytes() == content
    assert data_blocks(tmp_path / "image") == blocks_of(marked)
    assert (result.method, result.copied_bytes, result.hole_bytes, result.total_bytes) == (
        CopyMethod.COPY,
        data_bytes,
        SIZE - data_bytes,
        SIZE,
    )
    assert (sum(written), sum(left_out)) == (data_bytes, SIZE - data_bytes)

    looked_at: list[int] = []
    punched = punch_zeros(shm / "1.m", **free(progress=looked_at.append), chunk_bytes=chunk_bytes)
    assert (shm / "1.m").read_bytes() == content
    assert data_blocks(shm / "1.m") == blocks_of(marked)
    assert (punched, sum(looked_at)) == (SIZE - data_bytes, SIZE)


def test_holes_of_the_staged_file_are_not_read(tmp_path: Path, shm: Path) -> None:
    with (shm / "1.m").open("wb") as staged:
        staged.truncate(SIZE)
        staged.seek(3 * BLOCK_BYTES)
        staged.write(b"here")
    told: list[int] = []
    copy_full(shm / "1.m", tmp_path / "image", **free(), left_out=told.append)
    assert (tmp_path / "image").read_bytes() == (shm / "1.m").read_bytes()
    assert sum(told) == 0


@pytest.mark.parametrize("number", [errno.EOPNOTSUPP, errno.ENOSPC])
def test_zeros_that_can_not_be_punched_stay(tmp_path: Path, failing: Failing, number: int) -> None:
    content = memory_of({5 * BLOCK_BYTES})
    (tmp_path / "1.m").write_bytes(content)
    failing.watch("punch_hole")
    failing.at(2, number)
    assert punch_zeros(tmp_path / "1.m", **free(), chunk_bytes=2 * BLOCK_BYTES) == 2 * BLOCK_BYTES
    assert failing.calls == 2  # and it isn't asked again
    assert (tmp_path / "1.m").read_bytes() == content


@pytest.mark.parametrize("call", ["preadv", "pwrite", "punch_hole"])
def test_a_disk_that_fails_is_an_error_with_the_path(
    tmp_path: Path, failing: Failing, call: str
) -> None:
    content = memory_of({0, 5 * BLOCK_BYTES, 9 * BLOCK_BYTES})
    staged, image = tmp_path / "1.m", tmp_path / "image"
    staged.write_bytes(content)
    failing.watch(call)
    failing.at(2, errno.EIO)
    with pytest.raises(OSError, match=r"image|1\.m") as raised:
        if call == "punch_hole":
            punch_zeros(staged, **free(), chunk_bytes=BLOCK_BYTES)
        else:
            copy_full(staged, image, **free(), left_out=nobody, chunk_bytes=BLOCK_BYTES)
    assert raised.value.errno == errno.EIO
    assert not image.exists()
    assert staged.read_bytes() == content


def test_both_can_be_stopped_at_every_chunk(tmp_path: Path) -> None:
    staged, image = tmp_path / "1.m", tmp_path / "image"
    content = memory_of({0, 7 * BLOCK_BYTES})
    for chunks in range(BLOCKS):
        staged.write_bytes(content)
        for work in (
            lambda stop: copy_full(
                staged, image, **free(should_stop=stop), left_out=nobody, chunk_bytes=BLOCK_BYTES
            ),
            lambda stop: punch_zeros(staged, **free(should_stop=stop), chunk_bytes=BLOCK_BYTES),
        ):
            answers = iter([False] * chunks + [True])
            with pytest.raises(Stopped):
                work(lambda answers=answers: next(answers))
            assert not image.exists()
            assert staged.read_bytes() == content


def test_a_name_is_replaced_and_not_the_file_behind_it(tmp_path: Path) -> None:
    staged, image = tmp_path / "1.m", tmp_path / "image"
    staged.write_bytes(memory_of({77}))
    (tmp_path / "precious").write_text("mine")
    os.link(tmp_path / "precious", image)
    copy_full(staged, image, **free(), left_out=nobody)
    assert (tmp_path / "precious").read_text() == "mine"
    image.unlink()
    os.link(staged, image)
    with pytest.raises(ImageError, match="itself"):
        copy_full(staged, image, **free(), left_out=nobody)
    assert staged.read_bytes() == memory_of({77})
