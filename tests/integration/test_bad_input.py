"""Bad input of single calls, on a real server: each gets its own status, says what to do, and
leaves nothing behind."""

from __future__ import annotations

import asyncio
import base64
import os
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest
from google.protobuf.duration_pb2 import Duration
from google.protobuf.field_mask_pb2 import FieldMask

from forkpoint.v1 import fork_pb2, sandbox_pb2, sandbox_service_pb2, snapshot_service_pb2
from forkpointd.images import can_reflink
from tests.integration.refusals import (
    MEMORY_MIB,
    HeldHouse,
    connected,
    refused,
    served_with,
    told,
    traces,
)
from tests.integration.serving import Guest

Pb = sandbox_service_pb2


served = served_with(max_fork_count=50)
"""A server for the whole module."""


@pytest.fixture
async def house(served: HeldHouse) -> AsyncIterator[HeldHouse]:
    """The server, with one sandbox `src` and its snapshot `snap`."""
    async with connected(served) as house:
        if not (house.data_dir / "sandboxes" / "src").exists():
            await house.boot("src", MEMORY_MIB)
            await house.ready("src", snapshot_id="snap", branch_id="br")
        yield house


async def drain(call: Any) -> None:
    """Reads a stream to its end."""
    async for _ in call:
        pass


# --- ids ---------------------------------------------------------------------------------------

ByIds = Callable[[HeldHouse, str], Awaitable[Any]]


def sandbox_calls() -> dict[str, ByIds]:
    """Every call that names a sandbox which must exist."""
    return {
        "get": lambda h, i: h.sandboxes.GetSandbox(Pb.GetSandboxRequest(sandbox_id=i)),
        "update": lambda h, i: h.sandboxes.UpdateSandbox(
            Pb.UpdateSandboxRequest(sandbox_id=i, update_mask=FieldMask(paths=["labels"]))
        ),
        "delete": lambda h, i: h.sandboxes.DeleteSandbox(Pb.DeleteSandboxRequest(sandbox_id=i)),
        "pause": lambda h, i: h.sandboxes.PauseSandbox(Pb.PauseSandboxRequest(sandbox_id=i)),
        "resume": lambda h, i: h.sandboxes.ResumeSandbox(Pb.ResumeSandboxRequest(sandbox_id=i)),
        "branch": lambda h, i: h.branch(i),
        "read console": lambda h, i: drain(
            h.sandboxes.ReadConsole(Pb.ReadConsoleRequest(sandbox_id=i))
        ),
        "write console": lambda h, i: h.sandboxes.WriteConsole(
            Pb.WriteConsoleRequest(sandbox_id=i, data=b"t\n")
        ),
        "attach": lambda h, i: drain(
            h.sandboxes.AttachConsole(
                iter([Pb.AttachConsoleRequest(attach=Pb.ConsoleAttach(sandbox_id=i))])
            )
        ),
    }


