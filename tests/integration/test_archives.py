"""Snapshots that go from server to server, end to end: what left as an archive starts elsewhere."""

from __future__ import annotations

import asyncio
import io
import json
import os
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import grpc
import grpc.aio
import pytest
from blake3 import blake3

from forkpoint.v1 import sandbox_service_pb2, snapshot_pb2
from forkpoint.v1 import snapshot_service_pb2 as pb
from forkpointd.images import Table, pack_frame
from forkpointd.images.archive import (
    BLOCK_BYTES,
    CHECKSUMS_NAME,
    INDEX_NAME,
    checksums_json,
    header,
    padding,
)
from forkpointd.images.seekable import FRAME_BYTES, Frames
from forkpointd.model import MIB
from forkpointd.vmm import Binary
from tests.integration.refusals import until
from tests.integration.serving import FULL, Guest, House, error_info, reason
from tests.integration.test_branching import same_pages

MEMORY_MIB = 128
REGION_MIB = 32
LAYERED = snapshot_pb2.LAYOUT_LAYERED
FLAT = snapshot_pb2.LAYOUT_FLAT
KEPT = pb.ARCHIVE_LAYOUT_KEPT
PIECE_BYTES = 300_000


@asynccontextmanager
async def started(house: House) -> AsyncIterator[House]:
    try:
        await house.start()
        yield house
    finally:
        await house.close()


@pytest.fixture
async def here(binary: Binary, witness_kernel: Path, tmp_path: Path) -> AsyncIterator[House]:
    async with started(House(tmp_path / "here", binary, witness_kernel)) as house:
        yield house


@pytest.fixture
async def there(binary: Binary, witness_kernel: Path, tmp_path: Path) -> AsyncIterator[House]:
    async with started(House(tmp_path / "there", binary, witness_kernel)) as house:
        yield house


async def exported(house: House, snapshot_id: str, **fields: object) -> bytes:
    request = pb.ExportSnapshotRequest(snapshot_id=snapshot_id, **fields)  # type: ignore[arg-type]
    archive = bytearray()
    first = None
    done = 0
    async for response in house.snapshots.ExportSnapshot(request):
        first = first or response.info
        assert response.done_bytes >= done
        done = response.done_bytes
        archive += response.data
    assert first is not None
    assert done == first.content_bytes
    return bytes(archive)


async def sending(archive: bytes, **options: object) -> AsyncIterator[pb.ImportSnapshotRequest]:
    yield pb.ImportSnapshotRequest(options=pb.ImportOptions(**options))  # type: ignore[arg-type]
    for start in range(0, len(archive), PIECE_BYTES):
        yield pb.ImportSnapshotRequest(data=archive[start : start + PIECE_BYTES])


async def imported(house: House, archive: bytes, **options: object) -> snapshot_pb2.Snapshot:
    response = await house.snapshots.ImportSnapshot(sending(archive, **options))
    return response.snapshot


async def refused(house: House, archive: bytes, **options: object) -> grpc.aio.AioRpcError:
    """How an import fails; nothing of it is left or seen."""
    before = sorted(os.listdir(house.data_dir / "snapshots"))
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await imported(house, archive, **options)
    assert sorted(os.listdir(house.data_dir / "snapshots")) == before
    return caught.value


async def shown(house: House) -> list[str]:
    listed = await house.snapshots.ListSnapshots(pb.ListSnapshotsRequest())
    return [each.snapshot_id for each in listed.snapshots]


async def layered_source(house: House) -> Guest:
    """A source whose last snapshot, `top`, has two layers below it; `full` is the same moment."""
    source = await house.boot("src", MEMORY_MIB)
    await source.dirty(REGION_MIB)
    await house.ready("src", snapshot_id="root")
    for number in range(2):
        await source.dirty(REGION_MIB - 8 * number - 8)
        # Pages of zeros, which are no holes: they hide what lies below.
        await source.ask(f"z{500 * number},200")
        await house.ready("src", layout=LAYERED, snapshot_id=f"layer-{number}")
    request = sandbox_service_pb2.PauseSandboxRequest(sandbox_id="src")
    await house.sandboxes.PauseSandbox(request)
    await house.ready("src", layout=LAYERED, snapshot_id="top")
    await house.ready("src", mode=FULL, snapshot_id="full")
    await house.sandboxes.ResumeSandbox(sandbox_service_pb2.ResumeSandboxRequest(sandbox_id="src"))
    return source


