"""How long a window is expected to be, from the windows that this server has seen.

A window costs something always, something for each GiB of the guest (Firecracker walks the dirty
log of all of it), and something for each MiB that it writes, which depends on what is written
where. The costs start from figures measured on a two-core machine and follow what comes by an
exponentially weighted mean, so that a prediction is about this host and not about ours. Each window
teaches the cost that it is most of: one that wrote little that of the walk, one that wrote much
that of the writing.
"""

from __future__ import annotations

from dataclasses import dataclass

from forkpointd.model import MIB, BranchMode, PauseWindow, StagingKind

GIB = 1024 * MIB

WEIGHT = 0.3
"""Of the newest window."""
MOST_TIMES = 4.0
"""A window that cost more than so many times what was expected (the machine was busy) counts as
this."""
LEAST_US = 20.0
"""A cost of nothing would be believed for ever."""
ALWAYS_US = 1_300
WALK_US_PER_GIB = 1_100.0
MUCH_BYTES = 8 * MIB
"""From here on a window tells what writing costs, below it what walking costs."""


@dataclass(slots=True)
class _Cost:
    us: float

    def learn(self, seen_us: float) -> None:
        seen_us = min(max(LEAST_US, seen_us), MOST_TIMES * self.us)
        self.us += WEIGHT * (seen_us - self.us)


class PausePredictor:
    """Predicts the length of a window by mode, staging, and the sizes of guest and diff."""

    def __init__(self) -> None:
        self._walk_per_gib = _Cost(WALK_US_PER_GIB)
        self._write_per_mib = {
            (BranchMode.DIFF, StagingKind.TMPFS): _Cost(400),
            (BranchMode.DIFF, StagingKind.DISK): _Cost(900),
            (BranchMode.FULL, StagingKind.TMPFS): _Cost(450),
            (BranchMode.FULL, StagingKind.DISK): _Cost(1_500),
        }

    def predict_us(
        self, mode: BranchMode, staging: StagingKind, *, memory_bytes: int, data_bytes: int
    ) -> int:
        """The expected length, in microseconds, of a window of a guest with `memory_bytes` that
        writes `data_bytes`."""
        writing = self._write_per_mib[mode, staging].us * data_bytes / MIB
        return int(ALWAYS_US + self._walking_us(mode, memory_bytes) + writing)

    def observe(self, mode: BranchMode, window: PauseWindow, *, memory_bytes: int) -> None:
        """Learns from a window that came."""
        if window.was_paused:
            return
        write = self._write_per_mib[mode, window.staging]
        taken = window.total_us - ALWAYS_US
        written_mib = window.dirty_bytes / MIB
        if window.dirty_bytes >= MUCH_BYTES:
            write.learn((taken - self._walking_us(mode, memory_bytes)) / written_mib)
        elif mode is BranchMode.DIFF:
            self._walk_per_gib.learn((taken - write.us * written_mib) / (memory_bytes / GIB))

    def _walking_us(self, mode: BranchMode, memory_bytes: int) -> float:
        """A FULL window looks at no log."""
        return self._walk_per_gib.us * memory_bytes / GIB if mode is BranchMode.DIFF else 0.0
