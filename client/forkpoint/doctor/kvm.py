"""Whether this process may run virtual machines, and which of the many reasons it is if not."""

from __future__ import annotations

import errno
import fcntl
import grp
import os
import pwd
import re
import stat
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from forkpoint.enums import CheckOutcome
from forkpoint.views import HostCheck

DEVICE = Path("/dev/kvm")
KVM_GET_API_VERSION = 0xAE00
KVM_API_VERSION = 12
"""Linux's Documentation/virt/kvm/api.rst: any other is to be refused."""

_CONTAINER_MARKS = (Path("/.dockerenv"), Path("/run/.containerenv"))
"""What Docker and Podman leave in every container."""

_WITHOUT = "Without KVM there is the simulator (forkpointd serve --vmm simulator): no guest runs."


@dataclass(frozen=True)
class Who:
    """Whose rights count."""

    user: str
    groups: Collection[int]
    """The groups that this process has."""
    granted: Collection[int]
    """The groups that /etc/group and /etc/passwd give to the user."""

    @classmethod
    def me(cls) -> Who:
        """This process."""
        try:
            account = pwd.getpwuid(os.geteuid())
        except KeyError:  # a container's user without an account
            return cls(str(os.geteuid()), {*os.getgroups(), os.getegid()}, set())
        granted = os.getgrouplist(account.pw_name, account.pw_gid)
        return cls(account.pw_name, {*os.getgroups(), os.getegid()}, set(granted))


def check_kvm(device: Path = DEVICE, who: Who | None = None) -> HostCheck:
    """The check `kvm`."""
    try:
        descriptor = os.open(device, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        return _missing(device)
    except PermissionError:
        return _forbidden(device, Who.me() if who is None else who)
    except OSError as error:
        if error.errno in (errno.ENODEV, errno.ENXIO):
            return _missing(device)
        return _failed(f"{device} can't be opened: {error.strerror}", f"See dmesg. {_WITHOUT}")
    try:
        version = fcntl.ioctl(descriptor, KVM_GET_API_VERSION)
    except OSError as error:
        return _failed(
            f"{device} is not KVM: {error.strerror}",
            "Remove what stands in its place, and load the module: sudo modprobe kvm",
        )
    finally:
        os.close(descriptor)
    if version != KVM_API_VERSION:
        return _failed(
            f"{device} speaks version {version} of its API, not {KVM_API_VERSION}",
            "Use Linux 2.6.22 or newer.",
        )
    return HostCheck("kvm", CheckOutcome.OK, f"{device} can be used")


def _failed(detail: str, remedy: str) -> HostCheck:
    return HostCheck("kvm", CheckOutcome.FAILED, detail, remedy)


def _missing(
    device: Path,
    cpuinfo: Path = Path("/proc/cpuinfo"),
    containers: Collection[Path] = _CONTAINER_MARKS,
) -> HostCheck:
    """No device: no module, no virtualisation in the CPU, or a container without the device."""
    if any(mark.exists() for mark in containers):
        return _failed(
            f"there is no {device} in this container",
            f"Give it the device: docker run --device {device} ... {_WITHOUT}",
        )
    flags = re.search(r"^flags\s*:.*\b(vmx|svm)\b", cpuinfo.read_text("utf-8"), re.MULTILINE)
    if flags is None:
        return _failed(
            f"there is no {device}: this CPU offers no virtualisation",
            "On a physical machine, switch it on in the firmware (VT-x, SVM). On a virtual one, ask"
            f" for nested virtualisation.\n{_WITHOUT}",
        )
    module = "kvm_intel" if flags[1] == "vmx" else "kvm_amd"
    return _failed(
        f"there is no {device}: the CPU could, but the kernel's module is not loaded",
        f"sudo modprobe {module}\n{_WITHOUT}",
    )


def _forbidden(device: Path, who: Who) -> HostCheck:
    """There is one, and this process may not use it."""
    status = device.stat()
    once = f"sudo setfacl -m u:{who.user}:rw {device}"
    try:
        group = grp.getgrgid(status.st_gid).gr_name
    except KeyError:
        group = str(status.st_gid)
    group_may = status.st_mode & (stat.S_IRGRP | stat.S_IWGRP) == stat.S_IRGRP | stat.S_IWGRP
    if group_may and status.st_gid in who.granted and status.st_gid not in who.groups:
        return _failed(
            f"user {who.user} has been given group {group}, but this process does not have it yet",
            f"Log out and in again, or for this shell: newgrp {group}",
        )
    if not group_may or status.st_gid == 0:
        return _failed(f"user {who.user} has no permission for {device}", once)
    if status.st_gid in who.groups:
        return _failed(
            f"user {who.user} is in group {group} and still may not use {device}",
            f"Look at its access list (getfacl {device}) and at the container's device rules.",
        )
    return _failed(
        f"user {who.user} has no permission for {device}: it belongs to group {group}",
        f"sudo usermod -aG {group} {who.user}, then log in again. Until the next boot: {once}",
    )
