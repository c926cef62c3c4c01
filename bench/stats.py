"""What can be said about a ratio from pairs of measurements. Pure functions.

A ratio of medians is told with a bootstrap 95 % interval. *Pairs* are drawn, not single values:
what changed for both during the run (this machine's medians wander by a factor of two within
seconds) then changes both medians of a resample alike.

A trial that failed counts as infinitely slow, so a program can't win by failing where it is slow.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from statistics import median

RESAMPLES = 4_000
CONFIDENCE = 0.95
SEED = 20_240_229
"""The interval of one set of pairs is always the same."""

PAIRS_NEEDED = 200
"""Below this nothing is claimed."""


class Verdict(StrEnum):
    """What a target line ends with."""

    MET = "met"
    MISSED = "missed"
    UNDECIDED = "undecided"


@dataclass(frozen=True, slots=True)
class Pair:
    """One measurement of what is judged, and of what it is judged by, taken next to each other."""

    subject: float
    reference: float


@dataclass(frozen=True, slots=True)
class Estimate:
    """A figure with the interval it lies in, from so many samples."""

    value: float
    low: float
    high: float
    samples: int


@dataclass(frozen=True, slots=True)
class Goal:
    """A bound, and the side of it that is right. The bound itself is right."""

    bound: float
    at_most: bool
    unit: str = ""

    def __str__(self) -> str:
        return f"{'<=' if self.at_most else '>='}{self.bound:g}{self.unit}"

    def verdict(self, estimate: Estimate | None) -> Verdict:
        """`met` when the whole interval is on the right side, `missed` when all of it is on the
        wrong one; `undecided` else, and always for fewer than PAIRS_NEEDED samples."""
        if estimate is None or estimate.samples < PAIRS_NEEDED:
            return Verdict.UNDECIDED
        worst, best = (
            (estimate.high, estimate.low) if self.at_most else (estimate.low, estimate.high)
        )
        if self._holds(worst):
            return Verdict.MET
        return Verdict.UNDECIDED if self._holds(best) else Verdict.MISSED

    def _holds(self, value: float) -> bool:
        return value <= self.bound if self.at_most else value >= self.bound


def ratio_of_medians(pairs: Sequence[Pair]) -> float:
    """Median of the subjects by median of the references. Raises ValueError without pairs, or
    where the references' median isn't a positive number."""
    if not pairs:
        raise ValueError("there are no pairs")
    reference = median(pair.reference for pair in pairs)
    if not 0 < reference < math.inf:
        raise ValueError(f"the references have the median {reference}")
    return median(pair.subject for pair in pairs) / reference


def estimate_ratio(
    pairs: Sequence[Pair], *, resamples: int = RESAMPLES, seed: int = SEED
) -> Estimate:
    """The ratio of medians with its bootstrap interval. Raises what `ratio_of_medians` does."""
    value = ratio_of_medians(pairs)
    draw = random.Random(seed)
    ratios = sorted(ratio_of_medians(draw.choices(pairs, k=len(pairs))) for _ in range(resamples))
    tail = (1 - CONFIDENCE) / 2
    low = ratios[math.floor(tail * resamples)]
    high = ratios[math.ceil((1 - tail) * resamples) - 1]
    return Estimate(value, low, high, len(pairs))


def estimate_worst(values: Sequence[float]) -> Estimate:
    """The largest of some values, with the range of all as the interval: for a bound that must
    never be passed. Raises ValueError without values."""
    return Estimate(max(values), min(values), max(values), len(values))
