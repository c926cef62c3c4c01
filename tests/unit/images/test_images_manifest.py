"""Manifests: nothing in them is believed, and a snapshot is loaded only where it fits."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from forkpointd.images import (
    DriveWitness,
    ImageError,
    Manifest,
    can_read,
    check_fits,
    read_host_facts,
)
from forkpointd.model import (
    Branch,
    BranchMode,
    BranchStage,
    Drive,
    Layout,
    Machine,
    VmmKind,
    VmmVersion,
)
from tests.unit.images.making import HOST, manifest

# --- JSON --------------------------------------------------------------------------------------


def content() -> dict[str, Any]:
    loaded = json.loads(manifest().to_json())
    assert isinstance(loaded, dict)
    return loaded


def read(changed: dict[str, Any]) -> Manifest:
    return Manifest.from_json(json.dumps(changed))


def test_a_manifest_survives_its_file() -> None:
    assert Manifest.from_json(manifest().to_json()) == manifest()
    orphan = replace(manifest(), parent_snapshot_id=None, drives=(), boot={})
    assert Manifest.from_json(orphan.to_json().encode()) == orphan
    assert content()["format"] == 3


def with_drive(**changes: Any) -> dict[str, Any]:
    """A manifest with one writable drive."""
    changed = content()
    changed["drives"][0].update({"read_only": False, **changes})
    return changed


def test_a_writable_drive_is_told_from_a_shared_one() -> None:
    (drive,) = read(with_drive()).writable_drives
    assert drive.drive_id == "root"
    assert read(content()).writable_drives == ()


def test_manifests_of_older_releases_are_read() -> None:
    assert read({**content(), "format": 2}) == manifest()
    first = {**content(), "format": 1}
    del first["layer"]
    assert read(first) == manifest()


def test_an_older_manifest_has_no_writable_drive() -> None:
    with pytest.raises(ImageError, match="format 2 has no writable drive"):
        read({**with_drive(), "format": 2})


@pytest.mark.parametrize("drive_id", ["../../etc/passwd", "a/b", "", ".", "Root", "a" * 33])
def test_a_writable_drive_never_names_a_path(drive_id: str) -> None:
    with pytest.raises(ImageError, match="can't name a writable drive"):
        read(with_drive(drive_id=drive_id))


def test_two_drives_of_one_name_are_refused() -> None:
    changed = with_drive()
    changed["drives"] *= 2
    with pytest.raises(ImageError, match="twice"):
        read(changed)


@pytest.mark.parametrize("key", sorted(content()))
def test_every_key_is_needed(key: str) -> None:
    changed = content()
    del changed[key]
    with pytest.raises(ImageError, match=key):
        read(changed)


@pytest.mark.parametrize("key", sorted(content()["drives"][0]))
def test_every_key_of_a_drive_is_needed(key: str) -> None:
    changed = content()
    del changed["drives"][0][key]
    with pytest.raises(ImageError, match=rf"drives\.{key} is missing"):
        read(changed)


def wrong_values() -> list[Any]:
    """Every key with every kind of value that it must not have."""
    texts = {key for key, right in content().items() if isinstance(right, str)}
    right = {
        ("parent_snapshot_id", None),
        ("layer", None),
        ("has_network", True),
        ("has_vsock", True),
        *((key, "word") for key in texts - {"mode", "layout", "create_time"}),
    }
    return [
        pytest.param(key, value, id=f"{key}-{value!r}")
        for key in sorted(content())
        for value in (None, 1.5, True, -1, "word", [1], {"a": 1})
        if isinstance(value, list | dict) or (key, value) not in right
    ]


@pytest.mark.parametrize(("key", "value"), wrong_values())
def test_no_wrong_type_or_value_passes(key: str, value: Any) -> None:
    with pytest.raises(ImageError):
        read({**content(), key: value})


@pytest.mark.parametrize("key", ["memory_bytes", "vcpus", "vmstate_bytes", "page_bytes"])
def test_sizes_of_nothing_are_refused(key: str) -> None:
    with pytest.raises(ImageError, match=key):
        read({**content(), key: 0})


def test_what_is_not_known_is_refused_by_name() -> None:
    with pytest.raises(ImageError, match="encryption is not known"):
        read({**content(), "encryption": "rot13"})
    changed = content()
    changed["drives"][0]["cache"] = "unsafe"
    with pytest.raises(ImageError, match=r"drives\.cache is not known"):
        read(changed)
    with pytest.raises(ImageError, match="format 4 is not known"):
        read({**content(), "format": 4})


@pytest.mark.parametrize("text", [b"", b"{", b"[]", b"null", b"\xff\xfe", b'{"format": 1'])
def test_what_is_no_manifest_is_refused(text: bytes) -> None:
    with pytest.raises(ImageError):
        Manifest.from_json(text)


def test_a_time_without_its_zone_and_a_relative_drive_are_refused() -> None:
    with pytest.raises(ImageError, match="create_time"):
        read({**content(), "create_time": "2026-01-02T03:04:05"})
    changed = content()
    changed["drives"][0]["path"] = "root.ext4"
    with pytest.raises(ImageError, match="not absolute"):
        read(changed)


def test_a_branch_is_described_with_its_drives_as_they_are(tmp_path: Path) -> None:
    disk = tmp_path / "root.ext4"
    disk.write_bytes(b"x" * 100)
    (tmp_path / "link").symlink_to(disk)
    at = datetime(2026, 1, 1, tzinfo=UTC)
    branch = Branch(
        branch_id="br-1",
        sandbox_id="agent-7",
        snapshot_id="snap-1",
        sequence=1,
        stage=BranchStage.FINALIZING,
        stages=(),
        requested_mode=BranchMode.AUTO,
        requested_layout=Layout.AUTO,
        layout=Layout.FLAT,
        create_time=at,
        mode=BranchMode.DIFF,
        base_snapshot_id="snap-0",
    )
    machine = Machine(vcpus=2, memory_mib=4, drives=(Drive("root", tmp_path / "link"),))
    older = VmmVersion(VmmKind.FIRECRACKER, "1.12.0")
    made = Manifest.describe(branch=branch, machine=machine, vmm=older, host=HOST)
    assert (made.snapshot_id, made.parent_snapshot_id, made.branch_id) == (
        "snap-1",
        "snap-0",
        "br-1",
    )
    assert (made.memory_bytes, made.vmm, made.cpu_features) == (4 << 20, older, HOST.cpu_features)
    found = disk.stat()
    assert made.drives == (
        DriveWitness("root", disk, True, False, 100, found.st_mtime_ns, found.st_ino),
    )


# --- drives ------------------------------------------------------------------------------------


def test_a_drive_that_changed_is_told_from_one_that_did_not(tmp_path: Path) -> None:
    disk = tmp_path / "root.ext4"
    disk.write_bytes(b"x" * 100)
    witness = DriveWitness.of(Drive("root", disk))
    assert witness.changed() is None
    found = disk.stat()

    disk.write_bytes(b"y" * 100)
    os.utime(disk, ns=(found.st_atime_ns, found.st_mtime_ns + 1))
    assert "written to" in str(witness.changed())
    disk.write_bytes(b"x" * 99)
    assert "99 bytes, not 100" in str(witness.changed())
    disk.unlink()
    assert "can't be found" in str(witness.changed())
    disk.mkdir()
    assert "neither a file" in str(witness.changed())


def test_a_faithful_copy_of_a_drive_is_as_good(tmp_path: Path) -> None:
    disk = tmp_path / "root.ext4"
    disk.write_bytes(b"x" * 100)
    witness = DriveWitness.of(Drive("root", disk))
    found = disk.stat()
    (tmp_path / "copy").write_bytes(b"x" * 100)
    (tmp_path / "copy").rename(disk)
    os.utime(disk, ns=(found.st_atime_ns, found.st_mtime_ns))
    assert disk.stat().st_ino != witness.inode
    assert witness.changed() is None


# --- hosts -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "field", "refuses", "refuses_strictly"),
    [
        ({"vmm": VmmVersion(VmmKind.SIMULATOR, "1.12.1")}, "vmm_kind", True, True),
        ({"snapshot_version": "5.9.0"}, "snapshot_version", True, True),
        ({"snapshot_version": "7.0.0"}, "snapshot_version", True, True),
        ({"architecture": "aarch64"}, "architecture", True, True),
        ({"cpu_vendor": "AuthenticAMD"}, "cpu_vendor", True, True),
        ({"cpu_model": "Xeon (cpu family 6, model 85)"}, "cpu_model", True, True),
        ({"cpu_features": HOST.cpu_features - {"avx512f"}}, "cpu_features", True, True),
        ({"page_bytes": 16384}, "page_bytes", True, True),
        ({"vmm": VmmVersion(VmmKind.FIRECRACKER, "1.12.2")}, "vmm_version", False, True),
        ({"kernel_release": "6.2.0"}, "kernel_release", False, True),
    ],
)
def test_each_difference_is_named_and_refused_or_warned_of(
    changes: dict[str, Any], field: str, refuses: bool, refuses_strictly: bool
) -> None:
    host = replace(HOST, **changes)
    for strict, expected in ((False, refuses), (True, refuses_strictly)):
        (mismatch,) = check_fits(manifest(), host, strict=strict)
        assert (mismatch.field, mismatch.refuses) == (field, expected)
        assert mismatch.snapshot_value != mismatch.host_value


def test_a_host_that_fits_and_has_more_is_taken() -> None:
    assert check_fits(manifest(), HOST, strict=True) == []
    richer = replace(HOST, cpu_features=HOST.cpu_features | {"amx_tile"}, snapshot_version="6.3.1")
    assert check_fits(manifest(), richer, strict=True) == []


def test_words_of_the_kernel_among_the_flags_are_not_missed() -> None:
    poorer = replace(HOST, cpu_features=HOST.cpu_features - {"pti", "rep_good"})
    assert check_fits(manifest(), poorer, strict=True) == []


def test_a_missing_feature_is_told_by_its_name_alone() -> None:
    host = replace(HOST, cpu_features=frozenset({"sse4_2"}))
    (mismatch,) = check_fits(manifest(), host, strict=False)
    assert mismatch.snapshot_value == "avx2 avx512f"


@pytest.mark.parametrize(
    ("reader", "snapshot", "reads"),
    [
        ("6.0.0", "6.0.0", True),
        ("6.0.0", "6.0.9", True),
        ("6.2.0", "6.1.5", True),
        ("6.1.0", "6.2.0", False),
        ("7.0.0", "6.0.0", False),
        ("6.0.0", "10.0.0", False),
        ("6.0.0", "6.0", False),
        ("", "6.0.0", False),
        ("6.0.0", "6.²0.0", False),
    ],
)
def test_snapshot_versions_are_read_by_firecrackers_rule(
    reader: str, snapshot: str, reads: bool
) -> None:
    assert can_read(reader, snapshot) is reads


X86 = """processor\t: 0
vendor_id\t: AuthenticAMD
cpu family\t: 25
model\t\t: 1
model name\t: AMD EPYC 7R13
flags\t\t: fpu sse4_2 avx2 sha_ni

