"""From trials to findings: which pairs answer which target."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from statistics import median

from bench.measures.branching import SECONDS
from bench.measures.copying import BYTES_PER_SECOND
from bench.measures.forking import DELETE_SECONDS, FORK_SECONDS, RESIDENT_BYTES
from bench.measures.windows import TOTAL, VMM_TOTAL
from bench.rounds import CONTROL, FORKPOINT, Trial, failed, pairs_of
from bench.stats import Estimate, Pair, estimate_ratio, estimate_worst
from bench.targets import (
    BRANCH_READY,
    COPY,
    DELETE_100,
    FORK_100,
    IDLE_DIFF_TOTAL,
    IDLE_DIFF_WINDOW,
    RESIDENT,
    Finding,
    Target,
)

Show = Callable[[float], str]


def microseconds(value: float) -> str:
    """In milliseconds."""
    return f"{value / 1000:.2f} ms"


def seconds(value: float) -> str:
    """In milliseconds."""
    return f"{value * 1000:.0f} ms"


def rate(value: float) -> str:
    """In MiB per second."""
    return f"{value / 2**20:.0f} MiB/s"


def window_findings(trials: Sequence[Trial]) -> list[Finding]:
    """idle_diff_window and idle_diff_total."""
    return [
        against_floor(IDLE_DIFF_WINDOW, trials, VMM_TOTAL, microseconds),
        against_floor(IDLE_DIFF_TOTAL, trials, TOTAL, microseconds),
    ]


def copy_findings(trials: Sequence[Trial]) -> list[Finding]:
    """copy: a rate, so what failed counts as 0 bytes per second."""
    return [against_floor(COPY, trials, BYTES_PER_SECOND, rate, worst=0.0)]


def branch_findings(trials: Sequence[Trial]) -> list[Finding]:
    """branch_ready."""
    return [against_floor(BRANCH_READY, trials, SECONDS, seconds)]


def fork_findings(trials: Sequence[Trial]) -> list[Finding]:
    """fork_100, delete_100 and resident."""
    forks = [trial for trial in trials if trial.role == FORKPOINT]
    good = [trial.metrics for trial in forks if not trial.error]
    deletes = [Pair(m[DELETE_SECONDS], m[FORK_SECONDS]) for m in good]
    # A fork or a delete that failed: the delete is the one that is judged here.
    if deletes:
        usual = median(pair.reference for pair in deletes)
        deletes += [Pair(math.inf, usual)] * failed(trials)
    resident = [m[RESIDENT_BYTES] / 1e6 for m in good]
    return [
        against_floor(FORK_100, trials, FORK_SECONDS, seconds),
        Finding(
            DELETE_100,
            _estimate(deletes),
            reference_median=_shown([pair.reference for pair in deletes], seconds),
            subject_median=_shown([pair.subject for pair in deletes], seconds),
            failed=failed(trials),
        ),
        Finding(
            RESIDENT,
            estimate_worst(resident) if resident else None,
            subject_median=_shown(resident, lambda megabytes: f"{megabytes:.1f} MB"),
            failed=failed(trials),
        ),
    ]


def against_floor(
    target: Target, trials: Sequence[Trial], metric: str, show: Show, *, worst: float = math.inf
) -> Finding:
    """A target that compares forkpoint with the floor, and the floor with itself."""
    pairs = pairs_of(trials, metric, worst=worst)
    control = [
        pair
        for pair in pairs_of(trials, metric, subject=CONTROL, worst=math.nan)
        if not math.isnan(pair.subject)
    ]
    return Finding(
        target,
        _estimate(pairs),
        control=_estimate(control),
        reference_median=_shown([pair.reference for pair in pairs], show),
        subject_median=_shown([pair.subject for pair in pairs], show),
        failed=failed(trials),
    )


def _estimate(pairs: Sequence[Pair]) -> Estimate | None:
    return estimate_ratio(pairs) if pairs else None


def _shown(values: Sequence[float], show: Show) -> str:
    return show(median(values)) if values else "-"
