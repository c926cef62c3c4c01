"""What this host can do, and where it can't, why and what to do: `doctor` and GetServerInfo.

Each check looks at the real thing: /dev/kvm is opened, the VMM is run, the staging folder is
written to. Blocking: run it in a thread.
"""

from __future__ import annotations

import errno
import fcntl
import grp
import os
import pwd
import resource
import shutil
from pathlib import Path

from forkpointd.config import Settings
from forkpointd.images import can_reflink, filesystem_of, probe_staging
from forkpointd.model import (
    MIB,
    CheckOutcome,
    ForkpointError,
    HostCheck,
    Reason,
    StagingKind,
    VmmKind,
)
from forkpointd.vmm import Binary, inspect_binary, simulator_binary
from forkpointd.vmm.fetch import PINNED_VERSION, FirecrackerUnavailableError, ensure_firecracker

KVM = Path("/dev/kvm")
KVM_GET_API_VERSION = 0xAE00
KVM_API_VERSION = 12
"""Linux's Documentation/virt/kvm/api.rst: anything else must be refused."""

LITTLE_STAGING_BYTES = 1024 * MIB
"""Less than this and most sources are staged on disk, with windows 1.3 to 3 times as long."""


def check_kvm(device: Path = KVM) -> HostCheck:
    """Whether this process may run virtual machines."""
    name = "kvm"
    if not device.exists():
        return HostCheck(
            name,
            CheckOutcome.FAILED,
            f"there is no {device}: this machine has no KVM, or its module is not loaded",
            "load it (modprobe kvm_intel or kvm_amd), switch virtualisation on in the firmware, or "
            "choose a machine with (nested) virtualisation; --vmm simulator works without",
        )
    try:
        descriptor = os.open(device, os.O_RDWR | os.O_CLOEXEC)
    except PermissionError:
        return _no_permission(device)
    except OSError as error:
        return HostCheck(
            name,
            CheckOutcome.FAILED,
            f"{device} can't be opened: {error.strerror}",
            "see dmesg; --vmm simulator works without",
        )
    try:
        version = fcntl.ioctl(descriptor, KVM_GET_API_VERSION)
    except OSError as error:
        return HostCheck(
            name,
            CheckOutcome.FAILED,
            f"{device} is not KVM: {error.strerror}",
            "remove what stands in its place and load the kvm module",
        )
    finally:
        os.close(descriptor)
    if version != KVM_API_VERSION:
        return HostCheck(
            name,
            CheckOutcome.FAILED,
            f"{device} speaks KVM API {version}, not {KVM_API_VERSION}",
            "use a Linux of this century",
        )
    return HostCheck(name, CheckOutcome.OK, f"{device} can be used")


def _no_permission(device: Path) -> HostCheck:
    try:
        user = pwd.getpwuid(os.geteuid()).pw_name
    except KeyError:  # a container's uid that nobody named
        user = str(os.geteuid())
    try:
        group = grp.getgrgid(device.stat().st_gid)
    except KeyError:
        group = None
    if group is not None and user in group.gr_mem and group.gr_gid not in os.getgroups():
        return HostCheck(
            "kvm",
            CheckOutcome.FAILED,
            f"user {user} was given group {group.gr_name}, but this process does not have it yet",
            f"log out and in again, or run: newgrp {group.gr_name}",
        )
    fix = (
        f"sudo usermod -aG {group.gr_name} {user}, then log in again"
        if group is not None and group.gr_gid != 0
        else f"sudo setfacl -m u:{user}:rw {device}"
    )
    return HostCheck("kvm", CheckOutcome.FAILED, f"user {user} has no permission for {device}", fix)


