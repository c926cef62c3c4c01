"""The memory budget: what would cross it is refused before it starts.

A sandbox is counted with the private memory that its VMM has now, plus a headroom for what it will
touch, and not with its memory size: children share the pages of their snapshot, and a hundred of
them that are 4 GiB each take some hundred MiB. What is staged on tmpfs is memory as well, and what
is reserved and allocated ahead there; so are images that are kept there.

The figures of processes are read in a thread, all at once, when something is to be admitted and
they are older than a quarter of a second: nothing is read while children start. A process that is
younger than the figures counts with its headroom.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, field

from forkpointd.images import Ledger, Reservation
from forkpointd.model import MIB, ForkpointError, MemoryUse, Reason
from forkpointd.vmm import resident_bytes

SAMPLE_SECONDS = 0.25
"""Figures of processes that are older are read again."""
RETRY_SECONDS = 30.0
"""Sandboxes end, and others are asked for again, in about such times."""

LEAST_RESERVE_BYTES = 512 * MIB
RESERVE_SHARE = 16
"""Without a budget a sixteenth of the host's memory, and 512 MiB at least, is nobody's."""


@dataclass(frozen=True, slots=True)
class Counted:
    """A sandbox as the budget sees it."""

    pid: int | None
    """None while its process is being started."""
    memory_bytes: int


@dataclass(frozen=True, slots=True)
class HostMemory:
    """What a host has."""

    total_bytes: int
    """The least of its memory and of the limits of this process's control groups."""
    available_bytes: int
    """What could be had now without swapping."""


@dataclass(frozen=True, slots=True)
class _Sample:
    """What was read at one moment."""

    staging_bytes: int
    host: HostMemory
    resident: dict[int, int] = field(default_factory=dict)
    """By pid."""
    monotonic_seconds: float = 0.0


