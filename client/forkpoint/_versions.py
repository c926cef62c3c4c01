"""Whether client and server fit, said once."""

from __future__ import annotations

from forkpoint.views import ServerInfo

_said: set[tuple[str, str]] = set()


def differs(info: ServerInfo) -> str | None:
    """What to say when the versions differ."""
    if info.version == info.client_version:
        return None
    return (
        f"this client is forkpoint {info.client_version} and the server is {info.version}:"
        " calls that one of them doesn't know will fail; install the same version for both"
    )


def mismatch(info: ServerInfo) -> str | None:
    """The same, but only the first time in this process for this pair of versions."""
    pair = (info.client_version, info.version)
    if pair in _said:
        return None
    _said.add(pair)
    return differs(info)
