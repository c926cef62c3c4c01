"""Sandboxes, snapshots and the server: orders arrive whole, answers are right."""

# ruff: noqa: ASYNC240 - a test may look at a folder itself

from __future__ import annotations

import asyncio
import os
from pathlib import Path
from typing import Any

import grpc
import pytest

from forkpoint.v1 import sandbox_pb2, snapshot_pb2
from forkpoint.v1 import sandbox_service_pb2 as pb
from forkpoint.v1 import server_service_pb2 as ipb
from forkpoint.v1 import snapshot_service_pb2 as spb
from forkpointd import model
from forkpointd.model import Reason, SandboxState
from forkpointd.rpc import convert, image_paths
from tests.unit.rpc import samples
from tests.unit.rpc.harness import Edge, refused, until


def boot_request(edge: Edge, **changes: Any) -> pb.CreateSandboxRequest:
    fields = {"kernel_image": str(edge.image_root / "vmlinux"), "memory_mib": 256}
    return pb.CreateSandboxRequest(boot=pb.BootSource(**{**fields, **changes}))


async def test_a_boot_with_all_defaults(edge: Edge) -> None:
    await edge.sandboxes.CreateSandbox(boot_request(edge))
    assert edge.rooms.sandboxes.orders == [
        model.CreateOrder(
            boot=model.Boot(
                model.Machine(1, 256),
                edge.image_root.resolve() / "vmlinux",
                None,
                "console=ttyS0 reboot=k panic=1",
            )
        )
    ]


async def test_a_boot_with_everything(edge: Edge) -> None:
    (edge.image_root / "link.img").symlink_to(edge.image_root / "rootfs.ext4")
    request = boot_request(
        edge,
        initrd=str(edge.image_root / "../images/rootfs.ext4"),
        boot_args="quiet",
        vcpus=32,
        drives=[
            sandbox_pb2.Drive(
                drive_id="root",
                path=str(edge.image_root / "link.img"),
                read_only=True,
                root_device=True,
            )
        ],
    )
    request.request_id = "7c1f8a52-61f3-4f0e-9b0a-3f1f6d0c2a11"
    request.sandbox_id = "agent-9"
    request.labels["a"] = "b"
    request.ttl.FromMilliseconds(1500)
    request.on_expiry = sandbox_pb2.EXPIRY_ACTION_PAUSE
    answer = await edge.sandboxes.CreateSandbox(request)
    assert answer.sandbox.sandbox_id == "agent-9"
    [order] = edge.rooms.sandboxes.orders
    root = edge.image_root.resolve()
    assert order.request is not None
    assert order.request.method == "CreateSandbox"
    assert order == model.CreateOrder(
        "agent-9",
        model.Boot(
            model.Machine(32, 256, (model.Drive("root", root / "rootfs.ext4", True, True),)),
            root / "vmlinux",
            root / "rootfs.ext4",
            "quiet",
        ),
        None,
        {"a": "b"},
        1.5,
        model.ExpiryAction.PAUSE,
        order.request,
    )


async def test_a_sandbox_from_a_snapshot(edge: Edge) -> None:
    await edge.sandboxes.CreateSandbox(pb.CreateSandboxRequest(snapshot_id="snap-2"))
    assert edge.rooms.sandboxes.orders == [model.CreateOrder(snapshot_id="snap-2")]


