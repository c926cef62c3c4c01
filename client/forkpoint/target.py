"""Where the server is: an address, and why nobody answers there.

An address is a Unix socket (`unix:/path`, or just a path) or `host:port`. Without one it is the
environment's FORKPOINT_ADDRESS, else the socket that `forkpointd serve` makes by default.
"""

from __future__ import annotations

import os
import socket
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import quote, unquote

from forkpoint.errors import ServerNotFound

ENVIRONMENT = "FORKPOINT_ADDRESS"
_MAX_SOCKET_PATH_BYTES = 107
"""sockaddr_un has 108 bytes, the last of them a zero."""


def default_socket() -> Path:
    """The socket of this user's server, as `forkpointd serve` makes it without being told."""
    runtime = os.environ.get("XDG_RUNTIME_DIR")
    if runtime and os.path.isabs(runtime):
        return Path(runtime, "forkpoint", "forkpoint.sock")
    if os.geteuid() == 0:
        return Path("/run/forkpoint/forkpoint.sock")
    return Path(f"/tmp/forkpoint-{os.geteuid()}/forkpoint.sock")


@dataclass
class Target:
    """One address. Holds a folder open where a socket's path is too long; `close` gives it back."""

    socket_path: Path | None
    """The socket; None for TCP."""
    host_port: str = ""
    _folder_fd: int | None = field(default=None, repr=False)

    @classmethod
    def find(cls, address: str | os.PathLike[str] | None = None) -> Target:
        """The target an address names; ValueError where it names none."""
        if address is None:
            address = os.environ.get(ENVIRONMENT) or default_socket()
        text = os.fspath(address)
        if text.startswith("unix:"):
            path = text.removeprefix("unix:")
            if path.startswith("//"):  # unix:///path
                path = "/" + path.lstrip("/")
            return cls(Path(os.path.abspath(unquote(path) if "%" in path else path)))
        if isinstance(address, os.PathLike) or "/" in text:
            return cls(Path(os.path.abspath(text)))
        host, colon, port = text.rpartition(":")
        if not (host and colon and port.isdigit() and 0 < int(port) < 65536):
            raise ValueError(f"{text!r} is no address: write unix:/path/of/the.sock or host:port")
        return cls(None, text)

    def __str__(self) -> str:
        return self.host_port if self.socket_path is None else f"unix:{self.socket_path}"

    def for_grpc(self) -> str:
        """The address as gRPC takes it; opens the socket's folder where the path is too long."""
        if self.socket_path is None:
            return self.host_port
        return "unix:" + quote(self._short_path(), safe="/")

    def close(self) -> None:
        """Gives the folder back. Idempotent."""
        if self._folder_fd is not None:
            os.close(self._folder_fd)
            self._folder_fd = None

    def _short_path(self) -> str:
        path = self.socket_path
        assert path is not None
        if len(os.fsencode(path)) <= _MAX_SOCKET_PATH_BYTES:
            return str(path)
        if self._folder_fd is None:
            try:
                self._folder_fd = os.open(path.parent, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
            except OSError as error:
                raise self.explain() from error
        return f"/proc/self/fd/{self._folder_fd}/{path.name}"

    def explain(self, said: str = "") -> ServerNotFound:
        """Why nobody answers here, and what to do. Tries to connect, for at most two seconds."""
        if self.socket_path is None:
            return ServerNotFound(
                f"no forkpoint server answers at {self.host_port}"
                + (f" ({said})" if said else "")
                + f". Is it running there? Another address is given by {ENVIRONMENT} or --address."
            )
        start = f"forkpointd serve --data-dir DIR --listen {self}"
        elsewhere = f"(A server elsewhere is named by {ENVIRONMENT} or --address.)"
        try:
            self._knock()
        except FileNotFoundError:
            why = f"there is no forkpoint server: {self.socket_path} does not exist"
        except NotADirectoryError:
            why = f"{self.socket_path} can't be a socket: a part of its path is not a folder"
        except PermissionError:
            why = f"you may not connect to {self.socket_path}; the server belongs to someone else"
            return ServerNotFound(f"{why}. Ask as its owner, or start one of your own. {elsewhere}")
        except ConnectionRefusedError:
            why = f"nobody listens on {self.socket_path}; a server that ended left it behind"
        except OSError as error:
            why = f"{self.socket_path} can't be reached: {error.strerror or error}"
        else:
            why = f"something listens on {self.socket_path} but is no forkpoint server"
            return ServerNotFound(f"{why}" + (f" ({said})" if said else "") + f". {elsewhere}")
        return ServerNotFound(f"{why}.\nStart one:  {start}\n{elsewhere}")

    def _knock(self) -> None:
        """Connects and goes away again."""
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as knock:
            knock.settimeout(2)
            knock.connect(self._short_path())
