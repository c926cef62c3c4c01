"""Where a figure was taken: machine, kernel, versions, commit; and whether it can be at all."""

from __future__ import annotations

import fcntl
import os
import platform
import subprocess
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import ClassVar

import grpc

import forkpointd

REPOSITORY = Path(__file__).resolve().parent.parent
KVM = Path("/dev/kvm")
KVM_GET_API_VERSION = 0xAE00


@dataclass(frozen=True, slots=True)
class _Facts:
    """One column each."""

    cpu: str
    cpus: int
    memory_mib: int
    kernel: str
    filesystem: str
    """Of the folder with the images."""
    firecracker: str
    forkpointd: str
    python: str
    grpcio: str
    commit: str
    """With `+` where files differ from it."""


class Machine(_Facts):
    """This machine and what runs on it."""

    COLUMNS: ClassVar[tuple[str, ...]] = tuple(field.name for field in fields(_Facts))

    def row(self) -> dict[str, str | int]:
        """For the CSV."""
        return asdict(self)

    @classmethod
    def here(cls, firecracker: Path, images: Path, *, except_for: Sequence[str] = ()) -> Machine:
        """The facts of now. `images` is the folder in which images are going to lie; files below
        the paths of `except_for` (from the repository's root) make no difference to the commit."""
        return cls(
            cpu=_cpu(),
            cpus=os.cpu_count() or 0,
            memory_mib=os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") >> 20,
            kernel=platform.release(),
            filesystem=describe_filesystem(images),
            firecracker=_firecracker_version(firecracker),
            forkpointd=forkpointd.__version__,
            python=platform.python_version(),
            grpcio=grpc.__version__,
            commit=_commit(except_for),
        )


def kvm_refusal() -> str:
    """Why real Firecracker can't run here; empty where it can."""
    try:
        descriptor = os.open(KVM, os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        return f"{KVM} can't be opened ({error.strerror})"
    try:
        fcntl.ioctl(descriptor, KVM_GET_API_VERSION)
    except OSError as error:
        return f"{KVM} is not KVM ({error.strerror})"
    finally:
        os.close(descriptor)
    return ""


def available_bytes() -> int:
    """MemAvailable of /proc/meminfo."""
    for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
        name, _, rest = line.partition(":")
        if name == "MemAvailable":
            return int(rest.split()[0]) * 1024
    raise OSError("/proc/meminfo has no MemAvailable")


def filesystem_of(folder: Path) -> str:
    """The type of the file system that a folder lies on, for example `ext4`."""
    device = os.stat(folder).st_dev
    wanted = f"{os.major(device)}:{os.minor(device)}"
    for line in Path("/proc/self/mountinfo").read_text(encoding="utf-8").splitlines():
        head, _, tail = line.partition(" - ")
        if head.split()[2] == wanted:
            return tail.split()[0]
    return "unknown"


def describe_filesystem(folder: Path) -> str:
    """Its type, and what is unusual about it.

    ext4 without a journal doesn't give an inode out again within the minutes after its deletion,
    and looks at each such inode whenever a file is made (recently_deleted() in fs/ext4/ialloc.c).
    There a fork is slower the more files were deleted just before it.
    """
    kind = filesystem_of(folder)
    if kind != "ext4":
        return kind
    device = os.stat(folder).st_dev
    block = Path(f"/sys/dev/block/{os.major(device)}:{os.minor(device)}").resolve().name
    journals = Path("/proc/fs/jbd2")
    journalled = journals.is_dir() and any(
        entry.name.startswith(f"{block}-") for entry in journals.iterdir()
    )
    return kind if journalled else "ext4 without a journal"


def _cpu() -> str:
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
        name, _, value = line.partition(":")
        if name.strip() == "model name":
            return value.strip()
    return platform.machine()


def _firecracker_version(firecracker: Path) -> str:
    done = subprocess.run([firecracker, "--version"], capture_output=True, text=True, check=True)
    return done.stdout.split()[1]


def _commit(except_for: Sequence[str]) -> str:
    paths = [f":(exclude){path}" for path in except_for]
    try:
        head = _git("rev-parse", "HEAD")
        return head + ("+" if _git("status", "--porcelain", "--", ".", *paths) else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _git(*arguments: str) -> str:
    command = ["git", "-C", str(REPOSITORY), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