def other_calls() -> dict[str, tuple[ByIds, str, str]]:
    """Every call that names something else which must exist: its field, and the reason."""
    snapshots = snapshot_service_pb2
    return {
        "create from snapshot": (
            lambda h, i: h.sandboxes.CreateSandbox(Pb.CreateSandboxRequest(snapshot_id=i)),
            "snapshot_id",
            "SNAPSHOT_NOT_FOUND",
        ),
        "fork": (lambda h, i: h.fork(i), "snapshot_id", "SNAPSHOT_NOT_FOUND"),
        "get snapshot": (
            lambda h, i: h.snapshots.GetSnapshot(snapshots.GetSnapshotRequest(snapshot_id=i)),
            "snapshot_id",
            "SNAPSHOT_NOT_FOUND",
        ),
        "update snapshot": (
            lambda h, i: h.snapshots.UpdateSnapshot(
                snapshots.UpdateSnapshotRequest(
                    snapshot_id=i, update_mask=FieldMask(paths=["labels"])
                )
            ),
            "snapshot_id",
            "SNAPSHOT_NOT_FOUND",
        ),
        "delete snapshot": (
            lambda h, i: h.delete_snapshot(i),
            "snapshot_id",
            "SNAPSHOT_NOT_FOUND",
        ),
        "get branch": (
            lambda h, i: h.sandboxes.GetBranch(Pb.GetBranchRequest(branch_id=i)),
            "branch_id",
            "BRANCH_NOT_FOUND",
        ),
        "watch branch": (
            lambda h, i: drain(h.sandboxes.WatchBranch(Pb.WatchBranchRequest(branch_id=i))),
            "branch_id",
            "BRANCH_NOT_FOUND",
        ),
        "cancel branch": (
            lambda h, i: h.sandboxes.CancelBranch(Pb.CancelBranchRequest(branch_id=i)),
            "branch_id",
            "BRANCH_NOT_FOUND",
        ),
        "get fork": (
            lambda h, i: h.sandboxes.GetFork(Pb.GetForkRequest(fork_id=i)),
            "fork_id",
            "FORK_NOT_FOUND",
        ),
        "watch fork": (
            lambda h, i: drain(h.sandboxes.WatchFork(Pb.WatchForkRequest(fork_id=i))),
            "fork_id",
            "FORK_NOT_FOUND",
        ),
    }


ALL_CALLS = {
    **{name: (call, "sandbox_id", "SANDBOX_NOT_FOUND") for name, call in sandbox_calls().items()},
    **other_calls(),
}
NO_IDS = ["", "../x", "a/b", "..", "a" * 64, "Upper", "1a", "a\0b", "-a", "a b", "\u00e4", "a\n"]


@pytest.mark.parametrize("name", ALL_CALLS)
async def test_an_id_that_nothing_has_is_not_found(house: HeldHouse, name: str) -> None:
    call, _, reason = ALL_CALLS[name]
    async with refused(house, "NOT_FOUND", reason, "there is no", "nobody-has-this"):
        await call(house, "nobody-has-this")


@pytest.mark.parametrize("name", ALL_CALLS)
async def test_what_is_no_id_is_refused_before_anything_is_looked_up(
    house: HeldHouse, name: str
) -> None:
    call, field, _ = ALL_CALLS[name]
    before = await traces(house)
    for wrong in NO_IDS:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call(house, wrong)
        words = "is required" if not wrong else "[a-z][a-z0-9-]"
        seen = told(caught.value, "INVALID_ARGUMENT", "INVALID_FIELD", words)
        assert [each.rpartition(".")[2] for each in seen.wrong_fields] == [field], wrong
    assert await traces(house) == before


async def test_ids_that_a_client_chooses_are_held_to_the_same_rule(house: HeldHouse) -> None:
    before = await traces(house)
    boot = Pb.BootSource(kernel_image=str(house.kernel), memory_mib=MEMORY_MIB)
    for wrong in NO_IDS[1:]:
        for call in (
            lambda i: house.sandboxes.CreateSandbox(
                Pb.CreateSandboxRequest(sandbox_id=i, boot=boot)
            ),
            lambda i: house.branch("src", branch_id=i),
            lambda i: house.branch("src", snapshot_id=i),
            lambda i: house.branch("src", fork=fork_pb2.ForkSpec(count=1, fork_id=i)),
            lambda i: house.fork("snap", fork_id=i),
        ):
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await call(wrong)
            told(caught.value, "INVALID_ARGUMENT", "INVALID_FIELD", "[a-z][a-z0-9-]")
    assert await traces(house) == before


async def test_an_id_of_63_characters_is_one(house: HeldHouse) -> None:
    name = "a" * 63
    await house.boot(name, MEMORY_MIB)
    await house.ready(name, snapshot_id=name, branch_id=name)
    child = await house.fork(name, fork_id="b" * 58)
    assert child.ready_count == 1
    await house.delete(child.children[0].sandbox_id)
    await house.delete(name)
    await house.delete_snapshot(name)


