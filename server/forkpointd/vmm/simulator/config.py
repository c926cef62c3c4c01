"""What a machine is made of: configured before the start, or read from vmstate."""

from __future__ import annotations

import os
from typing import Any, Final

from .errors import Fault, io_text

MAX_VCPUS: Final = 32
_COMMAND_LINE_BYTES: Final = 2048
_HUGE_PAGE_MIB: Final = {"None": 1, "2M": 2}
_SAVED: Final = ("vcpu_count", "mem_size_mib", "smt", "cpu_template", "huge_pages")


class MachineConfig:
    """Boot source, machine and drives. Setters raise Fault as Firecracker refuses."""

    def __init__(self) -> None:
        self.touched = False  # something was configured that forbids a load
        self.kernel: int | None = None  # descriptor, open since PUT /boot-source
        self.kernel_path = ""
        self.initrd_path: str | None = None
        self.boot_args: str | None = None
        self.vcpu_count = 1
        self.mem_size_mib = 128
        self.smt = False
        self.cpu_template: str | None = None
        self.track_dirty_pages = False
        self.huge_pages = "None"
        self.drives: list[dict[str, Any]] = []

    # --- boot source ------------------------------------------------------------------------------

    def set_boot_source(self, body: dict[str, Any]) -> None:
        """PUT /boot-source: the files are opened here and kept open."""
        self.touched = True
        try:
            kernel = os.open(body["kernel_image_path"], os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise Fault(
                f"Boot source error: The kernel file cannot be opened: {io_text(error)}"
            ) from error
        try:
            if (initrd := body.get("initrd_path")) is not None:
                os.close(os.open(initrd, os.O_RDONLY | os.O_CLOEXEC))
        except OSError as error:
            os.close(kernel)
            raise Fault(
                "Boot source error: The initrd file cannot be opened due to invalid path or "
                f"invalid permissions. {io_text(error)}"
            ) from error
        boot_args = body.get("boot_args")
        if boot_args is not None and len(boot_args.encode()) >= _COMMAND_LINE_BYTES:
            os.close(kernel)
            raise Fault(
                "Boot source error: The kernel command line is invalid: "
                "Invalid cmdline capacity provided."
            )
        if self.kernel is not None:
            os.close(self.kernel)
        self.kernel, self.kernel_path = kernel, body["kernel_image_path"]
        self.initrd_path, self.boot_args = body.get("initrd_path"), boot_args

    # --- machine ----------------------------------------------------------------------------------

    def update_machine(self, body: dict[str, Any]) -> None:
        """PUT and PATCH /machine-config: what is given replaces what was."""
        self.touched = True
        vcpus = body.get("vcpu_count", self.vcpu_count)
        smt = body.get("smt", self.smt)
        if not 0 < vcpus <= MAX_VCPUS or (smt and vcpus > 1 and vcpus % 2):
            raise Fault(
                "Machine config error: The number of vCPUs must be greater than 0, less than 32 "
                "and must be 1 or an even number if SMT is enabled."
            )
        size_mib = body.get("mem_size_mib", self.mem_size_mib)
        huge_pages = body.get("huge_pages", self.huge_pages)
        if not size_mib or size_mib % _HUGE_PAGE_MIB[huge_pages]:
            raise Fault(
                "Machine config error: The memory size (MiB) is either 0, or not a multiple of "
                "the configured page size."
            )
        self.vcpu_count, self.smt = vcpus, smt
        self.mem_size_mib, self.huge_pages = size_mib, huge_pages
        if template := body.get("cpu_template"):
            self.cpu_template = None if template == "None" else template
        self.track_dirty_pages = body.get("track_dirty_pages", self.track_dirty_pages)

    def machine_json(self) -> dict[str, Any]:
        """As GET /machine-config answers."""
        template = {"cpu_template": self.cpu_template} if self.cpu_template else {}
        return {
            "vcpu_count": self.vcpu_count,
            "mem_size_mib": self.mem_size_mib,
            "smt": self.smt,
            **template,
            "track_dirty_pages": self.track_dirty_pages,
            "huge_pages": self.huge_pages,
        }

    # --- drives -----------------------------------------------------------------------------------

    def set_drive(self, body: dict[str, Any]) -> None:
        """PUT /drives/{id}: a new drive, or another in the place of the one with this id."""
        self.touched = True
        drive = {
            "drive_id": body["drive_id"],
            "partuuid": body.get("partuuid"),
            "is_root_device": body["is_root_device"],
            "cache_type": body.get("cache_type", "Unsafe"),
            "is_read_only": body.get("is_read_only", False),
            "path_on_host": body.get("path_on_host"),
            "rate_limiter": _rate_limiter(body.get("rate_limiter")),
            "io_engine": body.get("io_engine", "Sync"),
            "socket": None,
        }
        others = [d for d in self.drives if d["drive_id"] != drive["drive_id"]]
        if drive["is_root_device"] and any(d["is_root_device"] for d in others):
            raise Fault("Drive config error: A root block device already exists!")
        open_drive(drive, "Drive config error: Unable to create the virtio block device")
        places = [d["drive_id"] for d in self.drives]
        if drive["drive_id"] in places:
            self.drives[places.index(drive["drive_id"])] = drive
        else:
            self.drives.append(drive)
        self.drives.sort(key=lambda d: not d["is_root_device"])  # the root device comes first

    # --- as a whole -------------------------------------------------------------------------------

    def full_json(self) -> dict[str, Any]:
        """As GET /vm/config answers."""
        return {
            "balloon": None,
            "drives": self.drives,
            "boot-source": {
                "kernel_image_path": self.kernel_path,
                "initrd_path": self.initrd_path,
                "boot_args": self.boot_args,
            },
            "cpu-config": None,
            "logger": None,
            "machine-config": self.machine_json(),
            "metrics": None,
            "mmds-config": None,
            "network-interfaces": [],
            "vsock": None,
            "entropy": None,
        }

    def for_vmstate(self) -> dict[str, Any]:
        """What a snapshot keeps; `track_dirty_pages` is not among it."""
        return {
            "machine": {name: getattr(self, name) for name in _SAVED},
            "boot_source": [self.kernel_path, self.initrd_path, self.boot_args],
            "drives": self.drives,
        }

    @classmethod
    def of_vmstate(cls, state: dict[str, Any], *, tracked: bool) -> MachineConfig:
        """The machine of a snapshot. Raises Fault where a drive's file is gone."""
        config = cls()
        for name, value in state["machine"].items():
            setattr(config, name, value)
        config.kernel_path, config.initrd_path, config.boot_args = state["boot_source"]
        config.track_dirty_pages = tracked
        config.drives = state["drives"]
        for drive in config.drives:
            open_drive(drive, "Failed to build microVM from snapshot: Failed to restore devices")
        return config


def _rate_limiter(given: dict[str, Any] | None) -> dict[str, Any] | None:
    """As GET /vm/config shows it: what was left out is null."""
    if given is None:
        return None
    bucket = {"size": None, "one_time_burst": None, "refill_time": None}
    return {name: given.get(name) and bucket | given[name] for name in ("bandwidth", "ops")}


def open_drive(drive: dict[str, Any], what: str) -> None:
    """Looks whether a drive's file can be opened as it is to be used. Raises Fault."""
    path = drive["path_on_host"]
    if path is None:
        raise Fault("Drive config error: Unable to create the virtio block device: no path_on_host")
    try:
        mode = os.O_RDONLY if drive["is_read_only"] else os.O_RDWR
        os.close(os.open(path, mode | os.O_CLOEXEC))
    except OSError as error:
        raise Fault(
            f"{what}: Virtio backend error: Error manipulating the backing file: "
            f"{io_text(error)} {path}"
        ) from error
