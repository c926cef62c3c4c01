"""Which bytes of a file are data: read once by lseek, stored beside a diff, the only truth since.

A hole of a *diff* means "unchanged", a page of zeros means "zero" (step 6). The difference is
told by SEEK_DATA alone, and only until something reads or maps the file, so the extents of a
window's diff are read right after its last reply, saved, and from then on only loaded. A hole of
an *image* is zeros and nothing else.

The file, little-endian:

    8s   magic            b"fpextent"
    u32  version          1
    u32  CRC-32           of the whole file, with this field as 0
    u32  unit_bytes       4096, or 1 where an extent is not of whole pages
    u32  width_bytes      of each number below: 4, or 8 where 4 don't hold them
    u64  memory_bytes     size of the file that the extents belong to
    u64  count
    then for each extent: gap since the end of the one before, length; both in units
"""

from __future__ import annotations

import errno
import os
import struct
import sys
import zlib
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import NamedTuple, overload

from forkpointd.images import syscalls
from forkpointd.images.errors import ImageError
from forkpointd.images.fs import Fs

_MAGIC = b"fpextent"
_VERSION = 1
_HEADER = struct.Struct("<8sIIIIQQ")
_CRC = struct.Struct("<I")
_CRC_OFFSET = 12
_TYPECODES = {4: "I", 8: "Q"}

PART_SUFFIX = ".part"
"""Ends the name of an extents file that is being written."""


class Extent(NamedTuple):
    """A run of data in a file."""

    offset_bytes: int
    length_bytes: int

    @property
    def end_bytes(self) -> int:
        """The first byte behind it."""
        return self.offset_bytes + self.length_bytes


class Extents(Sequence[Extent]):
    """Extents as two arrays of numbers: 16 bytes each, and nothing that the garbage collector has
    to walk over. A million scattered pages as objects held the interpreter up for 100 ms at a
    time, and with it the event loop."""

    __slots__ = ("lengths", "offsets")

    def __init__(self, offsets: array[int], lengths: array[int]) -> None:
        self.offsets = offsets
        self.lengths = lengths

    @classmethod
    def of(cls, extents: Sequence[Extent]) -> Extents:
        """The same extents in this form."""
        if isinstance(extents, Extents):
            return extents
        return cls(
            array("Q", [offset for offset, _ in extents]),
            array("Q", [length for _, length in extents]),
        )

    def pairs(self) -> Iterator[tuple[int, int]]:
        """Offset and length of each."""
        return zip(self.offsets, self.lengths, strict=True)

    def __len__(self) -> int:
        return len(self.offsets)

    @overload
    def __getitem__(self, index: int) -> Extent: ...
    @overload
    def __getitem__(self, index: slice) -> Extents: ...
    def __getitem__(self, index: int | slice) -> Extent | Extents:
        if isinstance(index, slice):
            return Extents(self.offsets[index], self.lengths[index])
        return Extent(self.offsets[index], self.lengths[index])

    def __iter__(self) -> Iterator[Extent]:
        return map(Extent, self.offsets, self.lengths)

    def __eq__(self, other: object) -> bool:
        if isinstance(other, Extents):
            return self.offsets == other.offsets and self.lengths == other.lengths
        return isinstance(other, Sequence) and tuple(self) == tuple(other)

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"<{len(self)} extents, {sum(self.lengths)} bytes>"


@dataclass(frozen=True, slots=True)
class StoredExtents:
    """What an extents file holds."""

    extents: Extents
    memory_bytes: int


def total_bytes(extents: Iterable[Extent]) -> int:
    """Bytes of data in all of them."""
    if isinstance(extents, Extents):
        return sum(extents.lengths)
    return sum(length for _, length in extents)


def first_of(extents: Extents, limit_bytes: int, limit_count: int) -> Extents:
    """The first extents, at most `limit_count` that have at most `limit_bytes` together; the last
    of them is cut, to whole pages."""
    kept, left = 0, limit_bytes
    for length in extents.lengths[:limit_count]:
        if length > left:
            break
        left -= length
        kept += 1
    first = extents[:kept]
    cut = left // syscalls.PAGE_BYTES * syscalls.PAGE_BYTES
    if kept < min(len(extents), limit_count) and cut:
        first.offsets.append(extents.offsets[kept])
        first.lengths.append(cut)
    return first


def find_extents(fd: int, size_bytes: int) -> Extents:
    """The data of an open file below `size_bytes`, in order. Moves the descriptor's position.

    Raises OSError (EINVAL where the file system knows no SEEK_DATA).
    """
    offsets, lengths = array("Q"), array("Q")
    lseek = syscalls.lseek
    position = 0
    while position < size_bytes:
        try:
            start = lseek(fd, position, os.SEEK_DATA)
        except OSError as error:
            if error.errno == errno.ENXIO:  # only a hole up to the end
                break
            raise
        if start >= size_bytes:
            break
        position = min(lseek(fd, start, os.SEEK_HOLE), size_bytes)
        offsets.append(start)
        lengths.append(position - start)
    return Extents(offsets, lengths)


