"""From the rows of a bench in phases to findings. A trial of forkpoint that failed, or was refused,
counts as infinitely slow; a round whose reference failed says nothing."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from statistics import median
from typing import Any, Protocol, TypeVar

from bench.rows import Outcome, TrialRow
from bench.stats import RESAMPLES, Pair, estimate_ratio
from bench.targets import Finding, Target

Show = Callable[[float], str]
R = TypeVar("R", bound=TrialRow[Any])
R_contra = TypeVar("R_contra", bound=TrialRow[Any], contravariant=True)


class AnySeries(Protocol[R_contra]):
    """Some of the trials of a cell, at most one for each key."""

    def values(self, rows: Sequence[R_contra], metric: str, /) -> Mapping[Hashable, float]:
        """By what pairs are made of; infinite where it failed or was refused."""


def value_of(row: TrialRow[Any], metric: str, worst: float = math.inf) -> float | None:
    """A figure of a row: `worst` where the trial was not good, None where it has none such."""
    if row.outcome is not Outcome.OK:
        return worst
    return row.figures.get(metric)


def pairs_of(
    rows: Sequence[R], metric: str, subject: AnySeries[R], reference: AnySeries[R]
) -> list[Pair]:
    """What two series have of the same keys. Where the reference failed there is no pair."""
    ones, others = subject.values(rows, metric), reference.values(rows, metric)
    return [
        Pair(ones[key], other)
        for key, other in others.items()
        if key in ones and not math.isinf(other)
    ]


def ratio_finding(
    target: Target,
    pairs: Sequence[Pair],
    control: Sequence[Pair],
    show: Show,
    *,
    failed: int,
    resamples: int = RESAMPLES,
) -> Finding:
    """A ratio of medians; without an estimate where there are no pairs."""
    control = finite(control)
    return Finding(
        target,
        estimate_ratio(pairs, resamples=resamples) if pairs else None,
        control=estimate_ratio(control, resamples=resamples) if control else None,
        reference_median=shown_median([pair.reference for pair in pairs], show),
        subject_median=shown_median([pair.subject for pair in pairs], show),
        failed=failed,
    )


def finite(pairs: Sequence[Pair]) -> list[Pair]:
    """Without those whose subject failed: for a control."""
    return [pair for pair in pairs if not math.isinf(pair.subject)]


def shown_median(values: Sequence[float], show: Show) -> str:
    """In words; empty without values."""
    return show(median(values)) if values else ""


def milliseconds(microseconds: float) -> str:
    """Of microseconds."""
    return f"{microseconds / 1000:.2f} ms"


def seconds(value: float) -> str:
    """Of seconds."""
    return f"{value:.3f} s"
