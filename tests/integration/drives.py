"""What tests of writable drives share: file systems with and without reflink, a sandbox with a
drive, and the files behind it.

The witness has no driver for block devices, so what a guest would write is written here, into the
sandbox's own file.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from forkpoint.v1 import sandbox_pb2, sandbox_service_pb2
from forkpointd.images import can_reflink
from forkpointd.model import MIB
from tests.integration.serving import Guest, House
from tests.unit.images.filesystems import mounted

MEMORY_MIB = 80
REGION_MIB = 12
DRIVE_BYTES = 8 * MIB
FIRST = b"as the image was"


@pytest.fixture(scope="module")
def xfs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder on an XFS of its own: it can share blocks between files."""
    with mounted(tmp_path_factory.mktemp("xfs"), "xfs", "", ["-q"], 1024) as folder:
        yield folder


@pytest.fixture
def plain(tmp_path: Path) -> Path:
    """A folder whose file system can't."""
    if can_reflink(tmp_path):
        pytest.skip("the file system of the tests' folder has reflink: this is about one without")
    return tmp_path


def make_image(house: House, name: str = "data.img") -> Path:
    """A drive's image: some bytes, then a hole."""
    path = house.images / name
    path.write_bytes(FIRST)
    os.truncate(path, DRIVE_BYTES)
    return path


async def booted(house: House, sandbox_id: str = "src", *, allow_drive_copy: bool = False) -> Guest:
    """A booted witness with one writable drive, `data`."""
    image = house.images / "data.img"
    if not image.exists():
        make_image(house)
    drives = [sandbox_pb2.Drive(drive_id="data", path=str(image), read_only=False)]
    request = sandbox_service_pb2.CreateSandboxRequest(
        sandbox_id=sandbox_id,
        boot=sandbox_service_pb2.BootSource(
            kernel_image=str(house.kernel), memory_mib=MEMORY_MIB, drives=drives
        ),
        allow_drive_copy=allow_drive_copy,
    )
    await house.sandboxes.CreateSandbox(request)
    guest = Guest(house, sandbox_id)
    await guest.read_until(0, lambda text: "READY\n" in text)
    return guest


def drive_of(house: House, sandbox_id: str) -> Path:
    return house.data_dir / "sandboxes" / sandbox_id / "drives" / "data"


def clone_in(house: House, snapshot_id: str) -> Path:
    return house.data_dir / "snapshots" / snapshot_id / "drive-data"


def write(path: Path, content: bytes, at: int = 0) -> None:
    """What a guest would write there."""
    fd = os.open(path, os.O_WRONLY)
    try:
        os.pwrite(fd, content, at)
    finally:
        os.close(fd)


def head(path: Path, count: int = 16, at: int = 0) -> bytes:
    with path.open("rb") as opened:
        opened.seek(at)
        return opened.read(count)
