"""What the bench claims: intervals that hold what is true, and verdicts that need it."""

import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench.stats import (
    PAIRS_NEEDED,
    Estimate,
    Goal,
    Pair,
    Verdict,
    estimate_ratio,
    estimate_worst,
    ratio_of_medians,
)

AT_MOST = Goal(1.1, at_most=True)
AT_LEAST = Goal(0.9, at_most=False)


def estimate(low: float, high: float, samples: int = PAIRS_NEEDED) -> Estimate:
    return Estimate((low + high) / 2, low, high, samples)


@pytest.mark.parametrize(
    ("goal", "low", "high", "verdict"),
    [
        (AT_MOST, 0.9, 1.1, Verdict.MET),
        (AT_MOST, 0.9, 1.11, Verdict.UNDECIDED),
        (AT_MOST, 1.1, 1.2, Verdict.UNDECIDED),
        (AT_MOST, 1.11, 1.2, Verdict.MISSED),
        (AT_LEAST, 0.9, 1.5, Verdict.MET),
        (AT_LEAST, 0.8, 0.9, Verdict.UNDECIDED),
        (AT_LEAST, 0.89, 1.0, Verdict.UNDECIDED),
        (AT_LEAST, 0.7, 0.89, Verdict.MISSED),
    ],
)
def test_the_whole_interval_decides(goal: Goal, low: float, high: float, verdict: Verdict) -> None:
    assert goal.verdict(estimate(low, high)) is verdict


@pytest.mark.parametrize(("low", "high"), [(0.1, 0.2), (5.0, 6.0)])
def test_too_few_pairs_decide_nothing(low: float, high: float) -> None:
    assert AT_MOST.verdict(estimate(low, high, PAIRS_NEEDED - 1)) is Verdict.UNDECIDED
    assert AT_MOST.verdict(estimate(low, high)) is not Verdict.UNDECIDED


def test_what_was_not_measured_is_undecided() -> None:
    assert AT_MOST.verdict(None) is Verdict.UNDECIDED


def test_a_goal_is_written_with_its_side_and_unit() -> None:
    assert [str(AT_MOST), str(AT_LEAST)] == ["<=1.1", ">=0.9"]
    assert str(Goal(120, at_most=True, unit="MB")) == "<=120MB"


def test_the_ratio_is_of_the_medians() -> None:
    pairs = [Pair(2, 1), Pair(30, 10), Pair(6, 3)]
    assert ratio_of_medians(pairs) == 6 / 3


def test_no_pairs_have_no_ratio() -> None:
    with pytest.raises(ValueError, match="no pairs"):
        estimate_ratio([])


@pytest.mark.parametrize("reference", [0.0, math.inf])
def test_a_reference_without_a_size_has_no_ratio(reference: float) -> None:
    with pytest.raises(ValueError, match="median"):
        ratio_of_medians([Pair(1, reference)])


def test_a_trial_that_failed_counts_as_slow_however_few_succeeded() -> None:
    pairs = [Pair(1, 1)] * 40 + [Pair(math.inf, 1)] * 160
    found = estimate_ratio(pairs, resamples=200)
    assert found.low == math.inf
    assert AT_MOST.verdict(found) is Verdict.MISSED


def test_the_interval_of_the_same_pairs_is_the_same() -> None:
    draw = random.Random(1)
    pairs = [Pair(draw.gauss(10, 1), draw.gauss(10, 1)) for _ in range(50)]
    assert estimate_ratio(pairs, resamples=300) == estimate_ratio(pairs, resamples=300)


def test_the_interval_holds_the_truth_about_as_often_as_it_says() -> None:
    """95 % of the intervals hold 1.2; of 100 fewer than 86 would be a chance of 1 in 10,000."""
    draw = random.Random(7)
    held = 0
    for seed in range(100):
        pairs = [
            Pair(1.2 * draw.lognormvariate(1, 0.3), draw.lognormvariate(1, 0.3)) for _ in range(60)
        ]
        found = estimate_ratio(pairs, resamples=200, seed=seed)
        held += found.low <= 1.2 <= found.high
    assert held >= 86


def test_a_drift_that_both_share_does_not_widen_the_interval() -> None:
    draw = random.Random(3)
    steady, drifting = [], []
    for number in range(200):
        pair = Pair(draw.gauss(10, 0.2), draw.gauss(10, 0.2))
        drift = 1 + number / 200
        steady.append(pair)
        drifting.append(Pair(pair.subject * drift, pair.reference * drift))
    narrow = estimate_ratio(steady, resamples=400)
    wide = estimate_ratio(drifting, resamples=400)
    assert wide.high - wide.low < 4 * (narrow.high - narrow.low)


@given(
    st.lists(
        st.tuples(st.floats(0.1, 100), st.floats(0.1, 100)).map(lambda both: Pair(*both)),
        min_size=1,
        max_size=30,
    )
)
def test_the_interval_is_ordered_and_within_what_was_seen(pairs: list[Pair]) -> None:
    found = estimate_ratio(pairs, resamples=50)
    highest = max(p.subject for p in pairs) / min(p.reference for p in pairs)
    lowest = min(p.subject for p in pairs) / max(p.reference for p in pairs)
    assert lowest * 0.999 <= found.low <= found.high <= highest * 1.001


def test_a_bound_that_must_never_be_passed_is_judged_by_the_worst() -> None:
    found = estimate_worst([90.0] * 199 + [121.0])
    goal = Goal(120, at_most=True)
    assert found == Estimate(121.0, 90.0, 121.0, 200)
    assert goal.verdict(found) is Verdict.UNDECIDED
    assert goal.verdict(estimate_worst([90.0] * 200)) is Verdict.MET
    assert goal.verdict(estimate_worst([121.0] * 200)) is Verdict.MISSED
