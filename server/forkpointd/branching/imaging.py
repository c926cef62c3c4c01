"""The files of a snapshot that is being made: pre-copy, merge, finalise.

Copies run in threads of their own, a bounded number at once in the whole server. A cancelled wait
for one tells the thread to stop and returns once it has left, so no thread writes into a folder
that is being removed.
"""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import Executor
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from forkpointd.branching.page_cache import PageCache
from forkpointd.branching.quiet import Bandwidth, Pace, Quiet
from forkpointd.images import (
    Chain,
    CopyResult,
    Draft,
    Extents,
    ImageError,
    Layer,
    Reservation,
    StoredSnapshot,
    allocated_bytes,
    copy_chain,
    copy_full,
    copy_whole,
    load_extents,
    make_empty_image,
    merge_diff,
    punch_between,
    punch_zeros,
    total_bytes,
    union,
)
from forkpointd.model import StagingKind, UnmergedDiff

T = TypeVar("T")

PROGRESS_SECONDS = 0.1
"""How often a copy's progress is published."""


@dataclass(slots=True)
class Meter:
    """Bytes done, written by the copying thread and read by the loop."""

    reservation: Reservation | None = None
    """Room that the bytes take up as they land, so that it isn't counted twice."""
    done_bytes: int = 0
    total_bytes: int = 0

    def add(self, count: int) -> None:
        """Counts bytes that have landed."""
        self.done_bytes += count
        if self.reservation is not None:
            self.reservation.consume(count)

    def pass_over(self, count: int) -> None:
        """Counts bytes that took up no room."""
        self.done_bytes += count


class CopyWorkers:
    """Threads for copies: so many at once, the others wait in order."""

    def __init__(
        self,
        executor: Executor,
        at_once: int,
        quiet: Quiet,
        bandwidth: Bandwidth,
        page_cache: PageCache,
    ) -> None:
        self._executor = executor
        self._slots = asyncio.Semaphore(at_once)
        self._quiet = quiet
        self._bandwidth = bandwidth
        self._page_cache = page_cache

    @asynccontextmanager
    async def slot(self) -> AsyncIterator[None]:
        """A turn to copy."""
        async with self._slots:
            yield

    async def run(self, work: Callable[[Pace], T]) -> T:
        """Runs `work(pace)` in a thread. Cancelling tells it to stop, and waits for it."""
        stop = threading.Event()
        pace = Pace(stop.is_set, self._quiet, self._bandwidth, self._page_cache)
        future = asyncio.get_running_loop().run_in_executor(self._executor, work, pace)
        try:
            return await asyncio.shield(future)
        except asyncio.CancelledError:
            stop.set()
            await asyncio.wait([future])
            raise


def make_image(
    chain: Chain | None,
    unmerged: Sequence[UnmergedDiff],
    memory_bytes: int,
    image_path: Path,
    meter: Meter,
    pace: Pace,
) -> CopyResult:
    """Writes the memory that a snapshot (None: zeros) and diffs over it, oldest first, stand for to
    `image_path`."""
    layers = [*(() if chain is None else chain.parts()), *map(_as_layer, unmerged)]
    image = None if chain is None else chain.image.memory_path
    files = [layer.memory_path for layer in layers] + ([] if image is None else [image])
    cached_twice = 2 * sum(allocated_bytes(path) for path in files)
    return _compose(image, layers, image_path, memory_bytes, cached_twice, meter, pace)


def _compose(
    image: Path | None,
    layers: Sequence[Layer],
    target_path: Path,
    memory_bytes: int,
    cached_bytes: int,
    meter: Meter,
    pace: Pace,
) -> CopyResult:
    """`copy_chain`, metered and paced. `cached_bytes`: what it would leave in the page cache."""

    def sized(count: int) -> None:
        meter.total_bytes = count

    return copy_chain(
        image,
        layers,
        target_path,
        memory_bytes,
        progress=pace.paying(meter.add),
        should_stop=pace.should_stop,
        gate=pace.gate,
        drop_behind=pace.page_cache.is_crowded_by(cached_bytes),
        on_total=sized,
    )


def _as_layer(diff: UnmergedDiff) -> Layer:
    """Raises DiffLost, OSError."""
    try:
        stored = load_extents(diff.extents_path)
        size_bytes = diff.memory_path.stat().st_size
    except FileNotFoundError as error:
        raise DiffLost(diff.branch_id, f"{error.filename} is not there") from error
    except ImageError as error:
        raise DiffLost(diff.branch_id, str(error)) from error
    if size_bytes != stored.memory_bytes:
        raise DiffLost(
            diff.branch_id,
            f"{diff.memory_path} has {size_bytes} bytes, not {stored.memory_bytes}",
        )
    return Layer(diff.memory_path, stored.extents)


def check_diffs(diffs: Sequence[UnmergedDiff]) -> None:
    """Whether kept diffs are there. Raises DiffLost for the first that isn't, OSError."""
    for diff in diffs:
        _as_layer(diff)


class DiffLost(ImageError):
    """A diff that no snapshot has yet is gone, cut or altered."""

    def __init__(self, branch_id: str, why: str) -> None:
        super().__init__(f"the diff of branch {branch_id} is lost: {why}")
        self.branch_id = branch_id


