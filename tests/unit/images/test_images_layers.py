"""Layers: what a chain of diffs shows, and the image that it makes."""

from __future__ import annotations

import base64
import json
import os
import random
import zlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from forkpointd.images import (
    Extent,
    Extents,
    ImageError,
    Layer,
    LayerWitness,
    Manifest,
    SnapshotStore,
    Stopped,
    copy_chain,
    shown,
    total_bytes,
    union,
)
from forkpointd.images.copying import make_empty_image
from forkpointd.images.extents import encode_extents
from forkpointd.model import CopyMethod, Layout
from tests.unit.images.filesystems import Mount
from tests.unit.images.making import MEMORY_BYTES, MIB, filled, manifest

PAGE = 4096
PAGES = MEMORY_BYTES // PAGE


def extents_of(pages: set[int]) -> Extents:
    found: list[Extent] = []
    for page in sorted(pages):
        if found and found[-1].end_bytes == page * PAGE:
            found[-1] = Extent(found[-1].offset_bytes, found[-1].length_bytes + PAGE)
        else:
            found.append(Extent(page * PAGE, PAGE))
    return Extents.of(found)


def pages_of(extents: Extents) -> list[int]:
    return [
        page
        for offset, length in extents.pairs()
        for page in range(offset // PAGE, (offset + length) // PAGE)
    ]


page_sets = st.lists(st.sets(st.integers(0, 40), max_size=30), min_size=1, max_size=6)


@given(page_sets)
def test_each_page_is_shown_by_the_newest_layer_that_has_it(layers: list[set[int]]) -> None:
    found = shown([extents_of(pages) for pages in layers], 41 * PAGE)
    for number, extents in enumerate(found):
        newer = set().union(*layers[number + 1 :])
        assert pages_of(extents) == sorted(layers[number] - newer)


@given(page_sets)
def test_a_union_has_what_any_of_them_has(layers: list[set[int]]) -> None:
    found = union([extents_of(pages) for pages in layers], 41 * PAGE)
    assert found == extents_of(set().union(*layers))


@pytest.mark.parametrize("bad", [Extent(0, 512), Extent(512, PAGE), Extent(PAGES * PAGE, PAGE)])
@pytest.mark.parametrize("ask", [shown, union])
def test_a_layer_has_whole_pages_of_the_memory(
    bad: Extent, ask: Callable[[list[Extents], int], object]
) -> None:
    with pytest.raises(ImageError, match="no pages"):
        ask([Extents.of([bad])], MEMORY_BYTES)


# --- an image of them --------------------------------------------------------------------------


def layer_file(path: Path, pages: set[int], mark: int, *, elsewhere: int = 0) -> Layer:
    """A layer whose file has `elsewhere` in all bytes that it does not hold: a copy of it might."""
    content = bytearray([elsewhere]) * MEMORY_BYTES
    for page in pages:
        content[page * PAGE : (page + 1) * PAGE] = bytes([mark]) * PAGE
    path.write_bytes(content)
    return Layer(path, extents_of(pages))


def free() -> dict[str, Any]:
    return {"progress": lambda _: None, "should_stop": lambda: False, "gate": lambda: None}


def marks(path: Path) -> bytes:
    """The first byte of each page."""
    return path.read_bytes()[::PAGE]


def test_a_chain_is_its_image_under_its_layers(tmp_path: Path) -> None:
    chance = random.Random(5)
    image, expected = tmp_path / "image", bytearray(PAGES)
    make_empty_image(image, MEMORY_BYTES)
    with image.open("r+b") as file:
        for page in range(0, PAGES, 3):
            file.seek(page * PAGE)
            file.write(b"\x01" * PAGE)
            expected[page] = 1
    layers = []
    for mark in range(2, 7):
        pages = set(chance.sample(range(PAGES), 300))
        zeros = mark == 4  # a page of zeros is no hole
        layers.append(layer_file(tmp_path / str(mark), pages, 0 if zeros else mark, elsewhere=99))
        for page in pages:
            expected[page] = 0 if zeros else mark
    moved: list[int] = []
    told: list[int] = []
    result = copy_chain(
        image,
        layers,
        tmp_path / "flat",
        MEMORY_BYTES,
        **{**free(), "progress": moved.append},
        on_total=told.append,
    )
    assert marks(tmp_path / "flat") == bytes(expected)
    assert result.method is CopyMethod.COPY
    held = set(range(0, PAGES, 3)).union(*(pages_of(layer.extents) for layer in layers))
    assert [sum(moved)] == told == [len(held) * PAGE], "each page is moved once"
    assert os.stat(tmp_path / "flat").st_blocks * 512 <= len(held) * PAGE


def test_layers_over_nothing_stand_on_zeros(tmp_path: Path) -> None:
    layer = layer_file(tmp_path / "layer", {3}, 7, elsewhere=99)
    copy_chain(None, [layer], tmp_path / "flat", MEMORY_BYTES, **free())
    assert marks(tmp_path / "flat") == bytes(3) + b"\x07" + bytes(PAGES - 4)


def test_an_image_is_shared_where_it_can_be(mount: Mount) -> None:
    folder = mount("xfs")
    image = folder / "image"
    image.write_bytes(b"\x01" * MEMORY_BYTES)
    layer = layer_file(folder / "layer", {0, 9}, 7)
    moved: list[int] = []
    result = copy_chain(
        image, [layer], folder / "flat", MEMORY_BYTES, **{**free(), "progress": moved.append}
    )
    assert result.method is CopyMethod.REFLINK
    assert sum(moved) == 2 * PAGE
    assert marks(folder / "flat") == b"\x07" + b"\x01" * 8 + b"\x07" + b"\x01" * (PAGES - 10)


def test_a_chain_that_is_broken_off_leaves_no_image(tmp_path: Path) -> None:
    layer = layer_file(tmp_path / "layer", {3}, 7)
    with pytest.raises(Stopped):
        copy_chain(
            None,
            [layer],
            tmp_path / "flat",
            MEMORY_BYTES,
            **{**free(), "should_stop": lambda: True},
        )
    (tmp_path / "short").write_bytes(b"x" * PAGE)
    with pytest.raises(ImageError, match="its own size"):
        copy_chain(
            None,
            [Layer(tmp_path / "short", extents_of({0}))],
            tmp_path / "flat",
            MEMORY_BYTES,
            **free(),
        )
    assert not (tmp_path / "flat").exists()
    (tmp_path / "flat").write_text("somebody's")
    with pytest.raises(FileExistsError):
        copy_chain(None, [layer], tmp_path / "flat", MEMORY_BYTES, **free())
    assert (tmp_path / "flat").read_text() == "somebody's"


def test_a_thousand_layers_are_one_image(tmp_path: Path) -> None:
    same = layer_file(tmp_path / "same", set(range(PAGES)), 1)
    layers = [Layer(same.memory_path, extents_of({n % PAGES, 0})) for n in range(1000)]
    result = copy_chain(None, layers, tmp_path / "flat", MEMORY_BYTES, **free())
    assert result.copied_bytes == 1000 * PAGE


# --- manifests of layers -----------------------------------------------------------------------


def layered(
    snapshot_id: str = "snap-b",
    branch_id: str = "br-b",
    *,
    parent: str = "snap-a",
    parent_branch: str = "br-a",
    pages: set[int] = frozenset({1, 2, 7}),  # type: ignore[assignment]
) -> Manifest:
    return replace(
        manifest(snapshot_id, branch_id),
        layout=Layout.LAYERED,
        parent_snapshot_id=parent,
        layer=LayerWitness(parent_branch, extents_of(pages)),
        drives=(),
    )


def test_a_layer_survives_its_manifest() -> None:
    assert Manifest.from_json(layered().to_json()) == layered()
    empty = layered(pages=set())
    assert Manifest.from_json(empty.to_json()) == empty


def test_a_manifest_from_before_there_were_layers_is_flat() -> None:
    old = json.loads(manifest().to_json())
    del old["layer"]
    old["format"] = 1
    assert Manifest.from_json(json.dumps(old)) == manifest()


def packed(extents: Extents, memory_bytes: int = MEMORY_BYTES) -> str:
    return base64.b64encode(zlib.compress(encode_extents(extents, memory_bytes))).decode()


BOMB = base64.b64encode(zlib.compress(bytes(80 * MIB))).decode()


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"layout": "FLAT"}, "does not fit"),
        ({"layer": None}, "does not fit"),
        ({"parent_snapshot_id": None}, "can't stand on None"),
        ({"parent_snapshot_id": "snap-b"}, "can't stand on snap-b"),
        ({"layer.parent_branch_id": 7}, "not a string"),
        ({"layer.data_bytes": PAGE}, "not 4096"),
        ({"layer.extents": "no base64!"}, "can't be unpacked"),
        ({"layer.extents": base64.b64encode(b"no zlib").decode()}, "can't be unpacked"),
        ({"layer.extents": packed(extents_of({1, 2, 7}))[:-8] + "AAAA"}, "unpacked|cut"),
        ({"layer.extents": packed(extents_of({1, 2, 7}), 2 * MEMORY_BYTES)}, "of a memory of"),
        ({"layer.extents": BOMB}, "too many"),
        ({"layer.more": 1}, "not known"),
    ],
)
def test_a_manifest_of_a_layer_is_not_believed(changes: dict[str, Any], why: str) -> None:
    content = json.loads(layered().to_json())
    for name, value in changes.items():
        place = content
        *outer, key = name.split(".")
        for part in outer:
            place = place[part]
        place[key] = value
    with pytest.raises(ImageError, match=why):
        Manifest.from_json(json.dumps(content))