@pytest.mark.parametrize("layout", [pb.ARCHIVE_LAYOUT_FLAT, KEPT], ids=["flat", "kept"])
async def test_a_layered_snapshot_starts_on_another_server_page_by_page(
    here: House, there: House, layout: int
) -> None:
    source = await layered_source(here)
    archive = await exported(here, "top", layout=layout)
    assert len(archive) < MEMORY_MIB * MIB / 2
    made = await imported(there, archive, labels={"from": "here"})
    assert made.snapshot_id == "top"
    assert made.layout == (LAYERED if layout == KEPT else FLAT)
    assert dict(made.labels) == {"from": "here"}
    assert (made.memory_mib, made.source_sandbox_id) == (MEMORY_MIB, "src")
    assert await shown(there) == ["top"], "what it stands on is no snapshot of its own"
    child = await there.child("top")
    assert same_pages(there.memory_file("top"), here.memory_file("full")) == MEMORY_MIB * 256
    assert await child.verify(REGION_MIB) == await source.verify(REGION_MIB)
    # It is a snapshot as any other: a base of diffs, also of layers.
    await child.dirty(3)
    await there.ready(child.id, layout=LAYERED, snapshot_id="next")
    grandchild = await there.child("next")
    assert await grandchild.verify(REGION_MIB) == await child.verify(REGION_MIB)
    assert there.half_made() == []


async def test_an_imported_snapshot_can_be_verified_with_what_it_stands_on(here: House) -> None:
    await layered_source(here)
    await imported(here, await exported(here, "top", layout=KEPT), snapshot_id="new")
    for name in ("layer-0", "layer-1", "top", "full", "root"):
        await here.delete_snapshot(name)
    request = pb.VerifySnapshotRequest(snapshot_id="new")
    seen = [each async for each in here.snapshots.VerifySnapshot(request)]
    assert seen[-1].verified
    assert seen[-1].total_bytes > REGION_MIB * MIB


async def test_what_an_imported_layer_stands_on_goes_with_it(here: House, there: House) -> None:
    await layered_source(here)
    await imported(there, await exported(here, "top", layout=KEPT))
    await there.restart()
    assert len(os.listdir(there.data_dir / "snapshots")) == 4
    await there.delete_snapshot("top")

    async def gone() -> bool:
        return os.listdir(there.data_dir / "snapshots") == []

    await until(gone)


async def test_an_archive_survives_the_delete_of_its_snapshot(here: House, there: House) -> None:
    source = await layered_source(here)
    call = here.snapshots.ExportSnapshot(pb.ExportSnapshotRequest(snapshot_id="top"))
    archive = bytearray()
    async for response in call:
        if not archive:
            for name in await shown(here):
                await here.delete_snapshot(name)
        archive += response.data
    assert await shown(here) == []
    await imported(there, bytes(archive))
    child = await there.child("top")
    assert await child.verify(REGION_MIB) == await source.verify(REGION_MIB)


async def flat_archive(house: House) -> bytes:
    source = await house.boot("src", MEMORY_MIB)
    await source.dirty(REGION_MIB)
    await house.ready("src", snapshot_id="one")
    return await exported(house, "one")


async def test_taken_ids_and_repeats(here: House) -> None:
    archive = await flat_archive(here)
    error = await refused(here, archive)
    assert reason(error) == "ID_TAKEN"
    request_id = str(uuid.uuid4())
    made = await imported(here, archive, snapshot_id="two", request_id=request_id)
    again = await imported(here, b"", snapshot_id="two", request_id=request_id)
    assert again == made
    other = await refused(here, archive, snapshot_id="three", request_id=request_id)
    assert reason(other) == "REQUEST_ID_REUSED"
    assert reason(await refused(here, archive, snapshot_id="two")) == "ID_TAKEN"
    child = await here.child("two")
    assert (await child.verify(REGION_MIB))[2:] == (0, 0)


