"""How long the server's event loop keeps others waiting while it pre-copies: the row `loop_lag`.

Measured from outside: one client calls GetSandbox of a third sandbox every few milliseconds, while
two sources of 4 GiB are branched at the same time. GetSandbox needs no disk and no thread, so what
it takes longer than usual is time in which the loop did not come to it, or in which the machine let
neither the loop nor this client run. To tell these apart the same is measured beside two cps of as
much data, which keep the machine as busy and the server idle, and beside nothing at all. The row's
figure is the longest call during the pre-copies.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from statistics import median
from typing import TypeVar

from bench.cp import cp, make_dense, settle
from bench.machine import available_bytes
from bench.scratch import Scratch
from bench.served import Served, ServedError, entered
from forkpoint.v1 import branch_pb2

T = TypeVar("T")

MEMORY_MIB = 4096
SPARE_MIB = 3072
"""Left free beside guests and staging."""
IDLE_SECONDS = 3.0
EVERY_SECONDS = 0.002


@dataclass(frozen=True, slots=True)
class _Call:
    start: float
    """Seconds since the epoch, as the stages' times are."""
    seconds: float


class LoopLag:
    """Two pre-copies at once, and someone who only asks."""

    name = "loop_lag"

    def __init__(self, scratch: Scratch, served: Served, touched_mib: int) -> None:
        """`touched_mib`: how much of each source's memory has to be copied."""
        self._folder = scratch.disk
        self._served = served
        self._touched_mib = touched_mib
        self._ids = ("lag-0", "lag-1")

    def refusal(self) -> str:
        """Why there is too little memory for this; empty where there is enough."""
        # Both guests, the staging of one window, and page cache that the kernel can give back.
        needed = (3 * self._touched_mib + SPARE_MIB) << 20
        free = available_bytes()
        if free >= needed:
            return ""
        return f"{needed >> 20} MiB of memory are needed, {free >> 20} MiB are available"

    def measure(self) -> Mapping[str, float]:
        """The whole measurement, once."""
        served = self._served
        served.boot("lag-asked", 128)
        try:
            for sandbox_id in self._ids:
                served.boot(sandbox_id, MEMORY_MIB)
                served.ask(sandbox_id, f"d{self._touched_mib}")
                served.delete_snapshot(served.branch(sandbox_id).snapshot_id)
            settle()
            idle = self._ask_during(lambda: time.sleep(IDLE_SECONDS))
            cps = self._ask_during_cps()
            settle()
            branches: list[branch_pb2.Branch] = []
            busy = self._ask_during(lambda: branches.extend(self._both(self._served.branch)))
        finally:
            served.delete([*self._ids, "lag-asked"])
        starts = [entered(branch, branch_pb2.BRANCH_STAGE_PRECOPYING) for branch in branches]
        ends = [entered(branch, branch_pb2.BRANCH_STAGE_PAUSED) for branch in branches]
        during = [call for call in busy if max(starts) <= call.start <= min(ends)]
        if not during:
            raise ServedError("the two pre-copies were not under way at the same time")
        return {
            **_figures("precopies", during),
            **_figures("cps", cps),
            **_figures("idle", idle),
            "precopies_seconds": min(ends) - max(starts),
            "precopied_bytes": sum(branch.precopy.total_bytes for branch in branches),
        }

    def _ask_during_cps(self) -> list[_Call]:
        source = self._folder / "lag-source"
        make_dense(source, self._touched_mib)

        def copy(sandbox_id: str) -> None:
            target = self._folder / f"{sandbox_id}.copy"
            try:
                cp(source, target)
            finally:
                target.unlink(missing_ok=True)

        try:
            return self._ask_during(lambda: self._both(copy))
        finally:
            source.unlink()

    def _both(self, work: Callable[[str], T]) -> list[T]:
        with ThreadPoolExecutor(len(self._ids)) as threads:
            return list(threads.map(work, self._ids))

    def _ask_during(self, work: Callable[[], object]) -> list[_Call]:
        calls: list[_Call] = []
        over = threading.Event()
        with ThreadPoolExecutor(1) as threads:
            asking = threads.submit(self._ask, calls, over)
            try:
                work()
            finally:
                over.set()
            asking.result()
        return calls

    def _ask(self, calls: list[_Call], over: threading.Event) -> None:
        while not over.wait(EVERY_SECONDS):
            at, start = time.time(), time.perf_counter()
            self._served.get("lag-asked")
            calls.append(_Call(at, time.perf_counter() - start))


def _figures(kind: str, calls: Sequence[_Call]) -> dict[str, float]:
    return {
        f"{kind}_worst_seconds": max(call.seconds for call in calls),
        f"{kind}_median_seconds": median(call.seconds for call in calls),
        f"{kind}_calls": len(calls),
    }
