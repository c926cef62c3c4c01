"""Archives: what goes in comes out, page by page, and what was altered does not come in."""

from __future__ import annotations

import io
import json
import shutil
import struct
import subprocess
import tarfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import zstandard
from blake3 import blake3
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from forkpointd.images import (
    Draft,
    Extent,
    Extents,
    LayerWitness,
    Manifest,
    Packing,
    SnapshotStore,
    Table,
    Unpacking,
    adopted,
    copy_chain,
    data_extents_of,
    pack_frame,
    union,
)
from forkpointd.images.archive import CHECKSUMS_NAME, header, padding
from forkpointd.images.errors import ArchiveError
from forkpointd.images.seekable import FRAME_BYTES, Frames
from forkpointd.model import Layout
from tests.unit.images.making import MEMORY_BYTES, MIB, manifest

PAGE = 4096
PAGES = MEMORY_BYTES // PAGE


def page(number: int) -> bytes:
    """Never the same twice; 0 is a page of zeros."""
    return bytes(PAGE) if not number else struct.pack("<Q", number) * (PAGE // 8)


class Made:
    """Snapshots `s0`, FLAT, and `s1` and on, each a layer over the one before it."""

    def __init__(self, root: Path, images: Sequence[dict[int, int]]) -> None:
        root.mkdir()
        self.root = root
        self.store = SnapshotStore(root)
        self.wanted = bytearray(MEMORY_BYTES)
        for number, pages in enumerate(images):
            self._make(number, pages)
        self.chain = self.store.chain(f"s{len(images) - 1}")

    def _make(self, number: int, pages: dict[int, int]) -> None:
        draft = self.store.draft(f"br-{number}")
        made = replace(manifest(f"s{number}", f"br-{number}"), drives=(), parent_snapshot_id=None)
        path = draft.memory_path
        if number:
            path = draft.layer_path
            held = [Extent(at * PAGE, PAGE) for at in sorted(pages)]
            made = replace(
                made,
                layout=Layout.LAYERED,
                parent_snapshot_id=f"s{number - 1}",
                layer=LayerWitness(f"br-{number - 1}", Extents.of(held)),
            )
        with path.open("wb") as file:
            file.truncate(MEMORY_BYTES)
            for at, stamp in pages.items():
                file.seek(at * PAGE)
                file.write(page(stamp))
                self.wanted[at * PAGE : (at + 1) * PAGE] = page(stamp)
        draft.vmstate_path.write_bytes(f"state {number}".encode())
        self.store.finalise(draft, made)

    def packing(self, *, kept: bool) -> Packing:
        dirty = [7 * number for number in range(self.chain.depth + 1)]
        return Packing.kept(self.chain, dirty) if kept else Packing.flat(self.chain, dirty[-1])


def packed(packing: Packing, level: int = 1) -> bytes:
    """A whole archive."""
    table = Table()
    archive = b""
    while (content := packing.next_frame()) is not None:
        frame = pack_frame(content, level)
        table.add(frame, len(content))
        archive += frame
    packing.close()
    return archive + table.end()


def as_archive(content: bytes) -> bytes:
    """Any content in a right container."""
    table = Table()
    archive = b""
    for start in range(0, len(content), FRAME_BYTES):
        part = content[start : start + FRAME_BYTES]
        frame = pack_frame(part, 1)
        table.add(frame, len(part))
        archive += frame
    return archive + table.end()


def unpack(archive: bytes, store: SnapshotStore, step: int = 1 << 16) -> list[Manifest]:
    """What an import does with its files; nothing is left where it fails."""
    unpacking = Unpacking()
    drafts: list[Draft] = []
    try:
        for start in range(0, len(archive), step):
            unpacking.feed(archive[start : start + step], lambda: None, lambda: False)
            if unpacking.waits:
                drafts += [
                    store.draft(f"import-{number}") for number in range(len(unpacking.manifests))
                ]
                unpacking.place(drafts, landed=lambda _: None)
                unpacking.feed(b"", lambda: None, lambda: False)
        unpacking.finish()
        made = adopted(unpacking.manifests, [f"new-{number}" for number in range(len(drafts))])
        for draft, each in zip(drafts, made, strict=True):
            store.finalise(draft, each)
        return list(made)
    except BaseException:
        unpacking.close()
        for draft in drafts:
            store.discard(draft)
        raise


def memory_of(store: SnapshotStore, snapshot_id: str, target: Path) -> bytes:
    """What a child would map."""
    chain = store.chain(snapshot_id)
    copy_chain(
        chain.image.memory_path,
        chain.parts(),
        target,
        MEMORY_BYTES,
        progress=lambda _: None,
        should_stop=lambda: False,
        gate=lambda: None,
    )
    return target.read_bytes()


def empty_store(path: Path) -> SnapshotStore:
    path.mkdir()
    return SnapshotStore(path)


@pytest.fixture
def layered(tmp_path: Path) -> Made:
    return Made(tmp_path / "a", [{0: 1, 5: 2, 900: 3}, {5: 0, 6: 4}, {6: 0, 1023: 5}])


@pytest.fixture
def flat(tmp_path: Path) -> Made:
    return Made(tmp_path / "a", [{0: 1, 5: 2, 1023: 3}])


images = st.lists(
    st.dictionaries(st.integers(0, PAGES - 1), st.integers(0, 9), max_size=40),
    min_size=1,
    max_size=4,
)


@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(images, st.booleans(), st.integers(1, 1 << 17))
@example([{}], False, 1)
@example([dict.fromkeys(range(PAGES), 7), dict.fromkeys(range(0, PAGES, 2), 0)], True, 1 << 16)
def test_every_page_comes_back(
    tmp_path: Path, images: list[dict[int, int]], kept: bool, step: int
) -> None:
    for name in ("a", "b"):
        shutil.rmtree(tmp_path / name, ignore_errors=True)
    (tmp_path / "image").unlink(missing_ok=True)
    made = Made(tmp_path / "a", images)
    archive = packed(made.packing(kept=kept))
    store = empty_store(tmp_path / "b")
    manifests = unpack(archive, store, step=max(step, len(archive) // 300))
    assert len(manifests) == (len(images) if kept else 1)
    assert memory_of(store, manifests[-1].snapshot_id, tmp_path / "image") == made.wanted
    last = store.open(manifests[-1].snapshot_id)
    assert last.vmstate_path.read_bytes() == f"state {len(images) - 1}".encode()


def test_layers_keep_what_they_hold_and_stand_on_each_other_under_new_ids(
    layered: Made, tmp_path: Path
) -> None:
    store = empty_store(tmp_path / "b")
    made = unpack(packed(layered.packing(kept=True)), store)
    assert [each.parent_snapshot_id for each in made] == [None, "new-0", "new-1"]
    for old, new in zip(layered.chain.layers, made[1:], strict=True):
        assert new.layer is not None and old.manifest.layer is not None
        held = union([old.manifest.layer.extents], MEMORY_BYTES)
        assert new.layer.extents == held, "a page of zeros is no hole"
        assert new.layer.parent_branch_id == old.manifest.layer.parent_branch_id
    assert (tmp_path / "b" / "new-1" / "layer").stat().st_size == MEMORY_BYTES
    assert data_extents_of(store.open("new-1").memory_path, MEMORY_BYTES) == (
        Extent(5 * PAGE, 2 * PAGE),
    )


def test_holes_are_not_stored(flat: Made, tmp_path: Path) -> None:
    packing = flat.packing(kept=False)
    assert packing.index.data_bytes == 3 * PAGE
    assert packing.index.content_bytes < 3 * PAGE + 16 * 1024
    store = empty_store(tmp_path / "b")
    unpack(packed(packing), store)
    found = data_extents_of(store.open("new-0").memory_path, MEMORY_BYTES)
    assert sum(length for _, length in found) == 3 * PAGE


def test_archives_of_one_snapshot_are_equal(layered: Made) -> None:
    assert packed(layered.packing(kept=False)) == packed(layered.packing(kept=False))


def test_the_index_knows_the_size_of_all_content(layered: Made) -> None:
    for kept in (False, True):
        packing = layered.packing(kept=kept)
        assert len(content_of(packed(packing))) == packing.index.content_bytes


# --- what is refused ---


def refused(archive: bytes, folder: Path) -> str:
    """The words of the refusal. Nothing is left."""
    store = SnapshotStore(folder)
    with pytest.raises(ArchiveError) as caught:
        unpack(archive, store)
    assert list(folder.iterdir()) == []
    return str(caught.value)


@pytest.fixture
def empty(tmp_path: Path) -> Path:
    folder = tmp_path / "b"
    folder.mkdir()
    return folder


@pytest.fixture
def small(tmp_path: Path) -> bytes:
    """An archive of two images, some kilobytes long."""
    return packed(Made(tmp_path / "s", [{3: 1}, {4: 0}]).packing(kept=True), level=12)


def test_an_archive_with_any_bit_altered_is_refused(small: bytes, empty: Path) -> None:
    assert len(small) < 8 * 1024
    for at in range(len(small)):
        altered = bytearray(small)
        altered[at] ^= 1 << at % 8
        assert "Nothing of it was kept" in refused(bytes(altered), empty)


def test_an_archive_that_is_cut_anywhere_is_refused(small: bytes, empty: Path) -> None:
    for length in range(0, len(small), 7):
        assert "archive" in refused(small[:length], empty)


@settings(
    max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.data())
def test_pieces_that_are_left_out_doubled_or_mixed_up_are_refused(
    small: bytes, empty: Path, data: st.DataObject
) -> None:
    first, second, third = sorted(
        data.draw(st.integers(0, len(small)), label="cut") for _ in range(3)
    )
    a, b, c = small[first:second], small[second:third], small[third:]
    changed = small[:first] + data.draw(
        st.sampled_from([b + c, a + a + b + c, b + a + c, a + c, a + b + c + a])
    )
    if changed != small:
        refused(changed, empty)


def test_what_follows_the_end_is_refused(small: bytes, empty: Path) -> None:
    assert "follow the end" in refused(small + b"\0", empty)
    assert "follow the end" in refused(small + small, empty)


@pytest.mark.parametrize("other", [b"", b"x" * 5000, zstandard.compress(b"x" * 5000), b"\0" * 9000])
def test_another_file_is_refused(other: bytes, empty: Path) -> None:
    assert "archive" in refused(other, empty)


def content_of(archive: bytes) -> bytes:
    frames = Frames()
    frames.add(archive)
    content = b""
    while (part := frames.take()) is not None:
        content += part
    frames.finish()
    return content


def members_of(archive: bytes) -> list[tuple[tarfile.TarInfo, bytes]]:
    found = []
    with tarfile.open(fileobj=io.BytesIO(content_of(archive))) as tar:
        for info in tar:
            file = tar.extractfile(info)
            assert file is not None
            found.append((info, file.read()))
    return found


def rebuilt(members: Sequence[tuple[str, bytes]]) -> bytes:
    """An archive of these members, with checksums that are right."""
    content = b""
    digests = {}
    for name, data in members:
        digests[name] = blake3(data).hexdigest()
        content += header(name, len(data)) + data + bytes(padding(len(data)))
    sums = json.dumps({"algorithm": "blake3", "members": digests}, indent=1).encode() + b"\n"
    content += header(CHECKSUMS_NAME, len(sums)) + sums + bytes(padding(len(sums))) + bytes(1024)
    return as_archive(content)


def plain_members(archive: bytes) -> list[tuple[str, bytes]]:
    return [(info.name, data) for info, data in members_of(archive)][:-1]


def test_a_rebuilt_archive_is_taken(small: bytes, empty: Path) -> None:
    """So that what is refused below is refused for what was changed in it."""
    archive = rebuilt(plain_members(small))
    assert archive == as_archive(content_of(small))
    assert len(unpack(archive, SnapshotStore(empty))) == 2


def link(name: str, to: str, kind: bytes) -> bytes:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, to
    return info.tobuf(tarfile.GNU_FORMAT)


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        (header("../../etc/cron.d/x", 4) + b"evil" + bytes(508), "'../../etc/cron.d/x'"),
        (header("/etc/passwd", 4) + b"evil" + bytes(508), "'/etc/passwd'"),
        (link("0/vmstate", "/etc/shadow", tarfile.SYMTYPE), "a symbolic link"),
        (link("0/memory", "0/vmstate", tarfile.LNKTYPE), "a hard link"),
        (link("0/memory", "", tarfile.CHRTYPE), "a character device"),
        (link("0", "", tarfile.DIRTYPE), "a folder"),
        (header("0/vmstate", 7) + b"state 0" + bytes(505), "0/vmstate"),
        (bytes(512), "no header"),
        (b"\xff" * 512, "no header"),
    ],
    ids=["dots", "absolute", "symlink", "hardlink", "device", "folder", "twice", "zeros", "noise"],
)
@pytest.mark.parametrize("place", range(0, 10, 3))
def test_an_entry_that_does_not_belong_there_is_refused_by_its_name(
    small: bytes, empty: Path, entry: bytes, words: str, place: int
) -> None:
    content = content_of(small)
    with tarfile.open(fileobj=io.BytesIO(content)) as tar:
        starts = [info.offset for info in tar]
    at = starts[place % len(starts)]
    said = refused(as_archive(content[:at] + entry + content[at:]), empty)
    assert words in said


Change = Callable[[list[tuple[str, bytes]]], list[tuple[str, bytes]]]


def in_json(name: str, **changes: object) -> Change:
    def change(members: list[tuple[str, bytes]]) -> list[tuple[str, bytes]]:
        found = []
        for each, data in members:
            content = data
            if each == name:
                altered = json.loads(data) | changes
                text = json.dumps(altered, indent=1, sort_keys=name != "archive.json")
                content = text.encode() + b"\n"
            found.append((each, content))
        return resized(found)

    return change


def resized(members: list[tuple[str, bytes]]) -> list[tuple[str, bytes]]:
    """The index says the sizes that the members have, so that only their content is wrong."""
    sizes = {name: len(data) for name, data in members}
    content = json.loads(members[0][1])
    for number, image in enumerate(content["images"]):
        image["manifest_bytes"] = sizes[f"{number}/manifest.json"]
    return [(members[0][0], json.dumps(content, indent=1).encode() + b"\n"), *members[1:]]


def lie(name: str, value: int) -> Change:
    def change(members: list[tuple[str, bytes]]) -> list[tuple[str, bytes]]:
        content = json.loads(members[0][1])
        content["images"][0][name] = value
        return [(members[0][0], json.dumps(content, indent=1).encode() + b"\n"), *members[1:]]

    return change


@pytest.mark.parametrize(
    "change",
    [
        in_json("archive.json", format=2),
        in_json("archive.json", kind="tarball"),
        in_json("archive.json", images=[]),
        in_json("archive.json", layout="FLAT"),
        in_json("archive.json", surprise=1),
        lie("data_bytes", 1 << 55),
        lie("data_bytes", 0),
        lie("data_bytes", -1),
        lie("vmstate_bytes", 6),
        lie("vmstate_bytes", 1 << 40),
        lie("extents_bytes", 8),
        in_json("0/manifest.json", snapshot_id="../x"),
        in_json("0/manifest.json", branch_id="/etc"),
        in_json("0/manifest.json", memory_bytes=MEMORY_BYTES + MIB),
        in_json("0/manifest.json", memory_bytes=PAGE),
        in_json("0/manifest.json", layout="LAYERED"),
        in_json("0/manifest.json", mode="AUTO"),
        in_json("0/manifest.json", has_vsock=True),
        in_json("0/manifest.json", surprise=1),
        in_json("1/manifest.json", parent_snapshot_id="s9"),
        in_json("1/manifest.json", parent_snapshot_id="s1"),
        in_json("1/manifest.json", layout="FLAT", layer=None),
        lambda members: [*members[:3], *members[4:]],
        lambda members: [members[0], members[2], members[1], *members[3:]],
        lambda members: [*members, members[-1]],
        lambda members: [*members[:-1], ("1/memory", bytes(2 * PAGE))],
        lambda members: [
            (n, d if n != "1/extents" else dict(members)["0/extents"]) for n, d in members
        ],
    ],
)
def test_an_archive_that_lies_consistently_is_refused(
    small: bytes, empty: Path, change: Change
) -> None:
    refused(rebuilt(change(plain_members(small))), empty)


def test_checksums_of_other_content_are_refused(small: bytes, empty: Path) -> None:
    content = content_of(small)
    at = content.index(b"state 0")
    said = refused(as_archive(content[:at] + b"STATE 0" + content[at + 7 :]), empty)
    assert CHECKSUMS_NAME in said


def test_a_bomb_is_never_larger_in_memory_than_a_frame(empty: Path) -> None:
    bomb = zstandard.ZstdCompressor(level=1, write_checksum=True).compress(bytes(256 * MIB))
    assert "268435456 bytes of content" in refused(bomb, empty)
    unsized = zstandard.ZstdCompressor(write_checksum=True, write_content_size=False)
    refused(unsized.compress(bytes(64 * MIB)), empty)
    # A frame of empty blocks without end.
    frame = pack_frame(b"x" * 100, 1)
    start = frame[: zstandard.frame_header_size(frame)]
    assert "larger than frames" in refused(start + bytes(3 * MIB), empty)


def test_right_frames_of_zeros_without_end_are_refused_at_the_first_header(empty: Path) -> None:
    frame = pack_frame(bytes(FRAME_BYTES), 1)
    assert "begins with" in refused(frame * 1000, empty)


# --- other programs ---


@pytest.mark.skipif(shutil.which("zstd") is None, reason="there is no zstd")
@pytest.mark.skipif(shutil.which("tar") is None, reason="there is no tar")
def test_zstd_and_tar_read_an_archive(layered: Made, tmp_path: Path) -> None:
    file = tmp_path / "s2.forkpoint"
    file.write_bytes(packed(layered.packing(kept=True)))
    subprocess.run(["zstd", "--test", "--quiet", file], check=True)
    plain = subprocess.run(["zstd", "-dc", file], check=True, capture_output=True).stdout
    listed = subprocess.run(["tar", "t"], input=plain, check=True, capture_output=True).stdout
    names = listed.decode().split()
    assert names[0] == "archive.json"
    assert names[-1] == "checksums.json"
    assert "2/memory" in names


def test_the_seek_table_finds_each_frame(flat: Made) -> None:
    """As zstd's contrib/seekable_format documents it."""
    archive = as_archive(bytes(range(256)) * (5 * MIB // 256))
    count, flags, magic = struct.unpack("<IBI", archive[-9:])
    assert (flags, magic) == (0x80, 0x8F92EAB1)
    table = archive[-9 - 12 * count : -9]
    skip, size = struct.unpack("<II", archive[-17 - 12 * count : -9 - 12 * count])
    assert (skip, size) == (0x184D2A5E, 12 * count + 9)
    at = 0
    entries = list(struct.iter_unpack("<III", table))
    for packed_bytes, content_bytes, checksum in entries[:-1]:
        frame = archive[at : at + packed_bytes]
        assert len(zstandard.decompress(frame)) == content_bytes
        assert frame[-4:] == struct.pack("<I", checksum)
        at += packed_bytes
    assert entries[-1][1] == 0
    assert at + entries[-1][0] + 8 + size == len(archive)


def test_a_member_of_more_than_8_gib_has_a_header_of_one_block() -> None:
    large = header("0/memory", 1 << 40)
    assert len(large) == 512
    assert tarfile.TarInfo.frombuf(large, "utf-8", "strict").size == 1 << 40
