"""From rows to the targets: which trials answer which, by the rules of bench/README.md.

All windows are compared by Firecracker's own figures (`vmm_total_us`): what the guest stood still,
whoever asked for it. A trial of forkpoint that failed, or was refused, counts as infinitely slow.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median

from bench.claiming import (
    Show,
    finite,
    milliseconds,
    pairs_of,
    ratio_finding,
    seconds,
    value_of,
)
from bench.pause_window.cells import (
    DIFF,
    FRESH,
    NOTHING,
    PRECOPIES,
    REPEATED,
    SIZES_MIB,
    Cell,
)
from bench.pause_window.rows import READY_SECONDS, Row
from bench.rounds import CONTROL, FLOOR, FORKPOINT
from bench.rows import Outcome
from bench.stats import (
    RESAMPLES,
    TAIL_SAMPLES_NEEDED,
    Estimate,
    Goal,
    Pair,
    estimate,
    quantile,
    ratio_of_quantiles,
)
from bench.targets import Finding, Target

VMM_TOTAL = "vmm_total_us"
TENTH = 9

IDLE_MEDIAN = Target(
    "idle_4gib_median",
    Goal(1.05, at_most=True),
    "median window of an idle 4 GiB source, DIFF on tmpfs: forkpoint / floor",
)
IDLE_P99 = Target(
    "idle_4gib_p99",
    Goal(1.5, at_most=True, samples_needed=TAIL_SAMPLES_NEEDED),
    "99th percentile of the same windows: forkpoint / floor",
)
SLOPE = Target(
    "memory_slope",
    Goal(1.2, at_most=True),
    "growth of the idle window from 256 MiB to 8 GiB, by least squares over the medians: "
    "forkpoint / floor",
)
FRESH_100 = Target(
    "dirty_100mib_fresh",
    Goal(1.05, at_most=True),
    "window of a 2 GiB source that wrote 100 MiB of new pages: forkpoint / fresh-page floor",
)
PREALLOCATED_100 = Target(
    "dirty_100mib_preallocated",
    Goal(0.75, at_most=True),
    "window of a 2 GiB source that wrote the same 100 MiB again: forkpoint, which may allocate "
    "before / fresh-page floor",
)
TEN = Target(
    "ten_in_a_row",
    Goal(1.2, at_most=True),
    "tenth window of a row / first of the same row, 100 MiB each: forkpoint (A/A: tenth / ninth)",
)
STRETCH = Target(
    "stretch_beside_precopies",
    Goal(0.8, at_most=True),
    "window beside eight branches / alone, forkpoint, by window beside eight cp / alone, floor",
)
STRETCH_WRITING = Target(
    "stretch_beside_precopies_100mib",
    Goal(0.8, at_most=True),
    "the same of a window that writes 100 MiB, the same pages each time",
)
READY_SMALL = Target(
    "ready_100mib",
    Goal(2.0, at_most=True),
    "BranchSandbox of an idle 4 GiB source to READY, image of 100 MiB / cp of 100 MiB and fsync",
)
READY_LARGE = Target(
    "ready_2gib",
    Goal(2.0, at_most=True),
    "BranchSandbox of an idle 4 GiB source to READY, image of 2 GiB / cp of 2 GiB and fsync",
)
TARGETS = (
    IDLE_MEDIAN,
    IDLE_P99,
    SLOPE,
    FRESH_100,
    PREALLOCATED_100,
    TEN,
    STRETCH,
    STRETCH_WRITING,
    READY_SMALL,
    READY_LARGE,
)


@dataclass(frozen=True, slots=True)
class Series:
    """The windows of one role in the rounds of a cell."""

    role: str
    beside: str = NOTHING
    number: int | None = None
    """Only this window of each slot; None: all."""

    def values(self, rows: Sequence[Row], metric: str) -> Mapping[Hashable, float]:
        """By round and number; infinite where it failed or was refused."""
        values: dict[Hashable, float] = {}
        for row in rows:
            if row.role != self.role or row.mode != DIFF or row.beside != self.beside:
                continue
            if self.number is not None and row.number != self.number:
                continue
            key = row.round, 0 if self.number is not None else row.number
            if (value := value_of(row, metric)) is not None:
                values[key] = value
        return values


def findings(rows: Sequence[Row], *, resamples: int = RESAMPLES) -> list[Finding]:
    """One for each target; without an estimate where there are no rows. `resamples`: of each
    interval."""

    idle = {size: [row for row in rows if _is_idle(row.cell, size)] for size in SIZES_MIB}
    fresh = [row for row in rows if _is_100_mib(row.cell, FRESH)]
    repeated = [row for row in rows if _is_100_mib(row.cell, REPEATED)]
    ten = [row for row in rows if row.cell.phase == "1c" and row.cell.in_a_row == TENTH + 1]
    loaded = [row for row in rows if row.cell.load == PRECOPIES]
    small, large = (
        [row for row in rows if row.cell.phase == "ready" and row.cell.touched_mib == image]
        for image in (100, 2048)
    )
    return [
        _ratio(IDLE_MEDIAN, idle[4096], VMM_TOTAL, milliseconds, resamples),
        _tail(idle[4096], resamples),
        _slope(list(idle.values()), resamples),
        _ratio(FRESH_100, fresh, VMM_TOTAL, milliseconds, resamples),
        _ratio(PREALLOCATED_100, repeated, VMM_TOTAL, milliseconds, resamples),
        _in_a_row(ten, resamples),
        _stretch(STRETCH, [row for row in loaded if not row.cell.dirty_mib], resamples),
        _stretch(STRETCH_WRITING, [row for row in loaded if row.cell.dirty_mib], resamples),
        _ratio(READY_SMALL, small, READY_SECONDS, seconds, resamples),
        _ratio(READY_LARGE, large, READY_SECONDS, seconds, resamples),
    ]


def _is_idle(cell: Cell, size_mib: int) -> bool:
    return cell == Cell("1a", size_mib)


def _is_100_mib(cell: Cell, pattern: str) -> bool:
    return cell == Cell("1b", 2048, touched_mib=0, dirty_mib=100, pattern=pattern)


def _ratio(target: Target, rows: Sequence[Row], metric: str, show: Show, resamples: int) -> Finding:
    return ratio_finding(
        target,
        pairs_of(rows, metric, Series(FORKPOINT), Series(FLOOR)),
        pairs_of(rows, metric, Series(CONTROL), Series(FLOOR)),
        show,
        failed=_bad(rows),
        resamples=resamples,
    )


def _tail(rows: Sequence[Row], resamples: int) -> Finding:
    def judged(pairs: Sequence[Pair]) -> Estimate | None:
        if not pairs:
            return None
        return estimate([pairs], lambda drawn: ratio_of_quantiles(drawn[0], 0.99), resamples)

    pairs = pairs_of(rows, VMM_TOTAL, Series(FORKPOINT), Series(FLOOR))
    control = finite(pairs_of(rows, VMM_TOTAL, Series(CONTROL), Series(FLOOR)))
    return Finding(
        IDLE_P99,
        judged(pairs),
        control=judged(control),
        reference_median=_tail_of([pair.reference for pair in pairs]),
        subject_median=_tail_of([pair.subject for pair in pairs]),
        failed=_bad(rows),
    )


def _slope(by_size: Sequence[Sequence[Row]], resamples: int) -> Finding:
    def judged(role: str) -> Estimate | None:
        groups = [pairs_of(rows, VMM_TOTAL, Series(role), Series(FLOOR)) for rows in by_size]
        if not all(groups):
            return None
        return estimate(
            [finite(g) if role == CONTROL else g for g in groups], _ratio_of_slopes, resamples
        )

    def shown(role: str) -> str:
        groups = [Series(role).values(rows, VMM_TOTAL) for rows in by_size]
        if not all(groups):
            return ""
        return f"{slope([median(g.values()) for g in groups]):.0f} µs/GiB"

    return Finding(
        SLOPE,
        judged(FORKPOINT),
        control=judged(CONTROL),
        reference_median=shown(FLOOR),
        subject_median=shown(FORKPOINT),
        failed=sum(map(_bad, by_size)),
    )


def _ratio_of_slopes(groups: Sequence[Sequence[Pair]]) -> float:
    """Infinite where the reference does not grow, so that nothing is met by that."""
    reference = slope([median(pair.reference for pair in group) for group in groups])
    if reference <= 0:
        return math.inf
    return slope([median(pair.subject for pair in group) for group in groups]) / reference


def slope(medians: Sequence[float]) -> float:
    """Of the line of least squares through a median for each of SIZES_MIB; per GiB. Infinite where
    a median is."""
    if any(map(math.isinf, medians)):
        return math.inf
    sizes = [size / 1024 for size in SIZES_MIB]
    middle, height = sum(sizes) / len(sizes), sum(medians) / len(medians)
    over = sum((x - middle) * (y - height) for x, y in zip(sizes, medians, strict=True))
    return over / sum((x - middle) ** 2 for x in sizes)


def _in_a_row(rows: Sequence[Row], resamples: int) -> Finding:
    tenth = Series(FORKPOINT, number=TENTH)
    return ratio_finding(
        TEN,
        pairs_of(rows, VMM_TOTAL, tenth, Series(FORKPOINT, number=0)),
        pairs_of(rows, VMM_TOTAL, tenth, Series(FORKPOINT, number=TENTH - 1)),
        milliseconds,
        failed=_bad(rows),
        resamples=resamples,
    )


@dataclass(frozen=True, slots=True)
class _Stretched:
    subject: Pair
    reference: Pair


def _stretch(target: Target, rows: Sequence[Row], resamples: int) -> Finding:
    def judged(role: str) -> Estimate | None:
        def alone_and_beside(role: str) -> dict[Hashable, Pair]:
            alone = Series(role).values(rows, VMM_TOTAL)
            loaded = Series(role, PRECOPIES).values(rows, VMM_TOTAL)
            return {key: Pair(loaded[key], alone[key]) for key in alone if key in loaded}

        ones, others = alone_and_beside(role), alone_and_beside(FLOOR)
        samples = [
            _Stretched(ones[key], other)
            for key, other in others.items()
            if key in ones and not math.isinf(other.subject) and not math.isinf(ones[key].reference)
        ]
        return (
            estimate([samples], lambda drawn: _stretch_of(drawn[0]), resamples) if samples else None
        )

    def shown(role: str) -> str:
        alone = list(Series(role).values(rows, VMM_TOTAL).values())
        loaded = list(Series(role, PRECOPIES).values(rows, VMM_TOTAL).values())
        return f"{median(loaded) / median(alone):.2f} times" if alone and loaded else ""

    return Finding(
        target,
        judged(FORKPOINT),
        control=judged(CONTROL),
        reference_median=shown(FLOOR),
        subject_median=shown(FORKPOINT),
        failed=_bad(rows),
    )


def _stretch_of(samples: Sequence[_Stretched]) -> float:
    one = median(s.subject.subject for s in samples) / median(s.subject.reference for s in samples)
    other = median(s.reference.subject for s in samples) / median(
        s.reference.reference for s in samples
    )
    return one / other


def _bad(rows: Sequence[Row]) -> int:
    return sum(row.role == FORKPOINT and row.outcome is not Outcome.OK for row in rows)


def _tail_of(values: Sequence[float]) -> str:
    return milliseconds(quantile(values, 0.99)) if values else ""
