"""Layers: a snapshot that is kept as the diff of its window over its parent.

A chain is an image and the diffs that stand on it. What the last one's memory is, page by page, is
said by the newest diff that has the page, else by the image; so a page is copied once, however many
layers hold it. What a layer holds is said by the extents in its manifest, never by the holes of its
file: a copy, an archive or another file system may fill them or dig new ones.

Synchronous: run it in threads.
"""

from __future__ import annotations

import re
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from forkpointd.images.copying import CopyResult, copy_image, make_empty_image, merge_diff
from forkpointd.images.errors import ImageError
from forkpointd.images.extents import Extent, Extents, find_extents_of, total_bytes
from forkpointd.images.moving import Gate, Progress, ShouldStop
from forkpointd.images.syscalls import PAGE_BYTES
from forkpointd.model import CopyMethod

_UNCOVERED = re.compile(b"\0+")


@dataclass(frozen=True, slots=True)
class Layer:
    """A memory file that holds some of the pages."""

    memory_path: Path
    extents: Extents
    """Which. The rest of the file says nothing."""


def shown(layers: Sequence[Extents], memory_bytes: int) -> list[Extents]:
    """Of each of these layers, oldest first, what no newer one covers: together each page at most
    once. Takes a byte of memory a page, and time by extents, not by pages.

    Raises ImageError for extents that are not of whole pages, or beyond the memory's end.
    """
    if len(layers) == 1:
        for offset, length in layers[0].pairs():
            _pages(offset, length, memory_bytes)
        return [layers[0]]
    covered = bytearray(memory_bytes // PAGE_BYTES)
    found = []
    for extents in reversed(layers):
        offsets, lengths = array("Q"), array("Q")
        for offset, length in extents.pairs():
            first, end = _pages(offset, length, memory_bytes)
            if covered.find(1, first, end) < 0:
                offsets.append(offset)
                lengths.append(length)
                continue
            for run in _UNCOVERED.finditer(covered, first, end):
                offsets.append(run.start() * PAGE_BYTES)
                lengths.append((run.end() - run.start()) * PAGE_BYTES)
        for offset, length in extents.pairs():
            first, end = offset // PAGE_BYTES, (offset + length) // PAGE_BYTES
            covered[first:end] = b"\1" * (end - first)
        found.append(Extents(offsets, lengths))
    return found[::-1]


def union(layers: Sequence[Extents], memory_bytes: int) -> Extents:
    """What any of these layers holds. Raises ImageError as `shown` does."""
    held = bytearray(memory_bytes // PAGE_BYTES)
    for extents in layers:
        for offset, length in extents.pairs():
            first, end = _pages(offset, length, memory_bytes)
            held[first:end] = b"\1" * (end - first)
    offsets, lengths = array("Q"), array("Q")
    for run in re.finditer(b"\1+", held):
        offsets.append(run.start() * PAGE_BYTES)
        lengths.append((run.end() - run.start()) * PAGE_BYTES)
    return Extents(offsets, lengths)


def copy_chain(
    image_path: Path | None,
    layers: Sequence[Layer],
    target_path: Path,
    memory_bytes: int,
    *,
    progress: Progress,
    should_stop: ShouldStop,
    gate: Gate,
    drop_behind: bool = False,
    on_total: Progress = lambda _: None,
) -> CopyResult:
    """Makes `target_path`, which must not exist, what the image (None: zeros) is under its layers,
    oldest first.

    The image is reflinked where the file system can; else of it, as of each layer, only that is
    moved which no newer one covers. `on_total` is told once how many bytes will be moved. Nothing
    is synced. Raises Stopped, ImageError, FileExistsError, OSError with the path; then there is no
    `target_path`, unless it was there before.
    """
    held = [layer.extents for layer in layers]
    parts = shown(held, memory_bytes)
    laid = sum(map(total_bytes, parts))
    if image_path is None:
        make_empty_image(target_path, memory_bytes)
        on_total(laid)
        copied = CopyResult(CopyMethod.COPY, 0, memory_bytes, memory_bytes)
    else:
        copied = copy_image(
            image_path,
            target_path,
            memory_bytes,
            progress=progress,
            should_stop=should_stop,
            gate=gate,
            drop_behind=drop_behind,
            on_total=lambda count: on_total(count + laid),
            only=partial(_below, image_path, held, memory_bytes) if layers else None,
        )
    try:
        for layer, extents in zip(layers, parts, strict=True):
            merge_diff(
                layer.memory_path,
                extents,
                target_path,
                progress=progress,
                should_stop=should_stop,
                gate=gate,
                drop_behind=drop_behind,
            )
    except BaseException:
        target_path.unlink(missing_ok=True)
        raise
    if copied.method is CopyMethod.REFLINK:
        return copied
    total = copied.copied_bytes + laid
    return CopyResult(CopyMethod.COPY, total, memory_bytes - total, memory_bytes)


def _below(image_path: Path, layers: Sequence[Extents], memory_bytes: int) -> Extents:
    """What of an image's data no layer covers."""
    data = whole_pages(find_extents_of(image_path, memory_bytes), memory_bytes)
    left, _ = shown([data, union(layers, memory_bytes)], memory_bytes)
    return left


def _pages(offset_bytes: int, length_bytes: int, memory_bytes: int) -> tuple[int, int]:
    """First page and the one behind the last."""
    end_bytes = offset_bytes + length_bytes
    if offset_bytes % PAGE_BYTES or length_bytes % PAGE_BYTES or end_bytes > memory_bytes:
        raise ImageError(
            f"{length_bytes} bytes at {offset_bytes} are no pages of a memory of {memory_bytes}"
        )
    return offset_bytes // PAGE_BYTES, end_bytes // PAGE_BYTES


def whole_pages(extents: Extents, memory_bytes: int) -> Extents:
    """The data of an image, whose holes are zeros, widened to pages: some file systems have
    smaller blocks."""
    wide = []
    for offset, length in extents.pairs():
        start = offset // PAGE_BYTES * PAGE_BYTES
        end = min(memory_bytes, -(-(offset + length) // PAGE_BYTES) * PAGE_BYTES)
        wide.append(Extent(start, end - start))
    return union([Extents.of(wide)], memory_bytes)
