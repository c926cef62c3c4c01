"""An archive of a snapshot: what is in it, byte by byte (docs/design/archive.md).

Its content, inside the container of `seekable`, is a tar with these members and no others, in this
order, all of them regular files whose headers are the same in every archive but for name and size:

    archive.json         the index: the format's version, and the sizes of all that follows
    N/manifest.json      of each image, oldest first: 0 is the one that is whole, each further one
                         is a layer over the one before it, the last is the snapshot
    N/vmstate
    N/extents            which bytes of the memory are there, as `extents` stores them
    N/memory             those bytes one after another: holes are not stored
    checksums.json       BLAKE3 of each member above

All sizes are known before the first byte is written, and nothing in a header is believed when it is
read: each is compared with the one that the index asks for. So no file is ever made by a name from
an archive.
"""

from __future__ import annotations

import json
import tarfile
from collections.abc import Mapping
from dataclasses import dataclass

from forkpointd.images.errors import ArchiveError
from forkpointd.images.manifest import MAX_MANIFEST_BYTES
from forkpointd.images.syscalls import PAGE_BYTES
from forkpointd.model import MIB, Layout

FORMAT = 1
ALGORITHM = "blake3"
BLOCK_BYTES = tarfile.BLOCKSIZE
END = bytes(2 * BLOCK_BYTES)
"""What a tar ends with."""

INDEX_NAME = "archive.json"
CHECKSUMS_NAME = "checksums.json"

MAX_INDEX_BYTES = 4 * MIB
MAX_IMAGES = 10_000
MAX_EXTENTS_BYTES = MAX_MANIFEST_BYTES
MAX_MANIFESTS_BYTES = 4 * MAX_MANIFEST_BYTES
"""Of all images together: they are held in memory."""
MAX_VMSTATE_BYTES = 256 * MIB

_KIND = "forkpoint snapshot"
_HEX_DIGITS = 64


@dataclass(frozen=True, slots=True)
class ImageEntry:
    """What the index says of one image."""

    manifest_bytes: int
    vmstate_bytes: int
    extents_bytes: int
    data_bytes: int
    """Of the memory: what is stored of it."""
    dirty_bytes: int
    """What its window wrote."""


_LIMITS: Mapping[str, tuple[int, int]] = {
    "manifest_bytes": (1, MAX_MANIFEST_BYTES),
    "vmstate_bytes": (1, MAX_VMSTATE_BYTES),
    "extents_bytes": (1, MAX_EXTENTS_BYTES),
    "data_bytes": (0, 1 << 56),
    "dirty_bytes": (0, 1 << 56),
}