# --- the store ---------------------------------------------------------------------------------


@pytest.fixture
def store(tmp_path: Path) -> SnapshotStore:
    root = tmp_path / "snapshots"
    root.mkdir()
    made = SnapshotStore(root)
    made.finalise(
        filled(made.draft("br-a"), b"\x01" * MEMORY_BYTES), replace(manifest(), drives=())
    )
    return made


def put_layer(store: SnapshotStore, what: Manifest, mark: int = 7) -> Path:
    assert what.layer is not None
    draft = store.draft(what.branch_id)
    layer_file(draft.layer_path, set(pages_of(what.layer.extents)), mark)
    draft.vmstate_path.write_bytes(b"state")
    return store.finalise(draft, what)


def flatten(store: SnapshotStore, snapshot_id: str) -> None:
    def make(path: Path) -> None:
        chain = store.chain(snapshot_id)
        copy_chain(chain.image.memory_path, chain.parts(), path, MEMORY_BYTES, **free())

    store.flatten(snapshot_id, make)
    assert SnapshotStore(store.root).flattened_layers() == (
        (snapshot_id,) if layer_is_there(store, snapshot_id) else ()
    )
    store.remove_layer(snapshot_id)
    store.remove_layer(snapshot_id)
    assert SnapshotStore(store.root).flattened_layers() == ()


