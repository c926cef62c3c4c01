"""What the lab takes from Debian: the kernel of its cloud images with its modules, and busybox.

apt knows the packages and their SHA-256 (its lists are signed). Each is downloaded once, by apt,
into the user's cache, and checked at each use. Nothing is installed.
"""

from __future__ import annotations

import hashlib
import lzma
import os
import re
import shutil
import struct
import subprocess
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

KERNEL_PACKAGE = "linux-image-cloud-amd64"
"""Depends on the newest kernel, whose package is named by its release."""
BUSYBOX_PACKAGE = "busybox-static"

DOWNLOAD_SECONDS = 300


class UnavailableError(Exception):
    """Something that the lab needs is not here; says what, and what to do."""


@dataclass(frozen=True)
class Kernel:
    """An unpacked kernel package."""

    release: str
    image: Path
    """As a boot loader takes it (bzImage)."""
    modules: Path


def cache_folder() -> Path:
    """Where packages are kept for this user."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    folder = Path(base) if os.path.isabs(base) else Path.home() / ".cache"
    return folder / "forkpoint" / "debian"


def unpacked_kernel(folder: Path) -> Kernel:
    """Debian's newest cloud kernel, unpacked into `folder`. Raises UnavailableError."""
    match = re.search(r"linux-image-(\S+)", _record(KERNEL_PACKAGE).get("Depends", ""))
    if match is None:
        raise UnavailableError(f"{KERNEL_PACKAGE}, as apt knows it here, depends on no kernel")
    _unpack(f"linux-image-{match[1]}", folder)
    usr = folder / "usr" if (folder / "usr/lib/modules").is_dir() else folder
    return Kernel(match[1], folder / f"boot/vmlinuz-{match[1]}", usr / f"lib/modules/{match[1]}")


def unpacked_busybox(folder: Path) -> Path:
    """busybox without libraries, unpacked into `folder`. Raises UnavailableError."""
    _unpack(BUSYBOX_PACKAGE, folder)
    places = [folder / "bin/busybox", folder / "usr/bin/busybox"]
    return next(place for place in places if place.is_file())


def _record(package: str) -> dict[str, str]:
    """The fields that apt's lists have of the version it would install."""
    if shutil.which("apt-cache") is None or shutil.which("dpkg-deb") is None:
        raise UnavailableError("there is no apt here: the guest's kernel is a package of Debian")
    command = ["apt-cache", "show", "--no-all-versions", package]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    fields = dict(re.findall(r"^([A-Za-z0-9-]+): (.*)$", done.stdout, re.MULTILINE))
    if "SHA256" not in fields:
        raise UnavailableError(
            f"apt knows no package {package} here; `apt-get update` (as root) fetches its lists, "
            "and it is Debian that has it"
        )
    return fields


def _unpack(package: str, folder: Path) -> None:
    """The files of a package, which is downloaded unless the cache has it."""
    digest = _record(package)["SHA256"]
    kept = cache_folder() / f"{digest}.deb"
    if not kept.is_file() or _sha256(kept) != digest:
        _download(package, digest, kept)
    folder.mkdir(parents=True, exist_ok=True)
    subprocess.run(["dpkg-deb", "-x", kept, folder], check=True)


def _download(package: str, digest: str, target: Path) -> None:
    try:
        target.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".fetch-", dir=target.parent) as scratch:
            done = subprocess.run(
                ["apt-get", "download", "-q", package],
                cwd=scratch,
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                timeout=DOWNLOAD_SECONDS,
                check=False,
            )
            found = list(Path(scratch).glob("*.deb"))
            if done.returncode != 0 or len(found) != 1:
                said = (done.stderr.strip() or done.stdout.strip()).splitlines()[-1:]
                raise UnavailableError(
                    f"`apt-get download {package}` failed: {''.join(said)}; "
                    "`apt-get update` (as root) renews lists that are too old"
                )
            if (wrong := _sha256(found[0])) != digest:
                raise UnavailableError(f"{package} has SHA-256 {wrong}, apt's lists say {digest}")
            found[0].replace(target)
    except subprocess.TimeoutExpired as error:
        raise UnavailableError(
            f"`apt-get download {package}` took more than {DOWNLOAD_SECONDS} s"
        ) from error
    except OSError as error:
        raise UnavailableError(
            f"the cache {target.parent} can't be written: {error}; XDG_CACHE_HOME names another"
        ) from error


def _sha256(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def extract_vmlinux(image: Path, target: Path) -> None:
    """Takes the ELF file, which Firecracker boots, out of a bzImage. Raises ValueError.

    Linux, Documentation/arch/x86/boot.rst: setup_sects, payload_offset, payload_length. The
    payload's last four bytes are its size when it is unpacked.
    """
    raw = image.read_bytes()
    sectors = raw[0x1F1]
    offset, length = struct.unpack_from("<II", raw, 0x248)
    start = (sectors + 1) * 512 + offset
    payload = raw[start : start + length]
    if payload.startswith(b"\xfd7zXZ\0"):
        elf = lzma.LZMADecompressor().decompress(payload)
    elif payload.startswith(b"\x28\xb5\x2f\xfd"):
        elf = _through(["zstd", "-dcq"], payload[:-4])
    elif payload.startswith(b"\x02\x21\x4c\x18"):
        elf = _through(["lz4", "-dcq"], payload[:-4])
    else:
        raise ValueError(f"{image} is packed in a way that is not known: {payload[:6]!r}")
    if not elf.startswith(b"\x7fELF"):
        raise ValueError(f"what is packed in {image} is no ELF file")
    target.write_bytes(elf)


def _through(command: list[str], data: bytes) -> bytes:
    return subprocess.run(command, input=data, stdout=subprocess.PIPE, check=True).stdout


def copy_modules(kernel: Kernel, names: Iterable[str], folder: Path) -> list[str]:
    """Copies modules and all that they depend on, without those that are built in.

    Returns their file names in the order in which they can be loaded. Raises KeyError where the
    kernel has no such module.
    """
    builtin = {
        _module_name(Path(line))
        for line in (kernel.modules / "modules.builtin").read_text().splitlines()
    }
    files = {_module_name(path): path for path in kernel.modules.rglob("*.ko*")}
    order: list[str] = []

    def take(name: str) -> None:
        if name in builtin or f"{name}.ko" in order:
            return
        path = files[name]
        module = lzma.decompress(path.read_bytes()) if path.suffix == ".xz" else path.read_bytes()
        for needed in _dependencies(module):
            take(needed)
        (folder / f"{name}.ko").write_bytes(module)
        order.append(f"{name}.ko")

    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        take(name)
    return order


def _module_name(path: Path) -> str:
    return path.name.partition(".ko")[0].replace("-", "_")


def _dependencies(module: bytes) -> list[str]:
    """What its section .modinfo says: `depends=a,b`."""
    match = re.search(rb"\0depends=([^\0]*)\0", module)
    names = match[1].decode() if match else ""
    return [name.replace("-", "_") for name in names.split(",") if name]
