"""sequential-disk's copy and merge: what the image holds afterwards."""

import os
from pathlib import Path

import pytest

from bench.pause_window.sequential import copy_whole, lay_over

PAGE = 4096
SIZE = 64 * PAGE


def sparse(path: Path, pages: dict[int, bytes], size: int = SIZE) -> Path:
    with path.open("xb") as opened:
        opened.truncate(size)
        for index, fill in pages.items():
            opened.seek(index * PAGE)
            opened.write(fill * PAGE)
    return path


def test_a_whole_image_copy_has_no_hole(tmp_path: Path) -> None:
    source = sparse(tmp_path / "source", {3: b"a", 60: b"b"})
    target = tmp_path / "target"
    assert copy_whole(source, target) == SIZE
    assert target.read_bytes() == source.read_bytes()
    assert target.stat().st_blocks * 512 >= SIZE


def test_an_image_that_is_there_is_never_written_over(tmp_path: Path) -> None:
    source = sparse(tmp_path / "source", {})
    target = sparse(tmp_path / "target", {1: b"x"})
    with pytest.raises(FileExistsError):
        copy_whole(source, target)
    assert target.read_bytes()[PAGE : 2 * PAGE] == b"x" * PAGE


def test_a_hole_of_the_diff_means_unchanged_and_zeros_mean_zero(tmp_path: Path) -> None:
    base = sparse(tmp_path / "base", {0: b"a", 1: b"b", 2: b"c", 63: b"d"})
    diff = sparse(tmp_path / "diff", {1: b"\0", 40: b"e", 63: b"f"})
    image = tmp_path / "image"
    copy_whole(base, image)
    written = lay_over(diff, image)
    wanted = sparse(tmp_path / "wanted", {0: b"a", 2: b"c", 40: b"e", 63: b"f"})
    assert image.read_bytes() == wanted.read_bytes()
    assert written % PAGE == 0
    assert written >= 3 * PAGE


def test_an_empty_diff_changes_nothing(tmp_path: Path) -> None:
    image = sparse(tmp_path / "image", {5: b"a"})
    before = image.read_bytes()
    assert lay_over(sparse(tmp_path / "diff", {}), image) == 0
    assert image.read_bytes() == before


def test_an_image_of_another_size_is_refused(tmp_path: Path) -> None:
    image = sparse(tmp_path / "image", {5: b"a"}, SIZE - PAGE)
    with pytest.raises(ValueError, match="another size"):
        lay_over(sparse(tmp_path / "diff", {1: b"b"}), image)
    assert os.path.getsize(image) == SIZE - PAGE