def layer_is_there(store: SnapshotStore, snapshot_id: str) -> bool:
    return (store.root / snapshot_id / "layer").exists()


def test_a_chain_is_found_from_its_last_layer(store: SnapshotStore) -> None:
    put_layer(store, layered())
    put_layer(store, layered("snap-c", "br-c", parent="snap-b", parent_branch="br-b", pages={5}))
    chain = store.chain("snap-c")
    assert chain.image.manifest.snapshot_id == "snap-a"
    assert [stored.manifest.snapshot_id for stored in chain.layers] == ["snap-b", "snap-c"]
    assert [total_bytes(part.extents) for part in chain.parts()] == [3 * PAGE, PAGE]
    assert (store.chain("snap-a").depth, chain.depth) == (0, 2)


def test_a_chain_that_lacks_something_is_refused(store: SnapshotStore) -> None:
    put_layer(store, layered())
    put_layer(store, layered("snap-c", "br-c", parent="snap-b", parent_branch="br-x", pages={5}))
    with pytest.raises(ImageError, match="of branch br-x, and that is of branch br-b"):
        store.chain("snap-c")
    store.delete("snap-a")
    with pytest.raises(ImageError, match="snap-b stands on snap-a"):
        store.chain("snap-b")
    draft = store.draft("br-a")
    draft.memory_path.write_bytes(bytes(2 * MEMORY_BYTES))
    draft.vmstate_path.write_bytes(b"state")
    store.finalise(draft, replace(manifest(), memory_bytes=2 * MEMORY_BYTES, drives=()))
    with pytest.raises(ImageError, match=f"under it {2 * MEMORY_BYTES}"):
        store.chain("snap-b")


