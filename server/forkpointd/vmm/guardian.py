"""The guardian: a process of its own that runs one pause window in which drives are cloned.

Such a window can't be one write, since a clone comes between Firecracker's create and its resume.
So that the source runs again whatever becomes of the server, the requests are not the server's but
this process's: it has a session of its own, the open connection to Firecracker and the open files,
and resumes the source at once when the server's end of its pipe closes. It is started, and has said
that it is ready, before the source's dirty base is PENDING (`guarded.py`).

    python -I -S guardian.py SPECIFICATION      by path: it imports the standard library only

Standard input: one byte begins the window; its end says that the server is gone. Standard output: a
JSON object a line for each step, and an empty line now and then as a sign of life.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import select
import signal
import socket
import sys
import threading
import time
from typing import Any

FICLONE = 0x40049409
"""_IOW(0x94, 9, int): include/uapi/linux/fs.h."""
NO_REFLINK = frozenset(
    {errno.EOPNOTSUPP, errno.EINVAL, errno.EXDEV, errno.ENOTTY, errno.ENOSYS, errno.EPERM}
)
NO_COPY_FILE_RANGE = frozenset(
    {errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EPERM}
)
CHUNK_BYTES = 4 * 1024 * 1024
BEAT_SECONDS = 0.25
RECEIVE_BYTES = 64 * 1024
COMMANDS, REPORTS = 0, 1
"""Descriptors: standard input and output."""


class ServerGoneError(Exception):
    """The server's end of the pipe is closed: nothing but the resume is left to do."""


class VmmGoneError(Exception):
    """Firecracker closed the connection: it has ended."""