@dataclass(frozen=True, slots=True)
class Index:
    """The first member: what an archive holds."""

    images: tuple[ImageEntry, ...]
    """Oldest first."""

    @property
    def layout(self) -> Layout:
        """How the snapshot is kept in it."""
        return Layout.FLAT if len(self.images) == 1 else Layout.LAYERED

    @property
    def data_bytes(self) -> int:
        """Of memory, in all images."""
        return sum(image.data_bytes for image in self.images)

    @property
    def content_bytes(self) -> int:
        """The size of the whole tar."""
        sizes = [len(self.to_json()), *(size for _, size in self.members())]
        sizes.append(checksums_bytes(self))
        return sum(BLOCK_BYTES + size + padding(size) for size in sizes) + len(END)

    @property
    def disk_bytes(self) -> int:
        """What it takes on a disk."""
        return sum(
            -(-size // PAGE_BYTES) * PAGE_BYTES
            for image in self.images
            # A manifest is written anew, with other ids and in this version's form.
            for size in (image.manifest_bytes + MIB, image.vmstate_bytes, image.data_bytes)
        )

    def members(self) -> list[tuple[str, int]]:
        """Name and size of each member between the index and the checksums."""
        found = [
            (f"{number}/manifest.json", image.manifest_bytes)
            for number, image in enumerate(self.images)
        ]
        for number, image in enumerate(self.images):
            found.append((f"{number}/vmstate", image.vmstate_bytes))
            found.append((f"{number}/extents", image.extents_bytes))
            found.append((f"{number}/memory", image.data_bytes))
        return found

    def to_json(self) -> bytes:
        """As its member has it."""
        content = {
            "kind": _KIND,
            "format": FORMAT,
            "layout": self.layout.value,
            "images": [
                {name: getattr(image, name) for name in ImageEntry.__slots__}
                for image in self.images
            ],
        }
        return json.dumps(content, indent=1).encode() + b"\n"

    @classmethod
    def from_json(cls, content: bytes) -> Index:
        """Raises ArchiveError for anything that `to_json` of this format would not have written."""
        try:
            found = json.loads(content)
        except (ValueError, RecursionError) as error:
            raise ArchiveError(f"{INDEX_NAME} is not JSON: {error}") from error
        if not isinstance(found, dict) or found.get("kind") != _KIND:
            raise ArchiveError(f"{INDEX_NAME} is not that of a snapshot")
        if found.get("format") != FORMAT:
            raise ArchiveError(
                f"archive format {found.get('format')!r} is not known: this version knows {FORMAT}"
            )
        images = found.get("images")
        if not isinstance(images, list) or not 0 < len(images) <= MAX_IMAGES:
            raise ArchiveError(f"{INDEX_NAME} has no list of 1 to {MAX_IMAGES} images")
        index = cls(tuple(map(_entry, images)))
        if sum(image.manifest_bytes for image in index.images) > MAX_MANIFESTS_BYTES:
            raise ArchiveError(f"the manifests have more than {MAX_MANIFESTS_BYTES} bytes")
        if content != index.to_json():
            raise ArchiveError(f"{INDEX_NAME} is not as this format has it")
        return index


def _entry(found: object) -> ImageEntry:
    if not isinstance(found, dict) or found.keys() != _LIMITS.keys():
        raise ArchiveError(f"an image in {INDEX_NAME} has not the fields {', '.join(_LIMITS)}")
    for name, (least, most) in _LIMITS.items():
        value = found[name]
        if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
            raise ArchiveError(f"{name} in {INDEX_NAME} is not a number from {least} to {most}")
    return ImageEntry(**found)


# --- checksums ---------------------------------------------------------------------------------


def checksums_json(digests: Mapping[str, str]) -> bytes:
    """The last member: the digest of each other one, in hexadecimal digits."""
    return json.dumps({"algorithm": ALGORITHM, "members": digests}, indent=1).encode() + b"\n"


def checksums_bytes(index: Index) -> int:
    """The size of the last member, which its index fixes."""
    names = (INDEX_NAME, *(name for name, _ in index.members()))
    return len(checksums_json(dict.fromkeys(names, "0" * _HEX_DIGITS)))


# --- tar ---------------------------------------------------------------------------------------


def header(name: str, size_bytes: int) -> bytes:
    """The one header that a member of this name and size has. GNU's form, since sizes of more than
    8 GiB still fit into one block of it; no times and no owners, so that archives of one snapshot
    are equal."""
    info = tarfile.TarInfo(name)
    info.size = size_bytes
    info.mode = 0o600
    return info.tobuf(tarfile.GNU_FORMAT)


def padding(size_bytes: int) -> int:
    """Zeros behind a member."""
    return -size_bytes % BLOCK_BYTES


_KINDS: Mapping[bytes, str] = {
    tarfile.LNKTYPE: "a hard link",
    tarfile.SYMTYPE: "a symbolic link",
    tarfile.CHRTYPE: "a character device",
    tarfile.BLKTYPE: "a block device",
    tarfile.DIRTYPE: "a folder",
    tarfile.FIFOTYPE: "a FIFO",
    tarfile.GNUTYPE_SPARSE: "a sparse file",
    tarfile.REGTYPE: "a file",
    tarfile.AREGTYPE: "a file",
}


def what_is(found: bytes) -> str:
    """What a block says that is not the header it should be, for an error."""
    try:
        info = tarfile.TarInfo.frombuf(found, "utf-8", "replace")
    except tarfile.HeaderError:
        return "something that is no header"
    kind = _KINDS.get(info.type, f"an entry of type {info.type!r}")
    name = info.name if len(info.name) <= 80 else f"{info.name[:77]}..."
    return f"{kind} {name!r} of {info.size} bytes"


def index_size(found: bytes) -> int:
    """The size of the index, by the first block. Raises ArchiveError unless it is its header."""
    try:
        size = tarfile.TarInfo.frombuf(found, "utf-8", "replace").size
    except tarfile.HeaderError:
        size = -1
    if not 0 < size <= MAX_INDEX_BYTES or found != header(INDEX_NAME, size):
        raise ArchiveError(f"this is no archive of a snapshot: it begins with {what_is(found)}")
    return size
