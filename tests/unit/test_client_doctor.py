"""`forkpoint doctor`: each state of a machine has its own words and its own remedy."""

import json
import os
import stat
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import forkpoint
from forkpoint import doctor
from forkpoint.cli.common import fail
from forkpoint.doctor import kvm, local
from forkpoint.doctor import server as server_checks
from forkpoint.doctor.kvm import Who, check_kvm
from forkpoint.enums import CheckOutcome
from forkpoint.views import HostCheck
from tests.unit.client_fake import Fake, fresh_address

NO_GROUPS = Who("alice", groups=set(), granted=set())


@pytest.fixture
def locked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A device that belongs to a group, and that this process may not open."""
    device = tmp_path / "kvm"
    device.touch()
    device.chmod(0o660)
    if os.geteuid() == 0:
        os.chown(device, 0, grp_of("daemon"))
    opened = os.open

    def refuse(path: os.PathLike[str] | str, flags: int, *rest: int) -> int:
        if path == device:
            raise PermissionError(13, "Permission denied", str(path))
        return opened(path, flags, *rest)

    monkeypatch.setattr(os, "open", refuse)
    return device


def grp_of(name: str) -> int:
    import grp

    return grp.getgrnam(name).gr_gid


def test_no_device_and_a_cpu_that_could(tmp_path: Path) -> None:
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text("flags\t\t: fpu svm sse\n")
    missing = kvm._missing(tmp_path / "kvm", cpuinfo, containers=())
    assert "module is not loaded" in missing.detail
    assert "sudo modprobe kvm_amd" in (missing.remedy or "")
    cpuinfo.write_text("flags\t\t: fpu vmx sse\n")
    assert "kvm_intel" in (kvm._missing(tmp_path / "kvm", cpuinfo, containers=()).remedy or "")


def test_no_device_and_a_cpu_that_can_not(tmp_path: Path) -> None:
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text("flags\t\t: fpu sse\n")
    missing = kvm._missing(tmp_path / "kvm", cpuinfo, containers=())
    assert "no virtualisation" in missing.detail
    assert "firmware" in (missing.remedy or "")
    assert "simulator" in (missing.remedy or "")


def test_no_device_in_a_container(tmp_path: Path) -> None:
    mark = tmp_path / "dockerenv"
    mark.touch()
    missing = kvm._missing(Path("/dev/kvm"), containers=(mark,))
    assert "--device /dev/kvm" in (missing.remedy or "")


def test_no_permission_at_all(locked: Path) -> None:
    check = check_kvm(locked, NO_GROUPS)
    assert check.outcome is CheckOutcome.FAILED
    assert "user alice has no permission" in check.detail
    assert "alice" in (check.remedy or "")


def test_a_group_that_was_given_but_is_not_here_yet(locked: Path) -> None:
    gid = locked.stat().st_gid
    if gid == 0:
        pytest.skip("the group of a new file is root's here")
    check = check_kvm(locked, Who("alice", groups=set(), granted={gid}))
    assert "does not have it yet" in check.detail
    assert "newgrp" in (check.remedy or "")
    not_given = check_kvm(locked, NO_GROUPS)
    assert "usermod -aG" in (not_given.remedy or "")
    still = check_kvm(locked, Who("alice", groups={gid}, granted={gid}))
    assert "still may not" in still.detail


def test_a_device_that_only_root_may_use(locked: Path) -> None:
    locked.chmod(stat.S_IRUSR | stat.S_IWUSR)
    assert "setfacl" in (check_kvm(locked, NO_GROUPS).remedy or "")


def test_something_else_in_its_place(tmp_path: Path) -> None:
    (tmp_path / "kvm").touch()
    check = check_kvm(tmp_path / "kvm")
    assert check.outcome is CheckOutcome.FAILED
    assert "is not KVM" in check.detail


def firecracker(folder: Path, says: str) -> str:
    path = folder / "firecracker"
    path.write_text(f"#!/bin/sh\necho '{says}'\n")
    path.chmod(0o755)
    return str(path)


@pytest.mark.parametrize(
    ("says", "outcome", "detail"),
    [
        ("Firecracker v1.12.1", CheckOutcome.OK, "Firecracker 1.12.1"),
        ("Firecracker v0.9.0", CheckOutcome.WARNING, "tested is 1.12.1"),
        ("BusyBox v1.36", CheckOutcome.FAILED, "is not Firecracker"),
    ],
)
def test_the_firecracker_that_is_named(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    says: str,
    outcome: CheckOutcome,
    detail: str,
) -> None:
    monkeypatch.setenv("FORKPOINT_FIRECRACKER", firecracker(tmp_path, says))
    check = local.check_firecracker()
    assert check.outcome is outcome
    assert detail in check.detail


def test_a_firecracker_that_can_not_be_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORKPOINT_FIRECRACKER", str(tmp_path / "none"))
    assert local.check_firecracker().outcome is CheckOutcome.FAILED
    monkeypatch.delenv("FORKPOINT_FIRECRACKER")
    monkeypatch.setenv("PATH", str(tmp_path))
    none = local.check_firecracker()
    assert none.outcome is CheckOutcome.WARNING
    assert "fetches its own" in (none.remedy or "")


def test_little_or_no_tmpfs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mounts = tmp_path / "mounts"
    mounts.write_text(f"tmpfs {tmp_path} ext4 rw 0 0\n")
    assert "is no tmpfs" in local.check_tmpfs(tmp_path, mounts).detail
    mounts.write_text(f"tmpfs {tmp_path} tmpfs rw 0 0\n")
    monkeypatch.setattr("shutil.disk_usage", lambda _: Usage(2**26))
    little = local.check_tmpfs(tmp_path, mounts)
    assert little.outcome is CheckOutcome.WARNING
    assert "64 MiB free" in little.detail
    assert "--shm-size" in (little.remedy or "")
    monkeypatch.setattr("shutil.disk_usage", lambda _: Usage(2**32))
    assert local.check_tmpfs(tmp_path, mounts).outcome is CheckOutcome.OK


class Usage:
    """What `shutil.disk_usage` returns, as far as it is looked at."""

    def __init__(self, free: int) -> None:
        self.free = free


def installed(monkeypatch: pytest.MonkeyPatch, folder: Path, script: str) -> None:
    """As if this were `forkpointd`."""
    path = folder / "forkpointd.py"
    path.write_text(script)
    monkeypatch.setattr(server_checks, "forkpointd_command", lambda: [sys.executable, str(path)])


def test_the_servers_code_is_asked_where_it_is_installed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    check = {
        "name": "staging",
        "outcome": "WARNING",
        "detail": "huge pages",
        "remedy": "huge=never",
    }
    report = json.dumps({"checks": [check, check | {"name": "extra", "remedy": ""}]})
    installed(monkeypatch, tmp_path, f"import sys; assert sys.argv[1:] == ['doctor', '--json']; "
              f"print({report!r}); sys.exit(1)")  # fmt: skip
    monkeypatch.setenv("FORKPOINT_ADDRESS", str(tmp_path / "no.sock"))
    checks = {each.name: each for each in doctor.examine()}
    assert checks["staging"] == HostCheck(
        "staging", CheckOutcome.WARNING, "huge pages", "huge=never"
    )
    assert checks["extra"].remedy is None
    assert next(iter(checks)) == "kvm"
    assert list(checks)[-1] == "server"
    assert checks["server"].outcome is CheckOutcome.WARNING
    assert "forkpointd serve" in (checks["server"].remedy or "")


@pytest.mark.parametrize("script", ["raise SystemExit('broken pipe dream')", "print('{}')"])
def test_a_broken_server_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str
) -> None:
    installed(monkeypatch, tmp_path, script)
    checks = server_checks.ask_forkpointd()
    assert checks is not None
    assert [(each.name, each.outcome) for each in checks] == [("forkpointd", CheckOutcome.FAILED)]


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Fake]:
    server = Fake(fresh_address(tmp_path))
    server.version = forkpoint.__version__
    server.start()
    monkeypatch.setattr(server_checks, "forkpointd_command", lambda: None)
    yield server
    server.stop()


def test_a_running_server_is_asked_where_its_code_is_not_installed(fake: Fake) -> None:
    checks = {each.name: each for each in doctor.examine(fake.address)}
    assert checks["reflink"].remedy == "use XFS"
    assert checks["server"].outcome is CheckOutcome.OK
    assert "with Simulator 1.12.1" in checks["server"].detail
    fake.version = "9.9.9"
    other = {each.name: each for each in doctor.examine(fake.address)}["server"]
    assert other.outcome is CheckOutcome.WARNING
    assert "same version" in (other.remedy or "")


def test_without_either_it_says_what_it_can_not_see(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server_checks, "forkpointd_command", lambda: None)
    checks = {each.name: each for each in doctor.examine(str(tmp_path / "no.sock"))}
    assert set(checks) == {"kvm", "vmm", "staging", "forkpointd", "server"}
    assert "forkpoint[server]" in (checks["forkpointd"].remedy or "")


def test_several_failures_are_all_said(capsys: pytest.CaptureFixture[str]) -> None:
    group = ExceptionGroup("two", [forkpoint.errors.NotFound("a"), forkpoint.errors.Aborted("b")])
    fail(group, json=False)
    assert capsys.readouterr().err == "error: a\nerror: b\n"
    fail(group, json=True)
    assert [each["message"] for each in json.loads(capsys.readouterr().err)["errors"]] == ["a", "b"]
