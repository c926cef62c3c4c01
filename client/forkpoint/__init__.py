"""forkpoint: branch a running microVM in milliseconds, and start copies of that very moment.

    import forkpoint

    async with forkpoint.connect() as fp:
        source = await fp.sandboxes.get("agent-7")
        async with source.fork(10, ttl="10m") as children:
            async for child in children:
                print(await child.console.ask("uname -a"))

A *sandbox* is one microVM. A *snapshot* is an immutable image from which sandboxes start. A
*branch* makes a snapshot of a sandbox while it runs; a *fork* starts any number of sandboxes from
one snapshot. The same client without `await` is `forkpoint.sync`.
"""

import importlib
from typing import TYPE_CHECKING, Any

from forkpoint._version import __version__

if TYPE_CHECKING:
    from forkpoint import errors
    from forkpoint._async._branches import Branches, Branching
    from forkpoint._async._client import Client, connect
    from forkpoint._async._console import Attachment, Console
    from forkpoint._async._forks import Children, Forks
    from forkpoint._async._sandboxes import Sandbox, Sandboxes
    from forkpoint._async._server import Server
    from forkpoint._async._snapshots import Snapshot, Snapshots
    from forkpoint._orders import UNCHANGED
    from forkpoint.enums import (
        ArchiveLayout,
        BranchMode,
        BranchStage,
        CheckOutcome,
        CopyMethod,
        DirtyBaseState,
        Durability,
        ExpiryAction,
        FailureAction,
        ForkChildState,
        ForkStage,
        Layout,
        SandboxExitCause,
        SandboxState,
        SnapshotState,
        StagingKind,
        VmmKind,
        WishedState,
    )
    from forkpoint.errors import ForkpointError
    from forkpoint.views import (
        ArchivePiece,
        BranchUpdate,
        DirtyBase,
        Drive,
        FlattenUpdate,
        ForkChild,
        ForkUpdate,
        HostCheck,
        MemoryUse,
        PauseWindow,
        Progress,
        SandboxExit,
        SandboxMemory,
        SandboxView,
        ServerInfo,
        SnapshotView,
        StageEntry,
        Vmm,
    )

__all__ = [
    "UNCHANGED",
    "ArchiveLayout",
    "ArchivePiece",
    "Attachment",
    "BranchMode",
    "BranchStage",
    "BranchUpdate",
    "Branches",
    "Branching",
    "CheckOutcome",
    "Children",
    "Client",
    "Console",
    "CopyMethod",
    "DirtyBase",
    "DirtyBaseState",
    "Drive",
    "Durability",
    "ExpiryAction",
    "FailureAction",
    "FlattenUpdate",
    "ForkChild",
    "ForkChildState",
    "ForkStage",
    "ForkUpdate",
    "ForkpointError",
    "Forks",
    "HostCheck",
    "Layout",
    "MemoryUse",
    "PauseWindow",
    "Progress",
    "Sandbox",
    "SandboxExit",
    "SandboxExitCause",
    "SandboxMemory",
    "SandboxState",
    "SandboxView",
    "Sandboxes",
    "Server",
    "ServerInfo",
    "Snapshot",
    "SnapshotState",
    "SnapshotView",
    "Snapshots",
    "StageEntry",
    "StagingKind",
    "Vmm",
    "VmmKind",
    "WishedState",
    "__version__",
    "connect",
    "errors",
]

# Where the names are. They are imported when they are first used: gRPC takes half a second, which
# `forkpoint --help` and a program that only wants `forkpoint.errors` need not pay.
_PLACES = {
    "forkpoint._async._branches": (
        "Branches",
        "Branching",
    ),
    "forkpoint._async._client": (
        "Client",
        "connect",
    ),
    "forkpoint._async._console": (
        "Attachment",
        "Console",
    ),
    "forkpoint._async._forks": (
        "Children",
        "Forks",
    ),
    "forkpoint._async._sandboxes": (
        "Sandbox",
        "Sandboxes",
    ),
    "forkpoint._async._server": ("Server",),
    "forkpoint._async._snapshots": (
        "Snapshot",
        "Snapshots",
    ),
    "forkpoint._orders": ("UNCHANGED",),
    "forkpoint.enums": (
        "ArchiveLayout",
        "BranchMode",
        "BranchStage",
        "CheckOutcome",
        "CopyMethod",
        "DirtyBaseState",
        "Durability",
        "ExpiryAction",
        "FailureAction",
        "ForkChildState",
        "ForkStage",
        "Layout",
        "SandboxExitCause",
        "SandboxState",
        "SnapshotState",
        "StagingKind",
        "VmmKind",
        "WishedState",
    ),
    "forkpoint.errors": ("ForkpointError",),
    "forkpoint.views": (
        "ArchivePiece",
        "BranchUpdate",
        "DirtyBase",
        "Drive",
        "FlattenUpdate",
        "ForkChild",
        "ForkUpdate",
        "HostCheck",
        "MemoryUse",
        "PauseWindow",
        "Progress",
        "SandboxExit",
        "SandboxMemory",
        "SandboxView",
        "ServerInfo",
        "SnapshotView",
        "StageEntry",
        "Vmm",
    ),
}
_MODULES = {name: module for module, names in _PLACES.items() for name in names}


if not TYPE_CHECKING:  # type checkers see the imports above, and what is misspelt

    def __getattr__(name: str) -> Any:
        if name == "errors":
            return importlib.import_module("forkpoint.errors")
        if name not in _MODULES:
            raise AttributeError(f"module 'forkpoint' has no attribute {name!r}")
        value = getattr(importlib.import_module(_MODULES[name]), name)
        globals()[name] = value
        return value


def __dir__() -> list[str]:
    return sorted(__all__)
