"""From rows to the targets: which trials answer which, by the rules of bench/README.md."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, replace

from bench.claiming import Show, finite, pairs_of, ratio_finding, seconds, shown_median, value_of
from bench.images.cells import (
    AGAIN,
    ALL,
    CHILD,
    DISK,
    FLATTEN,
    READY,
    REFLINK,
    ROW,
    ROW_LENGTH,
    ROWS,
    SIZES_MIB,
    XFS,
)
from bench.images.rows import BYTES_PER_SECOND, GROWN, SECONDS, WRITTEN, Row
from bench.rounds import CONTROL, FLOOR, FORKPOINT
from bench.rows import Outcome
from bench.stats import RESAMPLES, Estimate, Goal, Pair, estimate, ratio_of_medians
from bench.targets import Finding, Target

SMALLEST, LARGEST = SIZES_MIB[0], SIZES_MIB[-1]
LAST = ROW_LENGTH - 1
LATE, BEFORE_LATE, EARLY = range(95, 100), range(90, 95), range(5, 10)
"""Of a row: the branches up to the hundredth, those before them, and those up to the tenth."""

READY_4GIB = Target(
    "layered_ready_4gib",
    Goal(3.0, at_most=True),
    "BranchSandbox LAYERED to READY, 4 GiB populated, 50 MiB dirtied / write and fsync of 50 MiB",
)
BY_SIZE = Target(
    "layered_4gib_by_1gib",
    Goal(1.3, at_most=True),
    "the same / that of a source with 1 GiB in the same round (A/A: two sources with 1 GiB)",
)
HUNDREDTH = Target(
    "hundredth_by_tenth",
    Goal(1.3, at_most=True),
    "LAYERED branches of 10 MiB in a row, flatten policy off: the 96th to 100th / the 6th to 10th "
    "of the same row (A/A: / the 91st to 95th)",
)
GROWTH = Target(
    "row_growth",
    Goal(1.05, at_most=True, samples_needed=ROWS),  # bytes are counted, not timed
    "growth of the server's folder in such a row / bytes that the guest wrote in it",
)
FLATTEN_RATE = Target(
    "flatten_rate",
    Goal(0.9, at_most=False),
    "bytes per second: FlattenSnapshot / cp of the image that comes of it, and fsync",
)
FLATTEN_REFLINK = Target(
    "flatten_reflink",
    Goal(1.5, at_most=True),
    "FlattenSnapshot of 4 GiB with 50 MiB in the layer, XFS / FICLONE of the same image, the "
    "layer's extents written over it, fsync",
)
CHILDREN_REFLINK = Target(
    "children_10_reflink",
    Goal(1.3, at_most=True),
    "BranchSandbox LAYERED to 10 running children, 4 GiB populated, XFS / the sum of its floors",
)
CHILDREN_COPIED = Target(
    "children_10_copied",
    Goal(1.3, at_most=True),
    "the same on the disk without reflink, 256 MiB of the 4 GiB populated",
)
CHILDREN_COPIED_ALL = Target(
    "children_10_copied_4gib",
    Goal(1.3, at_most=True),
    "the same with all 4 GiB populated, of which each round copies three: too few for a verdict",
)
TARGETS = (
    READY_4GIB,
    BY_SIZE,
    HUNDREDTH,
    GROWTH,
    FLATTEN_RATE,
    FLATTEN_REFLINK,
    CHILDREN_REFLINK,
    CHILDREN_COPIED,
    CHILDREN_COPIED_ALL,
)


@dataclass(frozen=True, slots=True)
class Series:
    """The trials of one role and size in the rounds of a cell."""

    role: str
    source_mib: int | None = None
    """None: of any."""
    number: int = 0
    """Within their slot."""
    worst: float = math.inf
    """What stands for a trial that failed or was refused, or was not come to."""

    def values(self, rows: Sequence[Row], metric: str) -> Mapping[Hashable, float]:
        """By round."""
        values: dict[Hashable, float] = {}
        for row in rows:
            if row.role != self.role or self.source_mib not in (None, row.source_mib):
                continue
            bad = row.outcome is not Outcome.OK and row.number <= self.number
            if row.number == self.number or bad:
                value = value_of(row, metric, self.worst)
                if value is not None:
                    values[row.round] = value
        return values


def findings(rows: Sequence[Row], *, resamples: int = RESAMPLES) -> list[Finding]:
    """One for each target; without an estimate where there are no rows. `resamples`: of each
    interval."""

    def of(phase: str, disk: str = DISK, touched_mib: int | None = None) -> list[Row]:
        return [
            row
            for row in rows
            if row.cell.phase == phase
            and row.cell.disk == disk
            and touched_mib in (None, row.cell.touched_mib)
        ]

    def against(
        target: Target,
        of_what: Sequence[Row],
        subject: Series,
        reference: Series,
        control: Series,
        *,
        metric: str = SECONDS,
        show: Show = seconds,
    ) -> Finding:
        """`control`: what is held against the same reference."""
        return ratio_finding(
            target,
            pairs_of(of_what, metric, subject, reference),
            pairs_of(of_what, metric, control, reference),
            show,
            failed=bad(of_what),
            resamples=resamples,
        )

    floor, control, subject = Series(FLOOR), Series(CONTROL), Series(FORKPOINT)
    ready, row = of(READY), [one for one in of(ROW) if not one.cell.flatten_depth]
    return [
        against(READY_4GIB, ready, Series(FORKPOINT, LARGEST), floor, control),
        against(
            BY_SIZE,
            ready,
            Series(FORKPOINT, LARGEST),
            Series(FORKPOINT, SMALLEST),
            Series(AGAIN, SMALLEST),
        ),
        _hundredth(row, resamples),
        _growth(row, resamples),
        against(
            FLATTEN_RATE,
            of(FLATTEN),
            Series(FORKPOINT, worst=0.0),
            floor,
            control,
            metric=BYTES_PER_SECOND,
            show=rate,
        ),
        against(FLATTEN_REFLINK, of(REFLINK, XFS), subject, floor, control),
        against(CHILDREN_REFLINK, of(CHILD, XFS), subject, floor, control),
        against(CHILDREN_COPIED, of(CHILD, touched_mib=256), subject, floor, control),
        against(CHILDREN_COPIED_ALL, of(CHILD, touched_mib=ALL), subject, floor, control),
    ]


def _hundredth(rows: Sequence[Row], resamples: int) -> Finding:
    def against(others: range) -> dict[Hashable, list[Pair]]:
        """The pairs of each row, which have its minute in common."""
        pairs: defaultdict[Hashable, list[Pair]] = defaultdict(list)
        for late, other in zip(LATE, others, strict=True):
            ones = Series(FORKPOINT, number=late).values(rows, SECONDS)
            for key, reference in Series(FORKPOINT, number=other).values(rows, SECONDS).items():
                if key in ones and not math.isinf(reference):
                    pairs[key].append(Pair(ones[key], reference))
        return pairs

    def judged(by_row: Sequence[Sequence[Pair]]) -> Estimate | None:
        """The interval draws rows, not pairs."""
        if not by_row:
            return None
        drawn = estimate([by_row], lambda groups: ratio_of_medians(_all(groups[0])), resamples)
        return replace(drawn, samples=len(_all(by_row)))

    pairs = list(against(EARLY).values())
    control = [finite(of_row) for of_row in against(BEFORE_LATE).values()]
    return Finding(
        HUNDREDTH,
        judged(pairs),
        control=judged([of_row for of_row in control if of_row]),
        reference_median=shown_median([pair.reference for pair in _all(pairs)], seconds),
        subject_median=shown_median([pair.subject for pair in _all(pairs)], seconds),
        failed=bad(rows),
    )


def _all(by_row: Sequence[Sequence[Pair]]) -> list[Pair]:
    return [pair for of_row in by_row for pair in of_row]


def _growth(rows: Sequence[Row], resamples: int) -> Finding:
    """Of a row that was broken off nothing is known of its end: it counts as having no bound."""
    last = Series(FORKPOINT, number=LAST)
    grown, written = last.values(rows, GROWN), last.values(rows, WRITTEN)
    whole = [value for value in written.values() if value < math.inf]
    # Each row writes as much: what is not known of one is that of another.
    pairs = [Pair(grown[key], whole[0]) for key in grown] if whole else []
    return ratio_finding(
        GROWTH,
        pairs,
        [],
        mebibytes,
        failed=bad(rows),
        resamples=resamples,
    )


def bad(rows: Sequence[Row]) -> int:
    """Trials of forkpoint that failed or were refused."""
    return sum(row.role == FORKPOINT and row.outcome is not Outcome.OK for row in rows)


def rate(value: float) -> str:
    """Of bytes per second."""
    return f"{value / 2**20:.0f} MiB/s"


def mebibytes(value: float) -> str:
    """Of bytes."""
    return f"{value / 2**20:.1f} MiB"
