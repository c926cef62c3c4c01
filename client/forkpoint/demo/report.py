"""How the demo is told: while it goes on, and at its end."""

from __future__ import annotations

import os
import shlex
import shutil
import sys
from datetime import timedelta
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.markup import escape

from forkpoint.cli import output
from forkpoint.cli.progress import BranchDisplay, pause_line
from forkpoint.demo.story import BranchRow, Claim, Outcome
from forkpoint.enums import BranchMode, StagingKind, VmmKind
from forkpoint.views import BranchUpdate, ForkUpdate, ServerInfo

_LEGEND = """\
dirtied  memory that was written while the source stood still
copied   memory that was pre-copied before, while it ran
pause    how long it stood still, by the server's clock
parts    to pause + to write + to resume, by the VMM's own clock
guest    the longest gap that the source saw on its own clock meanwhile
ready    from the request until the snapshot was durable and bootable"""


class Narrator:
    """Tells the story on a console; silent where it is asked to."""

    def __init__(self, console: Console, *, silent: bool = False) -> None:
        self._console = console
        self._silent = silent
        self._display: BranchDisplay | None = None

    def __enter__(self) -> Narrator:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._end_display()

    def say(self, text: str) -> None:
        """A line."""
        if not self._silent:
            self._console.print(escape(text))

    def server(self, info: ServerInfo, folder: Path) -> None:
        """The server answers."""
        self.say(f"server: forkpointd {info.version} in {folder}, which is removed at the end")
        if info.vmm is None:
            self.say("VMM: none")
        elif info.vmm.kind is VmmKind.SIMULATOR:
            self.say(
                f"VMM: the SIMULATOR {info.vmm.version}: no guest code runs, and its times are not"
                f"\n     Firecracker's. What keeps Firecracker from running: {program()} doctor"
            )
        else:
            self.say(f"VMM: {info.vmm} on /dev/kvm, unmodified")
        self.say("guest: the witness, a small kernel that stamps its memory; not Linux")

    def branch(self, number: int, total: int, mode: BranchMode, written_bytes: int) -> None:
        """A branch is about to start."""
        self.say(
            f"branch {number} of {total}: {mode.value}, after the source wrote"
            f" {output.size(written_bytes)}"
        )
        self._display = BranchDisplay(self._console, quiet=self._silent, terse=True)
        self._display.__enter__()

    def branch_update(self, update: BranchUpdate) -> None:
        """It goes on."""
        if self._display is not None:
            self._display.update(update)

    def branch_end(self, row: BranchRow) -> None:
        """It is READY."""
        self._end_display()
        self.say(f"  {pause_line(row.pause)}; READY after {output.span(row.ready_after)}")

    def _end_display(self) -> None:
        display, self._display = self._display, None
        if display is not None:
            display.__exit__(None, None, None)

    def fork_update(self, fork: ForkUpdate) -> None:
        """Children come; said once all have."""
        if fork.stage.over:
            self.say(f"  {fork.ready_count} of {fork.count} run")

    def claim(self, claim: Claim) -> None:
        """Something was checked."""
        if self._silent:
            return
        mark = "[green]✓[/green]" if claim.held else "[bold red]✗[/bold red]"
        detail = "" if claim.held else f": [red]{escape(claim.detail)}[/red]"
        self._console.print(f"  {mark} {escape(claim.text)}{detail}")


def print_outcome(outcome: Outcome) -> None:
    """The table, what it means, and what to type next."""
    output.out.print()
    output.table(
        ["MODE", "DIRTIED", "COPIED", "PAUSE", "VMM'S PARTS, ms", "GUEST", "READY", "DISK"],
        [
            [
                row.mode.value,
                output.size(row.pause.dirty_bytes),
                "-" if row.precopied_bytes is None else output.size(row.precopied_bytes),
                output.span(row.pause.total),
                _parts(row),
                output.span(row.guest_gap),
                output.span(row.ready_after),
                output.size(row.disk_bytes),
            ]
            for row in outcome.branches
        ],
        right=["DIRTIED", "COPIED", "PAUSE", "VMM'S PARTS, ms", "GUEST", "READY", "DISK"],
    )
    output.out.print(f"[dim]{_LEGEND}[/dim]")
    output.out.print()
    if outcome.children_ready_after is not None:
        output.out.print(
            f"{outcome.children} children ran {output.span(outcome.children_ready_after)} after"
            " they were asked for."
        )
    vmm = "an unknown VMM" if outcome.vmm is None else str(outcome.vmm)
    if outcome.vmm is not None and outcome.vmm.kind is VmmKind.SIMULATOR:
        vmm = f"the SIMULATOR {outcome.vmm.version} (no guest code ran)"
    output.out.print(
        f"This ran on {vmm},\nwith a witness guest of {outcome.memory_mib} MiB; not Linux."
    )
    if outcome.held:
        output.out.print(
            f"[green]All {len(outcome.claims)} claims held[/green],"
            f" in {output.span(outcome.took)}; nothing is left behind."
        )
    else:
        failed = sum(not claim.held for claim in outcome.claims)
        output.out.print(
            f"[bold red]{failed} of {len(outcome.claims)} claims did not hold[/bold red]"
        )
    if outcome.kernel is not None:
        _print_next(outcome.kernel)


def program(name: str = "forkpoint") -> str:
    """What to type for one of our programs: its path where the shell would find no such program."""
    here = Path(sys.executable).parent / name
    found = shutil.which(name)
    if not here.exists() or (found is not None and os.path.samefile(found, here)):
        return name
    return str(here.relative_to(Path.cwd())) if here.is_relative_to(Path.cwd()) else str(here)


def _print_next(kernel: Path) -> None:
    """Commands that work as they stand, with the demo's own guest."""
    command = program()
    output.out.print(
        escape(
            "\nNext, with the same guest, in one terminal:\n"
            f"  {program('forkpointd')} serve --data-dir ~/forkpoint-try \\\n"
            f"      --image-root {shlex.quote(str(kernel.parent))}\n"
            "and in another:\n"
            f"  {command} sandbox create agent-7 --memory 512 \\\n"
            f"      --kernel {shlex.quote(str(kernel))}\n"
            f"  {command} branch start agent-7\n"
            f"  {command} fork agent-7 -n 10 --ttl 10m\n"
            f"  {command} tree\n"
            "A Linux of your own wants an uncompressed vmlinux in the --image-root."
        )
    )


def _parts(row: BranchRow) -> str:
    pause = row.pause
    parts = (pause.pause, pause.snapshot, pause.resume)
    return " + ".join(_milliseconds(part) for part in parts)


def _milliseconds(part: timedelta) -> str:
    """Two digits, and all that stand before the point."""
    amount = part.total_seconds() * 1000
    return f"{amount:.2g}" if amount < 10 else f"{amount:.0f}"


def as_json(outcome: Outcome) -> dict[str, Any]:
    """The same as one object."""
    staging = {row.pause.staging for row in outcome.branches}
    return {
        "held": outcome.held,
        "client_version": output.client_version(),
        "server_version": outcome.server_version,
        "vmm": output.as_data(outcome.vmm),
        "guest": outcome.guest,
        "memory_mib": outcome.memory_mib,
        "staging": sorted(kind.value for kind in staging if kind is not StagingKind.UNSPECIFIED),
        "branches": output.as_data(outcome.branches),
        "children": outcome.children,
        "children_ready_after_seconds": output.as_data(outcome.children_ready_after),
        "child_start_seconds": output.as_data(outcome.child_starts),
        "claims": output.as_data(outcome.claims),
        "took_seconds": output.as_data(outcome.took),
    }
