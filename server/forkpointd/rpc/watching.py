"""Streams that carry a state: what a port yields is written until it ends or the client leaves."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import TypeVar

T = TypeVar("T")


@asynccontextmanager
async def released(source: AsyncIterator[T]) -> AsyncIterator[AsyncIterator[T]]:
    """The iterator, closed in every case.

    A stream that ends at a write leaves its generator suspended; without this its cleanup (the
    watcher's place in the fan-out) would wait for the garbage collector.
    """
    try:
        yield source
    finally:
        close = getattr(source, "aclose", None)
        if close is not None:
            await close()