def data_extents(fd: int, size_bytes: int) -> tuple[Extent, ...]:
    """`find_extents` as a tuple: where there are few."""
    return tuple(find_extents(fd, size_bytes))


def data_extents_of(path: Path, size_bytes: int) -> tuple[Extent, ...]:
    """`find_extents_of` as a tuple: where there are few."""
    return tuple(find_extents_of(path, size_bytes))


def find_extents_of(path: Path, size_bytes: int) -> Extents:
    """The data of a file that must have exactly `size_bytes`.

    Raises ImageError for another size, OSError with the path for anything else.
    """
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    try:
        actual = os.fstat(fd).st_size
        if actual != size_bytes:
            raise ImageError(f"{path} has {actual} bytes, not {size_bytes}")
        return find_extents(fd, size_bytes)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error
    finally:
        os.close(fd)


def check_extents(extents: Sequence[Extent], size_bytes: int) -> None:
    """Raises ImageError unless they are in order, apart from each other, not empty and within
    `size_bytes`."""
    end = 0
    for offset, length in extents.pairs() if isinstance(extents, Extents) else extents:
        if length <= 0 or offset < end:
            raise ImageError(f"{length} bytes at {offset} are empty, or begin before byte {end}")
        end = offset + length
    if end > size_bytes:
        raise ImageError(f"extents end at byte {end} of a file of {size_bytes} bytes")


def save_extents(
    path: Path, extents: Sequence[Extent], memory_bytes: int, sync: bool, *, fs: Fs | None = None
) -> None:
    """Stores the extents of a file of `memory_bytes` in a new file that appears whole or not at
    all; with `sync` it and its name survive a power cut.

    Raises ImageError for impossible extents, FileExistsError, OSError with the path; then there
    is no file that wasn't there before.
    """
    fs = fs or Fs()
    check_extents(extents, memory_bytes)
    if os.path.lexists(path):
        raise FileExistsError(errno.EEXIST, "extents are stored once", str(path))
    part = path.with_name(path.name + PART_SUFFIX)
    try:
        fs.write_new(part, encode_extents(Extents.of(extents), memory_bytes))
        if sync:
            fs.fsync_file(part)
        fs.rename(part, path)
        if sync:
            fs.fsync_folder(path.parent)
    except OSError:
        part.unlink(missing_ok=True)
        path.unlink(missing_ok=True)
        raise


def load_extents(path: Path) -> StoredExtents:
    """The extents stored in a file. Raises ImageError if it is cut, altered or of a version that
    is not known here; OSError if it can't be read."""
    content = path.read_bytes()
    try:
        return decode_extents(content)
    except ImageError as error:
        raise ImageError(f"{path}: {error}") from error


def encode_extents(extents: Extents, memory_bytes: int) -> bytes:
    """As their file has them."""
    unit = syscalls.PAGE_BYTES
    largest = end = 0
    for offset, length in extents.pairs():
        if offset % unit or length % unit:
            unit = 1
        largest = max(largest, offset - end, length)
        end = offset + length
    width = 4 if largest // unit < 1 << 32 else 8
    packed = array(_TYPECODES[width])
    end = 0
    for offset, length in extents.pairs():
        packed.append((offset - end) // unit)
        packed.append(length // unit)
        end = offset + length
    if sys.byteorder == "big":
        packed.byteswap()
    body = packed.tobytes()
    crc = zlib.crc32(_header(0, unit, width, memory_bytes, len(extents)) + body)
    return _header(crc, unit, width, memory_bytes, len(extents)) + body


def _header(crc: int, unit: int, width: int, memory_bytes: int, count: int) -> bytes:
    return _HEADER.pack(_MAGIC, _VERSION, crc, unit, width, memory_bytes, count)


def decode_extents(content: bytes) -> StoredExtents:
    """What `encode_extents` made. Raises ImageError."""
    if len(content) < _HEADER.size or not content.startswith(_MAGIC):
        raise ImageError("this is no extents file, or it was cut")
    _, version, crc, unit, width, memory_bytes, count = _HEADER.unpack_from(content)
    if version != _VERSION:
        raise ImageError(f"extents format {version} is not known: this version knows {_VERSION}")
    zeroed = content[:_CRC_OFFSET] + bytes(_CRC.size) + content[_CRC_OFFSET + _CRC.size :]
    if zlib.crc32(zeroed) != crc:
        raise ImageError("the extents were cut or altered: their checksum is wrong")
    if width not in _TYPECODES or len(content) != _HEADER.size + 2 * count * width:
        raise ImageError(f"{count} extents of 2 x {width} bytes are not what the file holds")
    packed = array(_TYPECODES[width], content[_HEADER.size :])
    if sys.byteorder == "big":
        packed.byteswap()
    # A gap and a length in turn: their running sum is an extent's offset and its end in turn.
    try:
        ends = array("Q", (number * unit for number in accumulate(packed)))
        lengths = array("Q", (number * unit for number in packed[1::2]))
    except OverflowError as error:
        raise ImageError("an extent is beyond 2^64 bytes") from error
    extents = Extents(ends[::2], lengths)
    check_extents(extents, memory_bytes)
    return StoredExtents(extents, memory_bytes)
