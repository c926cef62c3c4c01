"""The CSV of a run: a row a trial, failed ones included, each with where and with what it ran.

Rows are written as they come, so a run that is broken off keeps what it measured.
"""

from __future__ import annotations

import csv
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Self

from bench.machine import Machine
from bench.rounds import Trial

COLUMNS = (
    "run",
    "mode",
    "measure",
    "round",
    "position",
    "role",
    "start",
    "outcome",
    "metric",
    "value",
    "error",
    *Machine.COLUMNS,
)


class ResultLog:
    """The open CSV of one run. A trial with several figures is as many rows; one that failed is a
    row without a figure."""

    def __init__(self, folder: Path, mode: str, machine: Machine) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.run = f"{datetime.now(UTC):%Y%m%dT%H%M%SZ}-{mode}-{machine.commit[:12]}"
        self.path = folder / f"{self.run}.csv"
        self._mode = mode
        self._machine = machine
        self._file = self.path.open("x", newline="", encoding="utf-8")
        self._writer = csv.DictWriter(self._file, COLUMNS)
        self._writer.writeheader()
        self._file.flush()

    def add(self, trial: Trial) -> None:
        """Writes a trial."""
        for metric, value in trial.metrics.items() or [("", None)]:
            self._writer.writerow(
                {
                    "run": self.run,
                    "mode": self._mode,
                    "measure": trial.measure,
                    "round": trial.round,
                    "position": trial.position,
                    "role": trial.role,
                    "start": datetime.fromtimestamp(trial.start, UTC).isoformat(),
                    "outcome": "failed" if trial.error else "ok",
                    "metric": metric,
                    "value": "" if value is None else repr(value),
                    "error": trial.error,
                    **self._machine.row(),
                }
            )
        self._file.flush()

    def close(self) -> None:
        """Closes the file."""
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()
