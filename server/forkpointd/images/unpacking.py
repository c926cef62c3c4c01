"""An archive that is being read, as its bytes come: into drafts, and no snapshot before its end.

It stops once at what comes first, the manifests: whoever reads looks whether the snapshot fits
here, finds room, and says where the files go (`place`). Nothing else of the archive says so.
Synchronous; one thread at a time.
"""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Callable, Generator, Sequence

from blake3 import blake3

from forkpointd.images.archive import (
    BLOCK_BYTES,
    CHECKSUMS_NAME,
    END,
    INDEX_NAME,
    ImageEntry,
    Index,
    checksums_bytes,
    checksums_json,
    header,
    index_size,
    padding,
    what_is,
)
from forkpointd.images.errors import ArchiveError, ImageError, Stopped
from forkpointd.images.extents import Extents, decode_extents, encode_extents, total_bytes
from forkpointd.images.manifest import Manifest
from forkpointd.images.moving import (
    CHUNK_BYTES,
    CHUNKS_BEHIND,
    Gate,
    Piece,
    Progress,
    ShouldStop,
    chunks,
    create_file,
    leave_cache,
    start_writeback,
    write_all,
)
from forkpointd.images.seekable import Frames
from forkpointd.images.store import Draft, check_parent
from forkpointd.images.syscalls import PAGE_BYTES
from forkpointd.model import ID_PATTERN, MIB, BranchMode, Layout

_Steps = Generator[None, bytes, None]


class Unpacking:
    """One archive."""

    def __init__(self) -> None:
        self.index: Index | None = None
        """Known after its first bytes."""
        self.manifests: tuple[Manifest, ...] = ()
        """Oldest first, checked against one another; known after the first of the content."""
        self._frames = Frames()
        self._have = bytearray()
        """Content that was not looked at."""
        self._drafts: Sequence[Draft] = ()
        self._drop_behind = False
        self._landed: Progress = lambda _: None
        self._digests: dict[str, str] = {}
        self._ended = False
        self._members = self._read()
        next(self._members)

    @property
    def waits(self) -> bool:
        """Whether nothing goes on before `place`."""
        return bool(self.manifests) and not self._drafts

    def feed(self, data: bytes, gate: Gate, should_stop: ShouldStop) -> None:
        """The next bytes of the archive: what can be is put where it belongs. Raises
        ArchiveError, Stopped, OSError; then this is of no use any more."""
        self._frames.add(data)
        if self._drafts and not self._ended:
            self._send(b"")  # what was there already when the drafts were not
        while not self.waits:
            gate()
            if should_stop():
                raise Stopped
            content = self._frames.take()
            if content is None:
                break
            if self._ended:
                raise ArchiveError("more follows where the archive should end")
            self._send(content)

    def place(
        self, drafts: Sequence[Draft], *, landed: Progress, drop_behind: bool = False
    ) -> None:
        """Where the images go, oldest first; `landed` is told of bytes on the disk. `feed` goes on,
        if with nothing."""
        self._drafts = drafts
        self._landed = landed
        self._drop_behind = drop_behind

    def finish(self) -> None:
        """Nothing more comes. Raises ArchiveError unless the archive is whole and unaltered."""
        self._frames.finish()
        if not self._ended:
            raise ArchiveError("the archive is not whole: members are missing at its end")

    def close(self) -> None:
        """Lets go of the files. Idempotent."""
        self._members.close()

    def _send(self, content: bytes) -> None:
        try:
            self._members.send(content)
        except StopIteration:
            self._ended = True

    # --- members ---

    def _read(self) -> _Steps:
        """All of the tar, in order."""
        size = index_size((yield from self._take(BLOCK_BYTES)))
        index = Index.from_json((yield from self._content(INDEX_NAME, size)))
        names = iter(index.members())
        manifests = []
        for _ in index.images:
            content = yield from self._member(*next(names))
            manifests.append(_manifest(content))
        _check_images(manifests, index.images)
        self.index, self.manifests = index, tuple(manifests)
        while not self._drafts:
            self._have += yield
        for draft, manifest, image in zip(self._drafts, manifests, index.images, strict=True):
            yield from self._write_vmstate(draft, *next(names))
            extents = _extents((yield from self._member(*next(names))), manifest, image)
            yield from self._write_memory(draft, manifest, extents, *next(names))
        wanted = checksums_json(self._digests)
        if (yield from self._member(CHECKSUMS_NAME, checksums_bytes(index))) != wanted:
            raise ArchiveError(f"{CHECKSUMS_NAME} doesn't fit what the archive holds")
        if (yield from self._take(len(END))) != END or self._have:
            raise ArchiveError(f"more follows behind {CHECKSUMS_NAME}")

    def _take(self, count: int) -> Generator[None, bytes, bytes]:
        """So many bytes of the content."""
        while len(self._have) < count:
            self._have += yield
        taken = bytes(memoryview(self._have)[:count])
        del self._have[:count]
        return taken

    def _member(self, name: str, size: int) -> Generator[None, bytes, bytes]:
        """All of a member."""
        yield from self._header(name, size)
        return (yield from self._content(name, size))

    def _header(self, name: str, size: int) -> _Steps:
        found = yield from self._take(BLOCK_BYTES)
        if found != header(name, size):
            raise ArchiveError(f"there is {what_is(found)} where {name} of {size} bytes should be")

    def _content(self, name: str, size: int) -> Generator[None, bytes, bytes]:
        content = yield from self._take(size)
        yield from self._end(name, size, blake3(content))
        return content

    def _end(self, name: str, size: int, digest: blake3) -> _Steps:
        if any((yield from self._take(padding(size)))):
            raise ArchiveError(f"something lies between {name} and what follows it")
        self._digests[name] = digest.hexdigest()

    def _write_vmstate(self, draft: Draft, name: str, size: int) -> _Steps:
        yield from self._header(name, size)
        digest = blake3()
        with create_file(draft.vmstate_path) as target:
            done = 0
            while done < size:
                piece = yield from self._take(min(CHUNK_BYTES, size - done))
                digest.update(piece)
                write_all(target, memoryview(piece), done)
                done += len(piece)
                self._landed(len(piece))
        yield from self._end(name, size, digest)

    def _write_memory(
        self, draft: Draft, manifest: Manifest, extents: Extents, name: str, size: int
    ) -> _Steps:
        yield from self._header(name, size)
        digest = blake3()
        path = draft.memory_path if manifest.layer is None else draft.layer_path
        behind: deque[list[Piece]] = deque()
        with create_file(path) as target:
            target.resize(manifest.memory_bytes)
            for chunk, count in chunks(extents, CHUNK_BYTES):
                if not count:
                    continue
                data = yield from self._take(count)
                digest.update(data)
                at = 0
                with memoryview(data) as view:
                    for offset, length in chunk:
                        write_all(target, view[at : at + length], offset)
                        at += length
                start_writeback(target, chunk)
                self._landed(count)
                if self._drop_behind:
                    behind.append(chunk)
                    if len(behind) > CHUNKS_BEHIND:
                        leave_cache((target,), behind.popleft())
            for chunk in behind:
                leave_cache((target,), chunk)
        yield from self._end(name, size, digest)


