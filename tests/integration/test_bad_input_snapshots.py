"""Snapshots from which nothing can be started: of another host, damaged, with a changed drive; and
forks of which not every child comes to run."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
from google.rpc import error_details_pb2

from forkpoint.v1 import fork_pb2, sandbox_pb2, sandbox_service_pb2
from forkpointd.model import VmmKind
from tests.integration.refusals import (
    MEMORY_MIB,
    REGION_MIB,
    HeldHouse,
    connected,
    everyone_answers,
    problem_of,
    refused,
    served_with,
    traces,
    until,
)
from tests.integration.serving import READY_STAGE, Guest

Pb = sandbox_service_pb2
FORK_FAILED = fork_pb2.FORK_STAGE_FAILED
FORK_READY = fork_pb2.FORK_STAGE_READY
CHILD_READY = fork_pb2.FORK_CHILD_STATE_READY
CHILD_FAILED = fork_pb2.FORK_CHILD_STATE_FAILED
CHILD_DELETED = fork_pb2.FORK_CHILD_STATE_DELETED


served = served_with()
"""A server for the whole module."""


@pytest.fixture
async def house(served: HeldHouse) -> AsyncIterator[HeldHouse]:
    """The server, with one sandbox `src` that has a drive, and its snapshot `snap`."""
    async with connected(served) as house:
        if not (house.data_dir / "sandboxes" / "src").exists():
            disk(house).write_bytes(b"disk" * 1024)
            drive = sandbox_pb2.Drive(drive_id="data", path=str(disk(house)), read_only=True)
            boot = Pb.BootSource(
                kernel_image=str(house.kernel), memory_mib=MEMORY_MIB, drives=[drive]
            )
            await house.sandboxes.CreateSandbox(
                Pb.CreateSandboxRequest(sandbox_id="src", boot=boot)
            )
            source = Guest(house, "src")
            await source.read_until(0, lambda text: "READY\n" in text)
            await source.dirty(REGION_MIB)
            await house.ready("src", snapshot_id="snap")
        yield house
        house.release_all()


def disk(house: HeldHouse) -> Path:
    """The drive's file."""
    return house.images / "disk"


async def starts_are_refused(house: HeldHouse, code: str, reason: str, *words: str) -> Any:
    """Whatever starts from `snap` is refused; returns the last refusal."""
    async with refused(house, code, reason, "snap", *words):
        await house.fork("snap", 2)
    async with refused(house, code, reason, "snap", *words) as refusal:
        await house.sandboxes.CreateSandbox(Pb.CreateSandboxRequest(snapshot_id="snap"))
    return refusal


async def a_child_is_right(house: HeldHouse) -> None:
    """`snap` is as good as before."""
    child = await house.child("snap")
    assert await child.verify(REGION_MIB) == await Guest(house, "src").verify(REGION_MIB)
    await house.delete(child.id)


# --- another host ------------------------------------------------------------------------------


class Manifest:
    """The manifest of `snap` on the disk, which a test may change; put back at the end."""

    def __init__(self, house: HeldHouse) -> None:
        self.path = house.data_dir / "snapshots" / "snap" / "manifest.json"
        self.original = self.path.read_bytes()

    def __enter__(self) -> Manifest:
        self.path.chmod(0o600)
        return self

    def __exit__(self, *_: object) -> None:
        self.path.write_bytes(self.original)
        self.path.chmod(0o400)

    def change(self, **fields: Any) -> None:
        content = json.loads(self.original)
        assert set(fields) <= set(content)
        self.path.write_text(json.dumps(content | fields))


def other_host(manifest: Manifest, kind: VmmKind) -> dict[str, dict[str, Any]]:
    """What another host's manifest would have, by the field that differs."""
    content = json.loads(manifest.original)
    other = VmmKind.SIMULATOR if kind is VmmKind.FIRECRACKER else VmmKind.FIRECRACKER
    return {
        "vmm_kind": {"vmm": content["vmm"] | {"kind": str(other)}},
        "snapshot_version": {"snapshot_version": "99.0.0"},
        "architecture": {"architecture": "aarch64"},
        "cpu_vendor": {"cpu_vendor": "AnotherVendor"},
        "cpu_model": {"cpu_model": "Another CPU (cpu family 1, model 2)"},
        "cpu_features": {"cpu_features": [*content["cpu_features"], "avx9000"]},
        "page_bytes": {"page_bytes": 16384},
    }


@pytest.mark.parametrize(
    "field",
    [
        "vmm_kind",
        "snapshot_version",
        "architecture",
        "cpu_vendor",
        "cpu_model",
        "cpu_features",
        "page_bytes",
    ],
)
async def test_a_snapshot_of_another_host(house: HeldHouse, field: str) -> None:
    with Manifest(house) as manifest:
        manifest.change(**other_host(manifest, house.binary.kind)[field])
        refusal = await starts_are_refused(
            house, "FAILED_PRECONDITION", "HOST_MISMATCH", field, "a host like the one it was taken"
        )
        failure = refusal.detail(error_details_pb2.PreconditionFailure)
        assert [each.subject for each in failure.violations] == [field]
        assert failure.violations[0].type == "HOST_MISMATCH"
    await a_child_is_right(house)


