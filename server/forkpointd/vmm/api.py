"""Firecracker's HTTP API over its Unix socket, synchronously, for threads.

Only what Firecracker's small server speaks (micro_http): requests with Content-Length, answers in
the order of the requests, no chunks, no continuation lines. An answer that is anything else is an
error here and never guessed at. Every request may take a time limit; the end of the process shows
as the end of the stream.

This module knows sockets and bytes, but no process and no snapshot.
"""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

SOCKET_NAME = "api.sock"
"""Of the API's socket in a sandbox's folder."""

MAX_HEAD_BYTES = 8 * 1024
MAX_BODY_BYTES = 1024 * 1024
RECEIVE_BYTES = 64 * 1024
CONNECT_RETRY_SECONDS = 0.0003


class VmmError(Exception):
    """The VMM did not do what it was asked to."""


class VmmFault(VmmError):
    """The VMM answered, and refused."""

    def __init__(self, status: int, fault_message: str) -> None:
        super().__init__(f"{fault_message} (status {status})" if status else fault_message)
        self.status = status
        """HTTP status; 0 where the answer was not HTTP as Firecracker speaks it."""
        self.fault_message = fault_message
        """The VMM's own words."""


class VmmGone(VmmError):
    """The VMM's process has ended, or nobody listens at its socket."""


@dataclass(frozen=True, slots=True)
class ApiRequest:
    """One request, for example `PUT /machine-config`."""

    method: str
    path: str
    body: Mapping[str, Any] | None = None

    def encode(self) -> bytes:
        """Its bytes, with no header that Firecracker can do without: a window's must be few."""
        head = f"{self.method} {self.path} HTTP/1.1\r\n"
        if self.body is None:
            return f"{head}\r\n".encode("ascii")
        body = json.dumps(self.body, separators=(",", ":"), ensure_ascii=False).encode()
        return f"{head}Content-Length: {len(body)}\r\n\r\n".encode("ascii") + body


@dataclass(frozen=True, slots=True)
class ApiReply:
    """One answer."""

    status: int
    body: bytes = field(default=b"", repr=False)

    @property
    def ok(self) -> bool:
        """Whether the request was done."""
        return 200 <= self.status < 300

    @property
    def fault_message(self) -> str:
        """The VMM's own words where it refused, else empty."""
        if self.ok:
            return ""
        try:
            message = json.loads(self.body)["fault_message"]
        except (ValueError, TypeError, KeyError):
            message = self.body.decode(errors="replace").strip()
        return str(message) or f"status {self.status} without a word"

    def value(self) -> Any:
        """The decoded body, None where there is none. Raises VmmFault where it was refused."""
        if not self.ok:
            raise VmmFault(self.status, self.fault_message)
        if not self.body:
            return None
        try:
            return json.loads(self.body)
        except ValueError as error:
            raise VmmFault(0, f"its answer is not JSON: {self.body[:80]!r}") from error


