"""What the server's own code says: installed beside us, or running."""

from __future__ import annotations

import json
import subprocess
import warnings
from typing import Any

from forkpoint import sync
from forkpoint._versions import differs
from forkpoint.enums import CheckOutcome
from forkpoint.errors import ForkpointError, VersionMismatchWarning
from forkpoint.programs import forkpointd_command
from forkpoint.views import HostCheck


def ask_forkpointd() -> list[HostCheck] | None:
    """What `forkpointd doctor --json` says; None where forkpointd is not installed."""
    command = forkpointd_command()
    if command is None:
        return None
    try:
        done = subprocess.run(
            [*command, "doctor", "--json"], capture_output=True, text=True, timeout=60, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return [_broken(f"{' '.join(command)} can't be run: {error}")]
    try:
        return [read_check(check) for check in json.loads(done.stdout)["checks"]]
    except (ValueError, KeyError, TypeError):
        said = (done.stderr.strip() or done.stdout.strip()).splitlines()
        last = said[-1] if said else "nothing"
        return [_broken(f"forkpointd doctor ended with code {done.returncode} and said: {last}")]


def read_check(check: dict[str, Any]) -> HostCheck:
    """A check as forkpointd prints it."""
    return HostCheck(
        str(check["name"]),
        CheckOutcome(str(check["outcome"]).upper()),
        str(check["detail"]),
        str(check.get("remedy") or "") or None,
    )


def _broken(detail: str) -> HostCheck:
    return HostCheck(
        "forkpointd",
        CheckOutcome.FAILED,
        detail,
        "pip install --force-reinstall 'forkpoint[server]'",
    )


def ask_server(address: str | None) -> tuple[HostCheck, list[HostCheck]]:
    """Whether a server can be reached, and its own checks."""
    try:
        with (
            warnings.catch_warnings(action="ignore", category=VersionMismatchWarning),
            sync.connect(address, timeout=10, hello=False) as fp,
        ):
            info = fp.server.info()
    except (ForkpointError, ValueError) as error:
        first, _, rest = str(error).partition("\n")
        check = HostCheck("server", CheckOutcome.WARNING, first, rest.strip() or None)
        return check, []
    vmm = str(info.vmm) if info.vmm else "no VMM"
    detail = f"forkpointd {info.version} answers at {fp.address}, with {vmm}"
    said = differs(info)
    outcome = CheckOutcome.OK if said is None else CheckOutcome.WARNING
    return HostCheck("server", outcome, detail, said), list(info.checks)