async def test_a_writable_drive_is_asked_for_with_leave_to_copy_it(edge: Edge) -> None:
    drive = sandbox_pb2.Drive(drive_id="data", path=str(edge.image_root / "rootfs.ext4"))
    request = boot_request(edge, drives=[drive])
    await edge.sandboxes.CreateSandbox(request)
    request.allow_drive_copy = True
    await edge.sandboxes.CreateSandbox(request)
    one, other = edge.rooms.sandboxes.orders
    assert one.boot is not None
    assert [drive.drive_id for drive in one.boot.machine.writable_drives] == ["data"]
    assert (one.allow_drive_copy, other.allow_drive_copy) == (False, True)


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("nowhere", "does not exist"),
        ("vmlinux/deeper", "does not exist"),
        ("", "is a folder"),
        ("../secret", "outside the image roots"),
        ("../missing", "outside the image roots"),
        ("leads-out", "outside the image roots"),
        ("out-folder/secret", "outside the image roots"),
        ("circle", "link that leads to itself"),
        ("pipe", "a FIFO"),
        ("../images-too/vmlinux", "outside the image roots"),
        ("n" * 300, "File name too long"),
    ],
)
async def test_files_that_no_guest_may_be_made_of(
    edge: Edge, tmp_path: Path, path: str, words: str
) -> None:
    root = edge.image_root
    (tmp_path / "secret").write_text("secret")
    (tmp_path / "images-too").mkdir()
    (tmp_path / "images-too/vmlinux").write_text("kernel")
    (root / "leads-out").symlink_to(tmp_path / "secret")
    (root / "out-folder").symlink_to(tmp_path)
    (root / "circle").symlink_to(root / "circle")
    os.mkfifo(root / "pipe")
    code, problem = await refused(
        edge.sandboxes.CreateSandbox(boot_request(edge, kernel_image=f"{root}/{path}"))
    )
    assert code is grpc.StatusCode.INVALID_ARGUMENT
    [violation] = problem.fields
    assert violation.field == "boot.kernel_image"
    assert words in violation.description


async def test_wrong_files_and_wrong_fields_are_told_together(edge: Edge) -> None:
    request = boot_request(edge, kernel_image="/etc/passwd", initrd="relative", memory_mib=0)
    _, problem = await refused(edge.sandboxes.CreateSandbox(request))
    assert {each.field for each in problem.fields} == {
        "boot.kernel_image",
        "boot.initrd",
        "boot.memory_mib",
    }


def test_a_file_that_cannot_be_read_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "kernel").write_text("kernel")
    monkeypatch.setattr(os, "access", lambda *_: False)  # root may read everything
    with pytest.raises(image_paths.UnusableFileError, match="can't be read by the server"):
        image_paths.resolve(str(tmp_path / "kernel"), [tmp_path.resolve()])


def test_without_image_roots_the_remedy_is_named() -> None:
    with pytest.raises(image_paths.UnusableFileError, match="set image_roots"):
        image_paths.resolve("/etc/passwd", [])


async def test_roots_may_be_links_themselves(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "real/kernel").write_text("kernel")
    (tmp_path / "root").symlink_to(tmp_path / "real")
    files, wrong = await image_paths.resolve_all(
        {"k": str(tmp_path / "root/kernel")}, [tmp_path / "root"]
    )
    assert files == {"k": tmp_path.resolve() / "real/kernel"}
    assert wrong == []


async def test_a_client_that_leaves_while_a_sandbox_is_made_reaches_the_port_only_as_a_cancel(
    edge: Edge,
) -> None:
    """The port shields its work; the edge neither swallows nor invents a cancel."""
    sandboxes = edge.rooms.sandboxes
    sandboxes.may_finish.clear()
    call = edge.sandboxes.CreateSandbox(pb.CreateSandboxRequest(snapshot_id="s"))
    await sandboxes.creating.wait()
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call
    await until(lambda: sandboxes.cancelled)
    assert sandboxes.cancelled == 1