async def test_every_difference_is_named(house: HeldHouse) -> None:
    with Manifest(house) as manifest:
        manifest.change(cpu_vendor="A", cpu_model="B", page_bytes=65536)
        refusal = await starts_are_refused(house, "FAILED_PRECONDITION", "HOST_MISMATCH")
        failure = refusal.detail(error_details_pb2.PreconditionFailure)
        subjects = [each.subject for each in failure.violations]
        assert subjects == ["cpu_vendor", "cpu_model", "page_bytes"]


async def test_another_release_is_a_warning_and_refused_where_the_host_is_strict(
    house: HeldHouse,
) -> None:
    with Manifest(house) as manifest:
        vmm = json.loads(manifest.original)["vmm"] | {"version": "1.0.0"}
        manifest.change(kernel_release="2.6.32", vmm=vmm)
        await a_child_is_right(house)
        assert "another kernel_release: 2.6.32" in house.log
        assert "another vmm_version: 1.0.0" in house.log
        house.settings["strict_host"] = True
        try:
            await house.restart()
            refusal = await starts_are_refused(
                house, "FAILED_PRECONDITION", "HOST_MISMATCH", "kernel_release", "2.6.32"
            )
            failure = refusal.detail(error_details_pb2.PreconditionFailure)
            subjects = [each.subject for each in failure.violations]
            assert subjects == ["vmm_version", "kernel_release"]
        finally:
            del house.settings["strict_host"]
            await house.restart()


# --- damage ------------------------------------------------------------------------------------


def truncated(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def grown(path: Path) -> None:
    os.truncate(path, path.stat().st_size + 4096)


def a_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def garbage(path: Path) -> None:
    path.write_bytes(b"\xff\x00garbage")


def anothers(path: Path) -> None:
    content = json.loads(path.read_text())
    path.write_text(json.dumps(content | {"snapshot_id": "another"}))


def unknown_key(path: Path) -> None:
    content = json.loads(path.read_text())
    path.write_text(json.dumps(content | {"from_the_future": True}))


def newer_format(path: Path) -> None:
    content = json.loads(path.read_text())
    path.write_text(json.dumps(content | {"format": content["format"] + 1}))


DAMAGES: dict[str, tuple[str, Callable[[Path], None]]] = {
    "memory cut": ("memory", truncated),
    "memory grown": ("memory", grown),
    "memory gone": ("memory", Path.unlink),
    "memory a folder": ("memory", a_folder),
    "vmstate cut": ("vmstate", truncated),
    "vmstate gone": ("vmstate", Path.unlink),
    "manifest cut": ("manifest.json", truncated),
    "manifest gone": ("manifest.json", Path.unlink),
    "manifest garbage": ("manifest.json", garbage),
    "manifest of another": ("manifest.json", anothers),
    "manifest with more": ("manifest.json", unknown_key),
    "manifest of a later release": ("manifest.json", newer_format),
}


@pytest.mark.parametrize("damage", DAMAGES)
async def test_a_damaged_image(house: HeldHouse, damage: str, tmp_path: Path) -> None:
    name, do = DAMAGES[damage]
    folder = house.data_dir / "snapshots" / "snap"
    path, good = folder / name, tmp_path / "good"
    shutil.copy2(path, good)
    path.chmod(0o600)
    try:
        do(path)
        await starts_are_refused(house, "DATA_LOSS", "IMAGE_DAMAGED", "delete it and branch again")
    finally:
        if path.is_dir():
            path.rmdir()
        path.unlink(missing_ok=True)
        shutil.copy2(good, path)
    await a_child_is_right(house)


async def test_a_snapshot_whose_folder_is_gone_or_a_file(house: HeldHouse) -> None:
    folder = house.data_dir / "snapshots" / "snap"
    away = house.root / "away"
    folder.rename(away)
    try:
        async with refused(house, "DATA_LOSS", "IMAGE_DAMAGED", "is not there"):
            await house.fork("snap")
        folder.write_text("")
        async with refused(house, "DATA_LOSS", "IMAGE_DAMAGED", "not a folder"):
            await house.fork("snap")
        folder.unlink()
    finally:
        away.rename(folder)
    await a_child_is_right(house)


async def test_a_vmstate_with_other_bytes_ends_no_more_than_the_start(
    house: HeldHouse, tmp_path: Path
) -> None:
    path = house.data_dir / "snapshots" / "snap" / "vmstate"
    good = path.read_bytes()
    path.chmod(0o600)
    bent = bytearray(good)
    bent[len(bent) // 2] ^= 0xFF
    try:
        path.write_bytes(bytes(bent))
        before = await traces(house)
        async with refused(house, "DATA_LOSS", "IMAGE_DAMAGED", "bent did not start", "vmstate"):
            await house.sandboxes.CreateSandbox(
                Pb.CreateSandboxRequest(sandbox_id="bent", snapshot_id="snap")
            )
        fork = await house.fork("snap", 2)
        assert fork.stage == FORK_READY and fork.failed_count == 2
        for child in fork.children:
            assert child.state == CHILD_FAILED
            problem_of(child.error, "IMAGE_DAMAGED", "did not start")
        assert await traces(house) == before
    finally:
        path.write_bytes(good)
        path.chmod(0o400)
    await a_child_is_right(house)


# --- drives ------------------------------------------------------------------------------------


async def test_a_drive_that_changed_since_the_snapshot(house: HeldHouse) -> None:
    path = disk(house)
    good, stat = path.read_bytes(), path.stat()

    def put_back() -> None:
        path.write_bytes(good)
        os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))

    words = ("data", str(path), "put the file back as it was")
    changes: list[tuple[str, Callable[[], object]]] = [
        ("was written to since", path.touch),
        ("bytes, not 4096", lambda: path.write_bytes(good + b"more")),
        ("can't be found any more", path.unlink),
        ("neither a file nor a block device", path.mkdir),
    ]
    for what, change in changes:
        change()
        await starts_are_refused(house, "FAILED_PRECONDITION", "DRIVE_CHANGED", what, *words)
    path.rmdir()
    put_back()
    await a_child_is_right(house)


