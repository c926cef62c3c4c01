"""The HTTP server: one thread, one epoll, ten connections, as Firecracker's micro_http.

What callers depend on, and why it is built the same way here (micro_http's server.rs and
connection.rs):

- a connection is read 1,024 bytes at a time, and all requests that are complete by then are run,
  in order, before anything is written or read again;
- a hang-up is noticed before what was sent ahead of it is read: the rest is dropped, unread;
- while an answer waits to be written nothing is read from that connection;
- a body needs Content-Length and is at most 51,200 bytes.
"""

from __future__ import annotations

import json
import select
import socket
from collections import deque
from collections.abc import Callable
from typing import Any, Final

BUFFER_BYTES: Final = 1024
MAX_CONNECTIONS: Final = 10
DEFAULT_MAX_BODY_BYTES: Final = 51_200

_METHODS: Final = ("GET", "PUT", "PATCH")
_SERVER: Final = b"Server: Firecracker simulator API\r\n"
_FULL_BODY: Final = b'{ "error": "Too many open connections" }'
_FULL: Final = (
    b"HTTP/1.1 503\r\n" + _SERVER + b"Connection: close\r\n"
    b"Content-Length: %d\r\n\r\n%s" % (len(_FULL_BODY), _FULL_BODY)
)
_CONTINUE: Final = b"HTTP/1.1 100 \r\n" + _SERVER + b"Connection: keep-alive\r\n\r\n"


class Request:
    """One request; `body` is None where there was none."""

    def __init__(self, method: str, path: str) -> None:
        self.method = method
        self.path = path
        self.body: bytes | None = None


class Response:
    """Status, and the body as JSON or as it is."""

    def __init__(self, status: int, body: Any = None) -> None:
        self.status = status
        self.body = body

    def encode(self) -> bytes:
        """The bytes that go over the wire."""
        head = b"HTTP/1.1 %d \r\n" % self.status + _SERVER + b"Connection: keep-alive\r\n"
        if self.body is None:
            return head + b"\r\n"
        text = (
            self.body
            if isinstance(self.body, str)
            else json.dumps(self.body, separators=(",", ":"), ensure_ascii=False)
        ).encode()
        length = b"Content-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(text)
        return head + length + text


class ParseError(Exception):
    """Bytes that are no request; the text is micro_http's."""


class RequestParser:
    """Takes bytes as they come and gives out requests; never more than 1,024 bytes ahead."""

    def __init__(self, max_body_bytes: int) -> None:
        self._max_body_bytes = max_body_bytes
        self._buffer = b""
        self._request: Request | None = None
        self._body_left = 0
        self._content_length = 0
        self._expects = False
        self.continues = False
        """A `100 Continue` is due."""

    @property
    def room(self) -> int:
        """How many bytes it takes at once."""
        return BUFFER_BYTES - len(self._buffer)

    def feed(self, data: bytes) -> list[Request]:
        """All requests that are now complete. Raises ParseError, dropping what it was given."""
        self._buffer += data
        complete: list[Request] = []
        try:
            while self._go_on(complete):
                pass
        except ParseError:
            self._buffer = b""
            raise
        return complete

    def _go_on(self, complete: list[Request]) -> bool:
        """Takes a line or a body from the buffer; False where more bytes are needed for it."""
        if self._request is not None and self._body_left:
            return self._take_body(self._request, complete)
        line, found, rest = self._buffer.partition(b"\r\n")
        if not found:
            if len(self._buffer) >= BUFFER_BYTES:
                raise ParseError(
                    "Invalid request."
                    if self._request is None
                    else "Invalid header. Reason: Header content-length exceeds the limit."
                )
            return False
        self._buffer = rest
        if self._request is None:
            self._request = _request_line(line)
            self._content_length, self._expects = 0, False
        elif line:
            self._header(line)
        else:
            self._end_headers(self._request, complete)
        return True

    def _end_headers(self, request: Request, complete: list[Request]) -> None:
        if not self._content_length:
            self._request = None
            complete.append(request)
            return
        if self._content_length > self._max_body_bytes:
            raise ParseError(
                f"Request payload with size {self._content_length} is larger than the limit of "
                f"{self._max_body_bytes} allowed by server."
            )
        self.continues |= self._expects
        self._body_left, request.body = self._content_length, b""

    def _take_body(self, request: Request, complete: list[Request]) -> bool:
        part, self._buffer = self._buffer[: self._body_left], self._buffer[self._body_left :]
        request.body = (request.body or b"") + part
        self._body_left -= len(part)
        if self._body_left:
            return False
        self._request = None
        complete.append(request)
        return True

    def _header(self, line: bytes) -> None:
        name, found, value = line.decode("utf-8", "replace").partition(":")
        if not found:
            raise ParseError(
                f"Invalid header. Reason: Header is incorrectly formatted. Key: {name}"
            )
        match name.lower().strip(), value.strip():
            case "content-length", digits:
                if not (digits.isascii() and digits.isdigit()) or int(digits) >= 1 << 32:
                    raise ParseError(
                        f"Invalid header. Reason: Invalid value. Key:Content-Length; Value:{value}"
                    )
                self._content_length = int(digits)
            case "expect", "100-continue":
                self._expects = True


