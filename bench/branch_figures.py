"""What the message of a READY branch says of the time it took."""

from __future__ import annotations

from itertools import pairwise

from bench.served import ServedError
from forkpoint.v1 import branch_pb2

WINDOW = ("total_us", "vmm_total_us", "pause_us", "snapshot_us", "resume_us")
"""total: the clock of who sent the window (forkpoint: the server's); the others are Firecracker's
latencies_us and their sum."""
STAGES = ("queued", "precopying", "paused", "resumed", "merging", "finalizing")
"""Each from being entered to the next."""


def branch_figures(branch: branch_pb2.Branch) -> dict[str, float]:
    """The figures of a READY branch. Raises ServedError where Firecracker's are missing."""
    pause = branch.pause_window
    if not pause.vmm_total.ToMicroseconds():
        raise ServedError("the window has no latencies of Firecracker's")
    figures: dict[str, float] = {
        "total_us": pause.total.ToNanoseconds() / 1000,
        "vmm_total_us": pause.vmm_total.ToMicroseconds(),
        "pause_us": pause.pause.ToMicroseconds(),
        "snapshot_us": pause.snapshot.ToMicroseconds(),
        "resume_us": pause.resume.ToMicroseconds(),
        "predicted_us": branch.predicted_pause.ToMicroseconds(),
        "dirty_bytes": pause.dirty_bytes,
        "precopied_bytes": branch.precopy.done_bytes,
        "merged_bytes": branch.merge.done_bytes,
    }
    for entry, after in pairwise(branch.stages):
        stage = branch_pb2.BranchStage.Name(entry.stage).removeprefix("BRANCH_STAGE_").lower()
        nanoseconds = after.enter_time.ToNanoseconds() - entry.enter_time.ToNanoseconds()
        if stage in STAGES:
            figures[f"{stage}_seconds"] = nanoseconds / 1e9
    return figures


def staging_name(branch: branch_pb2.Branch) -> str:
    """tmpfs or disk."""
    name = branch_pb2.StagingKind.Name(branch.pause_window.staging)
    return name.removeprefix("STAGING_KIND_").lower()
