"""The data folder: its lock, its parts, and its twin on tmpfs.

    DIR/lock              held by the one server that works here
    DIR/id                a random name, so that two data folders never share a staging folder
    DIR/forkpoint.db      the registry
    DIR/sandboxes/<id>/   a sandbox: sockets, console, links; the working folder of its Firecracker
    DIR/spare/            folders of deleted sandboxes, emptied, for the next ones
    DIR/snapshots/<id>/   a snapshot (images.store)
    DIR/staging/          windows that are staged on disk
    TMPFS/forkpoint-<id>/ windows that are staged in memory
    TMPFS/forkpoint-<id>.images/  snapshots that are kept in memory (images.store)

In each sandbox's folder `t` and `d` are links to the two staging folders: all paths in a window's
requests are short names relative to the folder (step 5).
"""

from __future__ import annotations

import fcntl
import os
import re
import secrets
import struct
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from forkpointd.model import StagingKind

STAGING_LINKS = {StagingKind.TMPFS: "t", StagingKind.DISK: "d"}
"""Names, in a sandbox's folder, of the links to the staging folders."""


_FS_IOC_GETFLAGS, _FS_IOC_SETFLAGS = 0x80086601, 0x40086602
_FS_TOPDIR_FL = 0x0002_0000
"""include/uapi/linux/fs.h; ioctl_iflags(2)."""

REGISTRY_NAME = "forkpoint.db"

_IDENTITY = re.compile(r"[0-9a-f]{16}")


class DataDirError(Exception):
    """The data folder can't be used; the message says why and what to do."""


class DataDirLocked(DataDirError):
    """Another server works here."""


@dataclass(frozen=True, slots=True)
class DataDir:
    """Paths of an open (locked) data folder."""

    root: Path
    identity: str
    tmpfs_staging: Path
    memory_images: Path
    lock_fd: int

    @property
    def registry_path(self) -> Path:
        return self.root / REGISTRY_NAME

    @property
    def sandboxes(self) -> Path:
        return self.root / "sandboxes"

    @property
    def snapshots(self) -> Path:
        return self.root / "snapshots"

    @property
    def disk_staging(self) -> Path:
        return self.root / "staging"

    @property
    def spare_folders(self) -> Path:
        return self.root / "spare"

    def sandbox(self, sandbox_id: str) -> Path:
        """The folder of one sandbox."""
        return self.sandboxes / sandbox_id

    def staging(self, kind: StagingKind) -> Path:
        """The staging folder of one kind."""
        return self.tmpfs_staging if kind is StagingKind.TMPFS else self.disk_staging

    def close(self) -> None:
        """Gives the folder free for another server. Empty folders on tmpfs go: memory keeps nothing
        of a server that left nothing in it."""
        for folder in (self.tmpfs_staging, self.memory_images):
            with suppress(OSError):
                folder.rmdir()
        os.close(self.lock_fd)


def open_data_dir(root: Path, staging_dir: Path, memory_images_dir: Path | None = None) -> DataDir:
    """Makes what is missing, private to this user, and takes the lock. Without `memory_images_dir`
    images are kept in memory beside the staging folder.

    The lock is a `flock`, which the kernel gives free with the process, so a crash leaves nothing
    to be cleaned up. Raises `DataDirLocked` or `DataDirError`.
    """
    try:
        for folder in (root, root / "sandboxes", root / "snapshots", root / "staging"):
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        lock_fd = os.open(root / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except (FileExistsError, NotADirectoryError) as error:
        raise DataDirError(
            f"{error.filename} is a file where a folder should be: move it away or choose another "
            "--data-dir"
        ) from error
    except IsADirectoryError as error:
        raise _not_a_file(error) from error
    except PermissionError as error:
        raise DataDirError(
            f"no permission for {error.filename}: choose a --data-dir that this user may write"
        ) from error
    except OSError as error:
        raise DataDirError(f"can't use {root} as data folder: {error}") from error
    try:
        fcntl.flock(lock_fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(lock_fd)
        raise DataDirLocked(
            f"another forkpointd works in {root}: stop it, or choose another --data-dir"
        ) from error
    spread(root / "sandboxes")
    try:
        identity = _identity(root)
        tmpfs_staging = staging_dir / f"forkpoint-{identity}"
        memory_images = (memory_images_dir or staging_dir) / f"forkpoint-{identity}.images"
        for folder in (tmpfs_staging, memory_images):
            with suppress(OSError):  # the host's checks say what is wrong with where it lies
                folder.mkdir(mode=0o700, exist_ok=True)
            if folder.exists() and folder.stat().st_uid != os.geteuid():
                raise DataDirError(f"{folder} belongs to another user: remove it")
    except IsADirectoryError as error:
        os.close(lock_fd)
        raise _not_a_file(error) from error
    except OSError as error:
        os.close(lock_fd)
        raise DataDirError(f"can't prepare {root}: {error}") from error
    except DataDirError:
        os.close(lock_fd)
        raise
    return DataDir(root, identity, tmpfs_staging, memory_images, lock_fd)


def spread(folder: Path) -> bool:
    """Asks the file system to put this folder's new sub-folders, and the files in each, far from
    one another (`chattr +T`); False where it knows no such wish, as only ext2 to ext4 do.

    An ext4 without a journal looks at every inode near by that was deleted in the last half minute
    before it takes one (fs/ext4/ialloc.c, `recently_deleted`): with the sandboxes side by side
    that was a quarter of the server's work in a fork after a delete.
    """
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        (flags,) = struct.unpack("i", fcntl.ioctl(fd, _FS_IOC_GETFLAGS, struct.pack("i", 0)))
        fcntl.ioctl(fd, _FS_IOC_SETFLAGS, struct.pack("i", flags | _FS_TOPDIR_FL))
    except OSError:
        return False
    finally:
        os.close(fd)
    return True


def _not_a_file(error: OSError) -> DataDirError:
    return DataDirError(
        f"{error.filename} is a folder where a file should be: move it away or choose another "
        "--data-dir"
    )


def _identity(root: Path) -> str:
    """The random name of this data folder, made once.

    What is no such name (an empty file after a power loss) is replaced: with the power, all that
    was staged under the old one went too.
    """
    path = root / "id"
    with suppress(FileNotFoundError):
        found = path.read_text(encoding="ascii", errors="replace").strip()
        if _IDENTITY.fullmatch(found):
            return found
    identity = secrets.token_hex(8)
    draft = root / ".id"
    with draft.open("w", encoding="ascii") as opened:
        opened.write(identity + "\n")
        opened.flush()
        os.fsync(opened.fileno())
    draft.rename(path)
    return identity