processor\t: 1
vendor_id\t: AuthenticAMD
cpu family\t: 25
model\t\t: 1
model name\t: AMD EPYC 7R13
flags\t\t: fpu sse4_2 avx2

"""

ARM = """processor\t: 0
BogoMIPS\t: 243.75
Features\t: fp asimd aes sve
CPU implementer\t: 0x41
CPU architecture: 8
CPU variant\t: 0x1
CPU part\t: 0xd40
CPU revision\t: 1

Hardware\t: Graviton
"""


def test_a_host_is_read_from_the_kernel(tmp_path: Path) -> None:
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text(X86)
    host = read_host_facts(HOST.vmm, "6.0.0", cpuinfo=cpuinfo)
    assert host.cpu_vendor == "AuthenticAMD"
    assert host.cpu_model == "AMD EPYC 7R13 (cpu family 25, model 1)"
    assert host.cpu_features == {"fpu", "sse4_2", "avx2"}, "what all CPUs have"
    assert host.kernel_release == os.uname().release
    assert host.page_bytes == os.sysconf("SC_PAGE_SIZE")

    cpuinfo.write_text(ARM)
    host = read_host_facts(HOST.vmm, "6.0.0", cpuinfo=cpuinfo)
    assert host.cpu_vendor == "0x41"
    assert host.cpu_model == "0xd40 (CPU variant 0x1, CPU architecture 8)"
    assert host.cpu_features == {"fp", "asimd", "aes", "sve"}


def test_this_host_fits_itself() -> None:
    host = read_host_facts(HOST.vmm, "6.0.0")
    assert host.cpu_features
    assert host.cpu_vendor
    own = replace(
        manifest(),
        **{
            name: getattr(host, name)
            for name in (
                "architecture",
                "cpu_vendor",
                "cpu_model",
                "cpu_features",
                "kernel_release",
                "page_bytes",
            )
        },
    )
    assert check_fits(own, host, strict=True) == []
