"""How the server's programs are started: as processes, for the client never imports it."""

from __future__ import annotations

import importlib.util
import shutil
import sys


def forkpointd_command() -> list[str] | None:
    """How to run forkpointd; None where it is not installed."""
    if importlib.util.find_spec("forkpointd") is not None:
        return [sys.executable, "-m", "forkpointd"]
    found = shutil.which("forkpointd")
    return None if found is None else [found]
