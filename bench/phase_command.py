"""The command line of a bench in phases.

Exit codes: 0 all that was asked for is measured, or there is no KVM to measure on; 1 it could not
run; 2 wrong usage; 130 it was broken off, and goes on where it was when it is run again.
"""

from __future__ import annotations

import argparse
import math
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.machine import REPOSITORY, Machine, kvm_refusal
from bench.phase_report import PLOTS, REPORT
from bench.phase_running import Runner
from bench.phases import Phase
from bench.rows import ResultsError
from bench.scratch import ScratchError, scratch
from bench.targets import Finding
from forkpointd.vmm.fetch import FirecrackerUnavailableError, ensure_firecracker
from forkpointd.witness.build import WitnessBuildError, cached_witness

INTERRUPTED = 128 + signal.SIGINT


@dataclass(frozen=True, slots=True)
class Bench:
    """One bench in phases."""

    program: str
    about: str
    folder: Path
    """Where results/, plots/ and RESULTS.md are."""
    phases: Mapping[str, Phase[Any, Any]]
    runner: type[Runner[Any, Any, Any]]
    write_report: Callable[[Path], Sequence[Finding]]

    @property
    def results(self) -> Path:
        """The folder with the CSVs."""
        return self.folder / "results"

    @property
    def made(self) -> tuple[str, ...]:
        """What a run itself changes in the tree."""
        paths = (self.results, self.folder / REPORT, self.folder / PLOTS)
        return tuple(str(path.relative_to(REPOSITORY)) for path in paths)


def run(bench: Bench, arguments: list[str] | None) -> int:
    """Runs the phases and writes the report; returns the exit code."""
    options = _parser(bench).parse_args(arguments)
    broken_off = 0
    try:
        if not options.report_only:
            if refusal := kvm_refusal():
                _say(f"skipped: {refusal}. The bench measures real Firecracker, which needs KVM")
                return 0
            broken_off = _measure(bench, options)
        for finding in bench.write_report(options.results):
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


def _measure(bench: Bench, options: argparse.Namespace) -> int:
    """Returns how many cells were broken off."""
    firecracker = options.firecracker or ensure_firecracker(_say)
    kernel = cached_witness()
    started = time.monotonic()
    with scratch(options.folder) as place:
        machine = Machine.here(firecracker, place.disk, except_for=bench.made)
        _say(
            f"Firecracker {machine.firecracker}, kernel {machine.kernel}, {machine.cpus} CPUs "
            f"({machine.cpu}), {machine.memory_mib} MiB; images on {machine.filesystem}; commit "
            f"{machine.commit[:12]}{'+' if machine.commit.endswith('+') else ''}"
        )
        if machine.commit.endswith("+"):
            _say("the tree differs from this commit: figures to be published need a clean one")
        _say(f"every trial goes to {options.results}")
        runner = bench.runner(
            place, firecracker, kernel, machine, options.results, _say, options.rounds
        )
        broken_off = runner.run([bench.phases[name] for name in options.phases])
    _say(f"took {time.monotonic() - started:.0f} s")
    return broken_off


def _say(line: str) -> None:
    print(line, flush=True)


def _rounds(text: str) -> float:
    if not text.isdigit() or not int(text):
        raise argparse.ArgumentTypeError("must be a number from 1 on")
    return int(text)


def _parser(bench: Bench) -> argparse.ArgumentParser:
    def phases(text: str) -> list[str]:
        names = [name.strip() for name in text.split(",")]
        if unknown := sorted(set(names) - set(bench.phases)):
            raise argparse.ArgumentTypeError(
                f"there is no phase {', '.join(unknown)}; there are {', '.join(bench.phases)}"
            )
        return names

    width = max(map(len, bench.phases))
    told = "\n".join(
        f"  {phase.name:<{width}} {phase.about}; about {phase.minutes:g} min"
        for phase in bench.phases.values()
    )
    total = sum(phase.minutes for phase in bench.phases.values())
    parser = argparse.ArgumentParser(
        prog=bench.program,
        description=f"{bench.about} Each trial is a row of a CSV; a run that was broken off goes "
        "on when it is started again. RESULTS.md is written from the rows.",
        epilog=f"phases (all of them: about {total:g} min on two CPUs):\n{told}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--phases",
        type=phases,
        default=list(bench.phases),
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
        default=bench.results,
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
