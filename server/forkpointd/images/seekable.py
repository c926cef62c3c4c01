"""The container of an archive: zstd's seekable format, with a checksum of the whole.

    frame, frame, ...     each FRAME_BYTES of the content (the last: what is left), independent
    checksum              a skippable frame: BLAKE3 of all frames and of the seek table behind it
    seek table            a skippable frame (contrib/seekable_format of zstd, version 0.1.0)

`zstd -d` reads it as any other file. The frames' own checksums say little about their headers, and
nothing says that one is missing at the end: so what is read here is believed only when the checksum
fits, which covers every bit but its own header, which is compared.

Frames are read by their size, which takes a look at the headers of their blocks (RFC 8878, 3.1.1):
so a frame is bounded before it is unpacked, and what is behind the last one is seen.
"""

from __future__ import annotations

import struct

import zstandard
from blake3 import blake3

from forkpointd.images.errors import ArchiveError
from forkpointd.model import MIB

FRAME_BYTES = 2 * MIB
"""Of content: some milliseconds of work at the usual levels, which is what a window may wait."""

MIN_LEVEL, DEFAULT_LEVEL, MAX_LEVEL = 1, 3, 12
"""Beyond 12 a frame takes a quarter of a second and more, and saves little of a memory."""

_MAX_PACKED_BYTES = FRAME_BYTES + FRAME_BYTES // 128 + 1024
"""No frame of ours is larger (ZSTD_COMPRESSBOUND)."""

_FRAME_MAGIC = struct.pack("<I", 0xFD2FB528)
_MAX_FRAME_HEADER_BYTES = 18
_DIGEST_BYTES = 32
_CHECKSUM_HEAD = struct.pack("<II", 0x184D2A50, _DIGEST_BYTES)
_TABLE_MAGIC = 0x184D2A5E
_SEEKABLE_MAGIC = 0x8F92EAB1
_HAS_CHECKSUMS = 0x80
_XXH64_OF_NOTHING = 0xEF46DB3751D8E999 & 0xFFFFFFFF
_MAX_FRAMES = 0x8000000
_ENTRY = struct.Struct("<III")
_FOOTER = struct.Struct("<IBI")

_RAW, _RLE, _COMPRESSED = range(3)


def pack_frame(content: bytes | bytearray | memoryview, level: int) -> bytes:
    """One frame. Other threads run meanwhile."""
    return zstandard.ZstdCompressor(level=level, write_checksum=True).compress(content)


class Table:
    """The frames so far, and what the end of the archive says about them."""

    def __init__(self) -> None:
        self._entries = bytearray()
        self._count = 0
        self._digest = blake3()

    def add(self, frame: bytes | bytearray | memoryview, content_bytes: int) -> None:
        """The next frame."""
        # The last four bytes of a frame are the low half of its content's XXH64: as the table's.
        (checksum,) = struct.unpack("<I", frame[-4:])
        self._entries += _ENTRY.pack(len(frame), content_bytes, checksum)
        self._count += 1
        self._digest.update(frame)

    def end(self) -> bytes:
        """All that follows the last frame."""
        if self._count >= _MAX_FRAMES:
            raise ArchiveError(f"{self._count} frames are more than a seek table holds")
        own = _ENTRY.pack(len(_CHECKSUM_HEAD) + _DIGEST_BYTES, 0, _XXH64_OF_NOTHING)
        body = bytes(self._entries) + own
        body += _FOOTER.pack(self._count + 1, _HAS_CHECKSUMS, _SEEKABLE_MAGIC)
        table = struct.pack("<II", _TABLE_MAGIC, len(body)) + body
        digest = self._digest.copy()
        digest.update(table)
        return _CHECKSUM_HEAD + digest.digest() + table


