"""The floor of everything that copies: coreutils' cp, and an fsync of what it wrote.

What it copies is dense, a file without a hole with as many bytes as the image has data: a copy
that spends time on holes is slower than this.
"""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

from bench.floor import FloorError
from bench.sparse import fsync

_MIB = bytes(range(256)) * 4096


def make_dense(path: Path, size_mib: int) -> None:
    """Makes a file of this size without a hole, whether it is there already or not: it is cut, or
    grows. Then it is on its disk, and in the page cache."""
    with path.open("ab") as opened:
        opened.truncate(min(opened.tell(), size_mib << 20))
        opened.seek(0, os.SEEK_END)
        while opened.tell() < size_mib << 20:
            opened.write(_MIB)
        opened.flush()
        os.fsync(opened.fileno())


def cp_seconds(sources: Sequence[Path], folder: Path) -> float:
    """How long it takes to cp these files into a folder, one after the other, and to fsync them.
    The copies are removed again."""
    targets = [folder / f"{source.name}.copy" for source in sources]
    try:
        start = time.perf_counter()
        for source, target in zip(sources, targets, strict=True):
            cp(source, target)
        for target in targets:
            fsync(target)
        return time.perf_counter() - start
    finally:
        for target in targets:
            target.unlink(missing_ok=True)


def write_seconds(path: Path, size_mib: int) -> float:
    """How long it takes to write so much to a new file from memory, and to fsync it. The file is
    removed again."""
    try:
        start = time.perf_counter()
        with path.open("xb", buffering=0) as opened:
            for _ in range(size_mib):
                opened.write(_MIB)
            os.fsync(opened.fileno())
        return time.perf_counter() - start
    finally:
        path.unlink(missing_ok=True)


def cp(source: Path, target: Path) -> None:
    """Copies a file."""
    done = subprocess.run(["cp", source, target], capture_output=True, check=False)
    if done.returncode:
        raise FloorError(f"cp failed: {done.stderr.decode(errors='replace')}")


def settle() -> None:
    """Waits until nothing is left to be written, so that no trial pays for the one before it."""
    os.sync()
