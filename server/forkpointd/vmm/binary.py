"""Which VMM is run: its file, its version, and what is known about that version.

Firecracker and the simulator are driven by the same code; they differ in the words their command
line begins with (`Binary.argv`). Everything here blocks: from an event loop call it in an executor.
"""

from __future__ import annotations

import hashlib
import os
import re
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from forkpointd.model import ForkpointError, Reason, VmmKind
from forkpointd.vmm.fetch import FirecrackerUnavailableError, firecracker_version
from forkpointd.vmm.simulator import simulator_argv
from forkpointd.vmm.simulator.versions import VMM_VERSION

VERSION_SECONDS = 10.0
REMEDY = "Set FORKPOINT_FIRECRACKER to a Firecracker binary that this user may run"

_DUMP_FAILED = (
    r"Create snapshot error: Cannot write memory file: "
    r"Cannot dump memory: Guest memory error: .+"
)
_PAGE_FAILED = r"Create snapshot error: Cannot write memory file: Volatile memory error: .+"

SUPPORTED_VERSIONS: Mapping[str, re.Pattern[str]] = {
    "1.12.1": re.compile(_DUMP_FAILED),
    # Its Diff writes page by page itself, and so says something else than its Full.
    "1.16.1": re.compile(f"{_DUMP_FAILED}|{_PAGE_FAILED}"),
    VMM_VERSION: re.compile(_DUMP_FAILED),
}
"""What this project is tested with, by the version that `GET /` answers, each with the words by
which it says that it could not write the memory; found by trial on a full tmpfs. Every other
failure of a create reads otherwise: `Cannot perform open on the memory backing file: ...` and
`Cannot serialize the microVM state: ...` come before the memory, `Cannot perform sync_all on ...`
after its dirty log was cleared."""


@dataclass(frozen=True, slots=True)
class Binary:
    """A VMM that can be run."""

    kind: VmmKind
    version: str
    """For example `1.12.1`."""
    argv: tuple[str, ...]
    """What its command line begins with."""
    path: Path
    """The file that is executed: what `/proc/PID/exe` shows."""
    device: int
    inode: int
    sha256: str
    """Of that file."""

    @property
    def supported(self) -> bool:
        """Whether this project was tested with it. Another one is run all the same, but after a
        failed create its dirty base counts as lost."""
        return self.version in SUPPORTED_VERSIONS


def inspect_binary(path: Path) -> Binary:
    """The Firecracker in this file. Raises ForkpointError NO_VMM that says what is wrong and what
    to do where it is none, can't be run, or does not answer within ten seconds."""
    try:
        version = firecracker_version(path)
        return _binary(VmmKind.FIRECRACKER, version, Path(os.path.realpath(path)), ())
    except (FirecrackerUnavailableError, OSError) as error:
        raise ForkpointError(
            Reason.NO_VMM,
            f"{error}. {REMEDY}",
            metadata={"path": str(path)},
        ) from error


def simulator_binary() -> Binary:
    """The simulator that comes with this package, run by this interpreter."""
    # Not the resolved path: a virtual environment is found by the link that was executed.
    executed, *arguments = simulator_argv()
    found = _binary(VmmKind.SIMULATOR, VMM_VERSION, Path(os.path.realpath(executed)), arguments)
    return replace(found, argv=(executed, *arguments))


def snapshot_version(binary: Binary) -> str:
    """The version of the snapshots that it writes, for example `6.0.0`. Raises NO_VMM."""
    try:
        done = subprocess.run(
            [*binary.argv, "--snapshot-version"],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=VERSION_SECONDS,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise ForkpointError(
            Reason.NO_VMM,
            f"{binary.path} can't be asked for its snapshot version: {error}. {REMEDY}",
        ) from error
    match = re.match(r"v(\d+\.\d+\.\d+)", done.stdout)
    if done.returncode != 0 or match is None:
        said = (done.stdout + done.stderr).strip().partition("\n")[0][:200]
        raise ForkpointError(
            Reason.NO_VMM,
            f"{binary.path} does not tell its snapshot version: it says {said!r}. {REMEDY}",
        )
    return match.group(1)


def memory_write_failed(version: str, fault_message: str) -> bool:
    """Whether this refusal of a create says that the memory could not be written, after which the
    VMM's dirty log is whole again: it puts the bits it took back, and the next Diff has all pages.

    For any other refusal, and any version that was not tried, the answer is no.
    """
    pattern = SUPPORTED_VERSIONS.get(version)
    return pattern is not None and pattern.fullmatch(fault_message) is not None


def _binary(kind: VmmKind, version: str, path: Path, arguments: Sequence[str]) -> Binary:
    with path.open("rb") as opened:
        stat = os.fstat(opened.fileno())
        digest = hashlib.file_digest(opened, "sha256").hexdigest()
    return Binary(kind, version, (str(path), *arguments), path, stat.st_dev, stat.st_ino, digest)
