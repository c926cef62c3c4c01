"""The seam of the sync client: grpc and threads. Its names are those of `aio`."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import ParamSpec, Protocol, TypeVar

import grpc

from forkpoint._seam.options import CHANNEL_OPTIONS

T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)
P = ParamSpec("P")

Channel = grpc.Channel
Condition = threading.Condition
Lock = threading.Lock
sleep = time.sleep
Worker = threading.Thread


class Stream(Protocol[T_co]):
    """A call whose responses are a stream."""

    def __iter__(self) -> Iterator[T_co]: ...

    def cancel(self) -> bool: ...


class CallEnded(Exception):
    """Never raised here: a cancelled call raises a `grpc.RpcError`, as any other."""


def open_channel(address: str) -> grpc.Channel:
    """A channel to an address as gRPC takes it; connects when it is first used."""
    return grpc.insecure_channel(address, options=CHANNEL_OPTIONS)


def to_thread(function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Calls it right here: who blocks anyway needs no thread for it."""
    return function(*args, **kwargs)


def wait(condition: threading.Condition, seconds: float | None) -> bool:
    """Waits for a notification, with the condition held; False when the time was over first."""
    return condition.wait(seconds)


def gather(jobs: Sequence[Callable[[], T]]) -> list[T | Exception]:
    """Runs all, a bounded number at once; an outcome each, in order."""

    def run(job: Callable[[], T]) -> T | Exception:
        try:
            return job()
        except Exception as error:  # noqa: BLE001 - handed to the caller, who looks at each
            return error

    if not jobs:
        return []
    with ThreadPoolExecutor(min(16, len(jobs)), "forkpoint-gather") as pool:
        return list(pool.map(run, jobs))


def spawn(work: Callable[[], None], name: str) -> threading.Thread:
    """Starts work beside the caller. Keep what is returned until the work is over."""
    worker = threading.Thread(target=work, name=name, daemon=True)
    worker.start()
    return worker


def join(worker: threading.Thread) -> None:
    """Waits until spawned work has ended. It reports its failures by itself."""
    worker.join()
