"""How long a window is expected to be, from the windows that this server has seen.

A window costs a fixed part and a part for each MiB that it writes; the second depends on what is
written where. Both start from figures measured on a two-core machine (docs/design) and follow what
comes by an exponentially weighted mean, so that a prediction is about this host and not about ours.
"""

from __future__ import annotations

from dataclasses import dataclass

from forkpointd.model import MIB, BranchMode, PauseWindow, StagingKind

WEIGHT = 0.3
"""Of the newest window."""
FIXED_US = 2_500
LEAST_BYTES = 8 * MIB
"""Windows that wrote less tell nothing about the cost of a MiB."""


@dataclass(slots=True)
class _Cost:
    us_per_mib: float


class PausePredictor:
    """Predicts the length of a window by mode and staging."""

    def __init__(self) -> None:
        self._costs = {
            (BranchMode.DIFF, StagingKind.TMPFS): _Cost(400),
            (BranchMode.DIFF, StagingKind.DISK): _Cost(900),
            (BranchMode.FULL, StagingKind.TMPFS): _Cost(800),
            (BranchMode.FULL, StagingKind.DISK): _Cost(1_000),
        }

    def predict_us(self, mode: BranchMode, staging: StagingKind, data_bytes: int) -> int:
        """The expected length, in microseconds, of a window that writes `data_bytes`."""
        return int(FIXED_US + self._costs[mode, staging].us_per_mib * data_bytes / MIB)

    def observe(self, mode: BranchMode, window: PauseWindow) -> None:
        """Learns from a window that came."""
        if window.dirty_bytes < LEAST_BYTES or window.was_paused:
            return
        cost = self._costs[mode, window.staging]
        seen = max(0, window.total_us - FIXED_US) / (window.dirty_bytes / MIB)
        cost.us_per_mib += WEIGHT * (seen - cost.us_per_mib)
