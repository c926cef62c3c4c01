"""`python -m bench.images`: `make bench-images`."""

from __future__ import annotations

import os
import sys
from pathlib import Path

# Before gRPC is imported: processes are spawned beside an open channel.
os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")

from bench.images.cells import PHASES
from bench.images.report import write_report
from bench.images.running import Runner
from bench.phase_command import Bench, run

BENCH = Bench(
    "python -m bench.images",
    "Takes branches by layers and flat, flattens and branches to children on real Firecracker, "
    "through forkpoint and beside what the same bytes cost by write, cp and FICLONE, interleaved.",
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
