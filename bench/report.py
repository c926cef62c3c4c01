"""What a person sees: progress while it runs, a table at the end, and the lines for scripts."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from bench.rounds import Limit, Trial
from bench.stats import Estimate
from bench.targets import Finding

REFRESH_SECONDS = 0.25


class Report:
    """One console."""

    def __init__(self, console: Console) -> None:
        self._console = console

    def say(self, line: str) -> None:
        """A line."""
        self._console.print(line, markup=False, highlight=False, soft_wrap=True)

    def trial(self, trial: Trial) -> None:
        """Says that a trial failed."""
        if trial.error:
            self.say(f"  {trial.measure} {trial.round} {trial.role} failed: {trial.error}")

    @contextmanager
    def progress(self, name: str, limit: Limit) -> Iterator[Callable[[int], None]]:
        """A bar, moved by calling what is yielded with the number of finished rounds.

        It is drawn between the rounds only: a thread that draws would be one more on the two or
        four processors that are measured.
        """
        started = time.monotonic()
        drawn = 0.0
        if not self._console.is_terminal:
            self.say(f"{name} ...")
        with Progress(
            TextColumn("{task.description:<13}"),
            BarColumn(),
            TextColumn("{task.fields[rounds]} rounds"),
            TimeElapsedColumn(),
            console=self._console,
            auto_refresh=False,
            disable=not self._console.is_terminal,
        ) as bar:
            task = bar.add_task(name, total=1.0, rounds=0)
            bar.refresh()

            def tick(rounds: int) -> None:
                nonlocal drawn
                now = time.monotonic()
                share = max(rounds / limit.rounds, (now - started) / limit.seconds)
                bar.update(task, completed=min(1.0, share), rounds=rounds)
                if now - drawn >= REFRESH_SECONDS:
                    drawn = now
                    bar.refresh()

            yield tick
            bar.refresh()

    def table(self, findings: Sequence[Finding]) -> None:
        """All findings, in 80 columns, then what is compared with what."""
        table = Table(box=None, padding=(0, 1, 0, 0), title_justify="left")
        for heading in ("target", "floor", "forkpoint"):
            table.add_column(heading, no_wrap=True)
        for heading in ("ratio [95 %]", "A/A [95 %]", "n"):
            table.add_column(heading, justify="right", no_wrap=True)
        for finding in findings:
            table.add_row(
                finding.target.name,
                finding.reference_median or "-",
                finding.subject_median or "-",
                interval(finding.estimate),
                interval(finding.control),
                str(0 if finding.estimate is None else finding.estimate.samples),
            )
        self._console.print(table)
        for finding in findings:
            told = finding.note or finding.target.compares
            failed = f"; {finding.failed} trials failed" if finding.failed else ""
            self.say(f"{finding.target.name}: {told}{failed}")

    def loop_lag(self, row: Mapping[str, float] | None, why_not: str) -> None:
        """The row without a goal."""
        if row is None:
            self.say(f"loop_lag: not measured: {why_not}")
            return
        figures = {
            kind: f"worst {row[f'{kind}_worst_seconds'] * 1000:.1f} ms, median "
            f"{row[f'{kind}_median_seconds'] * 1000:.2f} ms of {row[f'{kind}_calls']:.0f}"
            for kind in ("precopies", "cps", "idle")
        }
        self.say(
            f"loop_lag: GetSandbox, from outside: {figures['precopies']} in "
            f"{row['precopies_seconds']:.1f} s of two concurrent pre-copies of sources with 4 GiB "
            f"({row['precopied_bytes'] / 2**30:.1f} GiB of data in all); beside two cps instead: "
            f"{figures['cps']}; idle: {figures['idle']}"
        )

    def lines(self, findings: Sequence[Finding]) -> None:
        """One line a target, the last thing that is said."""
        for finding in findings:
            self.say(finding.line())


def interval(estimate: Estimate | None) -> str:
    """A figure and its interval."""
    if estimate is None:
        return "-"
    return f"{estimate.value:.2f} [{estimate.low:.2f},{estimate.high:.2f}]"