async def test_two_at_once_under_one_id_are_one_snapshot(here: House) -> None:
    archive = await flat_archive(here)
    ended = await asyncio.gather(
        *(imported(here, archive, snapshot_id="two") for _ in range(3)), return_exceptions=True
    )
    made = [each for each in ended if isinstance(each, snapshot_pb2.Snapshot)]
    assert len(made) == 1
    for each in ended:
        if isinstance(each, grpc.aio.AioRpcError):
            assert reason(each) == "ID_TAKEN"
    assert here.half_made() == []
    branch = await here.ready("src", snapshot_id="three")
    assert branch.snapshot.snapshot_id == "three"


async def test_an_id_that_is_being_imported_is_taken_for_branches(here: House) -> None:
    archive = await flat_archive(here)
    go_on = asyncio.Event()

    async def held() -> AsyncIterator[pb.ImportSnapshotRequest]:
        async for each in sending(archive[:-1], snapshot_id="two"):
            yield each
        await go_on.wait()
        yield pb.ImportSnapshotRequest(data=archive[-1:])

    importing = asyncio.ensure_future(here.snapshots.ImportSnapshot(held()))

    async def begun() -> bool:
        return any("draft" in name for name in os.listdir(here.data_dir / "snapshots"))

    await until(begun)
    assert await shown(here) == ["one"]
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await here.branch("src", snapshot_id="two")
    assert reason(caught.value) == "ID_TAKEN"
    go_on.set()
    assert (await importing).snapshot.snapshot_id == "two"


async def test_a_client_that_leaves_an_import_leaves_nothing(here: House) -> None:
    archive = await flat_archive(here)

    async def some() -> AsyncIterator[pb.ImportSnapshotRequest]:
        async for each in sending(archive[:-1], snapshot_id="two"):
            yield each
        await asyncio.Event().wait()

    call = here.snapshots.ImportSnapshot(some())
    waiting = asyncio.ensure_future(call)

    async def begun() -> bool:
        return bool(here.half_made())

    await until(begun)
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting

    async def free() -> bool:
        try:
            return (await imported(here, archive, snapshot_id="two")).snapshot_id == "two"
        except grpc.aio.AioRpcError as error:
            assert reason(error) == "ID_TAKEN"
            return False

    await until(free)
    assert here.half_made() == []
    assert sorted(os.listdir(here.data_dir / "snapshots")) == ["one", "two"]


