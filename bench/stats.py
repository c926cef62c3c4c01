"""What can be said about a ratio from pairs of measurements. Pure functions.

A ratio of medians is told with a bootstrap 95 % interval. *Pairs* are drawn, not single values:
what changed for both during the run (this machine's medians wander by a factor of two within
seconds) then changes both medians of a resample alike.

A trial that failed counts as infinitely slow, so a program can't win by failing where it is slow.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from statistics import median
from typing import TypeVar

T = TypeVar("T")

RESAMPLES = 4_000
CONFIDENCE = 0.95
SEED = 20_240_229
"""The interval of one set of pairs is always the same."""

PAIRS_NEEDED = 200
"""Below this nothing is claimed of a median."""
TAIL_SAMPLES_NEEDED = 1_000
"""Below this nothing is claimed of a percentile above 90."""


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
    samples_needed: int = PAIRS_NEEDED
    """Below this nothing is claimed."""

    def __str__(self) -> str:
        return f"{'<=' if self.at_most else '>='}{self.bound:g}{self.unit}"

    def verdict(self, estimate: Estimate | None) -> Verdict:
        """`met` when the whole interval is on the right side, `missed` when all of it is on the
        wrong one; `undecided` else, and always for fewer than `samples_needed` samples."""
        if estimate is None or estimate.samples < self.samples_needed:
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
    return estimate([pairs], lambda drawn: ratio_of_medians(drawn[0]), resamples, seed)


def estimate(
    groups: Sequence[Sequence[T]],
    statistic: Callable[[Sequence[Sequence[T]]], float],
    resamples: int = RESAMPLES,
    seed: int = SEED,
) -> Estimate:
    """A statistic of one or more groups of samples with its bootstrap interval; from each group as
    many are drawn as it has. The smallest group says of how many samples it is. Raises what the
    statistic does."""
    value = statistic(groups)
    draw = random.Random(seed)
    values = sorted(
        statistic([draw.choices(group, k=len(group)) for group in groups]) for _ in range(resamples)
    )
    tail = (1 - CONFIDENCE) / 2
    low = values[math.floor(tail * resamples)]
    high = values[math.ceil((1 - tail) * resamples) - 1]
    return Estimate(value, low, high, min(map(len, groups)))


def quantile(values: Sequence[float], share: float) -> float:
    """The value that this share of all (0 to 1) is at most, interpolated between neighbours.
    Raises ValueError without values."""
    if not values:
        raise ValueError("there are no values")
    ordered = sorted(values)
    place = share * (len(ordered) - 1)
    below = math.floor(place)
    low, high = ordered[below], ordered[min(below + 1, len(ordered) - 1)]
    if low == high:  # also where both are infinite
        return low
    return low + (high - low) * (place - below)


def ratio_of_quantiles(pairs: Sequence[Pair], share: float) -> float:
    """A quantile of the subjects by the same of the references. Raises ValueError without pairs."""
    subject = quantile([pair.subject for pair in pairs], share)
    return subject / quantile([pair.reference for pair in pairs], share)


def estimate_worst(values: Sequence[float]) -> Estimate:
    """The largest of some values, with the range of all as the interval: for a bound that must
    never be passed. Raises ValueError without values."""
    return Estimate(max(values), min(values), max(values), len(values))