async def test_get_pause_resume_delete(edge: Edge) -> None:
    edge.rooms.sandboxes.add("agent-7")
    found = await edge.sandboxes.GetSandbox(pb.GetSandboxRequest(sandbox_id="agent-7"))
    assert found.sandbox == convert.sandbox(samples.sandbox("agent-7"))
    edge.rooms.sandboxes.memory["agent-7"] = model.SandboxMemory(5, 7)
    found = await edge.sandboxes.GetSandbox(pb.GetSandboxRequest(sandbox_id="agent-7"))
    assert (found.sandbox.memory.private_bytes, found.sandbox.memory.shared_bytes) == (5, 7)
    paused = await edge.sandboxes.PauseSandbox(pb.PauseSandboxRequest(sandbox_id="agent-7"))
    assert paused.sandbox.state == sandbox_pb2.SANDBOX_STATE_PAUSED
    resumed = await edge.sandboxes.ResumeSandbox(pb.ResumeSandboxRequest(sandbox_id="agent-7"))
    assert resumed.sandbox.state == sandbox_pb2.SANDBOX_STATE_RUNNING
    await edge.sandboxes.DeleteSandbox(pb.DeleteSandboxRequest(sandbox_id="agent-7"))
    for call in (
        edge.sandboxes.GetSandbox(pb.GetSandboxRequest(sandbox_id="agent-7")),
        edge.sandboxes.PauseSandbox(pb.PauseSandboxRequest(sandbox_id="agent-7")),
        edge.sandboxes.ResumeSandbox(pb.ResumeSandboxRequest(sandbox_id="agent-7")),
        edge.sandboxes.DeleteSandbox(pb.DeleteSandboxRequest(sandbox_id="agent-7")),
    ):
        assert (await refused(call))[0] is grpc.StatusCode.NOT_FOUND


async def test_an_update_changes_what_its_mask_names(edge: Edge) -> None:
    edge.rooms.sandboxes.add("a")
    request = pb.UpdateSandboxRequest(sandbox_id="a")
    request.update_mask.paths.extend(["ttl", "on_expiry"])
    await edge.sandboxes.UpdateSandbox(request)
    request.ttl.FromSeconds(60)
    request.on_expiry = sandbox_pb2.EXPIRY_ACTION_BRANCH
    await edge.sandboxes.UpdateSandbox(request)
    names = frozenset({"ttl", "on_expiry"})
    assert edge.rooms.sandboxes.changes == [
        model.SandboxChange(names),
        model.SandboxChange(names, {}, 60.0, model.ExpiryAction.BRANCH),
    ]


async def test_pages_hold_every_sandbox_once(edge: Edge) -> None:
    edge.rooms.sandboxes.add(*(f"s-{index}" for index in range(7)))
    request = pb.ListSandboxesRequest(
        page_size=3, labels={"a": "b"}, states=[sandbox_pb2.SANDBOX_STATE_RUNNING]
    )
    sizes, seen = [], []
    while True:
        answer = await edge.sandboxes.ListSandboxes(request)
        sizes.append(len(answer.sandboxes))
        seen += [each.sandbox_id for each in answer.sandboxes]
        if not answer.next_page_token:
            break
        request.page_token = answer.next_page_token
    assert seen == [f"s-{index}" for index in range(7)]
    assert sizes == [3, 3, 1]
    assert edge.rooms.sandboxes.filters[0] == ({"a": "b"}, frozenset({SandboxState.RUNNING}))


async def test_a_page_of_no_size_has_50(edge: Edge) -> None:
    edge.rooms.sandboxes.add(*(f"s-{index}" for index in range(51)))
    answer = await edge.sandboxes.ListSandboxes(pb.ListSandboxesRequest())
    assert len(answer.sandboxes) == 50
    assert answer.next_page_token


async def test_a_token_of_another_filter_is_refused(edge: Edge) -> None:
    edge.rooms.sandboxes.add("a", "b")
    first = await edge.sandboxes.ListSandboxes(pb.ListSandboxesRequest(page_size=1))
    token = first.next_page_token
    wider = pb.ListSandboxesRequest(page_size=5, page_token=token)
    assert len((await edge.sandboxes.ListSandboxes(wider)).sandboxes) == 1
    for call in (
        edge.sandboxes.ListSandboxes(pb.ListSandboxesRequest(page_token=token, labels={"a": "b"})),
        edge.sandboxes.ListBranches(pb.ListBranchesRequest(page_token=token)),
        edge.snapshots.ListSnapshots(spb.ListSnapshotsRequest(page_token=token)),
        edge.sandboxes.ListSandboxes(pb.ListSandboxesRequest(page_token=token[:-4])),
        edge.sandboxes.ListSandboxes(
            pb.ListSandboxesRequest(page_token=f"{token[:9]}z{token[10:]}")
        ),
        edge.sandboxes.ListSandboxes(pb.ListSandboxesRequest(page_token="not a token")),
    ):
        code, problem = await refused(call)
        assert (code, problem.reason) == (
            grpc.StatusCode.INVALID_ARGUMENT,
            Reason.PAGE_TOKEN_INVALID,
        )


