"""Checksums of a snapshot's files: what counts, and what is noticed."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from forkpointd.images import Checksums, Damaged, ImageError, Stopped, compare, compute, digest_of
from forkpointd.images.checksums import CHUNK_BYTES, DIGEST_BYTES
from forkpointd.images.extents import Extent, Extents
from forkpointd.images.manifest import LayerWitness
from forkpointd.images.store import SnapshotStore, StoredSnapshot
from forkpointd.model import MIB, Layout
from tests.unit.images.making import manifest

MEMORY_BYTES = 4 * MIB + 8192
PAGE = 4096


def nothing(_: int = 0) -> None:
    pass


def computed(stored: StoredSnapshot) -> Checksums:
    return compute(stored, progress=nothing, should_stop=lambda: False, gate=nothing)


def check(stored: StoredSnapshot, sums: Checksums) -> int:
    """Compares; returns the bytes that were read."""
    read: list[int] = []
    compare(stored, sums, progress=read.append, should_stop=lambda: False, gate=nothing)
    return sum(read)


def stored_with(
    tmp_path: Path, pages: dict[int, bytes], held: tuple[Extent, ...] | None = None
) -> StoredSnapshot:
    """A snapshot whose memory has these pages, by offset; a layer where `held` is given."""
    store = SnapshotStore(tmp_path)
    draft = store.draft("br-1")
    layer = None if held is None else LayerWitness("br-0", Extents.of(held))
    memory = draft.memory_path if held is None else draft.layer_path
    with memory.open("wb") as file:
        file.truncate(MEMORY_BYTES)
        for offset, content in pages.items():
            os.pwrite(file.fileno(), content, offset)
    draft.vmstate_path.write_bytes(b"state" * 1000)
    made = replace(
        manifest("snap-1", "br-1"),
        memory_bytes=MEMORY_BYTES,
        layout=Layout.FLAT if layer is None else Layout.LAYERED,
        layer=layer,
    )
    store.finalise(draft, made)
    return store.open(made.snapshot_id)


PAGES = {0: b"a" * PAGE, 2 * MIB: b"b" * PAGE, MEMORY_BYTES - PAGE: b"c" * PAGE}
HELD = (Extent(0, PAGE), Extent(2 * MIB - PAGE, 2 * PAGE), Extent(MEMORY_BYTES - PAGE, PAGE))


def write(path: Path, offset: int, content: bytes) -> None:
    os.chmod(path, 0o600)
    with path.open("r+b") as file:
        os.pwrite(file.fileno(), content, offset)


def test_what_did_not_change_is_as_it_was(tmp_path: Path) -> None:
    stored = stored_with(tmp_path, PAGES)
    sums = computed(stored)
    assert set(sums.files) == {"manifest.json", "vmstate", "memory"}
    assert check(stored, sums) < 3 * MIB + 64 * 1024, "holes are not read"
    again = Checksums.from_json(sums.to_json())
    assert again == sums
    assert digest_of(sums.to_json()) == digest_of(again.to_json())


def test_holes_that_a_copy_filled_change_nothing(tmp_path: Path) -> None:
    stored = stored_with(tmp_path, PAGES)
    sums = computed(stored)
    content = stored.memory_path.read_bytes()
    stored.memory_path.unlink()
    stored.memory_path.write_bytes(content)
    check(stored, sums)


@pytest.mark.parametrize(
    ("offset", "expected"),
    [
        (17, (0, CHUNK_BYTES)),
        (MIB + 4096, (MIB, CHUNK_BYTES)),  # in a hole
        (2 * MIB + 4095, (2 * MIB, CHUNK_BYTES)),
        (MEMORY_BYTES - 1, (4 * MIB, 8192)),
    ],
)
def test_one_bit_is_found_with_its_place(
    tmp_path: Path, offset: int, expected: tuple[int, int]
) -> None:
    stored = stored_with(tmp_path, PAGES)
    sums = computed(stored)
    was = stored.memory_path.read_bytes()[offset]
    write(stored.memory_path, offset, bytes([was ^ 1]))
    with pytest.raises(Damaged, match="first bad range") as caught:
        check(stored, sums)
    assert (caught.value.offset_bytes, caught.value.length_bytes) == expected
    assert caught.value.path == stored.memory_path


def test_chunks_in_a_row_are_one_range(tmp_path: Path) -> None:
    stored = stored_with(tmp_path, PAGES)
    sums = computed(stored)
    write(stored.memory_path, MIB, b"x" * (2 * MIB))
    with pytest.raises(Damaged) as caught:
        check(stored, sums)
    assert (caught.value.offset_bytes, caught.value.length_bytes) == (MIB, 2 * MIB)


def test_data_that_became_a_hole_is_damage(tmp_path: Path) -> None:
    stored = stored_with(tmp_path, PAGES)
    sums = computed(stored)
    os.chmod(stored.memory_path, 0o600)
    with stored.memory_path.open("r+b") as file:
        file.truncate(2 * MIB)
        file.truncate(MEMORY_BYTES)
    with pytest.raises(Damaged) as caught:
        check(stored, sums)
    assert caught.value.offset_bytes == 2 * MIB


def test_of_a_layer_only_its_pages_count(tmp_path: Path) -> None:
    stored = stored_with(tmp_path, PAGES, HELD)
    sums = computed(stored)
    assert check(stored, sums) < 4 * PAGE + 64 * 1024
    write(stored.memory_path, MIB, b"whatever a copy puts there")
    check(stored, sums)
    write(stored.memory_path, 2 * MIB, b"B")
    with pytest.raises(Damaged) as caught:
        check(stored, sums)
    assert caught.value.offset_bytes == 2 * MIB


@pytest.mark.parametrize("name", ["vmstate", "manifest.json"])
def test_every_file_is_looked_at(tmp_path: Path, name: str) -> None:
    stored = stored_with(tmp_path, PAGES)
    sums = computed(stored)
    write(stored.folder / name, 3, b"\0")
    with pytest.raises(Damaged) as caught:
        check(stored, sums)
    assert caught.value.path.name == name


def cut(path: Path) -> None:
    os.truncate(path, MIB)


def longer(path: Path) -> None:
    os.truncate(path, MEMORY_BYTES + PAGE)


def a_link(path: Path) -> None:
    shutil.move(path, path.with_name("elsewhere"))
    path.symlink_to("elsewhere")


def a_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


@pytest.mark.parametrize("harm", [cut, longer, a_link, a_folder, Path.unlink])
def test_what_is_no_such_file_is_damage(tmp_path: Path, harm: Callable[[Path], None]) -> None:
    stored = stored_with(tmp_path, PAGES)
    sums = computed(stored)
    os.chmod(stored.memory_path, 0o600)
    harm(stored.memory_path)
    with pytest.raises((ImageError, OSError)):
        check(stored, sums)


def test_it_stops_when_told(tmp_path: Path) -> None:
    stored = stored_with(tmp_path, PAGES)
    with pytest.raises(Stopped):
        compute(stored, progress=nothing, should_stop=lambda: True, gate=nothing)


@given(st.data())
def test_altered_checksums_are_refused_or_read_as_what_they_say(data: st.DataObject) -> None:
    """The digest in the registry notices every change; reading one never fails otherwise."""
    sums = Checksums(Layout.FLAT, {})
    content = bytearray(sums.to_json())
    place = data.draw(st.integers(0, len(content) - 1))
    content[place] ^= data.draw(st.integers(1, 255))
    assert digest_of(bytes(content)) != digest_of(sums.to_json())
    with suppress(ImageError):
        Checksums.from_json(bytes(content))


@pytest.mark.parametrize(
    "change",
    [
        {"format": 2},
        {"algorithm": "md5"},
        {"layout": "ROUND"},
        {"files": []},
        {"files": {"memory": {"size_bytes": -1, "digests": ""}}},
        {"files": {"memory": {"size_bytes": DIGEST_BYTES, "digests": "eJwDAAAAAAE="}}},
        {"files": {"memory": {"size_bytes": 1, "digests": "not base64"}}},
    ],
)
def test_what_is_no_checksums_is_refused(change: dict[str, object]) -> None:
    content = json.loads(Checksums(Layout.FLAT, {}).to_json()) | change
    with pytest.raises(ImageError):
        Checksums.from_json(json.dumps(content).encode())
