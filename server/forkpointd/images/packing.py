"""An archive that is being written: its content, a frame's worth at a time.

Nothing is written to the disk: a chain of layers is made one image on the way, by the extents that
a flatten would copy. Synchronous; one thread at a time.
"""

from __future__ import annotations

import heapq
import os
from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

from blake3 import blake3

from forkpointd.images.archive import (
    BLOCK_BYTES,
    END,
    INDEX_NAME,
    ImageEntry,
    Index,
    checksums_json,
    header,
    padding,
)
from forkpointd.images.archive import CHECKSUMS_NAME as CHECKSUMS
from forkpointd.images.extents import Extents, encode_extents, find_extents_of, total_bytes
from forkpointd.images.layers import Layer, shown, union, whole_pages
from forkpointd.images.moving import OpenFile, leave_cache, open_file, read_all
from forkpointd.images.seekable import FRAME_BYTES
from forkpointd.images.store import Chain, StoredSnapshot
from forkpointd.model import Layout

_Run = tuple[bytes | OpenFile, int, int, blake3 | None]
"""Bytes of a source: offset and length, and the digest that they belong to."""


@dataclass(frozen=True, slots=True)
class _Image:
    """What goes into the archive of one image."""

    manifest: bytes
    vmstate_path: Path
    vmstate_bytes: int
    parts: tuple[Layer, ...]
    """Whose extents are apart from one another."""
    extents: Extents
    packed_extents: bytes
    dirty_bytes: int


class Packing:
    """The content of an archive of a snapshot."""

    def __init__(self, images: Sequence[_Image], *, drop_behind: bool) -> None:
        self._images = images
        self._drop_behind = drop_behind
        self.index = Index(
            tuple(
                ImageEntry(
                    manifest_bytes=len(image.manifest),
                    vmstate_bytes=image.vmstate_bytes,
                    extents_bytes=len(image.packed_extents),
                    data_bytes=total_bytes(image.extents),
                    dirty_bytes=image.dirty_bytes,
                )
                for image in images
            )
        )
        self._digests: dict[str, str] = {}
        self._frames = self._make_frames()

    @classmethod
    def flat(cls, chain: Chain, dirty_bytes: int, *, drop_behind: bool = False) -> Packing:
        """One image, whatever number of layers the snapshot has. Raises ImageError, OSError."""
        memory_bytes = chain.image.manifest.memory_bytes
        layers = chain.parts()
        base = _data_of(chain.image)
        held = shown([base.extents, *(layer.extents for layer in layers)], memory_bytes)
        parts = tuple(
            replace(layer, extents=extents)
            for layer, extents in zip((base, *layers), held, strict=True)
        )
        top = chain.layers[-1] if chain.layers else chain.image
        top = replace(top, manifest=replace(top.manifest, layout=Layout.FLAT, layer=None))
        return cls([_image(top, parts, dirty_bytes)], drop_behind=drop_behind)

    @classmethod
    def kept(
        cls, chain: Chain, dirty_bytes: Sequence[int], *, drop_behind: bool = False
    ) -> Packing:
        """The chain as it is. Raises ImageError, OSError."""
        parts = (_data_of(chain.image), *chain.parts())
        stored = (chain.image, *chain.layers)
        images = [
            _image(each, (part,), dirty)
            for each, part, dirty in zip(stored, parts, dirty_bytes, strict=True)
        ]
        return cls(images, drop_behind=drop_behind)

    def next_frame(self) -> bytearray | None:
        """The next FRAME_BYTES of content (the last time: what is left); None at its end. Raises
        ImageError where a file was cut, OSError."""
        return next(self._frames, None)

    def close(self) -> None:
        """Lets go of the files. Idempotent."""
        self._frames.close()

    def _make_frames(self) -> Generator[bytearray, None, None]:
        frame = bytearray(FRAME_BYTES)
        used = 0
        for source, offset, length, digest in self._runs():
            done = 0
            while done < length:
                count = min(length - done, FRAME_BYTES - used)
                with memoryview(frame) as whole, whole[used : used + count] as span:
                    if isinstance(source, bytes):
                        span[:] = source[done : done + count]
                    else:
                        read_all(source, span, offset + done)
                    if digest is not None:
                        digest.update(span)
                done += count
                used += count
                if used == FRAME_BYTES:
                    yield frame
                    frame, used = bytearray(FRAME_BYTES), 0
            if self._drop_behind and not isinstance(source, bytes):
                leave_cache((source,), [(offset, length)])
        if used:
            del frame[used:]
            yield frame

    def _runs(self) -> Iterator[_Run]:
        """All of the tar, a run of bytes at a time, each with the digest that it belongs to."""
        names = iter(self.index.members())
        yield from self._of_bytes(INDEX_NAME, self.index.to_json())
        for image in self._images:
            yield from self._of_bytes(next(names)[0], image.manifest)
        for image in self._images:
            size = image.vmstate_bytes
            yield from self._of_files(next(names), [(image.vmstate_path, 0, size)])
            yield from self._of_bytes(next(names)[0], image.packed_extents)
            yield from self._of_files(next(names), _in_order(image.parts))
        yield from self._of_bytes(CHECKSUMS, checksums_json(self._digests))
        yield END, 0, len(END), None

    def _of_bytes(self, name: str, content: bytes) -> Iterator[_Run]:
        digest = blake3()
        yield header(name, len(content)), 0, BLOCK_BYTES, None
        yield content, 0, len(content), digest
        yield bytes(padding(len(content))), 0, padding(len(content)), None
        self._digests[name] = digest.hexdigest()

    def _of_files(
        self, member: tuple[str, int], runs: Iterable[tuple[Path, int, int]]
    ) -> Iterator[_Run]:
        name, size = member
        digest = blake3()
        yield header(name, size), 0, BLOCK_BYTES, None
        with ExitStack() as stack:
            opened: dict[Path, OpenFile] = {}
            for path, offset, length in runs:
                if path not in opened:
                    opened[path] = stack.enter_context(open_file(path, os.O_RDONLY))
                yield opened[path], offset, length, digest
        yield bytes(padding(size)), 0, padding(size), None
        self._digests[name] = digest.hexdigest()


def _data_of(stored: StoredSnapshot) -> Layer:
    """What an image has, in whole pages: what it hasn't is zeros."""
    memory_bytes = stored.manifest.memory_bytes
    data = find_extents_of(stored.memory_path, memory_bytes)
    return Layer(stored.memory_path, whole_pages(data, memory_bytes))


def _image(stored: StoredSnapshot, parts: tuple[Layer, ...], dirty_bytes: int) -> _Image:
    manifest = stored.manifest
    extents = union([part.extents for part in parts], manifest.memory_bytes)
    if manifest.layer is not None:
        manifest = replace(manifest, layer=replace(manifest.layer, extents=extents))
    return _Image(
        manifest=manifest.to_json().encode(),
        vmstate_path=stored.vmstate_path,
        vmstate_bytes=manifest.vmstate_bytes,
        parts=parts,
        extents=extents,
        packed_extents=encode_extents(extents, manifest.memory_bytes),
        dirty_bytes=dirty_bytes,
    )


def _in_order(parts: Sequence[Layer]) -> Iterator[tuple[Path, int, int]]:
    """The extents of several files, by their offsets."""

    def of(layer: Layer) -> Iterator[tuple[int, int, Path]]:
        for offset, length in layer.extents.pairs():
            yield offset, length, layer.memory_path

    for offset, length, path in heapq.merge(*map(of, parts)):
        yield path, offset, length
