"""A file system with reflink where the disk of the run has none: XFS on a loop device over a sparse
file, made for some cells and removed after them. That takes root."""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from bench.phase_running import RefusedError, need_room
from bench.scratch import end_processes, uninterrupted

TOOLS = ("mkfs.xfs", "losetup", "mount", "umount")
UNMOUNT_SECONDS = 10.0


@contextmanager
def xfs_on_loop(folder: Path, size_mib: int) -> Iterator[Path]:
    """Mounts one in this folder. Whatever works in it at the end is ended.

    Raises RefusedError where it can't be had, with the reason, and OSError where it can't be
    unmounted.
    """
    if os.geteuid() != 0:
        raise RefusedError("an XFS on a loop device can be mounted by root only")
    if missing := [tool for tool in TOOLS if shutil.which(tool) is None]:
        raise RefusedError(f"an XFS on a loop device needs {', '.join(missing)} (xfsprogs)")
    need_room(folder, size_mib)
    image, place = folder / "xfs.img", folder / "xfs"
    with ExitStack() as stack:
        stack.callback(image.unlink, missing_ok=True)
        with image.open("xb") as opened:
            opened.truncate(size_mib << 20)
        _run("mkfs.xfs", "-q", "-m", "reflink=1", image)
        place.mkdir()
        stack.callback(place.rmdir)
        with uninterrupted():  # what is attached is known, or isn't attached
            stack.callback(_unmount, place)
            # Past the page cache: the pages of the files in it are there once, not twice.
            device = _run("losetup", "--find", "--show", "--direct-io=on", image).strip()
            try:
                _run("mount", "-t", "xfs", device, place)
            finally:
                _run("losetup", "--detach", device)  # a mounted one goes with its mount
        yield place


def _unmount(place: Path) -> None:
    with uninterrupted():
        end_processes(place)
        deadline = time.monotonic() + UNMOUNT_SECONDS
        while os.path.ismount(place):
            done = subprocess.run(["umount", place], capture_output=True, text=True, check=False)
            if done.returncode and time.monotonic() > deadline:
                raise OSError(f"{place} can't be unmounted: {done.stderr.strip()}")
            if done.returncode:
                time.sleep(0.1)


def _run(*command: str | Path) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        why = " ".join(done.stderr.split())
        raise RefusedError(f"no XFS on a loop device here: {command[0]} failed: {why}")
    return done.stdout
