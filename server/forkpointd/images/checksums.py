"""Checksums of a snapshot's files, chunk by chunk: whether they still hold what they held.

Content counts, not how it lies on the disk: a hole of a flat memory is hashed as the zeros that it
reads as, so a copy that filled holes is as good; of a layer only the pages that its manifest names
are hashed, for the rest of its file says nothing. A chunk is CHUNK_BYTES of a file's addresses.

The file `checksums` beside them is JSON, `format` 1. What vouches for it is its own digest, which
the registry keeps: a file that was altered along with what it speaks of is noticed too.

Synchronous: run it in threads.
"""

from __future__ import annotations

import base64
import binascii
import json
import mmap
import os
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from blake3 import blake3

from forkpointd.images import syscalls
from forkpointd.images.errors import ImageError
from forkpointd.images.extents import Extents, total_bytes
from forkpointd.images.moving import (
    Gate,
    OpenFile,
    Piece,
    Progress,
    ShouldStop,
    Steps,
    open_file,
    read_all,
)
from forkpointd.images.store import MANIFEST_NAME, StoredSnapshot
from forkpointd.model import MIB, Layout

FORMAT = 1
ALGORITHM = "blake3"
CHUNK_BYTES = MIB
DIGEST_BYTES = 32


class Damaged(ImageError):
    """A file does not hold what it held."""

    def __init__(self, path: Path, offset_bytes: int, length_bytes: int) -> None:
        super().__init__(
            f"{path} does not hold what it held: the first bad range is {length_bytes} bytes from "
            f"byte {offset_bytes} on"
        )
        self.path = path
        self.offset_bytes = offset_bytes
        self.length_bytes = length_bytes
        """In whole chunks, cut at the end of the file."""


@dataclass(frozen=True, slots=True)
class FileSums:
    """The checksums of one file."""

    size_bytes: int
    digests: bytes
    """DIGEST_BYTES for each chunk."""


@dataclass(frozen=True, slots=True)
class Checksums:
    """The checksums of a snapshot."""

    layout: Layout
    """What they are of: a flatten makes another file of the memory."""
    files: Mapping[str, FileSums]
    """By name."""

    def to_json(self) -> bytes:
        """As its file has it."""
        content = {
            "format": FORMAT,
            "algorithm": ALGORITHM,
            "chunk_bytes": CHUNK_BYTES,
            "layout": str(self.layout),
            "files": {
                name: {
                    "size_bytes": sums.size_bytes,
                    "digests": base64.b64encode(zlib.compress(sums.digests)).decode(),
                }
                for name, sums in self.files.items()
            },
        }
        return (json.dumps(content, indent=1, sort_keys=True) + "\n").encode()

    @classmethod
    def from_json(cls, text: bytes) -> Checksums:
        """Raises ImageError for what `to_json` would not have written."""
        try:
            content = json.loads(text)
            version = content["format"], content["algorithm"], content["chunk_bytes"]
            if version != (FORMAT, ALGORITHM, CHUNK_BYTES):
                raise ImageError(f"checksums of format {version!r} are not known here")
            files = {name: _read_sums(sums) for name, sums in content["files"].items()}
            return cls(Layout(content["layout"]), files)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ImageError(f"the checksums can't be read: {error!r}") from error


def _read_sums(content: Any) -> FileSums:
    size_bytes = content["size_bytes"]
    if not isinstance(size_bytes, int) or isinstance(size_bytes, bool) or size_bytes < 0:
        raise ValueError(f"{size_bytes!r} is no size")
    expected = _chunk_count(size_bytes) * DIGEST_BYTES
    unpacking = zlib.decompressobj()
    try:
        packed = base64.b64decode(content["digests"], validate=True)
        digests = unpacking.decompress(packed, expected + 1)
    except (binascii.Error, zlib.error) as error:
        raise ValueError(f"the digests can't be unpacked: {error}") from error
    if len(digests) != expected or not unpacking.eof or unpacking.unused_data:
        raise ValueError(f"there are not {expected} bytes of digests")
    return FileSums(size_bytes, digests)


def digest_of(content: bytes) -> str:
    """What the registry keeps of a file of checksums: `blake3:` and hexadecimal digits."""
    return f"{ALGORITHM}:{blake3(content).hexdigest()}"


# --- what there is to read -----------------------------------------------------------------------


