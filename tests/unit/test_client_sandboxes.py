"""Sandboxes, snapshots and the connection itself, over a real channel to a fake server."""

import asyncio
import warnings
from collections.abc import AsyncIterator, Iterator
from datetime import timedelta
from pathlib import Path

import pytest
from google.rpc import code_pb2

import forkpoint
from forkpoint import _versions, errors, sync
from tests.unit.client_fake import Fake, fresh_address


@pytest.fixture
def fake(tmp_path: Path) -> Iterator[Fake]:
    server = Fake(fresh_address(tmp_path))
    server.version = forkpoint.__version__
    server.start()
    yield server
    server.release()
    server.stop()


@pytest.fixture
async def fp(fake: Fake) -> AsyncIterator[forkpoint.Client]:
    async with forkpoint.connect(fake.address) as client:
        yield client


async def test_a_sandbox_is_created_looked_at_changed_and_ended(
    fake: Fake, fp: forkpoint.Client
) -> None:
    made = await fp.sandboxes.create(
        "agent-7", kernel="/images/vmlinux", memory_mib=256, labels={"a": "b"}, ttl="10m"
    )
    request = fake.called("CreateSandbox")[0]
    assert request.boot.kernel_image == "/images/vmlinux"
    assert len(request.request_id) == 36
    assert (made.id, made.state, made.memory_mib) == ("agent-7", "RUNNING", 256)
    assert made.ttl == timedelta(minutes=10)
    assert repr(made) == "<Sandbox agent-7 RUNNING>"

    assert (await made.pause()).state is forkpoint.SandboxState.PAUSED
    assert made.state is forkpoint.SandboxState.PAUSED
    await made.resume()
    await made.update(ttl=None, labels={"c": "d"})
    assert made.labels == {"c": "d"}
    changed = await fp.sandboxes.get("agent-7")
    assert changed.ttl is None
    assert await fp.sandboxes.get("agent-7") == made
    await made.delete()
    await made.delete()  # gone is gone
    with pytest.raises(errors.SandboxNotFound) as caught:
        await made.refresh()
    assert caught.value.reason == "SANDBOX_NOT_FOUND"
    with pytest.raises(errors.NotFound):
        await fp.sandboxes.delete("agent-7")


async def test_a_list_asks_for_page_after_page(fake: Fake, fp: forkpoint.Client) -> None:
    for number in range(5):
        fake.add_sandbox(f"s-{number}", labels={"odd": str(number % 2)})
    found = [each.id async for each in fp.sandboxes.list()]
    assert found == ["s-0", "s-1", "s-2", "s-3", "s-4"]
    assert len(fake.called("ListSandboxes")) == 3
    odd = [each.id async for each in fp.sandboxes.list(labels={"odd": "1"}, states=["running"])]
    assert odd == ["s-1", "s-3"]


async def test_a_list_that_is_left_asks_for_no_more(fake: Fake, fp: forkpoint.Client) -> None:
    for number in range(5):
        fake.add_sandbox(f"s-{number}")
    async for each in fp.sandboxes.list():
        assert each.id == "s-0"
        break
    assert len(fake.called("ListSandboxes")) == 1


async def test_a_lost_answer_is_asked_for_again_under_the_same_request_id(
    fake: Fake, fp: forkpoint.Client
) -> None:
    fake.unavailable_calls = 2
    made = await fp.sandboxes.create(kernel="/images/k", memory_mib=64)
    requests = fake.called("CreateSandbox")
    assert len({request.request_id for request in requests}) == 1
    assert len(requests) == 3
    assert list(fake.sandboxes) == [made.id]


async def test_what_is_typed_is_never_typed_twice(fake: Fake, fp: forkpoint.Client) -> None:
    source = fake.add_sandbox()
    fake.unavailable_calls = 1
    with pytest.raises(errors.ConnectionLost):
        await (await_sandbox(fp, source.sandbox_id)).console.write("rm -r x\n")
    assert len(fake.called("WriteConsole")) == 1


def await_sandbox(fp: forkpoint.Client, sandbox_id: str) -> forkpoint.Sandbox:
    """A handle without asking the server."""
    from forkpoint import _wire
    from forkpoint.v1 import sandbox_pb2

    view = _wire.sandbox(sandbox_pb2.Sandbox(sandbox_id=sandbox_id))
    return forkpoint.Sandbox(fp._calls, view)


