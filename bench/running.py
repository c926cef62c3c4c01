"""One run: every measurement in turn, each on a server of its own, and what came of them.

A measurement that can't be made (the server doesn't start, there is too little memory) takes
nothing away from the others: its targets are `undecided`, with the reason beside them.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

from bench.findings import branch_findings, copy_findings, fork_findings, window_findings
from bench.measures.branching import BranchReady
from bench.measures.copying import Copying
from bench.measures.forking import Forking
from bench.measures.loop_lag import LoopLag
from bench.measures.windows import IdleWindows
from bench.plan import Plan
from bench.report import Report
from bench.results import ResultLog
from bench.rounds import (
    FORKPOINT,
    TRIAL_FAILURES,
    Limit,
    Measure,
    Trial,
    describe,
    raise_if_interrupted,
    run_rounds,
)
from bench.scratch import Scratch
from bench.served import Served
from bench.targets import Finding

LOOP_LAG = "loop_lag"
MEASURES = ("idle_diff", "copy", "branch_ready", "fork", LOOP_LAG)


class _ClosingMeasure(Measure, Protocol):
    def close(self) -> None: ...


@dataclass(frozen=True, slots=True)
class _Job:
    name: str
    limit: Limit
    make: Callable[[Served], _ClosingMeasure]
    findings: Callable[[Sequence[Trial]], list[Finding]]


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a run found out."""

    findings: list[Finding]
    loop_lag: Mapping[str, float] | None
    why_no_loop_lag: str


class Run:
    """What all measurements of one run share."""

    def __init__(
        self,
        plan: Plan,
        scratch: Scratch,
        firecracker: Path,
        kernel: Path,
        log: ResultLog,
        report: Report,
    ) -> None:
        self._plan = plan
        self._scratch = scratch
        self._firecracker = firecracker
        self._kernel = kernel
        self._log = log
        self._report = report

    def run(self, only: frozenset[str]) -> Outcome:
        """Makes the measurements that `only` names; the others' targets are undecided."""
        findings: list[Finding] = []
        for job in self._jobs():
            trials: list[Trial] = []
            note = "not asked for"
            if job.name in only:
                trials, note = self._measure(job)
            findings += [replace(f, note=note) for f in job.findings(trials)]
        row, why_not = self._loop_lag() if LOOP_LAG in only else (None, "not asked for")
        return Outcome(findings, row, why_not)

    def _jobs(self) -> tuple[_Job, ...]:
        plan, place, vmm, kernel = self._plan, self._scratch, self._firecracker, self._kernel
        return (
            _Job(
                "idle_diff",
                plan.windows,
                lambda served: IdleWindows(place, served, vmm, kernel),
                window_findings,
            ),
            _Job("copy", plan.copying, lambda served: Copying(place, served), copy_findings),
            _Job(
                "branch_ready",
                plan.branching,
                lambda served: BranchReady(place, served),
                branch_findings,
            ),
            _Job(
                "fork",
                plan.forking,
                lambda served: Forking(place, served, vmm, kernel),
                fork_findings,
            ),
        )

    def _measure(self, job: _Job) -> tuple[list[Trial], str]:
        """The trials of one measurement, and what has to be said beside its figures."""
        trials: list[Trial] = []

        def done(trial: Trial) -> None:
            trials.append(trial)
            self._log.add(trial)
            self._report.trial(trial)

        try:
            with (
                self._report.progress(job.name, job.limit) as tick,
                Served(self._scratch, self._firecracker, self._kernel) as served,
                closing(job.make(served)) as measure,
            ):
                run_rounds(measure, job.limit, done, tick)
        except TRIAL_FAILURES as error:
            raise_if_interrupted(error)
            self._report.say(f"{job.name} was broken off: {describe(error)}")
            return trials, f"broken off: {describe(error)}"
        return trials, ""

    def _loop_lag(self) -> tuple[Mapping[str, float] | None, str]:
        """The row, or why there is none."""
        self._report.say(f"{LOOP_LAG} ...")
        at, metrics, error = time.time(), dict[str, float](), ""
        try:
            with Served(self._scratch, self._firecracker, self._kernel) as served:
                lag = LoopLag(self._scratch, served, self._plan.lag_mib)
                if refusal := lag.refusal():
                    return None, refusal
                metrics = dict(lag.measure())
        except TRIAL_FAILURES as failure:
            raise_if_interrupted(failure)
            error = describe(failure)
        self._log.add(Trial(LOOP_LAG, 0, 0, FORKPOINT, at, metrics, error))
        return (None, error) if error else (metrics, "")