async def test_a_drive_that_went_fails_a_branch_before_its_window(house: HeldHouse) -> None:
    path = disk(house)
    away = house.root / "disk-away"
    path.rename(away)
    try:
        branch = await house.branch("src")
        problem_of(branch.error, "DRIVE_CHANGED", "data", str(path), "put the file back")
        assert not branch.HasField("pause_window")
        await everyone_answers(house)
    finally:
        away.rename(path)
    assert (await house.ready("src")).stage == READY_STAGE


# --- forks that come to run in part ------------------------------------------------------------


async def test_a_child_that_does_not_start_fails_alone(house: HeldHouse) -> None:
    obstacle = house.data_dir / "sandboxes" / "part-1"
    obstacle.write_text("")
    try:
        fork = await house.fork("snap", 3, fork_id="part")
        assert fork.stage == FORK_READY
        assert (fork.ready_count, fork.failed_count) == (2, 1)
        assert [child.state for child in fork.children] == [CHILD_READY, CHILD_FAILED, CHILD_READY]
        problem_of(fork.children[1].error, "WRITE_FAILED", "part-1 did not start", str(obstacle))
        await everyone_answers(house)
    finally:
        obstacle.unlink()
    for name in ("part-0", "part-2"):
        await house.delete(name)
    again = await house.fork("snap", 3, fork_id="whole")
    assert again.ready_count == 3
    for child in again.children:
        await house.delete(child.sandbox_id)


@pytest.mark.parametrize("by", ["fork", "branch"])
async def test_on_failure_delete_all_leaves_no_child(house: HeldHouse, by: str) -> None:
    before = await traces(house)
    obstacle = house.data_dir / "sandboxes" / f"all-{by}-2"
    obstacle.write_text("")
    spec: dict[str, Any] = {
        "fork_id": f"all-{by}",
        "on_failure": fork_pb2.FAILURE_ACTION_DELETE_ALL,
    }
    try:
        if by == "fork":
            fork = await house.fork("snap", 6, **spec)
        else:
            branch = await house.branch(
                "src", snapshot_id="kept", fork=fork_pb2.ForkSpec(count=6, **spec)
            )
            problem_of(branch.error, "CHILDREN_FAILED", "all were deleted")
            fork = branch.fork
            assert branch.snapshot.snapshot_id == "kept", "the snapshot is READY and stays so"
            await house.delete_snapshot("kept")
    finally:
        obstacle.unlink()
    assert fork.stage == FORK_FAILED
    problem_of(fork.error, "CHILDREN_FAILED", f"all-{by}-2 did not start", str(obstacle))
    states = {child.sandbox_id: child.state for child in fork.children}
    assert states.pop(f"all-{by}-2") == CHILD_FAILED
    assert set(states.values()) == {CHILD_DELETED}
    after = await traces(house)
    assert (after.vmms, after.sandboxes) == (before.vmms, before.sandboxes)
    assert after.folders["sandboxes"] == before.folders["sandboxes"]
    await everyone_answers(house)


@pytest.mark.parametrize("count", [1, 3])
async def test_a_child_that_is_deleted_while_it_starts(house: HeldHouse, count: int) -> None:
    before = await traces(house)
    async with house.held("load") as hold:
        forking = asyncio.ensure_future(house.fork("snap", count, fork_id=f"gone{count}"))
        await hold.reached()
        deleting = asyncio.ensure_future(house.delete(f"gone{count}-0"))

        async def being_deleted() -> bool:
            states = (await traces(house)).sandboxes
            name = f"gone{count}-0"
            return name not in states or (states[name][0] == sandbox_pb2.SANDBOX_STATE_DELETING)

        await until(being_deleted)
    await deleting
    fork = await forking
    assert fork.stage == FORK_READY
    for number in range(1, count):
        await house.delete(f"gone{count}-{number}")
    assert await traces(house) == before
    await everyone_answers(house)