async def test_cut_and_altered_archives_are_refused_whole(here: House) -> None:
    archive = await flat_archive(here)
    for wrong in (
        archive[:-1],
        archive[: len(archive) // 2],
        archive + b"x",
        archive[:1000] + bytes([archive[1000] ^ 1]) + archive[1001:],
        archive[:-500] + bytes([archive[-500] ^ 64]) + archive[-499:],
        b"",
        b"not an archive at all, but some text" * 100,
    ):
        error = await refused(here, wrong, snapshot_id="two")
        assert reason(error) == "ARCHIVE_INVALID", error
        assert error.code() == grpc.StatusCode.INVALID_ARGUMENT
    assert await shown(here) == ["one"]


def rewritten(archive: bytes, **changes: object) -> bytes:
    """The archive with another manifest, consistent in itself."""
    frames = Frames()
    frames.add(archive)
    content = b""
    while (part := frames.take()) is not None:
        content += part
    members: list[tuple[str, bytes]] = []
    at = 0
    while any(head := content[at : at + BLOCK_BYTES]):
        name = head[:100].rstrip(b"\0").decode()
        size = int(head[124:135], 8)
        at += BLOCK_BYTES
        members.append((name, content[at : at + size]))
        at += size + padding(size)
    (_, old_index), (manifest_name, old_manifest), *others = members
    manifest = json.dumps(json.loads(old_manifest) | changes, indent=1, sort_keys=True) + "\n"
    index = json.loads(old_index)
    index["images"][0]["manifest_bytes"] = len(manifest)
    members = [
        (INDEX_NAME, json.dumps(index, indent=1).encode() + b"\n"),
        (manifest_name, manifest.encode()),
        *others[:-1],
    ]
    digests = {name: blake3(data).hexdigest() for name, data in members}
    members.append((CHECKSUMS_NAME, checksums_json(digests)))
    tar = b"".join(
        header(name, len(data)) + data + bytes(padding(len(data))) for name, data in members
    ) + bytes(1024)
    table = Table()
    made = io.BytesIO()
    for start in range(0, len(tar), FRAME_BYTES):
        part = tar[start : start + FRAME_BYTES]
        frame = pack_frame(part, 1)
        table.add(frame, len(part))
        made.write(frame)
    return made.getvalue() + table.end()


async def test_what_does_not_fit_the_host_is_refused_with_what_differs(here: House) -> None:
    archive = await flat_archive(here)
    features = json.loads((here.data_dir / "snapshots" / "one" / "manifest.json").read_text())[
        "cpu_features"
    ]
    wrong = rewritten(archive, cpu_features=[*features, "avx9000"])
    error = await refused(here, wrong, snapshot_id="two")
    assert reason(error) == "HOST_MISMATCH"
    assert "avx9000" in str(error.details())
    error = await refused(here, rewritten(archive, cpu_model="6502"), snapshot_id="two")
    assert reason(error) == "HOST_MISMATCH"
    assert "6502" in str(error.details())
    error = await refused(here, rewritten(archive, memory_bytes=1 << 50), snapshot_id="two")
    assert reason(error) in ("NO_MEMORY", "ARCHIVE_INVALID")
    # And the same, not changed, is taken.
    same = rewritten(archive, boot={"note": "rewritten"})
    assert (await imported(here, same, snapshot_id="two")).snapshot_id == "two"


async def test_drives_of_an_archive_are_looked_at_as_a_clients_are(here: House) -> None:
    archive = await flat_archive(here)
    drive = {
        "drive_id": "data",
        "path": "/etc/hostname",
        "read_only": True,
        "root_device": False,
        "size_bytes": os.stat("/etc/hostname").st_size,
        "mtime_ns": os.stat("/etc/hostname").st_mtime_ns,
        "inode": 1,
    }
    error = await refused(here, rewritten(archive, drives=[drive]), snapshot_id="two")
    assert reason(error) == "DRIVE_CHANGED"
    assert "image root" in str(error.details())
    inside = here.images / "data.img"
    link = here.images / "link.img"
    link.symlink_to("/etc/hostname")
    for path, words in ((inside, "can't be found"), (link, "image root")):
        wrong = rewritten(archive, drives=[drive | {"path": str(path)}])
        error = await refused(here, wrong, snapshot_id="two")
        assert reason(error) == "DRIVE_CHANGED"
        assert words in str(error.details())
        assert error_info(error).metadata["drive_id"] == "data"
    writable = rewritten(archive, drives=[drive | {"read_only": False}])
    assert reason(await refused(here, writable, snapshot_id="two")) == "WRITABLE_DRIVE"


async def test_windows_beside_an_export_that_nobody_reads(here: House) -> None:
    """A reader that stands still holds up neither windows nor other exports."""
    await layered_source(here)
    idle = here.snapshots.ExportSnapshot(pb.ExportSnapshotRequest(snapshot_id="full", level=12))
    await idle.read()
    for number in range(3):
        await here.ready("src", snapshot_id=f"beside-{number}")
    assert await exported(here, "full") == await exported(here, "full")
    idle.cancel()
    await here.delete_snapshot("full")

    async def gone() -> bool:
        return "full" not in os.listdir(here.data_dir / "snapshots")

    await until(gone)
