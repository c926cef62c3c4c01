"""Pages of lists: opaque tokens that hold a position and belong to one filter.

A token is base64url of a version byte, the creation time (microseconds since 1970), the id, and a
hash of those together with the filter. It names no row: a page goes on after its position whether
what was there is still there or not. It stays valid across restarts.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import struct
from collections.abc import Callable, Sequence
from datetime import UTC, datetime, timedelta
from typing import TypeVar

from google.protobuf.message import Message

from forkpointd.model import ID_PATTERN, ForkpointError, Page, Reason
from forkpointd.rpc.fingerprint import fingerprint
from forkpointd.rpc.ports import Position

T = TypeVar("T")
M = TypeVar("M", bound=Message)

MAX_PAGE_BYTES = 2 * 1024 * 1024
"""Of the items of one page: half of what a gRPC client takes in one message by default."""

_VERSION = 1
_HASH_BYTES = 12
_HEAD = struct.Struct(">Bq")
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


def position_of(token: str, request: Message) -> Position | None:
    """Where the page that `request` asks for starts; None for the first.

    Raises PAGE_TOKEN_INVALID for a token of another filter, or of no filter of ours.
    """
    if not token:
        return None
    try:
        data = base64.b64decode(token, altchars=b"-_", validate=True)
        head, digest = data[:-_HASH_BYTES], data[-_HASH_BYTES:]
        version, created = _HEAD.unpack_from(head)
        identifier = head[_HEAD.size :].decode("ascii")
        instant = _EPOCH + timedelta(microseconds=created)
    except (binascii.Error, struct.error, ValueError, OverflowError) as error:
        raise _invalid() from error
    if version != _VERSION or not ID_PATTERN.fullmatch(identifier):
        raise _invalid()
    if digest != _digest(head, request):
        raise _invalid()
    return instant, identifier


def token_of(position: Position, request: Message) -> str:
    """The token of the page after `position`, for the filter of `request`."""
    instant, identifier = position
    created = (instant - _EPOCH) // timedelta(microseconds=1)
    head = _HEAD.pack(_VERSION, created) + identifier.encode("ascii")
    return base64.urlsafe_b64encode(head + _digest(head, request)).decode("ascii")


def page_of(
    page: Page[T],
    request: Message,
    convert: Callable[[T], M],
    position: Callable[[T], Position],
) -> tuple[Sequence[M], str]:
    """The messages of a page and the token of the next.

    A page of large items ends early, before its answer grows beyond what clients take; it has at
    least one item.
    """
    messages: list[M] = []
    size = 0
    for index, item in enumerate(page.items):
        message = convert(item)
        size += message.ByteSize()
        if messages and size > MAX_PAGE_BYTES:
            return messages, token_of(position(page.items[index - 1]), request)
        messages.append(message)
    following = page.next_position
    return messages, "" if following is None else token_of(following, request)


def _digest(head: bytes, request: Message) -> bytes:
    filter_hash = fingerprint(request, without=("page_size", "page_token"))
    name = request.DESCRIPTOR.full_name
    return hashlib.sha256(head + f"{name}:{filter_hash}".encode()).digest()[:_HASH_BYTES]


def _invalid() -> ForkpointError:
    return ForkpointError(
        Reason.PAGE_TOKEN_INVALID,
        "page_token was not made by this server for this filter: send next_page_token of the page "
        "before together with the same filter, or leave it out to start anew",
    )