# --- what is in them ---------------------------------------------------------------------------


def _manifest(content: bytes) -> Manifest:
    try:
        return Manifest.from_json(content)
    except (ImageError, RecursionError) as error:
        raise ArchiveError(f"a manifest in it is wrong: {error}") from error


def _extents(content: bytes, manifest: Manifest, image: ImageEntry) -> Extents:
    """Where the memory's bytes belong."""
    try:
        stored = decode_extents(content)
    except ImageError as error:
        raise ArchiveError(f"the extents in it are wrong: {error}") from error
    extents = stored.extents
    if content != encode_extents(extents, stored.memory_bytes):
        raise ArchiveError("the extents in it are not as this format has them")
    if stored.memory_bytes != manifest.memory_bytes or total_bytes(extents) != image.data_bytes:
        raise ArchiveError("the extents in it don't fit the memory")
    if any(offset % PAGE_BYTES or length % PAGE_BYTES for offset, length in extents.pairs()):
        raise ArchiveError("the extents in it are not of whole pages")
    if manifest.layer is not None and extents != manifest.layer.extents:
        raise ArchiveError("the extents in it are not those of the layer's manifest")
    return extents


_Wrong = Callable[[Manifest], bool]

_LIES: Sequence[tuple[str, _Wrong]] = (
    ("its ids are none", lambda it: not all(map(_is_id, _ids(it)))),
    ("its memory has no whole MiB", lambda it: bool(it.memory_bytes % MIB)),
    ("its mode is neither FULL nor DIFF", lambda it: it.mode is BranchMode.AUTO),
    ("its layout is AUTO", lambda it: it.layout is Layout.AUTO),
    ("it has network interfaces or vsock", lambda it: it.has_network or it.has_vsock),
)


def _check_images(manifests: Sequence[Manifest], entries: Sequence[ImageEntry]) -> None:
    """Whether they are a snapshot and what it stands on."""
    below: Manifest | None = None
    for number, (manifest, entry) in enumerate(zip(manifests, entries, strict=True)):
        for lie, tells in _LIES:
            if tells(manifest):
                raise ArchiveError(f"the manifest of image {number} can't be: {lie}")
        if manifest.vmstate_bytes != entry.vmstate_bytes:
            raise ArchiveError(f"the manifest of image {number} doesn't fit {INDEX_NAME}")
        if entry.data_bytes > manifest.memory_bytes:
            raise ArchiveError(f"image {number} has more data than memory")
        if below is None:
            if manifest.layer is not None:
                raise ArchiveError("the oldest image is a layer, and what it stands on is missing")
        elif manifest.layer is None or manifest.parent_snapshot_id != below.snapshot_id:
            raise ArchiveError(f"image {number} does not stand on the one before it")
        else:
            try:
                check_parent(below, manifest, manifest.layer)
            except ImageError as error:
                raise ArchiveError(f"image {number} is wrong: {error}") from error
        below = manifest


def _is_id(text: str) -> bool:
    return ID_PATTERN.fullmatch(text) is not None


def _ids(manifest: Manifest) -> tuple[str, ...]:
    return manifest.snapshot_id, manifest.branch_id, manifest.source_sandbox_id


def adopted(manifests: Sequence[Manifest], snapshot_ids: Sequence[str]) -> tuple[Manifest, ...]:
    """The manifests under ids of this server. What the oldest one came from is not here, so it
    names no parent: another snapshot may be called so."""
    return tuple(
        dataclasses.replace(
            manifest,
            snapshot_id=snapshot_id,
            parent_snapshot_id=None if manifest.layer is None else snapshot_ids[number - 1],
        )
        for number, (manifest, snapshot_id) in enumerate(zip(manifests, snapshot_ids, strict=True))
    )
