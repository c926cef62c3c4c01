"""Folders on real file systems, and failing calls, for the tests of images."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.unit.images.filesystems import Failing, Mount, mounted

SHM = Path("/dev/shm")


@pytest.fixture
def shm(request: pytest.FixtureRequest) -> Iterator[Path]:
    """A folder on plain tmpfs."""
    if not (SHM.is_dir() and os.access(SHM, os.W_OK)):
        pytest.skip("there is no /dev/shm to write to")
    with tempfile.TemporaryDirectory(dir=SHM, prefix="forkpoint-test-") as folder:
        yield Path(folder)


@pytest.fixture
def mount(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mount]:
    """`mount("tmpfs", "huge=always")` or `mount("xfs", mkfs=["-b", "size=16384"])`: a folder on a
    file system made for this test, or a skip with the reason why it can't be made here."""
    with ExitStack() as stack:
        yield lambda kind, options="", mkfs=(), mib=320: stack.enter_context(
            mounted(tmp_path_factory.mktemp(kind), kind, options, list(mkfs), mib)
        )


@pytest.fixture
def failing(monkeypatch: pytest.MonkeyPatch) -> Failing:
    return Failing(monkeypatch)