class MemoryBudget:
    """Counts, and promises what is left. On the event loop, but for its reading."""

    def __init__(
        self,
        *,
        budget_bytes: int | None,
        child_headroom_bytes: int,
        staging_bytes: Callable[[], int],
        host: Callable[[], HostMemory],
        files: Executor,
        resident: Callable[[int], int] = resident_bytes,
    ) -> None:
        """`budget_bytes` None: what the host has, less a reserve. `staging_bytes`, `host` and
        `resident` block, and are called in a thread of `files`."""
        self._budget_bytes = budget_bytes
        self._child_headroom_bytes = child_headroom_bytes
        self._staging_bytes = staging_bytes
        self._host = host
        self._files = files
        self._resident = resident
        self._promises = Ledger()
        self._sample: _Sample | None = None
        self._reading: asyncio.Future[_Sample] | None = None

    async def refresh(
        self, there: Sequence[Counted], *, older_seconds: float = SAMPLE_SECONDS
    ) -> None:
        """Brings figures that are older up to date; to be called right before `use` and `promise`.
        Raises OSError."""
        sample = self._sample
        if sample and time.monotonic() - sample.monotonic_seconds < older_seconds:
            return
        if self._reading is None:
            pids = [one.pid for one in there if one.pid is not None]
            loop = asyncio.get_running_loop()
            self._reading = loop.run_in_executor(self._files, self._read, pids)
            self._reading.add_done_callback(self._has_read)
        await asyncio.shield(self._reading)

    def use(self, there: Sequence[Counted]) -> MemoryUse:
        """The budget and what of it is used, by the figures of the last `refresh`."""
        sample = self._sample
        assert sample is not None, "refresh() comes first"
        touched = [sample.resident.get(one.pid or -1, 0) for one in there]
        headroom = sum(
            self._headroom(one.memory_bytes, bytes_)
            for one, bytes_ in zip(there, touched, strict=True)
        )
        headroom += self._promises.reserved_bytes
        resident = sum(touched)
        return MemoryUse(
            budget_bytes=self._limit(sample, resident + sample.staging_bytes),
            sandbox_bytes=resident,
            headroom_bytes=headroom,
            staging_bytes=sample.staging_bytes,
            child_headroom_bytes=self._child_headroom_bytes,
        )

    def promise(
        self, there: Sequence[Counted], count: int, memory_bytes: int, what: str
    ) -> Reservation:
        """Counts `count` sandboxes more, that have touched nothing yet and have no row, until it is
        released: when they have their rows, or never will. Raises NO_MEMORY with the figures;
        nothing is counted then."""
        each = self._headroom(memory_bytes, 0)
        use = self.use(there)
        if count * each > use.free_bytes:
            raise _no_memory(use, count, each, len(there), what)
        return self._promises.add(count * each, what)

    async def check(self, there: Callable[[], Sequence[Counted]], what: str) -> None:
        """Refuses `what`, whose room on tmpfs is reserved by now, where that crosses the budget.
        Raises NO_MEMORY with the figures. Of two at once both may be refused, never none."""
        for _ in range(2):  # the first may be a reading that was under way before
            await self.refresh(there(), older_seconds=0.0)
        counted = there()
        use = self.use(counted)
        if use.used_bytes > use.budget_bytes:
            raise _over_budget(use, len(counted), what)

    def _headroom(self, memory_bytes: int, touched_bytes: int) -> int:
        """A guest can't touch more than it has."""
        return min(self._child_headroom_bytes, max(0, memory_bytes - touched_bytes))

    def _limit(self, sample: _Sample, taken_bytes: int) -> int:
        if self._budget_bytes is not None:
            return self._budget_bytes
        host = sample.host
        reserve = max(LEAST_RESERVE_BYTES, host.total_bytes // RESERVE_SHARE)
        # What others than our sandboxes have taken of the host is not ours to give.
        within = min(host.total_bytes, taken_bytes + host.available_bytes)
        return max(0, within - reserve)

    def _read(self, pids: Sequence[int]) -> _Sample:
        return _Sample(
            self._staging_bytes(),
            self._host(),
            {pid: self._resident(pid) for pid in pids},
            time.monotonic(),
        )

    def _has_read(self, reading: asyncio.Future[_Sample]) -> None:
        self._reading = None
        if not reading.cancelled() and reading.exception() is None:
            self._sample = reading.result()


def _no_memory(use: MemoryUse, count: int, each: int, there: int, what: str) -> ForkpointError:
    """The refusal, with a remedy that fits: retrying is none where the budget is too small."""
    needed = count * each
    possible = use.free_bytes // each
    remedies = []
    if 0 < possible < count:
        remedies.append(f"ask for {possible} at most")
    if needed <= use.budget_bytes:
        remedies.append("delete sandboxes that nobody needs")
    remedies.append(
        "let the server's memory_budget_bytes be raised or its child_headroom_mib lowered"
    )
    return ForkpointError(
        Reason.NO_MEMORY,
        f"no memory for {what}: it is counted with {_mib(needed)} ({count} x {_mib(each)}), and of "
        f"the budget of {_mib(use.budget_bytes)} there are {_mib(use.free_bytes)} left: "
        f"{there} sandboxes have {_mib(use.sandbox_bytes)}, {_mib(use.headroom_bytes)} are "
        f"headroom, {_mib(use.staging_bytes)} are staged or kept in memory. What helps: "
        + ", or ".join(remedies),
        metadata={
            "needed_bytes": str(needed),
            "possible_count": str(possible),
            **_figures(use),
        },
        retry_after_seconds=RETRY_SECONDS if needed <= use.budget_bytes else None,
    )


def _over_budget(use: MemoryUse, there: int, what: str) -> ForkpointError:
    return ForkpointError(
        Reason.NO_MEMORY,
        f"no memory for {what}: with it {_mib(use.used_bytes)} would be counted, and the budget is "
        f"{_mib(use.budget_bytes)}: {there} sandboxes have {_mib(use.sandbox_bytes)}, "
        f"{_mib(use.headroom_bytes)} are headroom, {_mib(use.staging_bytes)} are staged or kept in "
        "memory, this among them. What helps: ask for durability DISK, or delete sandboxes that "
        "nobody needs, or let the server's memory_budget_bytes be raised",
        metadata=_figures(use),
        retry_after_seconds=RETRY_SECONDS,
    )


def _figures(use: MemoryUse) -> dict[str, str]:
    return {
        "free_bytes": str(use.free_bytes),
        "budget_bytes": str(use.budget_bytes),
        "sandbox_bytes": str(use.sandbox_bytes),
        "headroom_bytes": str(use.headroom_bytes),
        "staging_bytes": str(use.staging_bytes),
    }


def _mib(count: int) -> str:
    return f"{count / MIB:.1f} MiB"
