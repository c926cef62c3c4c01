"""The targets of the bench: their names and goals, and the line each ends with."""

from __future__ import annotations

from dataclasses import dataclass

from bench.stats import Estimate, Goal, Verdict


@dataclass(frozen=True, slots=True)
class Target:
    """One figure with a goal."""

    name: str
    goal: Goal
    compares: str
    """What is divided by what, in words."""


IDLE_DIFF_WINDOW = Target(
    "idle_diff_window",
    Goal(1.1, at_most=True),
    "Firecracker's own pause + snapshot + resume: through forkpoint / by plain sockets",
)
IDLE_DIFF_TOTAL = Target(
    "idle_diff_total",
    Goal(1.2, at_most=True),
    "first byte of the pause to the reply of the resume: the server's clock / the floor's",
)
COPY = Target(
    "copy",
    Goal(0.9, at_most=False),
    "bytes per second: pre-copy, merge and fsync / cp of as many bytes without a hole, and fsync",
)
BRANCH_READY = Target(
    "branch_ready",
    Goal(3.0, at_most=True),
    "BranchSandbox to READY with 100 MiB dirtied / cp of 100 MiB and fsync",
)
FORK_100 = Target(
    "fork_100",
    Goal(1.5, at_most=True),
    "ForkSandboxes of 100 to READY / 100 loads by plain sockets",
)
DELETE_100 = Target(
    "delete_100",
    Goal(1.0, at_most=True),
    "100 concurrent DeleteSandbox calls / the fork that made them",
)
RESIDENT = Target(
    "resident",
    Goal(120, at_most=True, unit="MB"),
    "largest VmRSS of the server with 100 idle sandboxes",
)

TARGETS = (
    IDLE_DIFF_WINDOW,
    IDLE_DIFF_TOTAL,
    COPY,
    BRANCH_READY,
    FORK_100,
    DELETE_100,
    RESIDENT,
)


@dataclass(frozen=True, slots=True)
class Finding:
    """What was found out about a target."""

    target: Target
    estimate: Estimate | None
    """None where it could not be measured."""
    control: Estimate | None = None
    """The floor against itself, in the same rounds."""
    reference_median: str = ""
    subject_median: str = ""
    failed: int = 0
    """Trials of forkpoint that failed; they count as infinitely slow."""
    note: str = ""

    @property
    def verdict(self) -> Verdict:
        """Whether the goal is met."""
        return self.target.goal.verdict(self.estimate)

    def line(self) -> str:
        """The line for scripts: `target NAME value VALUE goal GOAL VERDICT`; VALUE is `-` where
        nothing was measured."""
        estimate, goal = self.estimate, self.target.goal
        value = "-" if estimate is None else f"{estimate.value:.3f}{goal.unit}"
        return f"target {self.target.name} value {value} goal {goal} {self.verdict}"
