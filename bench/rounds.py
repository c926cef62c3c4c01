"""Interleaving: the floor, the floor once more, and forkpoint, side by side in every round.

One round measures three roles next to each other. `forkpoint` against `floor` is the pair that is
judged; `control` (the floor again) against `floor` is the A/A pair of the same round: what it shows
beside 1.0 is noise. The order changes with every round, so that each goes first as often as the
other, and none always follows the one that leaves the machine's caches cold.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import grpc

from bench.floor import FloorError
from bench.served import ServedError
from bench.stats import Pair

FLOOR, CONTROL, FORKPOINT = "floor", "control", "forkpoint"
ORDERS = (
    (FLOOR, FORKPOINT, CONTROL),
    (FORKPOINT, CONTROL, FLOOR),
    (CONTROL, FLOOR, FORKPOINT),
    (FORKPOINT, FLOOR, CONTROL),
    (FLOOR, CONTROL, FORKPOINT),
    (CONTROL, FORKPOINT, FLOOR),
)
"""All there are, so that floor and forkpoint alternate in going first, and floor and control go
first equally often."""

FAILURES_IN_A_ROW = 5
"""After so many a measurement is given up: it would only wait for one time limit after another."""

TRIAL_FAILURES = (FloorError, ServedError, grpc.RpcError, OSError, TimeoutError)
"""What a trial may raise: a failed trial is a row, too."""


@dataclass(frozen=True, slots=True)
class Trial:
    """One measurement of one role."""

    measure: str
    round: int
    position: int
    """0, 1 or 2 within the round."""
    role: str
    start: float
    """Seconds since the epoch."""
    metrics: Mapping[str, float]
    """By name, which ends with the unit; empty where it failed."""
    error: str = ""


class Measure(Protocol):
    """Something that is measured in rounds."""

    name: str
    roles: frozenset[str]

    def prepare(self, round_number: int, *, afresh: bool) -> None:
        """Makes ready for a round, outside of all clocks. `afresh`: a trial failed before, so
        what there is may be in any state."""

    def measure(self, role: str) -> Mapping[str, float]:
        """One trial."""


@dataclass(frozen=True, slots=True)
class Limit:
    """When a measurement has enough rounds."""

    rounds: int
    seconds: float = math.inf


def run_rounds(
    measure: Measure, limit: Limit, done: Callable[[Trial], None], tick: Callable[[int], None]
) -> list[Trial]:
    """Measures until the limit is reached; at least one round. `done` gets each trial as soon as
    it is over, `tick` the number of finished rounds."""
    trials: list[Trial] = []
    end = time.monotonic() + limit.seconds
    failures, afresh = 0, False
    for number in range(limit.rounds):
        if number and time.monotonic() >= end:
            break
        failed = False
        try:
            measure.prepare(number, afresh=afresh)
        except TRIAL_FAILURES as error:
            raise_if_interrupted(error)
            trial = Trial(measure.name, number, 0, FORKPOINT, time.time(), {}, describe(error))
            trials.append(trial)
            done(trial)
            failed = True
        else:
            for position, role in enumerate(_order(number, measure.roles)):
                trial = _trial(measure, number, position, role)
                trials.append(trial)
                done(trial)
                failed = failed or bool(trial.error)
        tick(number + 1)
        afresh = failed
        failures = failures + 1 if failed else 0
        if failures == FAILURES_IN_A_ROW:
            break
    return trials


def _order(number: int, roles: frozenset[str]) -> list[str]:
    return [role for role in ORDERS[number % len(ORDERS)] if role in roles]


def _trial(measure: Measure, number: int, position: int, role: str) -> Trial:
    start, metrics, error = time.time(), dict[str, float](), ""
    try:
        metrics = dict(measure.measure(role))
    except TRIAL_FAILURES as failure:
        raise_if_interrupted(failure)
        error = describe(failure)
    return Trial(measure.name, number, position, role, start, metrics, error)


def raise_if_interrupted(error: BaseException) -> None:
    """Raises KeyboardInterrupt where this error came of cleaning up after one: a Ctrl-C ends the
    run, whatever it left half done."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, KeyboardInterrupt):
            raise KeyboardInterrupt from error
        seen = seen.__context__


def describe(error: BaseException) -> str:
    """An error in one line."""
    text = f"{type(error).__name__}: {error}"
    if isinstance(error, grpc.RpcError):  # what a stub raises is a grpc.Call as well
        code, details = getattr(error, "code", None), getattr(error, "details", None)
        if callable(code) and callable(details):
            text = f"{code().name}: {details()}"
    return " ".join(text.split())


def pairs_of(
    trials: Sequence[Trial],
    metric: str,
    *,
    subject: str = FORKPOINT,
    reference: str = FLOOR,
    worst: float = math.inf,
) -> list[Pair]:
    """The pairs of two roles in the same rounds. A subject that failed has the value `worst`; a
    round whose reference failed says nothing and is left out."""
    rounds: dict[int, dict[str, Trial]] = {}
    for trial in trials:
        rounds.setdefault(trial.round, {})[trial.role] = trial
    pairs = []
    for roles in rounds.values():
        one, other = roles.get(subject), roles.get(reference)
        if one is None or other is None or other.error:
            continue
        value = worst if one.error else one.metrics[metric]
        pairs.append(Pair(value, other.metrics[metric]))
    return pairs


def failed(trials: Sequence[Trial], role: str = FORKPOINT) -> int:
    """How many trials of a role failed."""
    return sum(trial.role == role and bool(trial.error) for trial in trials)