async def test_ids_that_are_taken(house: HeldHouse) -> None:
    boot = Pb.BootSource(kernel_image=str(house.kernel), memory_mib=MEMORY_MIB)
    await house.fork("snap", fork_id="kids")
    async with refused(house, "ALREADY_EXISTS", "ID_TAKEN", "sandbox", "src", "choose another"):
        await house.sandboxes.CreateSandbox(Pb.CreateSandboxRequest(sandbox_id="src", boot=boot))
    async with refused(house, "ALREADY_EXISTS", "ID_TAKEN", "sandbox", "kids-0"):
        await house.sandboxes.CreateSandbox(
            Pb.CreateSandboxRequest(sandbox_id="kids-0", snapshot_id="snap")
        )
    async with refused(house, "ALREADY_EXISTS", "ID_TAKEN", "snapshot", "snap", "choose another"):
        await house.branch("src", snapshot_id="snap")
    async with refused(house, "ALREADY_EXISTS", "ID_TAKEN", "branch", "br", "choose another"):
        await house.branch("src", branch_id="br")
    async with refused(house, "ALREADY_EXISTS", "ID_TAKEN", "fork", "kids", "choose another"):
        await house.fork("snap", fork_id="kids")
    async with refused(house, "ALREADY_EXISTS", "ID_TAKEN", "fork", "kids"):
        await house.branch("src", fork=fork_pb2.ForkSpec(count=1, fork_id="kids"))
    await house.delete("kids-0")


async def test_a_childs_id_that_is_taken_refuses_the_whole_fork(house: HeldHouse) -> None:
    await house.boot("squat-1", MEMORY_MIB)
    async with refused(house, "ALREADY_EXISTS", "ID_TAKEN", "squat-1"):
        await house.fork("snap", 3, fork_id="squat")
    async with refused(house, "ALREADY_EXISTS", "ID_TAKEN", "squat-1"):
        await house.branch("src", fork=fork_pb2.ForkSpec(count=3, fork_id="squat"))
    await house.delete("squat-1")


# --- sizes and counts --------------------------------------------------------------------------


@pytest.mark.parametrize("count", [0, 51, 10**9])
async def test_a_count_of_children_out_of_bounds(house: HeldHouse, count: int) -> None:
    words = (f"{count} is out of bounds", "1 to 50")
    async with refused(house, "INVALID_ARGUMENT", "INVALID_FIELD", *words) as refusal:
        await house.fork("snap", count)
    assert refusal.wrong_fields == ["fork.count"]
    async with refused(house, "INVALID_ARGUMENT", "INVALID_FIELD", *words) as refusal:
        await house.branch("src", fork=fork_pb2.ForkSpec(count=count))
    assert refusal.wrong_fields == ["fork.count"]


def host_mib() -> int:
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") >> 20


@pytest.mark.parametrize("memory_mib", [0, 15, host_mib() + 1, 2**64 - 1])
async def test_memory_out_of_bounds(house: HeldHouse, memory_mib: int) -> None:
    words = (f"{memory_mib} MiB is out of bounds", f"16 to {host_mib()}")
    async with refused(house, "INVALID_ARGUMENT", "INVALID_FIELD", *words) as refusal:
        await house.boot("big", memory_mib)
    assert refusal.wrong_fields == ["boot.memory_mib"]


async def test_all_wrong_fields_are_named_at_once(house: HeldHouse) -> None:
    async with refused(house, "INVALID_ARGUMENT", "INVALID_FIELD") as refusal:
        await house.sandboxes.CreateSandbox(
            Pb.CreateSandboxRequest(
                sandbox_id="Wrong",
                request_id="wrong",
                boot=Pb.BootSource(kernel_image="relative", vcpus=33, boot_args="a\nb"),
                ttl=Duration(seconds=-1),
                labels={"": "x"},
            )
        )
    assert sorted(refusal.wrong_fields) == [
        "boot.boot_args",
        "boot.kernel_image",
        "boot.memory_mib",
        "boot.vcpus",
        "labels",
        "request_id",
        "sandbox_id",
        "ttl",
    ]


async def test_a_sandbox_of_nothing(house: HeldHouse) -> None:
    async with refused(house, "INVALID_ARGUMENT", "INVALID_FIELD", "give one of boot, snapshot_id"):
        await house.sandboxes.CreateSandbox(Pb.CreateSandboxRequest())


