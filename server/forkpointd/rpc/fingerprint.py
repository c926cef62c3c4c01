"""Hashes of requests: whether a repeat asks for the same, whether a page belongs to its filter."""

from __future__ import annotations

import hashlib

from google.protobuf.message import Message


def fingerprint(request: Message, *, without: tuple[str, ...] = ("request_id",)) -> str:
    """SHA-256 of the request's deterministic bytes, with the fields of `without` cleared.

    It compares what was sent, not what it means: a default that is spelled out differs from one
    that is left out. Fields of a newer contract, which this server doesn't know, count.
    """
    copy = type(request)()
    copy.CopyFrom(request)
    for name in without:
        copy.ClearField(name)
    return hashlib.sha256(copy.SerializeToString(deterministic=True)).hexdigest()
