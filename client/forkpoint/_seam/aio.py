"""The seam of the async client: grpc.aio and asyncio."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Sequence
from typing import Any, Protocol, TypeVar

import grpc
import grpc.aio

from forkpoint._seam.options import CHANNEL_OPTIONS

T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)

Channel = grpc.aio.Channel
Condition = asyncio.Condition
Lock = asyncio.Lock
sleep = asyncio.sleep
to_thread = asyncio.to_thread


class Stream(Protocol[T_co]):
    """A call whose responses are a stream."""

    def __aiter__(self) -> AsyncIterator[T_co]: ...

    def cancel(self) -> bool: ...


def open_channel(address: str) -> grpc.aio.Channel:
    """A channel to an address as gRPC takes it; connects when it is first used."""
    return grpc.aio.insecure_channel(address, options=CHANNEL_OPTIONS)


async def wait(condition: asyncio.Condition, seconds: float | None) -> bool:
    """Waits for a notification, with the condition held; False when the time was over first."""
    if seconds is None:
        await condition.wait()
        return True
    try:
        await asyncio.wait_for(condition.wait(), seconds)
    except TimeoutError:
        return False
    return True


async def gather(jobs: Sequence[Callable[[], Awaitable[T]]]) -> list[T | Exception]:
    """Runs all, a bounded number at once; an outcome each, in order."""
    turns = asyncio.Semaphore(16)

    async def run(job: Callable[[], Awaitable[T]]) -> T | Exception:
        async with turns:
            try:
                return await job()
            except Exception as error:  # noqa: BLE001 - handed to the caller, who looks at each
                return error

    return list(await asyncio.gather(*(run(job) for job in jobs)))


def spawn(work: Callable[[], Coroutine[Any, Any, None]], name: str) -> asyncio.Task[None]:
    """Starts work beside the caller. Keep what is returned until the work is over."""
    return asyncio.create_task(work(), name=name)


async def join(worker: asyncio.Task[None]) -> None:
    """Waits until spawned work has ended. It reports its failures by itself."""
    await asyncio.wait([worker])


Worker = asyncio.Task[None]
CallEnded = asyncio.CancelledError
"""What iterating a call raises when it was cancelled from here."""
