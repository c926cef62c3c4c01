# Made of client/forkpoint/_async/_calls.py by tools/unasync_client.py: never edit.
"""How calls are made: deadlines, errors, and one bounded wait for a server that went away."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Generic, TypeVar

import grpc
from grpc import UnaryUnaryMultiCallable

from forkpoint import _status, durations
from forkpoint._seam import blocking as seam
from forkpoint.errors import (
    ConnectionLost,
    DeadlineExceeded,
    ForkpointError,
    ServerDraining,
    Unavailable,
)
from forkpoint.target import Target
from forkpoint.v1.sandbox_service_pb2_grpc import SandboxServiceStub
from forkpoint.v1.server_service_pb2_grpc import ServerServiceStub
from forkpoint.v1.snapshot_service_pb2_grpc import SnapshotServiceStub

Q = TypeVar("Q")
R = TypeVar("R")
M = TypeVar("M")

_FIRST_PAUSE_SECONDS = 0.05
_LONGEST_PAUSE_SECONDS = 1.0


class Patience:
    """How long a server that went away is still waited for; each good message renews it."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._until: float | None = None
        self._pause = _FIRST_PAUSE_SECONDS

    def renew(self) -> None:
        """The server is there."""
        self._until = None
        self._pause = _FIRST_PAUSE_SECONDS

    def wait(self) -> bool:
        """Waits before the next try; False when the time is over."""
        now = time.monotonic()
        if self._until is None:
            self._until = now + self._seconds
        if now >= self._until:
            return False
        seam.sleep(min(self._pause, self._until - now))
        self._pause = min(2 * self._pause, _LONGEST_PAUSE_SECONDS)
        return True


class Calls:
    """One connection to one server, and the manners of all calls on it."""

    def __init__(self, target: Target, *, timeout: float, reconnect: float) -> None:
        self.target = target
        self.timeout = timeout
        """Deadline of a call that isn't a stream, in seconds."""
        self._reconnect = reconnect
        self._reached = False
        self._channel = seam.open_channel(target.for_grpc())
        self._closed = False
        self.sandboxes = SandboxServiceStub(self._channel)
        self.snapshots = SnapshotServiceStub(self._channel)
        self.server = ServerServiceStub(self._channel)

    def close(self) -> None:
        """Ends the connection and what still runs on it. Idempotent."""
        if not self._closed:
            self._closed = True
            self._channel.close()
            self.target.close()

    def patience(self) -> Patience:
        """For a new call: none for a server that was never there, else the bounded wait."""
        return Patience(self._reconnect if self._reached else 0.0)

    def reached(self) -> None:
        """Notes that the server answered."""
        self._reached = True

    def check_open(self) -> None:
        """RuntimeError after `close`."""
        if self._closed:
            raise RuntimeError("this client is closed: use it inside its `with` block")

    def unary(
        self,
        method: UnaryUnaryMultiCallable[Q, R],
        request: Q,
        *,
        timeout: durations.Duration | None = None,
        repeatable: bool = True,
    ) -> R:
        """One request, one response.

        `repeatable`: whether the call may be sent again after the connection broke, as it has a
        request_id or changes nothing when done twice.
        """
        self.check_open()
        seconds = self.timeout if timeout is None else durations.parse(timeout).total_seconds()
        patience = self.patience()
        while True:
            try:
                response = method(request, timeout=seconds)
            except grpc.RpcError as raw:
                error = _status.from_call(raw)
                if not (repeatable and gone(error) and patience.wait()):
                    raise self.explain(error, seconds) from raw
                continue
            self._reached = True
            return response

    def explain(self, error: ForkpointError, seconds: float | None = None) -> ForkpointError:
        """The error to raise: what gRPC says of a connection, in words that help."""
        if error.reason is None and isinstance(error, Unavailable):
            if not self._reached:
                return seam.to_thread(self.target.explain, error.message)
            return ConnectionLost(
                f"the connection to {self.target} is lost and the server did not come back"
                f" ({error.message})"
            )
        if error.reason is None and isinstance(error, DeadlineExceeded) and seconds is not None:
            return DeadlineExceeded(f"{self.target} did not answer within {seconds:g} s")
        return error


def gone(error: ForkpointError) -> bool:
    """Whether the server itself is away, so that the same call may find it again later."""
    if isinstance(error, ServerDraining):
        return True
    return isinstance(error, Unavailable) and error.reason is None


class Follower(Generic[M]):
    """Follows one resource by its state-carrying stream, across lost connections.

    Each message is whole, so the next attachment only needs to be told what was seen last. One
    that was lost before its first message is begun again: its request_id makes that safe.
    """

    def __init__(
        self,
        calls: Calls,
        start: Callable[[float | None], seam.Stream[M]],
        again: Callable[[M, float | None], seam.Stream[M]],
        over: Callable[[M], bool],
        *,
        timeout: durations.Duration | None = None,
    ) -> None:
        self._calls = calls
        self._start = start
        self._again = again
        self._over = over
        self._seconds = None if timeout is None else durations.parse(timeout).total_seconds()
        self._deadline: float | None = None
        self._patience: Patience | None = None
        self._call: seam.Stream[M] | None = None
        self._responses: Iterator[M] | None = None
        self._turn = seam.Lock()
        self.last: M | None = None
        """The newest message."""

    @property
    def ended(self) -> bool:
        """Whether the newest message is the last one."""
        return self.last is not None and self._over(self.last)

    def start(self) -> None:
        """Sends the request now, rather than with the first `next`. Idempotent."""
        self._calls.check_open()
        if self._seconds is not None and self._deadline is None:
            self._deadline = time.monotonic() + self._seconds
        if self._patience is None:
            self._patience = self._calls.patience()
        if self._call is None:
            left = None
            if self._deadline is not None:
                left = max(0.0, self._deadline - time.monotonic())
            self._call = self._start(left) if self.last is None else self._again(self.last, left)
            self._responses = self._call.__iter__()

    def next(self) -> M | None:
        """The next message; None after the last one."""
        with self._turn:
            while not self.ended:
                self.start()
                assert self._responses is not None and self._patience is not None
                try:
                    message = self._responses.__next__()
                except StopIteration:
                    self._drop()
                    error: ForkpointError = ConnectionLost(
                        f"{self._calls.target} ended the stream before the work was over"
                    )
                    cause: BaseException | None = None
                except grpc.RpcError as raw:
                    self._drop()
                    error, cause = _status.from_call(raw), raw
                except BaseException:
                    self._drop()  # the caller gave up waiting: the call is of no use any more
                    raise
                else:
                    self._calls.reached()
                    self._patience = self._calls.patience()
                    self.last = message
                    return message
                if gone(error) and self._patience.wait():
                    continue
                if error.reason is None and isinstance(error, DeadlineExceeded):
                    error = DeadlineExceeded(
                        f"not over within {self._seconds:g} s; it goes on in the server"
                    )
                raise self._calls.explain(error) from cause
            self._drop()
            return None

    def _drop(self) -> None:
        """Lets the call go; the work it follows belongs to the server and goes on."""
        if self._call is not None:
            self._call.cancel()
        self._call = self._responses = None

    def close(self) -> None:
        """Stops following. Idempotent; `next` attaches again."""
        self._drop()