def raise_file_limit() -> None:
    """Lets this process open as many files as it may: each sandbox is one for as long as it runs,
    and several while it starts, and the usual soft limit is 1,024 (getrlimit(2))."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def choose_binary(settings: Settings, say: object = print) -> Binary:
    """The VMM that new sandboxes run on. Raises ForkpointError NO_VMM with reason and remedy."""
    kvm = check_kvm()
    kind = settings.vmm
    if kind == "auto":
        kind = "firecracker" if kvm.outcome is CheckOutcome.OK else "simulator"
    if kind == "simulator":
        return simulator_binary()
    if kvm.outcome is not CheckOutcome.OK:
        raise ForkpointError(Reason.NO_VMM, f"{kvm.detail}; {kvm.remedy}")
    if settings.firecracker is not None:
        return inspect_binary(settings.firecracker)
    try:
        path = ensure_firecracker(say if callable(say) else print)
    except FirecrackerUnavailableError as error:
        raise ForkpointError(Reason.NO_VMM, str(error)) from error
    return inspect_binary(path)


def check_vmm(settings: Settings) -> tuple[HostCheck, Binary | None]:
    """Whether there is a VMM, and which."""
    try:
        binary = choose_binary(settings, say=lambda _: None)
    except ForkpointError as error:
        return (
            HostCheck(
                "vmm",
                CheckOutcome.FAILED,
                str(error),
                f"install Firecracker {PINNED_VERSION} and name it by FORKPOINT_FIRECRACKER, or "
                "use --vmm simulator",
            ),
            None,
        )
    return describe_vmm(binary), binary


def describe_vmm(binary: Binary) -> HostCheck:
    """Which VMM new sandboxes run on."""
    if binary.kind is VmmKind.SIMULATOR:
        return HostCheck(
            "vmm",
            CheckOutcome.WARNING,
            f"the simulator {binary.version}: no guest code runs, for developing clients only",
            "use a machine with KVM to run real guests",
        )
    if binary.version != PINNED_VERSION:
        return HostCheck(
            "vmm",
            CheckOutcome.WARNING,
            f"Firecracker {binary.version} at {binary.path}; tested is {PINNED_VERSION}",
            f"use {PINNED_VERSION} unless you have a reason",
        )
    return HostCheck("vmm", CheckOutcome.OK, f"Firecracker {binary.version} at {binary.path}")


def check_staging(folder: Path, budget_bytes: int | None) -> tuple[HostCheck, StagingKind]:
    """Whether windows can be staged in memory: the folder is a tmpfs that tells holes truly."""
    name = "staging"
    if not folder.is_dir():
        return (
            HostCheck(
                name,
                CheckOutcome.WARNING,
                f"there is no folder {folder}: windows are staged on disk, and 1.3 to 3 times "
                "as long",
                f"mount a tmpfs there: mount -t tmpfs -o size=50% tmpfs {folder}",
            ),
            StagingKind.DISK,
        )
    try:
        probe = probe_staging(folder)
    except OSError as error:
        return (
            HostCheck(
                name,
                CheckOutcome.WARNING,
                f"{folder} can't be written ({error.strerror}): windows are staged on disk",
                f"give this user the right to write {folder}, or set staging_dir",
            ),
            StagingKind.DISK,
        )
    if not probe.ok or probe.filesystem != "tmpfs":
        reason = probe.reason or f"it is {probe.filesystem}, not tmpfs"
        return (
            HostCheck(
                name,
                CheckOutcome.WARNING,
                f"{folder} is not used for staging: {reason}. Windows are staged on disk",
                probe.remedy or "set staging_dir to a tmpfs mounted with huge=never",
            ),
            StagingKind.DISK,
        )
    free = shutil.disk_usage(folder).free
    usable = free if budget_bytes is None else min(free, budget_bytes)
    if usable < LITTLE_STAGING_BYTES:
        return (
            HostCheck(
                name,
                CheckOutcome.WARNING,
                f"little tmpfs: {usable // MIB} MiB at {folder}. Sources with more memory are "
                "staged on disk",
                f"mount -o remount,size=50% {folder}, or raise staging_bytes",
            ),
            StagingKind.TMPFS,
        )
    return (
        HostCheck(name, CheckOutcome.OK, f"{usable // MIB} MiB of tmpfs at {folder}"),
        StagingKind.TMPFS,
    )


def check_memory_images(folder: Path, budget_bytes: int | None) -> tuple[HostCheck, bool]:
    """Whether images can be kept in memory: the folder is a tmpfs."""
    name = "memory_images"
    if budget_bytes == 0:
        return HostCheck(name, CheckOutcome.OK, "none are kept: memory_images_bytes is 0"), False
    reason = ""
    if not folder.is_dir():
        reason = f"there is no folder {folder}"
    elif not os.access(folder, os.W_OK | os.X_OK):
        reason = f"{folder} can't be written by this user"
    elif (filesystem := filesystem_of(folder)) != "tmpfs":
        reason = f"{folder} is {filesystem}, not tmpfs"
    if reason:
        return (
            HostCheck(
                name,
                CheckOutcome.WARNING,
                f"{reason}: no image can be kept in memory (durability MEMORY)",
                "set memory_images_dir to a tmpfs that this user may write",
            ),
            False,
        )
    free = shutil.disk_usage(folder).free
    usable = free if budget_bytes is None else min(free, budget_bytes)
    return HostCheck(name, CheckOutcome.OK, f"{usable // MIB} MiB of tmpfs at {folder}"), True


def check_data_dir(root: Path) -> HostCheck:
    """Whether snapshots can be kept here at all: the disk's own staging must tell holes truly."""
    folder = root
    while not folder.exists():
        folder = folder.parent
    if not folder.is_dir():
        return HostCheck(
            "data_dir",
            CheckOutcome.FAILED,
            f"{folder} is a file where a folder should be",
            "choose another --data-dir",
        )
    if not os.access(folder, os.W_OK | os.X_OK):
        return HostCheck(
            "data_dir",
            CheckOutcome.FAILED,
            f"{folder} can't be written by this user",
            "choose another --data-dir, or give the right to write it",
        )
    try:
        probe = probe_staging(folder)
    except OSError as error:
        remedy = "make room" if error.errno == errno.ENOSPC else "choose another --data-dir"
        return HostCheck("data_dir", CheckOutcome.FAILED, f"{folder}: {error.strerror}", remedy)
    if not probe.ok:
        return HostCheck("data_dir", CheckOutcome.FAILED, f"{folder}: {probe.reason}", probe.remedy)
    free = shutil.disk_usage(folder).free
    return HostCheck(
        "data_dir", CheckOutcome.OK, f"{free // MIB} MiB free at {folder} ({probe.filesystem})"
    )