# --- files -------------------------------------------------------------------------------------


async def create(house: HeldHouse, kernel: Path | str, **boot: Any) -> None:
    await house.sandboxes.CreateSandbox(
        Pb.CreateSandboxRequest(
            sandbox_id="new",
            boot=Pb.BootSource(kernel_image=str(kernel), memory_mib=MEMORY_MIB, **boot),
        )
    )


def make_files(house: HeldHouse) -> dict[str, tuple[Path, str]]:
    """Files that no kernel, initrd or drive may be, each with words of its refusal."""
    images, outside = house.images, house.root / "outside"
    if not outside.exists():
        outside.write_bytes(house.kernel.read_bytes())
        (images / "link-out").symlink_to(outside)
        (images / "loop").symlink_to("loop")
        (images / "folder").mkdir()
        os.mkfifo(images / "fifo")
        (images / "link-folder").symlink_to("/etc")
    return {
        "missing": (images / "missing", "does not exist on the server's host"),
        "outside": (outside, "lies outside the image roots"),
        "dots": (images / ".." / "outside", "lies outside the image roots"),
        "a secret": (Path("/etc/shadow"), "lies outside the image roots"),
        "nothing outside": (Path("/etc/no-such-file"), "lies outside the image roots"),
        "link out": (images / "link-out", "a link leads out of them"),
        "through a link": (images / "link-folder" / "passwd", "a link leads out of them"),
        "link to itself": (images / "loop", "is a link that leads to itself"),
        "folder": (images / "folder", "is a folder"),
        "fifo": (images / "fifo", "is a FIFO"),
        "under a file": (house.kernel / "x", "does not exist on the server's host"),
    }


FILES = [
    "missing", "outside", "dots", "a secret", "nothing outside", "link out", "through a link",
    "link to itself", "folder", "fifo", "under a file",
]  # fmt: skip


@pytest.mark.parametrize("kind", FILES)
async def test_a_file_that_may_not_be_used(house: HeldHouse, kind: str) -> None:
    path, words = make_files(house)[kind]
    field = "INVALID_FIELD"
    async with refused(house, "INVALID_ARGUMENT", field, words, str(path)) as refusal:
        await create(house, path)
    assert refusal.wrong_fields == ["boot.kernel_image"]
    async with refused(house, "INVALID_ARGUMENT", field, words, str(path)) as refusal:
        await create(house, house.kernel, initrd=str(path))
    assert refusal.wrong_fields == ["boot.initrd"]
    async with refused(house, "INVALID_ARGUMENT", field, words, str(path)) as refusal:
        await create(
            house,
            house.kernel,
            drives=[sandbox_pb2.Drive(drive_id="a", path=str(path), read_only=True)],
        )
    assert refusal.wrong_fields == ["boot.drives[0].path"]


async def test_outside_the_roots_nothing_is_told_apart(house: HeldHouse) -> None:
    make_files(house)
    seen = []
    for name in ("passwd", "no-such-file", "shadow"):
        async with refused(house, "INVALID_ARGUMENT", "INVALID_FIELD") as refusal:
            await create(house, f"/etc/{name}")
        seen.append(refusal.words.replace(name, "?"))
    assert len(set(seen)) == 1


@pytest.mark.parametrize("content", [b"", b"#!/bin/sh\n", b"\x7fELF", b"\x1f\x8b\x08" + b"z" * 99])
async def test_a_kernel_that_is_no_elf(house: HeldHouse, content: bytes) -> None:
    kernel = house.images / "no-kernel"
    kernel.write_bytes(content)
    async with refused(house, "INVALID_ARGUMENT", "INVALID_FIELD", "ELF", "no-kernel") as refusal:
        await create(house, kernel)
    assert refusal.wrong_fields == ["boot.kernel_image"]


async def test_an_elf_that_is_no_kernel(house: HeldHouse) -> None:
    kernel = house.images / "cut-kernel"
    kernel.write_bytes(house.kernel.read_bytes()[:100])
    async with refused(house, "INTERNAL", "VMM_FAILED", "new did not start", "kernel"):
        await create(house, kernel)


