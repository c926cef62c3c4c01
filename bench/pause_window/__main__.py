"""`python -m bench.pause_window`: `make bench-pause`."""

from __future__ import annotations

import os
import sys
from pathlib import Path

# Before gRPC is imported: processes are spawned beside an open channel.
os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")

from bench.pause_window.cells import PHASES
from bench.pause_window.report import write_report
from bench.pause_window.running import Runner
from bench.phase_command import Bench, run

BENCH = Bench(
    "python -m bench.pause_window",
    "Takes pause windows of real Firecracker in three ways, interleaved: the floor (plain sockets, "
    "one write), forkpoint (gRPC), and sequential-disk (one call after the other, staged on disk, "
    "whole-image copy).",
    Path(__file__).resolve().parent,
    PHASES,
    Runner,
    write_report,
)


def main(arguments: list[str] | None = None) -> int:
    """Runs the phases and writes the report; returns the exit code."""
    return run(BENCH, arguments)


if __name__ == "__main__":
    sys.exit(main())