async def test_snapshots(edge: Edge) -> None:
    edge.rooms.snapshots.there["s"] = samples.snapshot("s")
    found = await edge.snapshots.GetSnapshot(spb.GetSnapshotRequest(snapshot_id="s"))
    assert found.snapshot == convert.snapshot(samples.snapshot("s"))
    update = spb.UpdateSnapshotRequest(snapshot_id="s", labels={"new": "label"})
    update.update_mask.paths.append("labels")
    changed = await edge.snapshots.UpdateSnapshot(update)
    assert changed.snapshot.labels == {"new": "label"}
    listed = await edge.snapshots.ListSnapshots(
        spb.ListSnapshotsRequest(labels={"a": "b"}, source_sandbox_id="agent-7")
    )
    assert [each.snapshot_id for each in listed.snapshots] == ["s"]
    assert edge.rooms.snapshots.filters == [({"a": "b"}, "agent-7")]
    await edge.snapshots.DeleteSnapshot(spb.DeleteSnapshotRequest(snapshot_id="s"))
    for call in (
        edge.snapshots.GetSnapshot(spb.GetSnapshotRequest(snapshot_id="s")),
        edge.snapshots.UpdateSnapshot(update),
        edge.snapshots.DeleteSnapshot(spb.DeleteSnapshotRequest(snapshot_id="s")),
    ):
        code, problem = await refused(call)
        assert (code, problem.reason) == (
            grpc.StatusCode.NOT_FOUND,
            Reason.SNAPSHOT_NOT_FOUND,
        )


async def test_a_flatten_is_followed_to_its_end(edge: Edge) -> None:
    edge.rooms.snapshots.there["s"] = samples.snapshot("s")
    request = spb.FlattenSnapshotRequest(snapshot_id="s")
    seen = [each async for each in edge.snapshots.FlattenSnapshot(request)]
    assert [(each.done_bytes, each.total_bytes) for each in seen] == [(0, 0), (5, 10), (10, 10)]
    layouts = [snapshot_pb2.Layout.Name(each.snapshot.layout) for each in seen]
    assert layouts == ["LAYOUT_LAYERED", "LAYOUT_LAYERED", "LAYOUT_FLAT"]
    missing = spb.FlattenSnapshotRequest(snapshot_id="no-such")
    code, problem = await refused(edge.snapshots.FlattenSnapshot(missing))
    assert (code, problem.reason) == (grpc.StatusCode.NOT_FOUND, Reason.SNAPSHOT_NOT_FOUND)


async def test_a_verify_is_followed_to_its_end(edge: Edge) -> None:
    edge.rooms.snapshots.there |= {each: samples.snapshot(each) for each in ("good", "bad")}
    request = spb.VerifySnapshotRequest(snapshot_id="good")
    seen = [each async for each in edge.snapshots.VerifySnapshot(request)]
    assert [(each.snapshot_id, each.done_bytes, each.verified) for each in seen] == [
        ("parent", 5, False),
        ("good", 10, True),
    ]
    bad = spb.VerifySnapshotRequest(snapshot_id="bad")
    code, problem = await refused(edge.snapshots.VerifySnapshot(bad))
    assert (code, problem.reason) == (grpc.StatusCode.DATA_LOSS, Reason.IMAGE_DAMAGED)
    assert problem.metadata["file"] == "memory"
    missing = spb.VerifySnapshotRequest(snapshot_id="no-such")
    code, problem = await refused(edge.snapshots.VerifySnapshot(missing))
    assert (code, problem.reason) == (grpc.StatusCode.NOT_FOUND, Reason.SNAPSHOT_NOT_FOUND)


async def test_the_server_tells_its_facts(edge: Edge) -> None:
    answer = await edge.info.GetServerInfo(ipb.GetServerInfoRequest())
    assert answer == convert.server_info(samples.facts())