@dataclass(frozen=True, slots=True)
class Staged:
    """The files of one window in a staging folder."""

    kind: StagingKind
    memory_path: Path
    vmstate_path: Path
    extents_path: Path

    def remove(self) -> None:
        """Unlinks them: only after the window's last reply."""
        for path in (self.memory_path, self.vmstate_path, self.extents_path):
            path.unlink(missing_ok=True)

    def remove_vmstate(self) -> None:
        """What a diff that is kept for later doesn't need."""
        self.vmstate_path.unlink(missing_ok=True)


def merge_staged_diff(staged: Staged, draft: Draft, meter: Meter, pace: Pace) -> None:
    """Lays the window's diff over the pre-copied image; copies the vmstate beside it."""
    loaded = load_extents(staged.extents_path)
    meter.total_bytes = total_bytes(loaded.extents)
    _copy_vmstate(staged, draft, pace)
    merge_diff(
        staged.memory_path,
        loaded.extents,
        draft.memory_path,
        progress=pace.paying(meter.add),
        should_stop=pace.should_stop,
        gate=pace.gate,
        drop_behind=pace.page_cache.is_crowded_by(meter.total_bytes),
    )


def place_layer(
    staged: Staged, diffs: Sequence[UnmergedDiff], draft: Draft, meter: Meter, pace: Pace
) -> Extents:
    """Makes the window's diff, the last of `diffs`, a layer, with those before it that no snapshot
    has; copies the vmstate beside it. In memory, where it is alone, the staged file itself becomes
    the layer: the staged name stays until the snapshot is READY, so a failure in between loses
    nothing. Returns what the layer holds. What a former server began is begun again. Raises
    DiffLost, OSError."""
    layers = list(map(_as_layer, diffs))
    memory_bytes = staged.memory_path.stat().st_size
    _copy_vmstate(staged, draft, pace)
    draft.layer_path.unlink(missing_ok=True)
    if len(layers) == 1 and staged.kind is StagingKind.TMPFS and _is_beside(staged, draft):
        (layer,) = layers
        meter.total_bytes = total_bytes(layer.extents)
        if allocated_bytes(staged.memory_path) > meter.total_bytes:
            punch_between(
                staged.memory_path,
                layer.extents,
                should_stop=pace.should_stop,
                gate=pace.gate,
            )
        os.link(staged.memory_path, draft.layer_path)
        meter.add(meter.total_bytes)
        return union([layer.extents], memory_bytes)
    cached = sum(total_bytes(layer.extents) for layer in layers)
    _compose(None, layers, draft.layer_path, memory_bytes, cached, meter, pace)
    return union([layer.extents for layer in layers], memory_bytes)


def place_staged_full(staged: Staged, draft: Draft, meter: Meter, pace: Pace) -> None:
    """Brings a FULL window's file to its place, without its zeros. Staged on the same file system
    it is hard-linked: the staged name stays until the snapshot is READY, so a failure in between
    loses nothing."""
    meter.total_bytes = staged.memory_path.stat().st_size
    _copy_vmstate(staged, draft, pace)
    crowded = pace.page_cache.is_crowded_by(meter.total_bytes)
    if _is_beside(staged, draft):
        punch_zeros(
            staged.memory_path,
            progress=meter.pass_over,
            should_stop=pace.should_stop,
            gate=pace.gate,
            drop_behind=crowded,
        )
        draft.memory_path.unlink(missing_ok=True)
        os.link(staged.memory_path, draft.memory_path)
        if meter.reservation is not None:
            meter.reservation.consume(meter.total_bytes)
    else:
        copy_full(
            staged.memory_path,
            draft.memory_path,
            progress=pace.paying(meter.add),
            left_out=meter.pass_over,
            should_stop=pace.should_stop,
            gate=pace.gate,
            drop_behind=crowded,
        )
    meter.done_bytes = meter.total_bytes


def copy_to_disk(
    stored: StoredSnapshot, file: Path, target: Path, meter: Meter, pace: Pace
) -> None:
    """Makes a copy of one of the files of a snapshot that is in memory. Of a layer what its
    manifest names, whatever else the file has."""
    crowded = pace.page_cache.is_crowded_by(allocated_bytes(file))
    layer = stored.manifest.layer
    if layer is not None and file == stored.memory_path:
        make_empty_image(target, stored.manifest.memory_bytes)
        merge_diff(
            file,
            layer.extents,
            target,
            progress=pace.paying(meter.add),
            should_stop=pace.should_stop,
            gate=pace.gate,
            drop_behind=crowded,
        )
    else:
        copy_whole(
            file,
            target,
            progress=pace.paying(meter.add),
            should_stop=pace.should_stop,
            gate=pace.gate,
            drop_behind=crowded,
        )


def _is_beside(staged: Staged, draft: Draft) -> bool:
    """Whether the staged file can have a second name in the draft."""
    return staged.memory_path.stat().st_dev == draft.folder.stat().st_dev


def _copy_vmstate(staged: Staged, draft: Draft, pace: Pace) -> None:
    draft.vmstate_path.unlink(missing_ok=True)
    copy_whole(
        staged.vmstate_path,
        draft.vmstate_path,
        progress=lambda _: None,
        should_stop=pace.should_stop,
        gate=pace.gate,
    )
