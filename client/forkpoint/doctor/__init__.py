"""What this machine can do, found out from wherever it can be: without a server, too.

- `kvm`: looked at here, by this process, since rights belong to a process;
- the checks that need the server's code (vmm, staging, reflink, memory, data_dir): from
  `forkpointd doctor --json` where that is installed, else from the running server, else the little
  that can be seen without either;
- `server`: whether one can be reached.

The client never imports the server: it is asked in a process of its own.
"""

from __future__ import annotations

from forkpoint.doctor.kvm import check_kvm
from forkpoint.doctor.local import check_firecracker, check_tmpfs
from forkpoint.doctor.server import ask_forkpointd, ask_server
from forkpoint.enums import CheckOutcome
from forkpoint.views import HostCheck

_ORDER = ("kvm", "vmm", "staging", "reflink", "memory", "data_dir")


def examine(address: str | None = None) -> list[HostCheck]:
    """All checks, in a fixed order. Blocks for some seconds at most."""
    reached, from_server = ask_server(address)
    installed = ask_forkpointd()
    found = {check.name: check for check in installed or from_server or ()}
    if not found:
        found = {check.name: check for check in (check_firecracker(), check_tmpfs())}
        found["forkpointd"] = HostCheck(
            "forkpointd",
            CheckOutcome.WARNING,
            "the server is not installed here: disk and staging can't be probed",
            "pip install 'forkpoint[server]'",
        )
    found["kvm"] = check_kvm()
    names = [name for name in _ORDER if name in found]
    names += [name for name in found if name not in names]
    return [*(found[name] for name in names), reached]


__all__ = ["examine"]
