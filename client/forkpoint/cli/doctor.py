"""`forkpoint doctor`: what this machine can do, what it can't, and what to do about it."""

from __future__ import annotations

import typer
from rich.markup import escape

from forkpoint.cli import exits, output
from forkpoint.cli.common import Address, Json
from forkpoint.enums import CheckOutcome
from forkpoint.views import HostCheck

_MARKS = {
    CheckOutcome.OK: "[green]ok[/green]",
    CheckOutcome.WARNING: "[yellow]warning[/yellow]",
    CheckOutcome.FAILED: "[bold red]failed[/bold red]",
    CheckOutcome.UNSPECIFIED: "?",
}


def doctor(address: Address = None, json: Json = False) -> None:
    """Check what this machine can do: KVM, Firecracker, disk, staging, and the server.

    Each thing that is missing comes with its remedy. Works without a server. Exit code 1: a check
    failed; warnings are slower or less, but work.

    Example: `forkpoint doctor --json`
    """
    from forkpoint.doctor import examine

    checks = examine(address)
    if json:
        output.print_json({"checks": checks})
    else:
        show_checks(checks)
    if any(check.outcome is CheckOutcome.FAILED for check in checks):
        raise typer.Exit(exits.FAILED)


def show_checks(checks: list[HostCheck]) -> None:
    """Checks, each with its remedy."""
    width = max((len(check.name) for check in checks), default=0)
    for check in checks:
        mark = output.plain(_MARKS[check.outcome])
        padded = _MARKS[check.outcome] + " " * (7 - len(mark))
        output.out.print(f"{padded}  {check.name.ljust(width)}  {escape(check.detail)}")
        if check.remedy:
            for line in check.remedy.splitlines():
                output.out.print(f"{' ' * (11 + width)}[bold]→[/bold] {escape(line)}")