class Frames:
    """An archive's bytes as they come, and the content of their frames. Memory: two frames, and
    what was added and not taken."""

    def __init__(self) -> None:
        self._bytes = bytearray()
        self._table = Table()
        self._walked = 0
        """Where in the first frame the next block begins; 0: its header was not read yet."""
        self._content_bytes = 0
        self._short = False
        """Whether a frame was not full: then it is the last."""
        self.taken_bytes = 0
        """Of the archive: what was looked at."""

    def add(self, data: bytes) -> None:
        """What came."""
        self._bytes += data

    def take(self) -> bytes | None:
        """The content of the next frame; None where it isn't all there, or was the last. Raises
        ArchiveError."""
        size = self._frame_bytes()
        if size is None:
            return None
        frame = bytes(memoryview(self._bytes)[:size])
        try:
            content = zstandard.ZstdDecompressor().decompress(frame)
        except zstandard.ZstdError as error:
            raise self._wrong(f"can't be unpacked ({error})") from error
        if len(content) != self._content_bytes:
            raise self._wrong(f"has {len(content)} bytes and says {self._content_bytes}")
        self._table.add(frame, len(content))
        self._short = len(content) < FRAME_BYTES
        del self._bytes[:size]
        self._walked = 0
        self.taken_bytes += size
        return content

    def finish(self) -> None:
        """Nothing more comes. Raises ArchiveError unless all of the archive was there, unaltered,
        and nothing behind it."""
        wanted = self._table.end()
        if self._bytes.startswith(_FRAME_MAGIC) or len(self._bytes) < len(wanted):
            raise ArchiveError(
                f"the archive is cut: it ends after {self.taken_bytes + len(self._bytes)} bytes"
            )
        if len(self._bytes) > len(wanted):
            raise ArchiveError(
                f"{len(self._bytes) - len(wanted)} bytes follow the end of the archive"
            )
        if self._bytes != wanted:
            raise ArchiveError("the archive was altered: its checksum is wrong")

    def _frame_bytes(self) -> int | None:
        """The size of the next frame, if all of it is there."""
        if not self._walked and not self._read_header():
            return None
        while True:
            at = self._walked
            if at + 3 > len(self._bytes):
                return None
            head = int.from_bytes(self._bytes[at : at + 3], "little")
            last, kind, size = head & 1, head >> 1 & 3, head >> 3
            if kind not in (_RAW, _RLE, _COMPRESSED):
                raise self._wrong("has a block of a kind that is not known")
            self._walked = at + 3 + (1 if kind == _RLE else size)
            if self._walked > _MAX_PACKED_BYTES:
                raise self._wrong("is larger than frames are")
            if last:
                # Once more the same block, should the rest not be there yet.
                end, self._walked = self._walked + 4, at
                return end if end <= len(self._bytes) else None

    def _read_header(self) -> bool:
        if len(self._bytes) < _MAX_FRAME_HEADER_BYTES:
            return False
        if not self._bytes.startswith(_FRAME_MAGIC):
            if not self.taken_bytes:
                raise ArchiveError("this is no archive of a snapshot: it doesn't begin as one")
            if not self._bytes.startswith(_CHECKSUM_HEAD):
                raise self._wrong("doesn't begin as one")
            if len(self._bytes) > len(self._table.end()):
                self.finish()
            return False
        head = bytes(self._bytes[:_MAX_FRAME_HEADER_BYTES])
        try:
            found = zstandard.get_frame_parameters(head)
            header_bytes = zstandard.frame_header_size(head)
        except zstandard.ZstdError as error:
            raise self._wrong(f"has no header ({error})") from error
        if self._short:
            raise self._wrong("follows one that is not full")
        if not found.has_checksum or found.dict_id:
            raise self._wrong("is not as frames of an archive are")
        if not 0 < found.content_size <= FRAME_BYTES:
            raise self._wrong(f"says that it has {found.content_size} bytes of content")
        self._content_bytes = found.content_size
        self._walked = header_bytes
        return True

    def _wrong(self, what: str) -> ArchiveError:
        return ArchiveError(f"the archive is damaged: the frame at byte {self.taken_bytes} {what}")