class Guardian:
    """One window."""

    def __init__(self, specification: dict[str, Any]) -> None:
        self._specification = specification
        self._api = socket.socket(fileno=specification["api"])
        self._api.setblocking(False)
        self._buffer = bytearray()
        self._awaited: list[str] = []
        self._server_gone = False
        self._stop_copies = False
        os.set_blocking(REPORTS, False)

    def run(self) -> None:
        """Waits for the word, and runs the window."""
        self._report(step="ready")
        if os.read(COMMANDS, 1):
            try:
                self._window()
            except VmmGoneError:
                self._report(step="gone")
            self._report(step="end")

    def _window(self) -> None:
        specification = self._specification
        self._report(step="start")
        try:
            if specification["pause"] is not None:
                self._ask("pause", specification["pause"])
            if self._ask("create", specification["create"]):
                self._clone_drives()
        except ServerGoneError:
            self._server_gone = True
        except VmmGoneError:
            raise
        except Exception as error:  # noqa: BLE001 - whatever it was, the source is resumed
            self._report(step="failed", error=repr(error))
        finally:
            self._stop_copies = True
            if specification["resume"] is not None:
                self._resume()

    # --- Firecracker ---

    def _ask(self, step: str, request: str) -> bool:
        """Sends a request and waits for its answer; whether it was done."""
        self._send(step, request)
        done = False
        while self._awaited:
            self._wait(self._api.fileno())
            done = self._receive()
        return done

    def _resume(self) -> None:
        """Sends the resume behind what Firecracker has still to answer, and waits for all of it:
        nobody but Firecracker can keep this from its end now."""
        self._send("resume", self._specification["resume"])
        while self._awaited:
            try:
                self._wait(self._api.fileno())
            except ServerGoneError:
                self._server_gone = True
            self._receive()

    def _send(self, step: str, request: str) -> None:
        self._awaited.append(step)
        left = memoryview(request.encode("latin-1"))
        while left:
            try:
                left = left[self._api.send(left) :]
            except BlockingIOError:
                select.select([], [self._api], [])
            except (BrokenPipeError, ConnectionResetError):
                return  # what it said before is read first

    def _receive(self) -> bool:
        """Takes what has come; whether the last complete answer says that it was done."""
        try:
            data = self._api.recv(RECEIVE_BYTES)
        except BlockingIOError:
            return False
        except ConnectionResetError:
            data = b""
        at = time.monotonic_ns()
        if not data:
            raise VmmGoneError
        self._buffer += data
        done = False
        while self._awaited and (reply := _take_reply(self._buffer)) is not None:
            status, body = reply
            done = 200 <= status < 300
            self._report(step=self._awaited.pop(0), at=at, status=status, body=body)
        return done

    # --- drives ---

    def _clone_drives(self) -> None:
        """Clones all drives in a thread, and watches the server's end meanwhile. A clone that takes
        too long, or never ends, is left alone: the source is resumed all the same."""
        drives = self._specification["drives"]
        begin = time.monotonic()
        fault: list[str] = []
        copied: list[str] = []
        done, end = os.pipe()

        def work() -> None:
            try:
                for drive_id, source, target in drives:
                    try:
                        if not self._clone(source, target):
                            copied.append(drive_id)
                    except OSError as error:
                        fault.append(f"drive {drive_id}: {error.strerror or error}")
                        return
            except BaseException as error:  # noqa: BLE001 - it is told, and the window goes on
                fault.append(repr(error))
            finally:
                os.write(end, b".")

        threading.Thread(target=work, daemon=True).start()
        limit = self._specification["clone_seconds"]
        if not self._wait(done, begin + limit):
            fault.append(f"the clone was not done within {limit:g} s")
        self._report(
            step="clone",
            us=int((time.monotonic() - begin) * 1e6),
            fault="; ".join(fault),
            copied=copied,
        )

    def _clone(self, source: int, target: int) -> bool:
        """Makes one file equal to another; whether by reflink."""
        try:
            fcntl.ioctl(target, FICLONE, source)
        except OSError as error:
            if error.errno not in NO_REFLINK or not self._specification["allow_copy"]:
                raise
        else:
            return True
        size_bytes = os.fstat(source).st_size
        os.ftruncate(target, size_bytes)
        at = 0
        while at < size_bytes:
            try:
                start = os.lseek(source, at, os.SEEK_DATA)
            except OSError as error:
                if error.errno == errno.ENXIO:  # nothing but a hole is left
                    break
                raise
            at = os.lseek(source, start, os.SEEK_HOLE)
            self._copy(source, target, start, at)
        return False

    def _copy(self, source: int, target: int, start: int, end: int) -> None:
        by_kernel = True
        while start < end:
            if self._stop_copies:
                raise OSError(errno.ECANCELED, "the copy was given up")
            count = min(CHUNK_BYTES, end - start)
            if by_kernel:
                try:
                    done = os.copy_file_range(source, target, count, start, start)
                except OSError as error:
                    if error.errno not in NO_COPY_FILE_RANGE:
                        raise
                    by_kernel = False
                    continue
            else:
                done = os.pwrite(target, os.pread(source, count, start), start)
            if not done:
                raise OSError(errno.EIO, "the file was cut under the copy")
            start += done

    # --- the server ---

    def _wait(self, fd: int, until: float | None = None) -> bool:
        """Waits until there is something to read; False once it is past `until`. Raises
        ServerGoneError, the first time that it is seen."""
        poll = select.poll()
        poll.register(fd, select.POLLIN)
        if not self._server_gone:
            poll.register(COMMANDS, select.POLLIN)
        while True:
            seconds = BEAT_SECONDS if until is None else min(BEAT_SECONDS, until - time.monotonic())
            ready = dict(poll.poll(max(0.0, seconds) * 1000))
            if COMMANDS in ready and not os.read(COMMANDS, 16):
                raise ServerGoneError
            if fd in ready:
                return True
            if until is not None and time.monotonic() >= until:
                return False
            self._write(b"\n")

    def _report(self, **facts: Any) -> None:
        facts.setdefault("at", time.monotonic_ns())
        self._write(json.dumps(facts).encode() + b"\n")

    def _write(self, line: bytes) -> None:
        """Tells the server, if there is one that listens: it may not hold this process up."""
        try:
            os.write(REPORTS, line)
        except (BlockingIOError, BrokenPipeError):
            return


def _take_reply(buffer: bytearray) -> tuple[int, str] | None:
    """Status and body of the first complete answer, which is taken out. Raises ValueError for what
    is not HTTP."""
    end = buffer.find(b"\r\n\r\n")
    if end < 0:
        return None
    first, *lines = bytes(buffer[:end]).split(b"\r\n")
    length = 0
    for line in lines:
        name, _, value = line.partition(b":")
        if name.strip().lower() == b"content-length":
            length = int(value)
    if len(buffer) < end + 4 + length:
        return None
    body = bytes(buffer[end + 4 : end + 4 + length])
    del buffer[: end + 4 + length]
    return int(first.split(b" ")[1]), body.decode("latin-1")


def main() -> None:
    """Runs one window, and leaves without a wait for a clone that hangs."""
    for each in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(each, signal.SIG_IGN)
    try:
        Guardian(json.loads(sys.argv[1])).run()
    finally:
        os._exit(0)


if __name__ == "__main__":
    main()
