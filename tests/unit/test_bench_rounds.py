"""Rounds: who goes first, what a failed trial is worth, when a measurement is given up."""

import itertools
import math
from collections import Counter
from collections.abc import Mapping

import pytest

from bench.findings import copy_findings, fork_findings, window_findings
from bench.floor import FloorError
from bench.rounds import (
    CONTROL,
    FAILURES_IN_A_ROW,
    FLOOR,
    FORKPOINT,
    ORDERS,
    Limit,
    Trial,
    failed,
    pairs_of,
    run_rounds,
)
from bench.stats import PAIRS_NEEDED, Pair, Verdict


class Recorded:
    """A measure that tells what was asked of it, and fails where it is told to."""

    name = "recorded"
    roles = frozenset({FLOOR, CONTROL, FORKPOINT})

    def __init__(self, fails: Mapping[str, set[int]] | None = None) -> None:
        self.fails = fails or {}
        self.asked: list[str] = []
        self.afresh: list[bool] = []
        self.round = -1

    def prepare(self, round_number: int, *, afresh: bool) -> None:
        self.round = round_number
        self.afresh.append(afresh)
        if round_number in self.fails.get("prepare", ()):
            raise FloorError("there is nothing to measure")

    def measure(self, role: str) -> Mapping[str, float]:
        self.asked.append(role)
        if self.round in self.fails.get(role, ()):
            raise FloorError(f"{role} failed\nin round {self.round}")
        return {"seconds": float(len(self.asked))}


def run(measure: Recorded, rounds: int) -> list[Trial]:
    told: list[Trial] = []
    trials = run_rounds(measure, Limit(rounds), told.append, lambda _: None)
    assert told == trials
    return trials


def trial(role: str, number: int, metrics: Mapping[str, float], error: str = "") -> Trial:
    return Trial("m", number, 0, role, 0.0, metrics, error)


def test_floor_and_forkpoint_alternate_in_going_first() -> None:
    first = [order.index(FLOOR) < order.index(FORKPOINT) for order in ORDERS * 2]
    assert all(one != other for one, other in itertools.pairwise(first))


def test_floor_and_control_go_first_equally_often_and_each_has_each_place() -> None:
    first = sum(order.index(FLOOR) < order.index(CONTROL) for order in ORDERS)
    assert first == len(ORDERS) / 2
    assert set(Counter(role for order in ORDERS for role in enumerate(order)).values()) == {2}


def test_every_round_measures_every_role_once() -> None:
    measure = Recorded()
    trials = run(measure, 7)
    assert len(trials) == 21
    for number in range(7):
        roles = [t.role for t in trials if t.round == number]
        assert tuple(roles) == ORDERS[number % len(ORDERS)]
    assert measure.afresh == [False] * 7


def test_time_ends_a_measurement_but_not_before_its_first_round() -> None:
    measure = Recorded()
    run_rounds(measure, Limit(100, seconds=0), lambda _: None, lambda _: None)
    assert len(measure.asked) == 3


def test_a_failed_trial_is_a_row_and_the_next_round_begins_afresh() -> None:
    measure = Recorded({FORKPOINT: {1}})
    trials = run(measure, 4)
    assert [t.round for t in trials if t.error] == [1]
    assert failed(trials) == 1
    assert next(t.error for t in trials if t.error) == "FloorError: forkpoint failed in round 1"
    assert measure.afresh == [False, False, True, False]


def test_what_can_not_be_prepared_counts_against_forkpoint() -> None:
    trials = run(Recorded({"prepare": {0}}), 2)
    assert (trials[0].role, trials[0].metrics) == (FORKPOINT, {})
    assert failed(trials) == 1


def test_a_measurement_that_only_fails_is_given_up() -> None:
    trials = run(Recorded({FORKPOINT: set(range(100))}), 100)
    assert trials[-1].round == FAILURES_IN_A_ROW - 1


def test_failures_now_and_then_don_t_give_it_up() -> None:
    odd = set(range(1, 30, 2))
    assert run(Recorded({FORKPOINT: odd}), 30)[-1].round == 29


def test_a_failed_subject_is_infinitely_slow_and_a_failed_reference_says_nothing() -> None:
    trials = [
        trial(FLOOR, 0, {"s": 1.0}),
        trial(FORKPOINT, 0, {"s": 2.0}),
        trial(FLOOR, 1, {"s": 3.0}),
        trial(FORKPOINT, 1, {}, "no"),
        trial(FLOOR, 2, {}, "no"),
        trial(FORKPOINT, 2, {"s": 4.0}),
        trial(FORKPOINT, 3, {"s": 5.0}),
    ]
    assert pairs_of(trials, "s") == [Pair(2.0, 1.0), Pair(math.inf, 3.0)]


def test_a_rate_that_was_never_reached_is_zero() -> None:
    trials = [trial(FLOOR, n, {"bytes_per_second": 1e9}) for n in range(PAIRS_NEEDED)]
    trials += [trial(FORKPOINT, n, {}, "no") for n in range(PAIRS_NEEDED)]
    (found,) = copy_findings(trials)
    assert found.line() == "target copy value 0.000 goal >=0.9 missed"
    assert found.failed == PAIRS_NEEDED


def test_a_delete_is_compared_with_the_fork_of_the_same_trial() -> None:
    figures = {"fork_seconds": 0.4, "delete_seconds": 0.1, "resident_bytes": 70e6}
    floor = {"fork_seconds": 0.2, "delete_seconds": 0.1}
    trials = [trial(FORKPOINT, n, figures) for n in range(PAIRS_NEEDED)]
    trials += [trial(FLOOR, n, floor) for n in range(PAIRS_NEEDED)]
    assert [found.line() for found in fork_findings(trials)] == [
        "target fork_100 value 2.000 goal <=1.5 missed",
        "target delete_100 value 0.250 goal <=1 met",
        "target resident value 70.000MB goal <=120MB met",
    ]


def test_nothing_measured_is_said_so_and_undecided() -> None:
    assert [found.line() for found in window_findings([])] == [
        "target idle_diff_window value - goal <=1.1 undecided",
        "target idle_diff_total value - goal <=1.2 undecided",
    ]
    assert all(found.verdict is Verdict.UNDECIDED for found in fork_findings([]))


def test_the_control_is_the_floor_against_itself() -> None:
    trials = []
    for number in range(PAIRS_NEEDED):
        for role, value in ((FLOOR, 100.0), (CONTROL, 90.0), (FORKPOINT, 105.0)):
            trials.append(trial(role, number, {"vmm_total_us": value, "total_us": value}))
    window, _ = window_findings(trials)
    assert window.estimate is not None and window.estimate.value == 1.05
    assert window.control is not None and window.control.value == 0.9
    assert window.verdict is Verdict.MET


def test_a_failure_of_cleaning_up_after_a_ctrl_c_ends_the_run() -> None:
    class Interrupted(Recorded):
        def measure(self, role: str) -> Mapping[str, float]:
            try:
                raise KeyboardInterrupt
            finally:
                raise FloorError("what it made is gone already")

    with pytest.raises(KeyboardInterrupt):
        run(Interrupted(), 3)