class Part:
    """One file of a snapshot, open."""

    def __init__(self, name: str, file: OpenFile, held: Extents | None) -> None:
        """`held`: of a layer, the pages that count."""
        self.name = name
        self.file = file
        self.size_bytes = file.size_bytes
        self._held = held
        self._data = file.data() if held is None else held
        self.read_bytes = (
            sum(length for _, length in self._chunks_read()) if held is None else total_bytes(held)
        )
        """What is read of it: no holes."""

    def _chunks_read(self) -> Iterator[Piece]:
        for number, _ in _by_chunk(self._data):
            yield self._place(number)

    def _place(self, number: int) -> Piece:
        start = number * CHUNK_BYTES
        return start, min(CHUNK_BYTES, self.size_bytes - start)

    def place_of(self, first: int, end: int) -> Piece:
        """Offset and length of some chunks."""
        start = first * CHUNK_BYTES
        return start, min(end * CHUNK_BYTES, self.size_bytes) - start

    def empty_digests(self) -> bytearray:
        """As they are of a file without data."""
        count = _chunk_count(self.size_bytes)
        if self._held is not None or not count:
            return bytearray(blake3(b"").digest() * count)
        whole = blake3(bytes(CHUNK_BYTES)).digest() * (count - 1)
        return bytearray(whole + blake3(bytes(self._place(count - 1)[1])).digest())

    def digests(self, steps: Steps, *, from_disk: bool) -> Iterator[tuple[int, bytes]]:
        """Number and digest of each chunk that has data, in order. Raises Stopped, ImageError (the
        file is cut), OSError with the path."""
        buffer = memoryview(mmap.mmap(-1, CHUNK_BYTES))
        for number, pieces in _by_chunk(self._data):
            steps.before_chunk()
            read = [self._place(number)] if self._held is None else pieces
            if from_disk:
                syscalls.forget_cached(self.file.fd, *_span(read))
            filled = 0
            for offset, length in read:
                read_all(self.file, buffer[filled : filled + length], offset)
                filled += length
            yield number, blake3(buffer[:filled]).digest()
            steps.progress(filled)


def parts_of(stored: StoredSnapshot) -> Iterator[Part]:
    """The files of a snapshot, one after the other, each open until the next is asked for. Raises
    ImageError, OSError."""
    layer = stored.manifest.layer
    for path, held in (
        (stored.folder / MANIFEST_NAME, None),
        (stored.vmstate_path, None),
        (stored.memory_path, None if layer is None else layer.extents),
        *((stored.drive_path(drive.drive_id), None) for drive in stored.manifest.writable_drives),
    ):
        with open_file(path, os.O_RDONLY) as file:
            yield Part(path.name, file, held)


def work_bytes(stored: StoredSnapshot) -> int:
    """What is read to compute or to compare its checksums. Raises ImageError, OSError."""
    return sum(part.read_bytes for part in parts_of(stored))


def compute(
    stored: StoredSnapshot, *, progress: Progress, should_stop: ShouldStop, gate: Gate
) -> Checksums:
    """Reads all files. Raises Stopped, ImageError, OSError."""
    steps = Steps(progress, should_stop, gate, CHUNK_BYTES)
    files = {}
    for part in parts_of(stored):
        digests = part.empty_digests()
        for number, digest in part.digests(steps, from_disk=False):
            digests[number * DIGEST_BYTES : (number + 1) * DIGEST_BYTES] = digest
        files[part.name] = FileSums(part.size_bytes, bytes(digests))
    return Checksums(stored.manifest.layout, files)


def compare(
    stored: StoredSnapshot,
    sums: Checksums,
    *,
    progress: Progress,
    should_stop: ShouldStop,
    gate: Gate,
) -> None:
    """Reads all files, from the disk as far as no process has them mapped. Raises Damaged for the
    first bad range, Stopped, ImageError, OSError."""
    steps = Steps(progress, should_stop, gate, CHUNK_BYTES)
    for part in parts_of(stored):
        known = sums.files.get(part.name)
        if known is None:
            raise ImageError(f"the checksums of {stored.folder} say nothing of {part.name}")
        if known.size_bytes != part.size_bytes:
            raise Damaged(part.file.path, min(known.size_bytes, part.size_bytes), 0)
        _compare_part(part, known.digests, steps)


def _compare_part(part: Part, known: bytes, steps: Steps) -> None:
    def bad(number: int, digest: bytes) -> bool:
        return known[number * DIGEST_BYTES : (number + 1) * DIGEST_BYTES] != digest

    first = end = None
    for number, digest in _all_digests(part, steps):
        if not bad(number, digest):
            if first is not None:
                break
        elif first is None:
            first, end = number, number + 1
        else:
            end = number + 1
    if first is not None and end is not None:
        raise Damaged(part.file.path, *part.place_of(first, end))


def _all_digests(part: Part, steps: Steps) -> Iterator[tuple[int, bytes]]:
    """Of every chunk, those without data included: there may have been some."""
    empty = bytes(part.empty_digests())
    following = 0
    for number, digest in part.digests(steps, from_disk=True):
        for hole in range(following, number):
            yield hole, empty[hole * DIGEST_BYTES : (hole + 1) * DIGEST_BYTES]
        yield number, digest
        following = number + 1
    for hole in range(following, _chunk_count(part.size_bytes)):
        yield hole, empty[hole * DIGEST_BYTES : (hole + 1) * DIGEST_BYTES]


def _by_chunk(extents: Extents) -> Iterator[tuple[int, list[Piece]]]:
    """The chunks that hold any of these, with their pieces, in order."""
    current, pieces = -1, list[Piece]()
    for start, length in extents.pairs():
        offset, end = start, start + length
        while offset < end:
            number = offset // CHUNK_BYTES
            until = min(end, (number + 1) * CHUNK_BYTES)
            if number != current:
                if pieces:
                    yield current, pieces
                current, pieces = number, []
            pieces.append((offset, until - offset))
            offset = until
    if pieces:
        yield current, pieces


def _span(pieces: list[Piece]) -> Piece:
    start = pieces[0][0]
    return start, pieces[-1][0] + pieces[-1][1] - start


def _chunk_count(size_bytes: int) -> int:
    return -(-size_bytes // CHUNK_BYTES)
