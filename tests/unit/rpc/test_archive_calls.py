"""Exports and imports at the edge."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import grpc
import pytest

from forkpoint.v1 import snapshot_pb2
from forkpoint.v1 import snapshot_service_pb2 as pb
from forkpointd import model
from forkpointd.model import Reason
from tests.unit.rpc import samples
from tests.unit.rpc.harness import Edge, refused, until

UUID = "9c0cf8d7-1ea2-4c38-9a6c-2f6f0a4de001"


async def test_an_export_tells_first_what_it_will_hold(edge: Edge) -> None:
    edge.rooms.snapshots.there["s"] = samples.snapshot("s")
    request = pb.ExportSnapshotRequest(snapshot_id="s", layout=pb.ARCHIVE_LAYOUT_KEPT, level=7)
    first, *others = [each async for each in edge.snapshots.ExportSnapshot(request)]
    assert first.info == pb.ArchiveInfo(
        snapshot_id="s",
        layout=snapshot_pb2.LAYOUT_LAYERED,
        image_count=3,
        data_bytes=25,
        content_bytes=30,
    )
    assert first.data == b""
    assert [(each.data, each.done_bytes) for each in others] == [(b"s", 10), (b"s", 20)]
    assert not any(each.HasField("info") for each in others)
    order = model.ExportOrder("s", model.ArchiveLayout.KEPT, 7)
    assert edge.rooms.archives.exports == [order]


async def test_an_export_has_defaults_and_bounds(edge: Edge) -> None:
    edge.rooms.snapshots.there["s"] = samples.snapshot("s")
    call = edge.snapshots.ExportSnapshot(pb.ExportSnapshotRequest(snapshot_id="s"))
    assert len([each async for each in call]) == 3
    assert edge.rooms.archives.exports == [model.ExportOrder("s", model.ArchiveLayout.FLAT, None)]
    wrong = edge.snapshots.ExportSnapshot(pb.ExportSnapshotRequest(snapshot_id="s", level=13))
    code, problem = await refused(wrong)
    assert (code, problem.reason) == (grpc.StatusCode.INVALID_ARGUMENT, Reason.INVALID_FIELD)


async def test_a_client_that_leaves_an_export_ends_it(edge: Edge) -> None:
    edge.rooms.snapshots.there["s"] = samples.snapshot("s")
    call = edge.snapshots.ExportSnapshot(pb.ExportSnapshotRequest(snapshot_id="s"))
    await call.read()
    call.cancel()
    await until(lambda: not edge.rooms.archives.exporting)


async def messages(*parts: pb.ImportSnapshotRequest) -> AsyncIterator[pb.ImportSnapshotRequest]:
    for each in parts:
        yield each


def options(**fields: object) -> pb.ImportSnapshotRequest:
    return pb.ImportSnapshotRequest(options=pb.ImportOptions(**fields))  # type: ignore[arg-type]


def data(content: bytes) -> pb.ImportSnapshotRequest:
    return pb.ImportSnapshotRequest(data=content)


async def test_an_import_hands_over_options_and_bytes(edge: Edge) -> None:
    edge.rooms.snapshots.there["new"] = samples.snapshot("new")
    first = options(snapshot_id="new", labels={"a": "b"}, request_id=UUID)
    parts = messages(first, data(b"one"), data(b""), data(b"two"))
    answer = await edge.snapshots.ImportSnapshot(parts)
    assert answer.snapshot.snapshot_id == "new"
    assert edge.rooms.archives.got == b"onetwo"
    (order,) = edge.rooms.archives.imports
    assert (order.snapshot_id, order.labels) == ("new", {"a": "b"})
    assert order.request is not None
    assert (order.request.request_id, order.request.method) == (UUID, "ImportSnapshot")


@pytest.mark.parametrize(
    ("parts", "field"),
    [
        ((), "options"),
        ((data(b"x"),), "options"),
        ((options(), options()), "options"),
        ((pb.ImportSnapshotRequest(),), "options"),
        ((options(), pb.ImportSnapshotRequest()), "options"),
        ((options(snapshot_id="../x"),), "options.snapshot_id"),
        ((options(labels={"": "x"}),), "options.labels"),
        ((options(request_id="1"),), "options.request_id"),
    ],
)
async def test_wrong_messages_are_refused(
    edge: Edge, parts: tuple[pb.ImportSnapshotRequest, ...], field: str
) -> None:
    edge.rooms.snapshots.there["s"] = samples.snapshot("s")
    code, problem = await refused(edge.snapshots.ImportSnapshot(messages(*parts)))
    assert (code, problem.reason) == (grpc.StatusCode.INVALID_ARGUMENT, Reason.INVALID_FIELD)
    assert [wrong.field for wrong in problem.fields] == [field]


async def test_a_refusal_in_the_middle_reaches_a_client_that_still_sends(edge: Edge) -> None:
    edge.rooms.archives.takes = 3

    async def endless() -> AsyncIterator[pb.ImportSnapshotRequest]:
        yield options()
        while True:
            yield data(b"x" * 100_000)

    async with asyncio.timeout(10):
        code, problem = await refused(edge.snapshots.ImportSnapshot(endless()))
    assert (code, problem.reason) == (grpc.StatusCode.INVALID_ARGUMENT, Reason.ARCHIVE_INVALID)


async def test_a_drain_ends_an_import_and_refuses_the_next(edge: Edge) -> None:
    async def waiting() -> AsyncIterator[pb.ImportSnapshotRequest]:
        yield options()
        yield data(b"some")
        await asyncio.Event().wait()

    call = edge.snapshots.ImportSnapshot(waiting())
    ending = asyncio.ensure_future(refused(call))
    await until(lambda: edge.rooms.archives.got)
    edge.server.drain()
    code, problem = await ending
    assert (code, problem.reason) == (grpc.StatusCode.UNAVAILABLE, Reason.SERVER_DRAINING)
    code, problem = await refused(edge.snapshots.ImportSnapshot(messages(options())))
    assert (code, problem.reason) == (grpc.StatusCode.UNAVAILABLE, Reason.SERVER_DRAINING)
