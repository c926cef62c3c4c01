"""Files that a request names: only regular files inside the image roots, links resolved.

It asks the disk, so it runs in a thread. A path that leads out of the roots gets one answer whether
there is such a file or not, so that a client learns nothing about the rest of the host.
"""

from __future__ import annotations

import asyncio
import errno
import os
import stat
from collections.abc import Mapping, Sequence
from pathlib import Path

from forkpoint.v1 import sandbox_service_pb2
from forkpointd.model import FieldViolation
from forkpointd.rpc.rules import malformed_path, shown


def named_files(boot: sandbox_service_pb2.BootSource) -> dict[str, str]:
    """Each path that may be asked for, by its field in a CreateSandboxRequest.

    What is no path at all is left out: validation has its own words for that.
    """
    files = {"boot.kernel_image": boot.kernel_image, "boot.initrd": boot.initrd}
    files |= {f"boot.drives[{index}].path": each.path for index, each in enumerate(boot.drives)}
    return {field: path for field, path in files.items() if path and not malformed_path(path)}


async def resolve_all(
    files: Mapping[str, str], roots: Sequence[Path]
) -> tuple[dict[str, Path], list[FieldViolation]]:
    """The real path of each file, and what is wrong with those that have none."""
    return await asyncio.to_thread(_resolve_all, files, roots)


def _resolve_all(
    files: Mapping[str, str], roots: Sequence[Path]
) -> tuple[dict[str, Path], list[FieldViolation]]:
    real_roots = [Path(os.path.realpath(root)) for root in roots]
    found: dict[str, Path] = {}
    wrong: list[FieldViolation] = []
    for field, path in files.items():
        try:
            found[field] = resolve(path, real_roots)
        except UnusableFileError as error:
            wrong.append(FieldViolation(field, str(error)))
    return found, wrong


class UnusableFileError(Exception):
    """A file that a guest may not be made of; the message says why and what to do."""


def resolve(path: str, real_roots: Sequence[Path]) -> Path:
    """The real path of a regular, readable file inside one of the roots (themselves resolved).

    Blocks. Raises `UnusableFileError`.
    """
    if not real_roots:
        raise UnusableFileError(
            f"{shown(path)} can't be used: this server has no image root; "
            "set image_roots to the folders that hold kernels, initrds and drives"
        )
    real = Path(os.path.realpath(path))
    if not any(real.is_relative_to(root) for root in real_roots):
        inside = ", ".join(map(str, real_roots))
        raise UnusableFileError(
            f"{shown(path)} lies outside the image roots, or a link leads out of them: "
            f"put the file itself into one of {inside}, or add its folder to image_roots"
        )
    try:
        mode = os.stat(real).st_mode
    except OSError as error:
        raise UnusableFileError(_why_not(path, error)) from error
    if not stat.S_ISREG(mode):
        raise UnusableFileError(f"{shown(path)} is {_kind(mode)}: name a regular file")
    if not os.access(real, os.R_OK):
        raise UnusableFileError(
            f"{shown(path)} can't be read by the server (user {os.geteuid()}): "
            "give it the permission to read the file"
        )
    return real


def _why_not(path: str, error: OSError) -> str:
    if error.errno in (errno.ENOENT, errno.ENOTDIR):
        return f"{shown(path)} does not exist on the server's host: check the path"
    if error.errno == errno.ELOOP:
        return f"{shown(path)} is a link that leads to itself: name the file itself"
    return f"{shown(path)} can't be reached: {os.strerror(error.errno or 0)}"


def _kind(mode: int) -> str:
    kinds = {
        stat.S_IFDIR: "a folder",
        stat.S_IFIFO: "a FIFO",
        stat.S_IFSOCK: "a socket",
        stat.S_IFBLK: "a block device",
        stat.S_IFCHR: "a character device",
        stat.S_IFLNK: "a link",
    }
    return kinds.get(stat.S_IFMT(mode), "no regular file")