class ReplyParser:
    """Turns received bytes into replies; holds what is not complete yet."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    def feed(self, data: bytes) -> list[ApiReply]:
        """The replies that `data` completes. Raises VmmFault(0) for what is not HTTP."""
        self._buffer += data
        replies = []
        while (reply := self._next()) is not None:
            replies.append(reply)
        return replies

    @property
    def pending_bytes(self) -> int:
        """How much of an incomplete reply is here."""
        return len(self._buffer)

    def _next(self) -> ApiReply | None:
        end = self._buffer.find(b"\r\n\r\n")
        if end < 0:
            if len(self._buffer) > MAX_HEAD_BYTES:
                raise VmmFault(0, f"its answer's head is over {MAX_HEAD_BYTES} bytes")
            return None
        status, body_bytes = _parse_head(bytes(self._buffer[:end]))
        start = end + 4
        if len(self._buffer) < start + body_bytes:
            return None
        body = bytes(self._buffer[start : start + body_bytes])
        del self._buffer[: start + body_bytes]
        return ApiReply(status, body)


def _parse_head(head: bytes) -> tuple[int, int]:
    """Status and length of the body."""
    try:
        first, *lines = head.decode("ascii").split("\r\n")
        version, status, *_ = first.split(" ", 2)
        if version not in ("HTTP/1.1", "HTTP/1.0") or len(status) != 3:
            raise ValueError(first)
        body_bytes = 0
        for line in lines:
            name, colon, value = line.partition(":")
            if not colon:
                raise ValueError(line)
            name = name.strip().lower()
            if name == "transfer-encoding":
                raise ValueError(line)
            if name == "content-length":
                body_bytes = int(value)
        code = int(status)
    except ValueError as error:
        raise VmmFault(0, f"its answer is not HTTP as it should be: {head[:80]!r}") from error
    if not 0 <= body_bytes <= MAX_BODY_BYTES:
        raise VmmFault(0, f"its answer claims a body of {body_bytes} bytes")
    return code, body_bytes


class ApiConnection:
    """One connection, used by one thread at a time. `abort` alone may be called from any."""

    def __init__(self, connected: socket.socket) -> None:
        self._socket = connected
        self._parser = ReplyParser()
        self._replies: list[ApiReply] = []
        self.received_ns = 0
        """When bytes last came, by `time.monotonic_ns`: before they were looked at."""

    @classmethod
    def open(cls, folder: Path, timeout: float) -> ApiConnection:
        """Connects to the VMM whose folder this is.

        Raises VmmGone where nobody listens, TimeoutError where nobody accepts within `timeout`
        seconds, other OSErrors where the folder can't be opened.
        """
        deadline = time.monotonic() + timeout
        with FolderSocket(folder) as there:
            while True:
                try:
                    return cls(there.connect())
                except (ConnectionRefusedError, FileNotFoundError) as error:
                    raise VmmGone(f"nobody listens at {folder / SOCKET_NAME}") from error
                except BlockingIOError as error:  # its queue of connections is full
                    if time.monotonic() >= deadline:
                        raise TimeoutError(f"{folder / SOCKET_NAME} takes no connection") from error
                    time.sleep(CONNECT_RETRY_SECONDS)

    def request(
        self,
        method: str,
        path: str,
        body: Mapping[str, Any] | None = None,
        *,
        timeout: float | None = None,
    ) -> Any:
        """One request; returns the decoded body of its answer (None where it has none).

        Raises VmmFault, VmmGone, or TimeoutError after `timeout` seconds; after the last two the
        connection is of no more use.
        """
        return self.pipeline(ApiRequest(method, path, body).encode(), 1, timeout=timeout)[0].value()

    def pipeline(
        self, request_bytes: bytes, n_replies: int, *, timeout: float | None = None
    ) -> list[ApiReply]:
        """Sends encoded requests in one go and waits for all their answers, refusals included.

        Raises VmmGone (with the answers that came before the end), TimeoutError.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        self.send(request_bytes, timeout=timeout)
        return self.receive(n_replies, deadline)

    def send(self, request_bytes: bytes, *, timeout: float | None = None) -> None:
        """Sends encoded requests. A connection that the VMM has closed is not told here but by
        `receive`, after what the VMM said before (503 where it has too many connections)."""
        self._socket.settimeout(timeout)
        with suppress(BrokenPipeError, ConnectionResetError):
            self._socket.sendall(request_bytes)

    def receive(self, n_replies: int, deadline: float | None = None) -> list[ApiReply]:
        """Waits for answers to what was sent; `deadline` is an instant of `time.monotonic`."""
        while len(self._replies) < n_replies:
            if deadline is not None:
                self._socket.settimeout(max(deadline - time.monotonic(), 0.000_001))
            try:
                data = self._socket.recv(RECEIVE_BYTES)
            except ConnectionResetError:
                data = b""
            except BlockingIOError as error:
                raise TimeoutError("no answer in time") from error
            self.received_ns = time.monotonic_ns()
            if not data:
                raise GoneAfter(self._replies, "it closed the connection before it answered")
            self._replies += self._parser.feed(data)
        replies, self._replies = self._replies[:n_replies], self._replies[n_replies:]
        return replies

    def abort(self) -> None:
        """Ends the connection under a thread that waits on it; that thread sees VmmGone.

        What a stopped Firecracker had not read yet is then never executed.
        """
        try:
            self._socket.shutdown(socket.SHUT_RDWR)
        except OSError:  # closed already, by either side
            return

    def fileno(self) -> int:
        """Its descriptor, for a process that is to have the connection in this one's place."""
        return self._socket.fileno()

    def close(self) -> None:
        """Closes the connection."""
        self._socket.close()

    def __enter__(self) -> ApiConnection:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


class GoneAfter(VmmGone):
    """The end came after some answers."""

    def __init__(self, replies: list[ApiReply], message: str) -> None:
        super().__init__(message)
        self.replies = replies


class FolderSocket:
    """The socket in a folder whose path may be longer than a socket's name can be.

    A socket's path ends at 107 bytes (unix(7)); through a descriptor of its folder any is reached.
    """

    def __init__(self, folder: Path) -> None:
        self._fd = os.open(folder, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        self._address = f"/proc/self/fd/{self._fd}/{SOCKET_NAME}"

    def connect(self) -> socket.socket:
        """A blocking, connected socket. Raises what connect(2) does: FileNotFoundError and
        ConnectionRefusedError where nobody listens (yet), BlockingIOError where too many wait."""
        connected = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        try:
            connected.setblocking(False)
            connected.connect(self._address)
            connected.setblocking(True)
        except BaseException:
            connected.close()
            raise
        return connected

    def __enter__(self) -> FolderSocket:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        os.close(self._fd)
