"""The little that can be seen where neither the server's code nor a server is there."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

from forkpoint.enums import CheckOutcome
from forkpoint.views import HostCheck

TESTED_FIRECRACKER = "1.12.1"
SHARED_MEMORY = Path("/dev/shm")

_GIB = 2**30
_VERSION = re.compile(r"Firecracker v(\d+\.\d+\.\d+)")


def check_firecracker() -> HostCheck:
    """The check `vmm`: the binary that FORKPOINT_FIRECRACKER or PATH names."""
    named = os.environ.get("FORKPOINT_FIRECRACKER")
    path = named or shutil.which("firecracker")
    if path is None:
        return HostCheck(
            "vmm",
            CheckOutcome.WARNING,
            "no Firecracker in PATH, and FORKPOINT_FIRECRACKER names none",
            "None is needed: the server fetches its own. To use another, name it by"
            " FORKPOINT_FIRECRACKER.",
        )
    try:
        done = subprocess.run(
            [path, "--version"], capture_output=True, text=True, timeout=10, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return HostCheck(
            "vmm",
            CheckOutcome.FAILED,
            f"{path} can't be run: {error}",
            f"Name a Firecracker {TESTED_FIRECRACKER} by FORKPOINT_FIRECRACKER.",
        )
    found = _VERSION.search(done.stdout)
    if found is None:
        return HostCheck(
            "vmm",
            CheckOutcome.FAILED,
            f"{path} is not Firecracker: --version says {done.stdout.strip()[:80]!r}",
            f"Name a Firecracker {TESTED_FIRECRACKER} by FORKPOINT_FIRECRACKER.",
        )
    if found[1] != TESTED_FIRECRACKER:
        return HostCheck(
            "vmm",
            CheckOutcome.WARNING,
            f"Firecracker {found[1]} at {path}; tested is {TESTED_FIRECRACKER}",
            f"Use {TESTED_FIRECRACKER} unless you have a reason.",
        )
    return HostCheck("vmm", CheckOutcome.OK, f"Firecracker {found[1]} at {path}")


def check_tmpfs(folder: Path = SHARED_MEMORY, mounts: Path = Path("/proc/mounts")) -> HostCheck:
    """The check `staging`: how much memory the window can be written to. Not probed here."""
    kinds = {
        fields[1]: fields[2]
        for fields in (line.split() for line in mounts.read_text("utf-8").splitlines())
    }
    if kinds.get(str(folder)) != "tmpfs":
        return HostCheck(
            "staging",
            CheckOutcome.WARNING,
            f"{folder} is no tmpfs: windows are staged on disk, and 1.3 to 3 times as long",
            f"sudo mount -t tmpfs -o size=50% tmpfs {folder}",
        )
    free = shutil.disk_usage(folder).free
    if free < _GIB:
        return HostCheck(
            "staging",
            CheckOutcome.WARNING,
            f"{folder} has {free / 2**20:.0f} MiB free: larger windows are staged on disk",
            f"sudo mount -o remount,size=50% {folder} (a container: --shm-size)",
        )
    return HostCheck("staging", CheckOutcome.OK, f"{folder}: {free / _GIB:.1f} GiB free")
