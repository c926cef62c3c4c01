"""Objects of the model with every field set, for tests of the edge."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path

from forkpointd import model

T0 = datetime(2026, 1, 2, 3, 4, 5, 678_901, tzinfo=UTC)

MACHINE = model.Machine(
    vcpus=2,
    memory_mib=256,
    drives=(model.Drive("rootfs", Path("/images/rootfs.ext4"), True, True),),
)
VMM = model.VmmVersion(model.VmmKind.FIRECRACKER, "1.12.1")


def at(seconds: float) -> datetime:
    return T0 + timedelta(seconds=seconds)


def problem(reason: model.Reason = model.Reason.NO_DISK_SPACE) -> model.Problem:
    return model.Problem(reason, "no room", {"needed_bytes": "4096", "free_bytes": "17"})


def sandbox(sandbox_id: str = "agent-7", **changes: object) -> model.Sandbox:
    fields: dict[str, object] = {
        "sandbox_id": sandbox_id,
        "state": model.SandboxState.STOPPED,
        "wished_state": model.WishedState.PAUSED,
        "machine": MACHINE,
        "vmm": VMM,
        "create_time": T0,
        "labels": {"team": "blue"},
        "boot": model.Boot(MACHINE, Path("/images/vmlinux")),
        "snapshot_id": "snap-1",
        "source_sandbox_id": "agent-1",
        "fork_id": "fork-1",
        "ttl_seconds": 90.5,
        "expire_time": at(90.5),
        "on_expiry": model.ExpiryAction.BRANCH,
        "dirty_base": model.DirtyBase(
            model.DirtyBaseState.PENDING,
            "snap-1",
            "branch-1",
            (model.UnmergedDiff(Path("/d/mem"), Path("/d/ext"), 8192, "branch-0"),),
            "",
        ),
        "last_diff_bytes": 4096,
        "process": model.ProcessRecord("boot", 4242, 99, Path("/fc"), 1, 2),
        "start_time": at(1),
        "exit": model.SandboxExit(
            at(2), -1, 9, "killed", model.ExitCause.OUT_OF_MEMORY, "too much: take less"
        ),
    }
    return model.Sandbox(**{**fields, **changes})  # type: ignore[arg-type]


def snapshot(snapshot_id: str = "snap-2", **changes: object) -> model.Snapshot:
    fields: dict[str, object] = {
        "snapshot_id": snapshot_id,
        "create_time": at(10),
        "source_sandbox_id": "agent-7",
        "branch_id": "branch-1",
        "parent_snapshot_id": "snap-1",
        "mode": model.BranchMode.DIFF,
        "layout": model.Layout.FLAT,
        "machine": MACHINE,
        "vmm": VMM,
        "disk_bytes": 1 << 20,
        "dirty_bytes": 1 << 16,
        "labels": {"step": "3"},
        "room": model.SnapshotRoom(4_096, 8_192),
        "digest": "blake3:" + 64 * "0",
    }
    return model.Snapshot(**{**fields, **changes})  # type: ignore[arg-type]


def branch(branch_id: str = "branch-1", **changes: object) -> model.Branch:
    fields: dict[str, object] = {
        "branch_id": branch_id,
        "sandbox_id": "agent-7",
        "snapshot_id": "snap-2",
        "sequence": 17,
        "stage": model.BranchStage.FAILED,
        "stages": (
            model.StageEntry(model.BranchStage.QUEUED, T0),
            model.StageEntry(model.BranchStage.FAILED, at(3)),
        ),
        "requested_mode": model.BranchMode.AUTO,
        "requested_layout": model.Layout.AUTO,
        "layout": model.Layout.FLAT,
        "create_time": T0,
        "mode": model.BranchMode.DIFF,
        "mode_reason": "the base is valid",
        "snapshot_labels": {"step": "3"},
        "max_pause_us": 20_000,
        "predicted_pause_us": 7_001,
        "precopy": model.PrecopyProgress(1, 2, 3, model.CopyMethod.REFLINK),
        "pause_window": model.PauseWindow(
            at(1), 5_003, 101, 4_002, 103, 77, model.StagingKind.TMPFS
        ),
        "merge": model.MergeProgress(4, 5),
        "fork_id": "fork-1",
        "error": problem(),
        "end_time": at(3),
        "staging_serial": 12,
        "staging": model.StagingKind.TMPFS,
        "base_snapshot_id": "snap-1",
    }
    return model.Branch(**{**fields, **changes})  # type: ignore[arg-type]


def fork(fork_id: str = "fork-1", **changes: object) -> model.Fork:
    fields: dict[str, object] = {
        "fork_id": fork_id,
        "snapshot_id": "snap-2",
        "sequence": 5,
        "stage": model.ForkStage.READY,
        "spec": model.ForkSpec(3, fork_id, on_failure=model.FailureAction.KEEP),
        "children": (
            model.ForkChild(f"{fork_id}-0", model.ForkChildState.READY, None, 2_345),
            model.ForkChild(f"{fork_id}-1", model.ForkChildState.FAILED, problem()),
            model.ForkChild(f"{fork_id}-2", model.ForkChildState.READY, None, 2_346),
        ),
        "create_time": T0,
        "branch_id": "branch-1",
        "error": problem(model.Reason.CHILDREN_FAILED),
        "end_time": at(4),
        "flatten": model.FlattenProgress(4_096, 8_192),
    }
    return model.Fork(**{**fields, **changes})  # type: ignore[arg-type]


def branch_view(branch_id: str = "branch-1", **changes: object) -> model.BranchView:
    return model.BranchView(branch(branch_id, **changes), snapshot(), fork())


def facts() -> model.ServerFacts:
    return model.ServerFacts(
        version="0.1.0",
        vmm=VMM,
        vmm_path=Path("/usr/bin/firecracker"),
        checks=(model.HostCheck("kvm", model.CheckOutcome.WARNING, "slow", "use a real one"),),
        start_time=T0,
        image_roots=(Path("/images"),),
        data_dir=Path("/var/lib/forkpoint"),
        max_fork_count=100,
        max_queued_branches=16,
        staging=model.StagingKind.TMPFS,
        reflink=True,
        image_free_bytes=1 << 40,
        image_used_bytes=1 << 39,
        images_quota_bytes=1 << 42,
        images_low_water_bytes=1 << 30,
        staging_free_bytes=1 << 30,
        memory=model.MemoryUse(1 << 34, 1 << 31, 1 << 28, 1 << 27, 1 << 24),
    )
