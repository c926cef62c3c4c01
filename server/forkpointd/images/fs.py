"""The steps on folders that the store takes, one method each: a test replaces the object to see
their order, to fail any of them, or to cut the power between two."""

from __future__ import annotations

import os
from pathlib import Path

from forkpointd.images import syscalls


class Fs:
    """The real file system. Everything raises OSError with the path."""

    def mkdir(self, path: Path) -> None:
        """A new folder, private to this user."""
        path.mkdir(mode=0o700)

    def write_new(self, path: Path, content: bytes) -> None:
        """A new file, private to this user; not synced."""
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            left = memoryview(content)
            offset = 0
            while left:
                done = syscalls.pwrite(fd, left, offset)
                left, offset = left[done:], offset + done
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(path)) from error
        finally:
            os.close(fd)

    def chmod(self, path: Path, mode: int) -> None:
        """Sets the permissions of a file."""
        path.chmod(mode, follow_symlinks=True)

    def fsync_file(self, path: Path) -> None:
        """Makes a file's contents and size durable, but not its name."""
        _sync(path, os.O_RDONLY)

    def fsync_folder(self, path: Path) -> None:
        """Makes the names in a folder durable."""
        _sync(path, os.O_RDONLY | os.O_DIRECTORY)

    def rename(self, old: Path, new: Path) -> None:
        """Renames within one file system."""
        old.rename(new)

    def unlink(self, path: Path) -> None:
        """Removes a name, if it is there."""
        path.unlink(missing_ok=True)

    def rmdir(self, path: Path) -> None:
        """Removes an empty folder."""
        path.rmdir()


def _sync(path: Path, flags: int) -> None:
    fd = os.open(path, flags | os.O_CLOEXEC | os.O_NOFOLLOW)
    try:
        syscalls.fsync(fd)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error
    finally:
        os.close(fd)
