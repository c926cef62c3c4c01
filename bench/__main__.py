"""`python -m bench quick` and `python -m bench full`: `make bench-quick` and `make bench`.

Exit codes: 0 the bench ran (whatever it found, and also where there is no KVM to run it on); 1 it
could not run; 2 wrong usage; 130 it was broken off.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import time
from pathlib import Path

# Before gRPC is imported: processes are spawned beside an open channel.
os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")

from rich.console import Console

from bench.findings import branch_findings, copy_findings, fork_findings, window_findings
from bench.machine import REPOSITORY, Machine, kvm_refusal
from bench.plan import PLANS, Plan
from bench.report import Report
from bench.results import ResultLog
from bench.running import MEASURES, Run
from bench.scratch import ScratchError, scratch
from forkpointd.vmm.fetch import FirecrackerUnavailableError, ensure_firecracker
from forkpointd.witness.build import WitnessBuildError, cached_witness

RESULTS = REPOSITORY / "bench" / "results"
INTERRUPTED = 128 + signal.SIGINT


def main(arguments: list[str] | None = None) -> int:
    """Runs the bench; returns its exit code."""
    options = _parser().parse_args(arguments)
    report = Report(Console())
    plan = PLANS[options.mode]
    report.say(
        f"forkpoint bench, {plan.mode}: real Firecracker by plain sockets and through forkpoint"
        + ("; takes about three minutes" if plan.mode == "quick" else "; has no time limit")
    )
    if refusal := kvm_refusal():
        report.say(f"skipped: {refusal}. The bench measures real Firecracker, which needs KVM")
        _end_undecided(report)
        return 0
    try:
        return _run(plan, options, report)
    except (ScratchError, FirecrackerUnavailableError, WitnessBuildError) as error:
        report.say(f"the bench can't run: {error}")
        return 1
    except KeyboardInterrupt:
        report.say("broken off; nothing is left running. What was measured is in the CSV")
        return INTERRUPTED


def _run(plan: Plan, options: argparse.Namespace, report: Report) -> int:
    firecracker = options.firecracker or ensure_firecracker(report.say)
    kernel = cached_witness()
    started = time.monotonic()
    with scratch(options.folder) as place:
        machine = Machine.here(firecracker, place.disk)
        report.say(
            f"Firecracker {machine.firecracker}, kernel {machine.kernel}, {machine.cpus} CPUs "
            f"({machine.cpu}), {machine.memory_mib} MiB; images on {machine.filesystem}, staging "
            "on tmpfs"
        )
        with ResultLog(options.results, plan.mode, machine) as log:
            report.say(f"every trial goes to {log.path}")
            outcome = Run(plan, place, firecracker, kernel, log, report).run(
                frozenset(options.only or MEASURES)
            )
    report.table(outcome.findings)
    report.loop_lag(outcome.loop_lag, outcome.why_no_loop_lag)
    report.say(f"took {time.monotonic() - started:.0f} s")
    report.lines(outcome.findings)
    return 0


def _end_undecided(report: Report) -> None:
    for findings in (window_findings, copy_findings, branch_findings, fork_findings):
        report.lines(findings([]))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m bench",
        description="Drives real Firecracker by plain sockets (the floor) and through forkpoint, "
        "interleaved, and ends with one line a target.",
    )
    parser.add_argument(
        "mode",
        choices=sorted(PLANS, reverse=True),
        help="quick: about three minutes, decides nothing below 200 pairs; full: no time limit, "
        "and only its figures are claimed",
    )
    parser.add_argument(
        "--only",
        action="append",
        choices=MEASURES,
        help="make this measurement only; may be repeated",
    )
    parser.add_argument("--firecracker", type=Path, help="the Firecracker to run")
    parser.add_argument(
        "--folder", type=Path, help="where the images lie meanwhile (a disk, not a tmpfs)"
    )
    parser.add_argument(
        "--results", type=Path, default=RESULTS, help="where the CSV goes (bench/results)"
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