def test_a_circle_of_layers_is_no_chain(store: SnapshotStore) -> None:
    put_layer(store, layered("snap-x", "br-x", parent="snap-y", parent_branch="br-y"))
    put_layer(store, layered("snap-y", "br-y", parent="snap-x", parent_branch="br-x"))
    with pytest.raises(ImageError, match="stands on itself"):
        store.chain("snap-x")


def test_a_layer_is_flattened_in_its_place(store: SnapshotStore) -> None:
    folder = put_layer(store, layered())
    put_layer(store, layered("snap-c", "br-c", parent="snap-b", parent_branch="br-b", pages={5}), 8)
    flatten(store, "snap-b")
    assert sorted(os.listdir(folder)) == ["manifest.json", "memory", "vmstate"]
    stored = store.open("snap-b")
    assert (stored.manifest.layout, stored.manifest.layer) == (Layout.FLAT, None)
    expected = bytearray(b"\x01" * PAGES)
    expected[1] = expected[2] = expected[7] = 7
    assert marks(stored.memory_path) == bytes(expected)
    store.delete("snap-a")
    assert store.chain("snap-c").depth == 1, "what stood on the layer stands on the image"
    flatten(store, "snap-c")
    expected[5] = 8
    assert marks(store.open("snap-c").memory_path) == bytes(expected)
    flatten(store, "snap-c")


def test_a_flatten_that_fails_leaves_the_layer(store: SnapshotStore) -> None:
    folder = put_layer(store, layered())

    def fail(path: Path) -> None:
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device", str(path))

    with pytest.raises(OSError, match="No space"):
        store.flatten("snap-b", fail)
    assert sorted(os.listdir(folder)) == ["layer", "manifest.json", "vmstate"]
    assert store.chain("snap-b").depth == 1
    # A crash may leave any of these.
    (folder / "memory").write_bytes(b"of a flatten that ended early")
    (folder / "memory.part").write_bytes(b"half")
    flatten(store, "snap-b")
    (folder / "layer").write_bytes(b"was not removed any more")
    assert SnapshotStore(store.root).flattened_layers() == ("snap-b",)
    flatten(store, "snap-b")
    assert sorted(os.listdir(folder)) == ["manifest.json", "memory", "vmstate"]
    assert store.open("snap-b").memory_path.stat().st_size == MEMORY_BYTES


def test_what_lacks_a_file_is_found_without_reading_any(store: SnapshotStore) -> None:
    folder = put_layer(store, layered())
    store.check_there(["snap-b", "snap-a"])
    (folder / "layer").unlink()
    with pytest.raises(ImageError, match="snap-b/layer is not there"):
        store.check_there(["snap-b", "snap-a"])
    with pytest.raises(ImageError, match=r"snap-x/manifest\.json is not there"):
        store.check_there(["snap-a", "snap-x"])
