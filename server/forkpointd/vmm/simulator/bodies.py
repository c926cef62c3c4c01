"""The structures of Firecracker 1.12.1's request bodies, in its own field order."""

from __future__ import annotations

from typing import Any, Final

from .body import (
    Field,
    Struct,
    WrongValueError,
    anything,
    boolean,
    defaulted,
    optional,
    sequence,
    string,
    unexpected,
    unsigned,
    variant,
)


def _path(value: Any) -> None:
    if not isinstance(value, str):
        raise WrongValueError(f"invalid type: {unexpected(value)}, expected path string")


_U8 = unsigned("u8", 8)
_USIZE = unsigned("usize", 64)
_HUGE_PAGES = variant("None", "2M")
_CPU_TEMPLATE = variant("C3", "T2", "T2S", "None", "T2CL", "T2A")

BOOT_SOURCE: Final = Struct(
    "BootSourceConfig",
    {
        "kernel_image_path": Field(string),
        "initrd_path": optional(string),
        "boot_args": optional(string),
    },
)
MACHINE: Final = Struct(
    "MachineConfig",
    {
        "vcpu_count": Field(_U8),
        "mem_size_mib": Field(_USIZE),
        "smt": defaulted(boolean),
        "cpu_template": optional(_CPU_TEMPLATE),
        "track_dirty_pages": defaulted(boolean),
        "huge_pages": defaulted(_HUGE_PAGES),
    },
)
MACHINE_UPDATE: Final = Struct(
    "MachineConfigUpdate",
    {
        "vcpu_count": optional(_U8),
        "mem_size_mib": optional(_USIZE),
        "smt": optional(boolean),
        "cpu_template": optional(_CPU_TEMPLATE),
        "track_dirty_pages": optional(boolean),
        "huge_pages": optional(_HUGE_PAGES),
    },
)
_TOKEN_BUCKET = Struct(
    "TokenBucketConfig",
    {
        "size": Field(unsigned("u64", 64)),
        "one_time_burst": optional(unsigned("u64", 64)),
        "refill_time": Field(unsigned("u64", 64)),
    },
)
_RATE_LIMITER = Struct(
    "RateLimiterConfig", {"bandwidth": optional(_TOKEN_BUCKET), "ops": optional(_TOKEN_BUCKET)}
)
DRIVE: Final = Struct(
    "BlockDeviceConfig",
    {
        "drive_id": Field(string),
        "partuuid": optional(string),
        "is_root_device": Field(boolean),
        "cache_type": defaulted(variant("Unsafe", "Writeback")),
        "is_read_only": optional(boolean),
        "path_on_host": optional(string),
        "rate_limiter": optional(_RATE_LIMITER),
        "io_engine": optional(variant("Sync", "Async")),
        "socket": optional(string),
    },
)
DRIVE_UPDATE: Final = Struct(
    "BlockDeviceUpdateConfig",
    {
        "drive_id": Field(string),
        "path_on_host": optional(string),
        "rate_limiter": optional(_RATE_LIMITER),
    },
)
METRICS: Final = Struct("MetricsConfig", {"metrics_path": Field(_path)}, closed=False)
LOGGER: Final = Struct(
    "LoggerConfig",
    {
        "log_path": optional(_path),
        "level": optional(string),
        "show_level": optional(boolean),
        "show_log_origin": optional(boolean),
        "module": optional(string),
    },
)
ACTION: Final = Struct(
    "ActionBody",
    {"action_type": Field(variant("FlushMetrics", "InstanceStart", "SendCtrlAltDel"))},
)
VM: Final = Struct("Vm", {"state": Field(variant("Paused", "Resumed"))})
SNAPSHOT_CREATE: Final = Struct(
    "CreateSnapshotParams",
    {
        "snapshot_type": defaulted(variant("Diff", "Full")),
        "snapshot_path": Field(_path),
        "mem_file_path": Field(_path),
    },
)
_MEM_BACKEND = Struct(
    "MemBackendConfig",
    {"backend_path": Field(_path), "backend_type": Field(variant("File", "Uffd"))},
)
SNAPSHOT_LOAD: Final = Struct(
    "LoadSnapshotConfig",
    {
        "snapshot_path": Field(_path),
        "mem_file_path": optional(_path),
        "mem_backend": optional(_MEM_BACKEND),
        "enable_diff_snapshots": defaulted(boolean),
        "resume_vm": defaulted(boolean),
        "network_overrides": defaulted(sequence),
    },
)
FAULTS: Final = Struct("Faults", {"rules": Field(anything)})