async def test_a_server_that_restarts_is_found_again(fake: Fake, fp: forkpoint.Client) -> None:
    fake.add_sandbox("agent-7")
    fake.stop()
    asking = asyncio.create_task(fp.sandboxes.get("agent-7"))
    await asyncio.sleep(0)
    await asyncio.to_thread(fake.start)
    assert (await asking).id == "agent-7"


async def test_a_server_that_does_not_come_back_is_waited_for_a_bounded_time(fake: Fake) -> None:
    async with forkpoint.connect(fake.address, reconnect=0.3) as fp:
        fake.stop()
        with pytest.raises(errors.ConnectionLost, match="did not come back"):
            await fp.sandboxes.get("agent-7")


async def test_no_server_is_said_at_once(tmp_path: Path) -> None:
    with pytest.raises(errors.ServerNotFound, match="forkpointd serve"):
        async with forkpoint.connect(tmp_path / "no.sock"):
            pytest.fail("there is no server")


async def test_a_closed_client_says_so(fake: Fake) -> None:
    async with forkpoint.connect(fake.address) as fp:
        sandboxes = fp.sandboxes
    with pytest.raises(RuntimeError, match="closed"):
        await sandboxes.get("x")
    with pytest.raises(RuntimeError, match="not open"):
        _ = fp.sandboxes


async def test_a_long_path_of_a_socket_simply_works(tmp_path: Path) -> None:
    folder = tmp_path / ("d" * 120)
    folder.mkdir()
    server = Fake(folder / "a b%20c.sock")
    server.start()
    try:
        async with forkpoint.connect(folder / "a b%20c.sock") as fp:
            assert (await fp.server.info()).data_dir == "/data"
    finally:
        server.stop()


@pytest.mark.parametrize("name", ["sp ace.sock", "per%41cent.sock", "ha#sh.sock", "que?st.sock"])
async def test_any_name_of_a_socket_simply_works(tmp_path: Path, name: str) -> None:
    server = Fake(tmp_path / name)
    server.start()
    try:
        async with forkpoint.connect(tmp_path / name) as fp:
            assert (await fp.server.info()).data_dir == "/data"
    finally:
        server.stop()


async def test_another_version_is_warned_of_once(fake: Fake) -> None:
    _versions._said.clear()
    fake.version = "9.9.9"
    with pytest.warns(errors.VersionMismatchWarning, match="server is 9.9.9"):
        async with forkpoint.connect(fake.address):
            pass
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        async with forkpoint.connect(fake.address) as fp:
            info = await fp.server.info()
    assert (info.version, info.client_version) == ("9.9.9", forkpoint.__version__)


async def test_the_server_tells_what_its_host_can_do(fp: forkpoint.Client) -> None:
    info = await fp.server.info()
    assert info.vmm == forkpoint.Vmm(forkpoint.VmmKind.SIMULATOR, "1.12.1")
    assert info.checks == (
        forkpoint.HostCheck(
            "reflink", forkpoint.CheckOutcome.WARNING, "ext4 shares no blocks", "use XFS"
        ),
    )
    assert info.staging is forkpoint.StagingKind.TMPFS


async def test_an_error_of_the_server_has_all_it_said(fake: Fake, fp: forkpoint.Client) -> None:
    fake.add_sandbox("taken")
    with pytest.raises(errors.AlreadyExists) as caught:
        await fp.sandboxes.create("taken", kernel="/k", memory_mib=64)
    assert caught.value.reason == "ID_TAKEN"
    assert caught.value.code == code_pb2.Code.Name(code_pb2.ALREADY_EXISTS)


def test_the_sync_client_does_the_same(fake: Fake) -> None:
    with sync.connect(fake.address) as fp:
        made = fp.sandboxes.create("agent-7", kernel="/images/k", memory_mib=64)
        fake.add_sandbox("b")
        fake.add_sandbox("c")
        assert [each.id for each in fp.sandboxes.list()] == ["agent-7", "b", "c"]
        assert made.pause().state is forkpoint.SandboxState.PAUSED
        with pytest.raises(errors.SandboxNotFound):
            fp.sandboxes.get("nobody")
        fake.stop()
        fake.start()
        assert fp.sandboxes.get("agent-7") == made
        made.delete()
    assert "agent-7" not in fake.sandboxes
    with pytest.raises(errors.ServerNotFound), sync.connect("unix:/nowhere/x.sock"):
        pytest.fail("there is no server")
