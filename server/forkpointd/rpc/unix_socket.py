"""The Unix socket: where it may be bound, who may reach it, and whose it is.

0600 in a folder that is made 0700. A folder of any depth works: an address ends at 107 bytes, so a
longer path is reached through a descriptor of its folder. A socket on which a server answers is
never taken over, one that nobody listens on is replaced, and what is no socket is left alone. A
lock beside the socket, held as long as the server runs, decides between two that start at once.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import socket
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from urllib.parse import quote

logger = logging.getLogger(__name__)

MAX_ADDRESS_BYTES = 107
"""sun_path without its NUL (unix(7))."""
CONNECT_SECONDS = 1.0


class ListenError(Exception):
    """The server can't listen where it was told to; the message says why and what to do."""


class UnixSocket:
    """One listening address, from its check to its end: `prepare`, `bind`, `release`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._folder = -1
        self._lock = -1
        self._identity: tuple[int, int] | None = None

    @classmethod
    def parse(cls, listen: str) -> UnixSocket:
        """The socket of `unix:PATH` or `unix:///PATH`. `ListenError` for anything else."""
        scheme, _, rest = listen.partition(":")
        if scheme != "unix":
            raise ListenError(
                f"can't listen at {listen!r}: this version serves Unix sockets only, since TCP "
                "without TLS would hand the host to whoever reaches the port; use unix:PATH "
                "(and ssh -L to reach it from elsewhere)"
            )
        path = rest.removeprefix("//")
        if not path or path.endswith("/") or "\0" in path:
            raise ListenError(f"can't listen at {listen!r}: give a socket as unix:PATH")
        return cls(Path(os.path.abspath(path)))

    def prepare(self) -> None:
        """Makes the folder, takes the lock and clears the way. Blocks; raises `ListenError`."""
        with self._telling():
            self.path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._folder = os.open(self.path.parent, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
            self._warn_of_open_folder()
            if len(os.fsencode(self._reachable())) > MAX_ADDRESS_BYTES:
                raise ListenError(
                    f"can't listen at {self.path}: the name {self.path.name} is too long "
                    "for a socket"
                )
            self._take_lock()
            self._clear_the_way(self._reachable())

    def bind(self, add_port: Callable[[str], int]) -> None:
        """Binds, after `prepare`, by `add_port`, which takes gRPC's address.

        Raises `ListenError`. The umask is the whole process's: nothing else may make files in the
        meantime that others are meant to read.
        """
        address = self._reachable()
        with self._telling():
            before = os.umask(0o077)
            try:
                add_port(f"unix:{quote(str(address))}")
            except RuntimeError as error:
                raise ListenError(f"can't listen at {self.path}: {error}") from error
            finally:
                os.umask(before)
            self._identity = _identity(address)
            os.chmod(address, 0o600)

    def release(self) -> None:
        """Removes the socket, if it is still ours, and the lock. Idempotent."""
        if self._identity is not None and _identity(self._reachable()) == self._identity:
            os.unlink(self._reachable())  # gRPC does so too, but not when its start failed
        self._identity = None
        if self._lock >= 0:
            with suppress(FileNotFoundError):
                os.unlink(self._lock_path())
            os.close(self._lock)
            self._lock = -1
        if self._folder >= 0:
            os.close(self._folder)
            self._folder = -1

    @contextmanager
    def _telling(self) -> Iterator[None]:
        """Turns what the system says into words for the operator."""
        try:
            yield
        except (FileExistsError, NotADirectoryError) as error:
            raise ListenError(
                f"can't listen at {self.path}: {error.filename} is a file where a folder should "
                "be; move it away or listen elsewhere"
            ) from error
        except OSError as error:
            where = f" ({error.filename})" if error.filename else ""
            words = os.strerror(error.errno) if error.errno else str(error)
            raise ListenError(
                f"can't listen at {self.path}: {words}{where}; put that right or listen elsewhere"
            ) from error

    def _reachable(self) -> Path:
        """A path of the socket that is short enough for its address."""
        if len(os.fsencode(self.path)) <= MAX_ADDRESS_BYTES:
            return self.path
        return Path(f"/proc/self/fd/{self._folder}/{self.path.name}")

    def _lock_path(self) -> Path:
        return self.path.with_name(f"{self.path.name}.lock")

    def _take_lock(self) -> None:
        while True:
            flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
            lock = os.open(self._lock_path(), flags, 0o600)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                os.close(lock)
                raise self._in_use() from None
            except BaseException:
                os.close(lock)
                raise
            held = os.fstat(lock)
            if _identity(self._lock_path()) == (held.st_dev, held.st_ino):
                self._lock = lock
                return
            os.close(lock)  # its holder has just removed it: lock the file that is there now

    def _clear_the_way(self, address: Path) -> None:
        try:
            mode = os.lstat(address).st_mode
        except FileNotFoundError:
            return
        if not stat.S_ISSOCK(mode):
            raise ListenError(
                f"can't listen at {self.path}: there is a file that is no socket; "
                "move it away or listen elsewhere"
            )
        if _answers(address):
            raise self._in_use()
        logger.info("replacing %s, on which nobody listens", self.path)
        os.unlink(address)

    def _in_use(self) -> ListenError:
        return ListenError(
            f"can't listen at {self.path}: another server is there; "
            "stop it first, or listen elsewhere"
        )

    def _warn_of_open_folder(self) -> None:
        mode = os.stat(self.path.parent).st_mode
        if mode & (stat.S_IWGRP | stat.S_IWOTH) and not mode & stat.S_ISVTX:
            logger.warning(
                "others may write to %s, and so put a socket of their own in the place of ours; "
                "chmod 700 it",
                self.path.parent,
            )


def _identity(path: Path) -> tuple[int, int] | None:
    try:
        found = os.lstat(path)
    except FileNotFoundError:
        return None
    return found.st_dev, found.st_ino


def _answers(address: Path) -> bool:
    """Whether anyone listens. A full queue of connections is someone, too."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(CONNECT_SECONDS)
        try:
            probe.connect(os.fspath(address))
        except OSError as error:
            return error.errno not in (errno.ECONNREFUSED, errno.ENOENT)
    return True
