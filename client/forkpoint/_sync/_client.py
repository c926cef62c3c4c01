# Made of client/forkpoint/_async/_client.py by tools/unasync_client.py: never edit.
"""The client: one connection to one server, and the collections behind it."""

from __future__ import annotations

import os
from types import TracebackType

from forkpoint import durations
from forkpoint._sync._branches import Branches
from forkpoint._sync._calls import Calls
from forkpoint._sync._forks import Forks
from forkpoint._sync._sandboxes import Sandboxes
from forkpoint._sync._server import Server
from forkpoint._sync._snapshots import Snapshots
from forkpoint.target import Target


def connect(
    address: str | os.PathLike[str] | None = None,
    *,
    timeout: durations.Duration = 60,
    reconnect: durations.Duration = 20,
    hello: bool = True,
) -> Client:
    """A client, to be entered: `with forkpoint.sync.connect() as fp: ...`.

    Args:
        address: `unix:/path`, a path, or `host:port`; None: FORKPOINT_ADDRESS, else the socket
            that `forkpointd serve` makes by default.
        timeout: deadline of each call that isn't a stream.
        reconnect: how long a server that was reached once is waited for when it goes away, for
            example since it is restarted. Only calls that are safe to repeat are repeated.
        hello: ask the server for its version when the block is entered, so that a server that
            isn't there is known at once, and one of another version warned of.

    Raises:
        ValueError: the address can't be read.
    """
    return Client(address, timeout=timeout, reconnect=reconnect, hello=hello)


class Client:
    """One connection to one server. Made by `connect`."""

    def __init__(
        self,
        address: str | os.PathLike[str] | None = None,
        *,
        timeout: durations.Duration = 60,
        reconnect: durations.Duration = 20,
        hello: bool = True,
    ) -> None:
        self._target = Target.find(address)
        self._timeout = durations.parse(timeout).total_seconds()
        self._reconnect = durations.parse(reconnect).total_seconds()
        self._hello = hello
        self._opened: Calls | None = None

    def __repr__(self) -> str:
        state = "closed" if self._opened is None else "open"
        return f"<forkpoint.Client {self._target} {state}>"

    @property
    def address(self) -> str:
        """The server's address."""
        return str(self._target)

    def open(self) -> None:
        """Connects; what entering the block does. Raises `ServerNotFound`."""
        if self._opened is not None:
            return
        self._opened = Calls(self._target, timeout=self._timeout, reconnect=self._reconnect)
        if self._hello:
            try:
                self.server.info()
            except BaseException:
                self.close()
                raise

    def close(self) -> None:
        """Disconnects; what leaving the block does. Idempotent."""
        opened, self._opened = self._opened, None
        if opened is not None:
            opened.close()

    def __enter__(self) -> Client:
        self.open()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    @property
    def _calls(self) -> Calls:
        if self._opened is None:
            raise RuntimeError("this client is not open: use it inside its `with` block")
        return self._opened

    @property
    def sandboxes(self) -> Sandboxes:
        """Sandboxes: create, get, list, update, delete, pause, resume."""
        return Sandboxes(self._calls)

    @property
    def snapshots(self) -> Snapshots:
        """Snapshots: get, list, update, delete."""
        return Snapshots(self._calls)

    @property
    def branches(self) -> Branches:
        """Branches: get, list, watch, cancel. A branch is started by its source."""
        return Branches(self._calls)

    @property
    def forks(self) -> Forks:
        """Forks: get, watch. A fork is started by a sandbox or a snapshot."""
        return Forks(self._calls)

    @property
    def server(self) -> Server:
        """The server itself: its versions, and what its host can do."""
        return Server(self._calls)