async def test_a_writable_drive_without_reflink(house: HeldHouse) -> None:
    (house.images / "disk").write_bytes(b"\0" * 4096)
    drive = sandbox_pb2.Drive(drive_id="rootfs", path=str(house.images / "disk"))
    if can_reflink(house.images):
        pytest.skip("this file system has reflink: it takes writable drives")
    async with refused(
        house, "FAILED_PRECONDITION", "WRITABLE_DRIVE", "rootfs is writable", "XFS or btrfs"
    ):
        await create(house, house.kernel, drives=[drive])


# --- bytes, tokens, repeats --------------------------------------------------------------------


@pytest.mark.parametrize(
    "method",
    [
        "SandboxService/CreateSandbox",
        "SandboxService/BranchSandbox",
        "SandboxService/AttachConsole",
        "SnapshotService/DeleteSnapshot",
    ],
)
async def test_bytes_that_are_no_message(house: HeldHouse, method: str) -> None:
    async with refused(house, "INVALID_ARGUMENT", "UNDECODABLE_MESSAGE", "the same contract"):
        send: Any = house.channel.stream_stream(f"/forkpoint.v1.{method}")
        await drain(send(iter([b"\xff\xff garbage"])))


async def test_page_tokens_that_nobody_made(house: HeldHouse) -> None:
    await house.boot("second", MEMORY_MIB)
    first = await house.sandboxes.ListSandboxes(Pb.ListSandboxesRequest(page_size=1))
    token = first.next_page_token
    bent = bytearray(base64.urlsafe_b64decode(token))
    bent[4] ^= 1
    forged = [
        "garbage",
        "A" * 40,
        token[:-4],
        base64.urlsafe_b64encode(bytes(bent)).decode(),
        token + "\0",
    ]
    for wrong in forged:
        for name in ("ListSandboxes", "ListBranches"):
            request = getattr(Pb, f"{name}Request")(page_token=wrong)
            async with refused(
                house, "INVALID_ARGUMENT", "PAGE_TOKEN_INVALID", "leave it out to start anew"
            ):
                await getattr(house.sandboxes, name)(request)
    for request in (
        Pb.ListSandboxesRequest(page_token=token, labels={"another": "filter"}),
        Pb.ListSandboxesRequest(page_token=token, states=[sandbox_pb2.SANDBOX_STATE_RUNNING]),
    ):
        async with refused(house, "INVALID_ARGUMENT", "PAGE_TOKEN_INVALID"):
            await house.sandboxes.ListSandboxes(request)
    async with refused(house, "INVALID_ARGUMENT", "PAGE_TOKEN_INVALID"):
        await house.snapshots.ListSnapshots(
            snapshot_service_pb2.ListSnapshotsRequest(page_token=token)
        )
    async with refused(house, "INVALID_ARGUMENT", "INVALID_FIELD", "no next_page_token"):
        await house.sandboxes.ListSandboxes(Pb.ListSandboxesRequest(page_token="A" * 513))
    async with refused(house, "INVALID_ARGUMENT", "INVALID_FIELD", "at most 1000"):
        await house.sandboxes.ListSandboxes(Pb.ListSandboxesRequest(page_size=1001))
    await house.delete("second")


@pytest.mark.parametrize(
    "request_id",
    [
        "x",
        "00000000-0000-1000-8000-000000000000",
        "641f746b-9d4c-4f0e-8a3b-5f1f4a3c2b1d ",
        "0" * 36,
    ],
)
async def test_a_request_id_that_is_no_uuid4(house: HeldHouse, request_id: str) -> None:
    for call in (
        lambda: house.boot("new", MEMORY_MIB, request_id=request_id),
        lambda: house.branch("src", request_id=request_id),
        lambda: drain(
            house.sandboxes.ForkSandboxes(
                Pb.ForkSandboxesRequest(
                    snapshot_id="snap", fork=fork_pb2.ForkSpec(count=1), request_id=request_id
                )
            )
        ),
    ):
        async with refused(house, "INVALID_ARGUMENT", "INVALID_FIELD", "a UUID4") as refusal:
            await call()
        assert refusal.wrong_fields == ["request_id"]


