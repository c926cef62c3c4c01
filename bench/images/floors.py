"""What the floor does in the place of a branch or a flatten, by the plainest means."""

from __future__ import annotations

import os
import shutil
import time
from contextlib import ExitStack
from pathlib import Path

from bench.cp import cp_seconds, write_seconds
from bench.floor import FloorVmm
from bench.fork_floor import ForkFloor
from bench.images.cells import CHILDREN, XFS
from bench.images.rows import COPY, FORK, REST, SECONDS, STORE, WINDOW_PART
from bench.images.sources import Place
from bench.phase_running import need_memory
from bench.sparse import clone, copy_extent, data_extents
from bench.witness import PAGES_PER_MIB, file_range, write_pages


class OpenLayer:
    """A layer and the image under it, held open: they can be read after a flatten removed them."""

    def __init__(self, image: Path, layer: Path) -> None:
        """The layer's extents are read from its holes: it was just written, by nobody's copy."""
        with ExitStack() as stack:
            self.image = os.open(image, os.O_RDONLY)
            stack.callback(os.close, self.image)
            self.layer = os.open(layer, os.O_RDONLY)
            stack.callback(os.close, self.layer)
            self.extents = list(data_extents(self.layer, os.fstat(self.layer).st_size))
            self._stack = stack.pop_all()

    def close(self) -> None:
        """Lets go of both."""
        self._stack.close()

    def clone_seconds(self, target: Path) -> float:
        """How long it takes to clone the image, write the layer's extents over it and fsync. The
        clone is removed again."""
        try:
            start = time.perf_counter()
            made = os.open(target, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
            try:
                clone(self.image, made)
                for first, end in self.extents:
                    copy_extent(self.layer, made, first, end)
                os.fsync(made)
                return time.perf_counter() - start
            finally:
                os.close(made)
        finally:
            target.unlink(missing_ok=True)


def overwrite_clone_seconds(image: Path, target: Path, dirty_mib: int) -> float:
    """The same of an image and of so much from memory, over the pages that the witness writes."""
    offset, length = file_range(0, dirty_mib * PAGES_PER_MIB)
    data = bytes(range(256)) * (length // 256)
    try:
        start = time.perf_counter()
        with image.open("rb") as opened, target.open("xb", buffering=0) as made:
            clone(opened.fileno(), made.fileno())
            made.seek(offset)
            made.write(data)
            os.fsync(made.fileno())
        return time.perf_counter() - start
    finally:
        target.unlink(missing_ok=True)


class ChildrenFloor:
    """The floors of a branch to running children, one after the other: a window by plain sockets,
    the diff written and synced, what has to be copied of the base, and the children loaded."""

    def __init__(self, place: Place, source_mib: int) -> None:
        self._place = place
        self._source_mib = source_mib
        cell = place.cell
        need_memory(cell.touched_of(source_mib))
        with ExitStack() as stack:
            root = place.scratch.memory / place.name("floor")
            root.mkdir()
            stack.callback(shutil.rmtree, root)
            self._staging = root / "staging"
            self._staging.mkdir()
            self._fork = ForkFloor(place.firecracker, root / "forks")
            (root / "forks").mkdir()
            self._fork.snapshot(place.kernel, source_mib)
            self._vmm = FloorVmm(place.firecracker, root / "vmm")
            stack.callback(self._vmm.close)
            self._vmm.boot(place.kernel, source_mib)
            self._vmm.ask(f"d{cell.touched_of(source_mib)}")
            self._vmm.window(self._staging, source_mib << 20)
            self._stack = stack.pop_all()
        for _ in range(2):  # the first ones find nothing in the caches
            self._write()
            self._vmm.window(self._staging, source_mib << 20)
            self._fork.fork(CHILDREN)

    def close(self) -> None:
        """Ends what runs."""
        self._stack.close()

    def measure(self, image: Path) -> dict[str, float]:
        """All parts once. `image`: of the snapshot that forkpoint's branch stands on."""
        place, folder = self._place, self._place.scratch.disk
        dirty_mib = place.cell.dirty_mib
        self._write()
        window = self._vmm.window(self._staging, self._source_mib << 20).total_us / 1e6
        store = write_seconds(folder / "floor-diff", dirty_mib)
        if place.cell.disk == XFS:
            copy = overwrite_clone_seconds(image, folder / "floor-clone", dirty_mib)
        else:
            copy = cp_seconds([image], folder)
        fork, _ = self._fork.fork(CHILDREN)
        parts = {WINDOW_PART: window, STORE: store, COPY: copy, FORK: fork}
        return {SECONDS: sum(parts.values()), **parts, REST: 0.0}

    def _write(self) -> None:
        write_pages(self._vmm, 0, self._place.cell.dirty_mib * PAGES_PER_MIB)
