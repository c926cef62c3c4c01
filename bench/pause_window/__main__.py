"""`python -m bench.pause_window`: `make bench-pause`.

Exit codes: 0 all that was asked for is measured, or there is no KVM to measure on; 1 it could not
run; 2 wrong usage; 130 it was broken off, and goes on where it was when it is run again.
"""

from __future__ import annotations

import argparse
import math
import os
import signal
import sys
import time
from pathlib import Path

# Before gRPC is imported: processes are spawned beside an open channel.
os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")

from bench.machine import REPOSITORY, Machine, kvm_refusal
from bench.pause_window.cells import PHASES
from bench.pause_window.report import PLOTS, REPORT, write_report
from bench.pause_window.rows import ResultsError
from bench.pause_window.running import Runner
from bench.scratch import ScratchError, scratch
from forkpointd.vmm.fetch import FirecrackerUnavailableError, ensure_firecracker
from forkpointd.witness.build import WitnessBuildError, cached_witness

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results"
INTERRUPTED = 128 + signal.SIGINT
MADE = tuple(str((HERE / name).relative_to(REPOSITORY)) for name in ("results", REPORT, PLOTS))
"""What a run itself changes in the tree."""


def main(arguments: list[str] | None = None) -> int:
    """Runs the phases and writes the report; returns the exit code."""
    options = _parser().parse_args(arguments)
    broken_off = 0
    try:
        if not options.report_only:
            if refusal := kvm_refusal():
                _say(f"skipped: {refusal}. The bench measures real Firecracker, which needs KVM")
                return 0
            broken_off = _measure(options)
        for finding in write_report(options.results):
            _say(finding.line())
    except (
        ResultsError,
        ScratchError,
        FirecrackerUnavailableError,
        WitnessBuildError,
        OSError,
    ) as error:
        _say(f"the bench can't run: {error}")
        return 1
    except KeyboardInterrupt:
        _say("broken off; nothing is left running. The next run goes on from the rows in the CSVs")
        return INTERRUPTED
    if broken_off:
        _say(f"{broken_off} cells were broken off and have no or too few rows")
        return 1
    return 0


def _measure(options: argparse.Namespace) -> int:
    """Returns how many cells were broken off."""
    firecracker = options.firecracker or ensure_firecracker(_say)
    kernel = cached_witness()
    started = time.monotonic()
    with scratch(options.folder) as place:
        machine = Machine.here(firecracker, place.disk, except_for=MADE)
        _say(
            f"Firecracker {machine.firecracker}, kernel {machine.kernel}, {machine.cpus} CPUs "
            f"({machine.cpu}), {machine.memory_mib} MiB; images on {machine.filesystem}; commit "
            f"{machine.commit[:12]}{'+' if machine.commit.endswith('+') else ''}"
        )
        if machine.commit.endswith("+"):
            _say("the tree differs from this commit: figures to be published need a clean one")
        _say(f"every trial goes to {options.results}")
        runner = Runner(place, firecracker, kernel, machine, options.results, _say, options.rounds)
        broken_off = runner.run([PHASES[name] for name in options.phases])
    _say(f"took {time.monotonic() - started:.0f} s")
    return broken_off


def _say(line: str) -> None:
    print(line, flush=True)


def _phases(text: str) -> list[str]:
    names = [name.strip() for name in text.split(",")]
    if unknown := sorted(set(names) - set(PHASES)):
        raise argparse.ArgumentTypeError(
            f"there is no phase {', '.join(unknown)}; there are {', '.join(PHASES)}"
        )
    return names


def _rounds(text: str) -> float:
    if not text.isdigit() or not int(text):
        raise argparse.ArgumentTypeError("must be a number from 1 on")
    return int(text)


def _parser() -> argparse.ArgumentParser:
    phases = "\n".join(
        f"  {phase.name:<6} {phase.about}; about {phase.minutes:g} min" for phase in PHASES.values()
    )
    total = sum(phase.minutes for phase in PHASES.values())
    parser = argparse.ArgumentParser(
        prog="python -m bench.pause_window",
        description="Takes pause windows of real Firecracker in three ways, interleaved: the floor "
        "(plain sockets, one write), forkpoint (gRPC), and sequential-disk (one call after the "
        "other, staged on disk, whole-image copy). Each trial is a row of a CSV; a run that was "
        "broken off goes on when it is started again. RESULTS.md is written from the rows.",
        epilog=f"phases (all of them: about {total:g} min on two CPUs):\n{phases}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--phases",
        type=_phases,
        default=list(PHASES),
        help="which, with commas between them; all if not given",
    )
    parser.add_argument(
        "--rounds",
        type=_rounds,
        default=math.inf,
        help="at most so many of each cell, for trying: too few for any claim",
    )
    parser.add_argument(
        "--results",
        type=Path,
        default=RESULTS,
        help="where the CSVs are; RESULTS.md and plots/ come beside that folder",
    )
    parser.add_argument(
        "--folder", type=Path, help="where the images lie meanwhile (a disk, not a tmpfs)"
    )
    parser.add_argument("--firecracker", type=Path, help="the Firecracker to run")
    parser.add_argument(
        "--report-only", action="store_true", help="measure nothing, write RESULTS.md anew"
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