def check_reflink(root: Path) -> tuple[HostCheck, bool]:
    """Whether a copy of an image can share its blocks."""
    folder = root
    while not folder.is_dir():
        folder = folder.parent
    try:
        able = can_reflink(folder)
    except OSError as error:
        return (
            HostCheck(
                "reflink", CheckOutcome.WARNING, f"not known: {error.strerror}", "see data_dir"
            ),
            False,
        )
    if able:
        return HostCheck("reflink", CheckOutcome.OK, "pre-copies share blocks"), True
    return (
        HostCheck(
            "reflink",
            CheckOutcome.WARNING,
            "this file system can't share blocks: pre-copies copy the data there is",
            "put the data folder on XFS (reflink=1) or btrfs for pre-copies without cost",
        ),
        False,
    )


def all_checks(settings: Settings) -> tuple[HostCheck, ...]:
    """Everything that `doctor` tells."""
    vmm, _ = check_vmm(settings)
    staging, _ = check_staging(settings.staging_dir, settings.staging_bytes)
    images, _ = check_memory_images(
        settings.memory_images_dir or settings.staging_dir, settings.memory_images_bytes
    )
    reflink, _ = check_reflink(settings.data_dir)
    return (check_kvm(), vmm, staging, images, reflink, check_data_dir(settings.data_dir))
