"""Copies and merges: right page by page, holes kept, stoppable, and nothing half-made left."""

from __future__ import annotations

import errno
import os
import random
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from forkpointd.images import (
    Extent,
    ImageError,
    Stopped,
    copy_image,
    copy_whole,
    data_extents_of,
    load_extents,
    make_empty_image,
    merge_diff,
    moving,
    save_extents,
    syscalls,
    total_bytes,
)
from forkpointd.model import CopyMethod
from tests.unit.images.filesystems import Failing, Mount

PAGE = 4096
PAGES = 64
SIZE = PAGES * PAGE
HOLE, ZERO = 0, 1

quick = settings(
    max_examples=80,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
memories = st.lists(st.integers(0, 5), min_size=PAGES, max_size=PAGES)
"""A page each: a hole, zeros that were written, or data of that kind."""


def free() -> dict[str, Any]:
    """What a copy is called with when nobody looks."""
    return {"progress": lambda _: None, "should_stop": lambda: False, "gate": lambda: None}


def page_of(kind: int, index: int) -> bytes:
    if kind <= ZERO:
        return bytes(PAGE)
    return (kind * 1000 + index).to_bytes(8, "little") * (PAGE // 8)


def write_memory(path: Path, kinds: Sequence[int], generation: int = 0) -> None:
    path.unlink(missing_ok=True)
    with path.open("wb") as file:
        file.truncate(len(kinds) * PAGE)
        for index, kind in enumerate(kinds):
            if kind != HOLE:
                file.seek(index * PAGE)
                file.write(page_of(kind + 10 * generation if kind > ZERO else kind, index))


def contents(kinds: Sequence[int], generation: int = 0) -> list[bytes]:
    return [
        page_of(kind + 10 * generation if kind > ZERO else kind, index)
        for index, kind in enumerate(kinds)
    ]


def pages_in(path: Path) -> list[bytes]:
    content = path.read_bytes()
    return [content[at : at + PAGE] for at in range(0, len(content), PAGE)]


@pytest.fixture
def base(tmp_path: Path) -> Path:
    path = tmp_path / "base"
    write_memory(path, [HOLE, 2, 3, ZERO, HOLE, HOLE, 4, 5] * (PAGES // 8))
    return path


@pytest.fixture(params=["same file system", "from tmpfs"])
def diff_folder(request: pytest.FixtureRequest, tmp_path: Path, shm: Path) -> Path:
    return tmp_path if request.param == "same file system" else shm


# --- what is right -----------------------------------------------------------------------------


@quick
@given(base=memories, diffs=st.lists(memories, max_size=3), chunk_pages=st.integers(1, 20))
def test_images_merged_from_diffs_equal_the_model_page_by_page(
    tmp_path: Path, shm: Path, base: list[int], diffs: list[list[int]], chunk_pages: int
) -> None:
    model = contents(base)
    write_memory(tmp_path / "base", base)
    image = tmp_path / "image"
    image.unlink(missing_ok=True)
    copy_image(tmp_path / "base", image, SIZE, **free(), chunk_bytes=chunk_pages * PAGE)
    assert pages_in(image) == model
    for number, diff in enumerate(diffs, start=1):
        folder = shm if number % 2 else tmp_path
        write_memory(folder / "1.m", diff, number)
        extents = data_extents_of(folder / "1.m", SIZE)
        (folder / "1.x").unlink(missing_ok=True)
        save_extents(folder / "1.x", extents, SIZE, sync=False)
        done = merge_diff(
            folder / "1.m",
            load_extents(folder / "1.x").extents,
            image,
            **free(),
            chunk_bytes=chunk_pages * PAGE,
        )
        laid = contents(diff, number)
        model = [laid[index] if diff[index] != HOLE else page for index, page in enumerate(model)]
        assert done == PAGE * sum(kind != HOLE for kind in diff)
        assert pages_in(image) == model
    assert pages_in(tmp_path / "base") == contents(base)


@quick
@given(base=memories)
def test_copies_keep_holes_and_zeros_as_they_are(
    tmp_path: Path, shm: Path, base: list[int]
) -> None:
    for source_folder in (tmp_path, shm):
        source, image = source_folder / "source", tmp_path / "image"
        write_memory(source, base)
        result = copy_whole(source, image, **free())
        data = PAGE * sum(kind != HOLE for kind in base)
        assert (result.copied_bytes, result.hole_bytes, result.total_bytes) == (
            data,
            SIZE - data,
            SIZE,
        )
        assert data_extents_of(image, SIZE) == data_extents_of(source, SIZE)
        assert pages_in(image) == contents(base)


def test_a_merge_lays_the_stored_extents_whatever_the_file_says_by_then(
    tmp_path: Path, base: Path, diff_folder: Path
) -> None:
    diff = diff_folder / "1.m"
    write_memory(diff, [7] * PAGES)  # as if everything had been read in and counted as data
    merge_diff(diff, [Extent(2 * PAGE, PAGE), Extent(5 * PAGE, 2 * PAGE)], base, **free())
    kinds = [HOLE, 2, 3, ZERO, HOLE, HOLE, 4, 5] * (PAGES // 8)
    expected = contents(kinds)
    for index in (2, 5, 6):
        expected[index] = page_of(7, index)
    assert pages_in(base) == expected


def test_a_merge_lays_zeros_where_an_extent_is_a_hole_by_now(
    tmp_path: Path, base: Path, diff_folder: Path
) -> None:
    make_empty_image(diff_folder / "1.m", SIZE)
    merge_diff(diff_folder / "1.m", [Extent(PAGE, 2 * PAGE)], base, **free())
    assert pages_in(base)[1:3] == [bytes(PAGE), bytes(PAGE)]
    assert pages_in(base)[6] == page_of(4, 6)


def test_a_merge_that_was_broken_off_is_repeated(
    tmp_path: Path, base: Path, diff_folder: Path
) -> None:
    diff = diff_folder / "1.m"
    write_memory(diff, [HOLE, 7] * (PAGES // 2))
    extents = data_extents_of(diff, SIZE)
    answers = iter([False] * 5 + [True])
    with pytest.raises(Stopped):
        merge_diff(
            diff,
            extents,
            base,
            progress=lambda _: None,
            should_stop=lambda: next(answers),
            gate=lambda: None,
            chunk_bytes=PAGE,
        )
    assert merge_diff(diff, extents, base, **free()) == SIZE // 2
    assert pages_in(base)[1::2] == [page_of(7, index) for index in range(1, PAGES, 2)]


def test_an_empty_image_is_one_hole(tmp_path: Path) -> None:
    make_empty_image(tmp_path / "image", SIZE)
    assert data_extents_of(tmp_path / "image", SIZE) == ()
    assert (tmp_path / "image").stat().st_mode & 0o777 == 0o600
    with pytest.raises(FileExistsError):
        make_empty_image(tmp_path / "image", SIZE)


# --- chunks ------------------------------------------------------------------------------------


def test_gate_and_stop_are_asked_before_each_chunk_and_progress_told_after_it(
    tmp_path: Path, shm: Path
) -> None:
    write_memory(shm / "source", [2] * 8)
    said: list[str] = []

    def should_stop() -> bool:
        said.append("stop?")
        return False

    result = copy_whole(
        shm / "source",
        tmp_path / "image",
        progress=lambda count: said.append(f"{count}"),
        should_stop=should_stop,
        gate=lambda: said.append("gate"),
        chunk_bytes=3 * PAGE,
        on_total=lambda count: said.append(f"total {count}"),
    )
    chunks = [3 * PAGE, 3 * PAGE, 2 * PAGE]
    assert said == [
        f"total {8 * PAGE}",
        *(word for chunk in chunks for word in ("gate", "stop?", f"{chunk}")),
    ]
    assert result.copied_bytes == 8 * PAGE


def test_scattered_pages_are_cut_into_chunks_by_their_number_too(tmp_path: Path) -> None:
    write_memory(tmp_path / "source", [HOLE, 2] * 600)
    told: list[int] = []
    copy_whole(
        tmp_path / "source",
        tmp_path / "image",
        progress=told.append,
        should_stop=lambda: False,
        gate=lambda: None,
    )
    assert told == [256 * PAGE, 256 * PAGE, 88 * PAGE]


def test_a_copy_can_be_stopped_at_every_chunk_and_leaves_nothing(
    tmp_path: Path, base: Path
) -> None:
    data_pages = total_bytes(data_extents_of(base, SIZE)) // PAGE
    for chunks in range(data_pages):
        answers = iter([False] * chunks + [True])
        told: list[int] = []
        with pytest.raises(Stopped):
            copy_image(
                base,
                tmp_path / "image",
                SIZE,
                progress=told.append,
                should_stop=lambda answers=answers: next(answers),  # type: ignore[misc]
                gate=lambda: None,
                chunk_bytes=PAGE,
            )
        assert sum(told) <= chunks * PAGE
        assert os.listdir(tmp_path) == ["base"]


def test_a_stop_while_the_gate_is_shut_is_heard(tmp_path: Path, base: Path) -> None:
    stopped: list[bool] = []
    with pytest.raises(Stopped):
        copy_image(
            base,
            tmp_path / "image",
            SIZE,
            progress=lambda _: None,
            should_stop=lambda: bool(stopped),
            gate=lambda: stopped.append(True),
        )


# --- what goes wrong ---------------------------------------------------------------------------


def every_failure(failing: Failing, number: int, work: Callable[[], object]) -> Iterator[OSError]:
    """Runs `work` once for each of its calls, which fails; yields what it raised."""
    failing.at(None, number)
    work()
    for call in range(1, failing.calls + 1):
        failing.at(call, number)
        with pytest.raises(OSError) as caught:
            work()
        yield caught.value


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO, errno.EDQUOT])
@pytest.mark.parametrize("kernel", [True, False])
def test_any_call_of_a_copy_may_fail_and_nothing_is_left(
    tmp_path: Path,
    base: Path,
    failing: Failing,
    monkeypatch: pytest.MonkeyPatch,
    number: int,
    kernel: bool,
) -> None:
    if not kernel:
        monkeypatch.setattr(moving, "_copy_by_kernel", lambda *_: False)
    failing.watch(
        "ficlone", "ftruncate", "lseek", "copy_file_range", "preadv", "pwrite", "start_writeback"
    )
    image = tmp_path / "image"
    before = pages_in(base)

    def work() -> None:
        image.unlink(missing_ok=True)
        copy_image(base, image, SIZE, **free(), chunk_bytes=3 * PAGE)

    count = 0
    for error in every_failure(failing, number, work):
        count += 1
        assert error.errno == number
        assert error.filename in (str(base), str(image))
        assert not image.exists()
        assert pages_in(base) == before
    assert count > 30


@pytest.mark.parametrize("kernel", [True, False])
def test_any_call_of_a_merge_may_fail_and_the_diff_is_untouched(
    tmp_path: Path,
    base: Path,
    failing: Failing,
    monkeypatch: pytest.MonkeyPatch,
    kernel: bool,
) -> None:
    if not kernel:
        monkeypatch.setattr(moving, "_copy_by_kernel", lambda *_: False)
    diff = tmp_path / "1.m"
    write_memory(diff, [HOLE, 7, HOLE, ZERO] * (PAGES // 4))
    extents = data_extents_of(diff, SIZE)
    before = pages_in(diff)
    failing.watch("copy_file_range", "preadv", "pwrite")
    errors = list(
        every_failure(failing, errno.ENOSPC, lambda: merge_diff(diff, extents, base, **free()))
    )
    assert len(errors) >= PAGES // 2
    assert {error.filename for error in errors} <= {str(base), str(diff)}
    assert pages_in(diff) == before
    failing.at(None, 0)
    merge_diff(diff, extents, base, **free())
    assert pages_in(base)[1::4] == before[1::4]


def test_a_full_file_system_is_named(tmp_path: Path, mount: Mount) -> None:
    small = mount("tmpfs", "size=64k")
    write_memory(tmp_path / "base", [2] * PAGES)
    with pytest.raises(OSError, match="No space left") as caught:
        copy_image(tmp_path / "base", small / "image", SIZE, **free())
    assert caught.value.errno == errno.ENOSPC
    assert caught.value.filename == str(small / "image")
    assert os.listdir(small) == []


@quick
@given(base=memories, seed=st.integers(0, 1 << 32), kernel=st.booleans())
def test_short_and_interrupted_calls_change_nothing(
    tmp_path: Path, base: list[int], seed: int, kernel: bool
) -> None:
    dice = random.Random(seed)
    real_copy, real_read, real_write = os.copy_file_range, os.preadv, os.pwrite

    def short_copy(source: int, target: int, count: int, *offsets: int) -> int:
        if not kernel:
            raise OSError(errno.EXDEV, "")
        if dice.random() < 0.3:
            raise InterruptedError(errno.EINTR, "")
        return real_copy(source, target, dice.randint(1, count), *offsets)

    def short_read(fd: int, views: list[memoryview], offset: int) -> int:
        return real_read(fd, [views[0][: dice.randint(1, len(views[0]))]], offset)

    def short_write(fd: int, data: memoryview, offset: int) -> int:
        return real_write(fd, data[: dice.randint(1, len(data))], offset)

    write_memory(tmp_path / "source", base)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(syscalls, "copy_file_range", short_copy)
        patch.setattr(syscalls, "preadv", short_read)
        patch.setattr(syscalls, "pwrite", short_write)
        patch.setattr(moving, "BUFFER_BYTES", 2 * PAGE)  # a chunk is more than it holds
        copy_whole(tmp_path / "source", tmp_path / "image", **free(), chunk_bytes=5 * PAGE)
    assert pages_in(tmp_path / "image") == contents(base)
    assert data_extents_of(tmp_path / "image", SIZE) == data_extents_of(tmp_path / "source", SIZE)


@pytest.mark.parametrize(
    "number",
    [errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EPERM, errno.ETXTBSY],
)
def test_where_the_kernel_can_not_copy_bytes_go_through_a_buffer(
    tmp_path: Path, base: Path, failing: Failing, number: int
) -> None:
    failing.watch("copy_file_range")
    for call in (1, 3):
        failing.at(call, number)
        result = copy_whole(base, tmp_path / "image", **free())
        assert failing.calls == call  # and it isn't asked again
        assert result.method is CopyMethod.COPY
        assert pages_in(tmp_path / "image") == pages_in(base)


@pytest.mark.parametrize("kernel", [True, False])
def test_a_source_that_is_cut_meanwhile_is_an_error(
    tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch, kernel: bool
) -> None:
    if not kernel:
        monkeypatch.setattr(moving, "_copy_by_kernel", lambda *_: False)
    write_memory(tmp_path / "1.m", [7] * PAGES)
    with pytest.raises(ImageError, match=r"1\.m ended at byte"):
        merge_diff(
            tmp_path / "1.m",
            [Extent(0, SIZE)],
            base,
            progress=lambda _: None,
            should_stop=lambda: False,
            gate=lambda: os.truncate(tmp_path / "1.m", 40 * PAGE),
            chunk_bytes=8 * PAGE,
        )


# --- files that are not what they should be ----------------------------------------------------


def test_an_image_is_never_written_over(tmp_path: Path, base: Path) -> None:
    image = tmp_path / "image"
    image.write_text("mine")
    with pytest.raises(FileExistsError):
        copy_image(base, image, SIZE, **free())
    assert image.read_text() == "mine"


def test_a_whole_copy_replaces_a_name_and_not_the_file_behind_it(
    tmp_path: Path, base: Path
) -> None:
    (tmp_path / "precious").write_text("mine")
    os.link(tmp_path / "precious", tmp_path / "image")
    copy_whole(base, tmp_path / "image", **free())
    assert (tmp_path / "precious").read_text() == "mine"
    assert pages_in(tmp_path / "image") == pages_in(base)


def test_a_file_is_not_copied_onto_itself(tmp_path: Path, base: Path) -> None:
    os.link(base, tmp_path / "image")
    with pytest.raises(ImageError, match="itself"):
        copy_whole(base, tmp_path / "image", **free())
    with pytest.raises(ImageError, match="itself"):
        merge_diff(base, [Extent(0, PAGE)], tmp_path / "image", **free())
    assert base.stat().st_size == SIZE


def test_sizes_that_do_not_fit_are_refused(tmp_path: Path, base: Path) -> None:
    with pytest.raises(ImageError, match=f"{SIZE} bytes, not {2 * SIZE}"):
        copy_image(base, tmp_path / "image", 2 * SIZE, **free())
    make_empty_image(tmp_path / "1.m", 2 * SIZE)
    with pytest.raises(ImageError, match="of its own size"):
        merge_diff(tmp_path / "1.m", [], base, **free())
    make_empty_image(tmp_path / "2.m", SIZE)
    with pytest.raises(ImageError, match="end at byte"):
        merge_diff(tmp_path / "2.m", [Extent(SIZE - PAGE, 2 * PAGE)], base, **free())
    assert sorted(os.listdir(tmp_path)) == ["1.m", "2.m", "base"]


def test_a_pipe_a_folder_and_a_link_are_no_images(tmp_path: Path, base: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to(base)
    for name, error in (("pipe", ImageError), ("folder", ImageError), ("link", OSError)):
        with pytest.raises(error):
            copy_image(tmp_path / name, tmp_path / "image", SIZE, **free())
        assert not (tmp_path / "image").exists()
