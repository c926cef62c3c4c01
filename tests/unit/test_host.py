"""What `doctor` tells apart, each with its remedy."""

from __future__ import annotations

import grp
import os
import pwd
from pathlib import Path
from types import SimpleNamespace

import pytest

from forkpointd import host
from forkpointd.config import Settings
from forkpointd.model import (
    CheckOutcome,
    ForkpointError,
    HostCheck,
    Reason,
    StagingKind,
    VmmKind,
)

FAILED, OK, WARNING = CheckOutcome.FAILED, CheckOutcome.OK, CheckOutcome.WARNING


def test_no_kvm_is_told_with_what_would_bring_it(tmp_path: Path) -> None:
    check = host.check_kvm(tmp_path / "kvm")
    assert check.outcome is FAILED
    assert "there is no" in check.detail
    assert "modprobe" in check.remedy and "simulator" in check.remedy


def test_something_else_in_its_place_is_not_kvm(tmp_path: Path) -> None:
    (tmp_path / "kvm").touch()
    check = host.check_kvm(tmp_path / "kvm")
    assert check.outcome is FAILED
    assert "is not KVM" in check.detail


@pytest.fixture
def closed_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A device that this user may not open."""
    device = tmp_path / "kvm"
    device.touch()
    real = os.open

    def refuse(path: object, *arguments: object, **named: object) -> int:
        if path == device:
            raise PermissionError(13, "Permission denied", str(device))
        return real(path, *arguments, **named)  # type: ignore[arg-type]

    monkeypatch.setattr(os, "open", refuse)
    monkeypatch.setattr(pwd, "getpwuid", lambda _: SimpleNamespace(pw_name="anna"))
    return device


def group(monkeypatch: pytest.MonkeyPatch, gid: int, members: list[str]) -> None:
    found = SimpleNamespace(gr_name="kvm", gr_gid=gid, gr_mem=members)
    monkeypatch.setattr(grp, "getgrgid", lambda _: found)


def test_no_permission_is_told_with_the_group_that_has_it(
    closed_device: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    group(monkeypatch, 108, [])
    check = host.check_kvm(closed_device)
    assert check.detail == f"user anna has no permission for {closed_device}"
    assert check.remedy == "sudo usermod -aG kvm anna, then log in again"


def test_a_group_that_the_process_has_not_yet_is_told_apart(
    closed_device: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    group(monkeypatch, 108, ["anna"])
    monkeypatch.setattr(os, "getgroups", lambda: [1000])
    check = host.check_kvm(closed_device)
    assert "was given group kvm" in check.detail
    assert "newgrp kvm" in check.remedy


def test_a_device_of_root_alone_is_opened_to_one_user(
    closed_device: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    group(monkeypatch, 0, [])
    assert "setfacl -m u:anna:rw" in host.check_kvm(closed_device).remedy


def test_a_uid_without_a_name_is_no_crash(
    closed_device: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unknown(_: int) -> None:
        raise KeyError("uid not found")

    monkeypatch.setattr(pwd, "getpwuid", unknown)
    group(monkeypatch, 108, [])
    assert str(os.geteuid()) in host.check_kvm(closed_device).detail


def test_without_kvm_auto_is_the_simulator_and_firecracker_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(host, "check_kvm", lambda: HostCheck("kvm", FAILED, "no kvm", "mend"))
    auto = Settings.load(None, data_dir=tmp_path, vmm="auto")
    assert host.choose_binary(auto).kind is VmmKind.SIMULATOR
    vmm, _ = host.check_vmm(auto)
    assert vmm.outcome is WARNING and "no guest code runs" in vmm.detail
    with pytest.raises(ForkpointError, match="no kvm; mend") as caught:
        host.choose_binary(Settings.load(None, data_dir=tmp_path, vmm="firecracker"))
    assert caught.value.reason is Reason.NO_VMM


def test_a_staging_folder_that_is_no_tmpfs_means_the_disk(tmp_path: Path) -> None:
    check, kind = host.check_staging(tmp_path, None)
    if Path("/tmp").stat().st_dev == Path("/dev/shm").stat().st_dev:
        pytest.skip("the temporary folder is on tmpfs here")
    assert kind is StagingKind.DISK
    assert check.outcome is WARNING and "not tmpfs" in check.detail
    check, kind = host.check_staging(tmp_path / "none", None)
    assert kind is StagingKind.DISK and "mount -t tmpfs" in check.remedy


def test_little_tmpfs_is_a_warning(tmp_path: Path) -> None:
    check, kind = host.check_staging(Path("/dev/shm"), 64 << 20)
    assert kind is StagingKind.TMPFS
    assert check.outcome is WARNING and "little tmpfs: 64 MiB" in check.detail
    assert "staging_bytes" in check.remedy


def test_a_file_where_the_data_folder_should_be_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    check = host.check_data_dir(tmp_path / "file")
    assert check.outcome is FAILED and "a file where a folder should be" in check.detail
    assert host.check_data_dir(tmp_path / "later" / "made").outcome is OK