def _request_line(line: bytes) -> Request:
    parts = line.split(b" ", 2)
    if len(parts) < 3:
        raise ParseError("Invalid request.")
    method = parts[0].decode("ascii", "replace")
    if method not in _METHODS:
        raise ParseError("Invalid HTTP Method: Unsupported HTTP method.")
    if not parts[1]:
        raise ParseError("Invalid URI: Empty URI not allowed.")
    try:
        uri = parts[1].decode()
    except UnicodeDecodeError as error:
        raise ParseError("Invalid URI: Cannot parse URI as UTF-8.") from error
    if parts[2] not in (b"HTTP/1.0", b"HTTP/1.1"):
        raise ParseError("Invalid HTTP Version: Unsupported HTTP version.")
    if uri.startswith("http://"):
        uri = "/" + uri.removeprefix("http://").partition("/")[2]
    return Request(method, uri if uri.startswith("/") else "")


class _Connection:
    def __init__(self, client: socket.socket, max_body_bytes: int) -> None:
        self.socket = client
        self.parser = RequestParser(max_body_bytes)
        self.closed = False
        self.in_flight = 0
        self.answers: deque[bytes] = deque()


Handler = Callable[[Request], Response | None]


class Server:
    """Listens on a Unix socket and answers by `handler`; None from it is no answer at all."""

    def __init__(self, listener: socket.socket, handler: Handler, max_body_bytes: int) -> None:
        self._listener = listener
        self._handler = handler
        self._max_body_bytes = max_body_bytes
        self._connections: dict[int, _Connection] = {}
        self._woken_by: set[int] = set()
        self._epoll = select.epoll()
        self._epoll.register(listener.fileno(), select.EPOLLIN | select.EPOLLRDHUP)

    def serve_once(self, timeout_s: float | None) -> None:
        """Waits for something to happen and does what it asks for."""
        batch: list[tuple[_Connection, Request]] = []
        for fd, events in self._epoll.poll(timeout_s, MAX_CONNECTIONS + 2):
            if fd == self._listener.fileno():
                self._accept()
                continue
            if fd in self._woken_by:
                continue
            connection = self._connections[fd]
            if events & (select.EPOLLERR | select.EPOLLHUP | select.EPOLLRDHUP):
                connection.closed = True
                connection.answers.clear()
            elif events & select.EPOLLIN:
                batch += [(connection, request) for request in self._read(connection)]
            elif events & select.EPOLLOUT:
                self._write(connection)
        self._drop_dead()
        for connection, request in batch:
            response = self._handler(request)
            connection.in_flight -= 1
            if response is not None and not connection.closed:
                self._answer(connection, response.encode())

    def wake_by(self, fd: int) -> None:
        """Lets `serve_once` return, too, when this descriptor becomes readable."""
        self._woken_by.add(fd)
        self._epoll.register(fd, select.EPOLLIN | select.EPOLLONESHOT)

    def flush(self) -> None:
        """Writes what answers there are; for just before the end."""
        for connection in self._connections.values():
            while connection.answers and not connection.closed:
                self._write(connection)

    def _accept(self) -> None:
        client, _ = self._listener.accept()
        if len(self._connections) == MAX_CONNECTIONS:
            with client:
                client.send(_FULL)
            return
        client.setblocking(False)
        self._connections[client.fileno()] = _Connection(client, self._max_body_bytes)
        self._epoll.register(client.fileno(), select.EPOLLIN | select.EPOLLRDHUP)

    def _read(self, connection: _Connection) -> list[Request]:
        try:
            data = connection.socket.recv(connection.parser.room)
        except OSError as error:
            self._answer(connection, Response(500, str(error)).encode())
            return []
        if not data:
            connection.closed = True
            return []
        try:
            requests = connection.parser.feed(data)
        except ParseError as error:
            text = f'{{ "error": "{error}\nAll previous unanswered requests will be dropped." }}'
            self._answer(connection, Response(400, text).encode())
            return []
        if connection.parser.continues:
            connection.parser.continues = False
            self._answer(connection, _CONTINUE)
        connection.in_flight += len(requests)
        return requests

    def _answer(self, connection: _Connection, data: bytes) -> None:
        if not connection.answers:
            self._epoll.modify(connection.socket.fileno(), select.EPOLLOUT | select.EPOLLRDHUP)
        connection.answers.append(data)

    def _write(self, connection: _Connection) -> None:
        """One answer, or what of it the socket takes."""
        data = connection.answers[0]
        try:
            sent = connection.socket.send(data)
        except OSError:  # gone, or so slow that nothing fits: micro_http drops both alike
            connection.closed = True
            connection.answers.clear()
            return
        if sent < len(data):
            connection.answers[0] = data[sent:]
            return
        connection.answers.popleft()
        if not connection.answers:
            self._epoll.modify(connection.socket.fileno(), select.EPOLLIN | select.EPOLLRDHUP)

    def _drop_dead(self) -> None:
        for fd, connection in list(self._connections.items()):
            if connection.closed and not connection.in_flight:
                self._epoll.unregister(fd)
                connection.socket.close()
                del self._connections[fd]
