"""Firecracker's own figures of a window: `latencies_us` in its metrics file.

`FlushMetrics` appends one JSON line before it is answered; Firecracker appends one by itself every
60 s. The latencies in a line are those of the latest request of each kind (a store, not a
difference: docs/metrics.md of Firecracker), so the last line after a flush is always the right one.
The file is not opened for appending, so it can't be cut; its old end is punched.

Everything here blocks: call it in a thread.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path

from forkpointd.vmm.api import ApiConnection, VmmFault
from forkpointd.vmm.process import METRICS_NAME
from forkpointd.vmm.words import trim_head

KEPT_METRICS_BYTES = 64 * 1024
"""Some lines of about 7 KB."""


@dataclass(frozen=True, slots=True)
class WindowLatencies:
    """The VMM's view of the three requests of the latest window, in microseconds."""

    pause_us: int
    snapshot_us: int
    resume_us: int


def read_latencies(folder: Path, *, full: bool, timeout: float) -> WindowLatencies:
    """The latencies of the latest window, which was of this kind.

    Between it and this call nothing may have paused or resumed the source. Raises VmmFault,
    VmmGone, TimeoutError, OSError.
    """
    with ApiConnection.open(folder, timeout) as connection:
        connection.request("PUT", "/actions", {"action_type": "FlushMetrics"}, timeout=timeout)
    try:
        figures = json.loads(_last_line(folder / METRICS_NAME))["latencies_us"]
        latencies = WindowLatencies(
            pause_us=int(figures["pause_vm"]),
            snapshot_us=int(figures["full_create_snapshot" if full else "diff_create_snapshot"]),
            resume_us=int(figures["resume_vm"]),
        )
    except (ValueError, KeyError, TypeError) as error:
        raise VmmFault(0, f"its metrics have no latencies: {error!r}") from error
    trim_metrics(folder)
    return latencies


def trim_metrics(folder: Path) -> None:
    """Gives the old end of the metrics back, beyond their last 64 KiB."""
    trim_head(folder / METRICS_NAME, KEPT_METRICS_BYTES)


def _last_line(path: Path) -> bytes:
    """The last complete line of a file, of which the last 64 KiB are looked at."""
    with path.open("rb", buffering=0) as opened:
        size = os.fstat(opened.fileno()).st_size
        tail = os.pread(opened.fileno(), KEPT_METRICS_BYTES, max(0, size - KEPT_METRICS_BYTES))
    lines = tail[: tail.rindex(b"\n")].rsplit(b"\n", 1)
    return lines[-1]