async def test_one_request_id_makes_one_sandbox(house: HeldHouse) -> None:
    request = Pb.CreateSandboxRequest(
        request_id=str(uuid.uuid4()),
        boot=Pb.BootSource(kernel_image=str(house.kernel), memory_mib=MEMORY_MIB),
    )
    async with house.held("boot") as hold:
        calls = [asyncio.ensure_future(house.sandboxes.CreateSandbox(request)) for _ in range(5)]
        await hold.reached()
        hold.release()
    made = {(await call).sandbox.sandbox_id for call in calls}
    assert len(made) == 1
    again = await house.sandboxes.CreateSandbox(request)
    assert {again.sandbox.sandbox_id} == made
    await house.restart()
    again = await house.sandboxes.CreateSandbox(request)
    assert {again.sandbox.sandbox_id} == made
    assert (await Guest(house, again.sandbox.sandbox_id).ask("t"))[0] == "T"
    other = Pb.CreateSandboxRequest()
    other.CopyFrom(request)
    other.boot.memory_mib += 1
    async with refused(
        house, "ALREADY_EXISTS", "REQUEST_ID_REUSED", "another CreateSandbox call", "make a new one"
    ):
        await house.sandboxes.CreateSandbox(other)
    async with refused(house, "ALREADY_EXISTS", "REQUEST_ID_REUSED"):
        await house.branch("src", request_id=request.request_id)
    await house.delete(again.sandbox.sandbox_id)


async def test_one_request_id_makes_one_fork(house: HeldHouse) -> None:
    request = Pb.ForkSandboxesRequest(
        request_id=str(uuid.uuid4()), snapshot_id="snap", fork=fork_pb2.ForkSpec(count=2)
    )

    async def fork(request: Pb.ForkSandboxesRequest) -> fork_pb2.Fork:
        last = fork_pb2.Fork()
        async for response in house.sandboxes.ForkSandboxes(request):
            last = response.fork
        return last

    async with house.held("load") as hold:
        calls = [asyncio.ensure_future(fork(request)) for _ in range(5)]
        await hold.reached()
    first = await calls[0]
    assert first.ready_count == 2
    assert {(await call).fork_id for call in calls} == {first.fork_id}
    await house.restart()
    assert (await fork(request)).fork_id == first.fork_id
    other = Pb.ForkSandboxesRequest()
    other.CopyFrom(request)
    other.fork.count = 3
    async with refused(house, "ALREADY_EXISTS", "REQUEST_ID_REUSED", "another ForkSandboxes call"):
        await fork(other)
    for child in first.children:
        await house.delete(child.sandbox_id)


async def test_a_request_that_was_refused_is_not_remembered(house: HeldHouse) -> None:
    request_id = str(uuid.uuid4())
    async with refused(house, "ALREADY_EXISTS", "ID_TAKEN"):
        await house.boot("src", MEMORY_MIB, request_id=request_id)
    await house.boot("later", MEMORY_MIB, request_id=request_id)
    await house.delete("later")


async def test_a_create_that_failed_is_not_remembered(house: HeldHouse) -> None:
    request_id = str(uuid.uuid4())
    kernel = house.images / "slow-kernel"
    kernel.write_bytes(house.kernel.read_bytes()[:100])
    request = Pb.CreateSandboxRequest(
        request_id=request_id,
        sandbox_id="mended",
        boot=Pb.BootSource(kernel_image=str(kernel), memory_mib=MEMORY_MIB),
    )
    async with refused(house, "INTERNAL", "VMM_FAILED"):
        await house.sandboxes.CreateSandbox(request)
    kernel.write_bytes(house.kernel.read_bytes())
    made = await house.sandboxes.CreateSandbox(request)
    assert made.sandbox.state == sandbox_pb2.SANDBOX_STATE_RUNNING
    await house.delete("mended")
