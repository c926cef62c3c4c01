"""RESULTS.md of a bench in phases: the parts that all such reports have."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any, TypeVar

from bench.report import interval
from bench.rows import Outcome, TrialRow
from bench.summary import Group, Spread, grouped, trials
from bench.targets import Finding

REPORT, PLOTS = "RESULTS.md", "plots"

R = TypeVar("R", bound=TrialRow[Any])


def targets_section(found: Sequence[Finding], rules: str) -> str:
    """What was found out about each target. `rules`: how a verdict comes about."""
    lines = [
        (
            "target",
            "what",
            "floor",
            "forkpoint",
            "ratio [95 %]",
            "A/A [95 %]",
            "n",
            "bad",
            "goal",
            "",
        )
    ]
    for finding in found:
        samples = 0 if finding.estimate is None else finding.estimate.samples
        cells = (
            f"`{finding.target.name}`",
            finding.target.compares,
            finding.reference_median or "-",
            finding.subject_median or "-",
            interval(finding.estimate),
            interval(finding.control),
            str(samples),
            str(finding.failed),
            str(finding.target.goal),
            f"**{finding.verdict}**",
        )
        lines.append(cells)
    told = "\n".join(finding.line() for finding in found)
    return f"## Targets\n\n{markdown_table(lines)}\n{rules}\n```text\n{told}\n```\n"


def runs_section(everything: Mapping[str, Sequence[R]], rows: Mapping[str, Sequence[R]]) -> str:
    """Where and when the rows were taken, all of them and those that are told of, by phase."""
    lines = [("phase", "taken", "commit", "machine", "versions", "trials", "failed", "refused")]
    left_out = 0
    for name, of in rows.items():
        left_out += trials(everything[name]) - trials(of)
        if not of:
            continue
        group, machine = Group(of), of[0].machine
        first, last = min(row.start for row in of), max(row.start for row in of)
        lines.append(
            (
                f"[{name}](results/{name}.csv)",
                _span(first, last),
                f"`{machine['commit'][:12]}{'+' if machine['commit'].endswith('+') else ''}`",
                _host(machine),
                _versions(machine),
                str(group.trials),
                str(group.count(Outcome.FAILED)),
                str(group.count(Outcome.REFUSED)),
            )
        )
    total = sum(trials(of) for of in rows.values())
    note = f"{total} trials in all. A commit with `+`: the tree differed from it.\n"
    if left_out:
        note += f"{left_out} trials of other commits or machines are in the CSVs and not here.\n"
    missing = [name for name, of in rows.items() if not of]
    if missing:
        note += f"Not measured: {', '.join(missing)}.\n"
    return f"## Where and when\n\n{markdown_table(lines)}\n{note}"


def _span(first: float, last: float) -> str:
    start, end = (datetime.fromtimestamp(at, UTC) for at in (first, last))
    return f"{start:%Y-%m-%d %H:%M} to {end:%H:%M} UTC"


def _host(machine: Mapping[str, str]) -> str:
    return (
        f"{machine['cpus']} CPUs ({machine['cpu']}), {machine['memory_mib']} MiB, kernel "
        f"{machine['kernel']}, {machine['filesystem']}"
    )


def _versions(machine: Mapping[str, str]) -> str:
    return (
        f"Firecracker {machine['firecracker']}, forkpointd {machine['forkpointd']}, Python "
        f"{machine['python']}, grpcio {machine['grpcio']}"
    )


def troubles(rows: Sequence[TrialRow[Any]]) -> str:
    """The errors of a phase, each once."""
    bad = grouped(
        [row for row in rows if row.outcome is not Outcome.OK],
        lambda row: (row.outcome.value, row.role, str(row.cell), row.error),
    )
    if not bad:
        return ""
    lines = [
        f"- {role} {outcome} {len(group.rows)} times ({cell}): {error}"
        for (outcome, role, cell, error), group in bad.items()
    ]
    return "\nFailed and refused trials:\n\n" + "\n".join(lines) + "\n"


def spread_text(spread: Spread | None, scale: float, digits: int) -> str:
    """Median, 10th and 90th percentile; empty where there is none."""
    if spread is None:
        return ""
    middle, low, high = (f"{v / scale:.{digits}f}" for v in (spread.median, spread.p10, spread.p90))
    return f"{middle} [{low}, {high}]"


def middle_text(spread: Spread | None, scale: float, digits: int) -> str:
    """The median alone."""
    return "" if spread is None else f"{spread.median / scale:.{digits}f}"


def markdown_table(lines: Sequence[Sequence[str]]) -> str:
    """The first line is the head."""
    head, *body = [
        "| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines
    ]
    rule = "|" + " --- |" * len(lines[0])
    return "\n".join([head, rule, *body]) + "\n"
