"""The life of sandboxes on a real server: how one ends, what is left of it, who may leave when, and
folders of any depth."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest
from google.protobuf.field_mask_pb2 import FieldMask

from forkpoint.v1 import fork_pb2, sandbox_pb2, sandbox_service_pb2
from forkpointd.model import VmmKind
from forkpointd.vmm import Binary
from tests.integration.refusals import (
    MEMORY_MIB,
    PAUSED,
    REGION_MIB,
    RUNNING,
    HeldHouse,
    connected,
    everyone_answers,
    nothing_half_made,
    problem_of,
    refused,
    served_with,
    snapshot_ids,
    stopped,
    told,
    traces,
    until,
)
from tests.integration.serving import DIFF, START_SECONDS, Guest, House

Pb = sandbox_service_pb2


served = served_with()
"""A server for the whole module."""


@pytest.fixture
async def house(served: HeldHouse) -> AsyncIterator[HeldHouse]:
    """The server; nothing is left on it after a test."""
    async with connected(served) as house:
        yield house
        house.release_all()
        for sandbox_id in list((await traces(house)).sandboxes):
            await house.delete(sandbox_id)
        for snapshot_id in await snapshot_ids(house):
            await house.delete_snapshot(snapshot_id)
        await nothing_half_made(house)
        left = await traces(house)
        assert (left.vmms, left.folders) == ([], {"sandboxes": [], "snapshots": []})


async def console(house: House, sandbox_id: str) -> str:
    """All that a sandbox ever wrote, as far as it is kept."""
    request = Pb.ReadConsoleRequest(sandbox_id=sandbox_id)
    data = [response.data async for response in house.sandboxes.ReadConsole(request)]
    return b"".join(data).decode()


# --- ends --------------------------------------------------------------------------------------


@pytest.mark.parametrize("wished", ["running", "paused"])
async def test_a_vmm_that_is_killed_is_stopped_at_once_and_its_console_stays(
    house: HeldHouse, wished: str
) -> None:
    guest = await house.boot("victim", MEMORY_MIB)
    assert (await guest.ask("t"))[0] == "T"
    before = await console(house, "victim")
    if wished == "paused":
        await house.sandboxes.PauseSandbox(Pb.PauseSandboxRequest(sandbox_id="victim"))
    following = house.sandboxes.ReadConsole(Pb.ReadConsoleRequest(sandbox_id="victim", follow=True))
    os.kill((await house.get("victim")).pid, signal.SIGKILL)
    async with asyncio.timeout(START_SECONDS):
        followed = b"".join([response.data async for response in following])
    assert followed.decode() == before, "the stream ends with the sandbox"
    await stopped(house, "victim")
    sandbox = await house.get("victim")
    assert (sandbox.exit.signal, sandbox.exit.exit_code) == (signal.SIGKILL, -1)
    assert sandbox.exit.HasField("exit_time")
    assert before.startswith("READY\n")
    assert await console(house, "victim") == before
    for call in (
        lambda: house.sandboxes.PauseSandbox(Pb.PauseSandboxRequest(sandbox_id="victim")),
        lambda: house.sandboxes.ResumeSandbox(Pb.ResumeSandboxRequest(sandbox_id="victim")),
        lambda: house.branch("victim"),
    ):
        async with refused(
            house,
            "FAILED_PRECONDITION",
            "SANDBOX_NOT_RUNNING",
            "its process has ended (ended by signal 9)",
            "Its console is still there",
        ):
            await call()
    async with refused(house, "FAILED_PRECONDITION", "SANDBOX_NOT_RUNNING", "does not run"):
        await guest.ask("t")
    await house.restart()
    again = await house.get("victim")
    assert again.state == sandbox_pb2.SANDBOX_STATE_STOPPED
    assert again.exit == sandbox.exit
    assert await console(house, "victim") == before


async def test_a_vmm_that_ends_itself_is_shown_with_its_last_words(house: HeldHouse) -> None:
    if house.binary.kind is VmmKind.SIMULATOR:
        pytest.skip("a Python process has nothing to say about a signal")
    await house.boot("crash", MEMORY_MIB)
    os.kill((await house.get("crash")).pid, signal.SIGSEGV)
    await stopped(house, "crash")
    end = (await house.get("crash")).exit
    assert (end.exit_code, end.signal) != (0, 0)
    assert "intercepting signal 11" in end.last_words
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await house.branch("crash")
    told(caught.value, "FAILED_PRECONDITION", "SANDBOX_NOT_RUNNING", f"code {end.exit_code}")


async def test_a_vmm_that_ends_while_no_server_runs(house: HeldHouse) -> None:
    await house.boot("alone", MEMORY_MIB)
    await house.boot("other", MEMORY_MIB)
    before = await console(house, "alone")
    pid = (await house.get("alone")).pid
    await house.kill()
    os.kill(pid, signal.SIGKILL)
    await house.start()
    sandbox = await house.get("alone")
    assert sandbox.state == sandbox_pb2.SANDBOX_STATE_STOPPED
    assert (sandbox.exit.exit_code, sandbox.exit.signal) == (-1, 0), "nobody saw how"
    assert await console(house, "alone") == before
    assert (await Guest(house, "other").ask("t"))[0] == "T"


async def test_an_adopted_vmm_that_is_killed_is_stopped_at_once(house: HeldHouse) -> None:
    await house.boot("adopted", MEMORY_MIB)
    await house.restart()
    os.kill((await house.get("adopted")).pid, signal.SIGKILL)
    await stopped(house, "adopted")


async def test_a_paused_sandbox_stays_so_over_a_restart(house: HeldHouse) -> None:
    guest = await house.boot("asleep", MEMORY_MIB)
    await house.sandboxes.PauseSandbox(Pb.PauseSandboxRequest(sandbox_id="asleep"))
    again = await house.sandboxes.PauseSandbox(Pb.PauseSandboxRequest(sandbox_id="asleep"))
    assert again.sandbox.state == PAUSED, "it is idempotent"
    await house.restart()
    assert (await house.get("asleep")).state == PAUSED
    await house.sandboxes.ResumeSandbox(Pb.ResumeSandboxRequest(sandbox_id="asleep"))
    resumed = await house.sandboxes.ResumeSandbox(Pb.ResumeSandboxRequest(sandbox_id="asleep"))
    assert resumed.sandbox.state == RUNNING
    assert (await guest.ask("t"))[0] == "T"


# --- callers that leave, calls that meet ----------------------------------------------------------


async def test_a_caller_that_leaves_a_create_ends_nothing(house: HeldHouse) -> None:
    request = Pb.CreateSandboxRequest(
        sandbox_id="ordered",
        boot=Pb.BootSource(kernel_image=str(house.kernel), memory_mib=MEMORY_MIB),
    )
    async with house.held("boot") as hold:
        call = house.sandboxes.CreateSandbox(request)
        await hold.reached()
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call

    async def running() -> bool:
        return bool((await house.get("ordered")).state == RUNNING)

    await until(running)
    await everyone_answers(house)


async def test_a_caller_that_leaves_a_delete_ends_nothing(house: HeldHouse) -> None:
    await house.boot("leaving", MEMORY_MIB)
    async with house.held("remove") as hold:
        call = house.sandboxes.DeleteSandbox(Pb.DeleteSandboxRequest(sandbox_id="leaving"))
        await hold.reached()
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call
        # A second one joins the first.
        again = asyncio.ensure_future(house.delete("leaving"))
        third = asyncio.ensure_future(house.delete("leaving"))
        await house.get("leaving")
    await asyncio.gather(again, third)
    async with refused(house, "NOT_FOUND", "SANDBOX_NOT_FOUND"):
        await house.delete("leaving")


async def test_a_sandbox_that_is_deleted_while_it_is_made(house: HeldHouse) -> None:
    async with house.held("boot") as hold:
        making = asyncio.ensure_future(
            house.sandboxes.CreateSandbox(
                Pb.CreateSandboxRequest(
                    sandbox_id="brief",
                    boot=Pb.BootSource(kernel_image=str(house.kernel), memory_mib=MEMORY_MIB),
                )
            )
        )
        await hold.reached()
        deleting = asyncio.ensure_future(house.delete("brief"))

        async def being_deleted() -> bool:
            return bool((await house.get("brief")).state == sandbox_pb2.SANDBOX_STATE_DELETING)

        await until(being_deleted)
    await deleting
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await making
    told(caught.value, "FAILED_PRECONDITION", "SANDBOX_DELETED", "brief")
    assert house.vmm_pids() == []


async def test_a_server_killed_in_a_create_or_a_delete_leaves_nothing(house: HeldHouse) -> None:
    await house.boot("going", MEMORY_MIB)
    await house.boot("staying", MEMORY_MIB)
    pid = (await house.get("going")).pid
    boot = Pb.BootSource(kernel_image=str(house.kernel), memory_mib=MEMORY_MIB)
    async with house.held("boot") as booting, house.held("remove") as removing:
        calls: list[Any] = [
            asyncio.ensure_future(
                house.sandboxes.CreateSandbox(Pb.CreateSandboxRequest(sandbox_id="new", boot=boot))
            ),
            asyncio.ensure_future(house.delete("going")),
        ]
        await booting.reached()
        await removing.reached()
        assert house.process is not None
        house.process.kill()
        await asyncio.gather(*calls, return_exceptions=True)
        await house.kill()
    await house.start()
    left = await traces(house)
    assert list(left.sandboxes) == left.folders["sandboxes"] == ["staying"]
    assert pid not in left.vmms
    await everyone_answers(house)
    await house.boot("new", MEMORY_MIB)


# --- changes -----------------------------------------------------------------------------------


async def test_an_update_changes_what_its_mask_names_and_nothing_else(house: HeldHouse) -> None:
    made = await house.boot("named", MEMORY_MIB, labels={"a": "1"})
    request = Pb.UpdateSandboxRequest(
        sandbox_id=made.id,
        update_mask=FieldMask(paths=["labels"]),
        labels={"b": "2"},
        on_expiry=sandbox_pb2.EXPIRY_ACTION_PAUSE,
    )
    sandbox = (await house.sandboxes.UpdateSandbox(request)).sandbox
    assert dict(sandbox.labels) == {"b": "2"}
    assert sandbox.on_expiry == sandbox_pb2.EXPIRY_ACTION_DELETE
    for paths in ([], ["sandbox_id"], ["labels", "memory_mib"]):
        async with refused(
            house, "INVALID_ARGUMENT", "INVALID_FIELD", "labels, ttl, on_expiry"
        ) as refusal:
            await house.sandboxes.UpdateSandbox(
                Pb.UpdateSandboxRequest(sandbox_id=made.id, update_mask=FieldMask(paths=paths))
            )
        assert refusal.wrong_fields == ["update_mask"]


# --- folders -----------------------------------------------------------------------------------


async def test_what_has_no_business_in_the_data_folder_is_in_nobodys_way(
    house: HeldHouse,
) -> None:
    await house.boot("first", MEMORY_MIB)
    await house.boot("second", MEMORY_MIB)
    await house.delete("first")
    shutil.rmtree(house.data_dir / "spare", ignore_errors=True)  # what a tidy person would do
    elsewhere = house.root / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "precious").write_text("not ours")
    for name in ("sandboxes", "snapshots"):
        (house.data_dir / name / "stray-file").write_text("")
        (house.data_dir / name / "stray-folder").mkdir()
        (house.data_dir / name / "stray-link").symlink_to("/nowhere")
        (house.data_dir / name / "stray-way-out").symlink_to(elsewhere)
    await house.boot("first", MEMORY_MIB)
    await house.restart()
    await everyone_answers(house)
    left = await traces(house)
    assert left.folders == {"sandboxes": ["first", "second"], "snapshots": []}
    assert (elsewhere / "precious").read_text() == "not ours"


async def test_a_data_folder_whose_path_has_two_hundred_characters_simply_works(
    binary: Binary, witness_kernel: Path, tmp_path: Path
) -> None:
    house = House(tmp_path / "h", binary, witness_kernel)
    deep = tmp_path
    while len(str(deep)) < 200:
        deep = deep / ("d" * min(40, max(1, 200 - len(str(deep)) - 1)))
    house.data_dir = deep
    house.socket = deep / "s" / "forkpoint.sock"
    try:
        await house.start()
        source = await house.boot("src", MEMORY_MIB)
        generation = await source.dirty(REGION_MIB)
        await house.ready("src", snapshot_id="first")
        later = await source.dirty(REGION_MIB)
        await house.restart()
        assert (await house.ready("src", mode=DIFF, snapshot_id="second")).mode == DIFF
        for snapshot_id, expected in (("first", generation), ("second", later)):
            fork = await house.fork(snapshot_id, 3)
            assert fork.ready_count == 3
            for child in fork.children:
                guest = Guest(house, child.sandbox_id)
                assert await guest.verify(REGION_MIB) == (expected, expected, 0, 0)
        assert await source.verify(REGION_MIB) == (later, later, 0, 0)
        await nothing_half_made(house)
        assert await house.stop() == 0
    finally:
        await house.close()


# --- limits ------------------------------------------------------------------------------------


class LimitedHouse(House):
    """A house whose server may have only so many files open."""

    soft = hard = 0

    def command(self) -> list[str]:
        limits = f'ulimit -Sn {self.soft}; ulimit -Hn {self.hard}; exec "$@"'
        return ["sh", "-c", limits, "sh", *super().command()]


@pytest.mark.parametrize(("soft", "hard"), [(40, 400), (50, 50)])
async def test_a_limit_of_open_files(
    binary: Binary, witness_kernel: Path, tmp_path: Path, soft: int, hard: int
) -> None:
    house = LimitedHouse(tmp_path / "h", binary, witness_kernel)
    house.soft, house.hard = soft, hard
    try:
        await house.start()
        source = await house.boot("src", MEMORY_MIB)
        await source.dirty(REGION_MIB)
        await house.ready("src", snapshot_id="first")
        fork = await house.fork("first", 40)
        if hard > soft:
            assert fork.ready_count == 40, "it takes what it may have"
        else:
            assert 0 < fork.failed_count < 40
            for child in fork.children:
                if child.error.message:
                    problem_of(child.error, "WRITE_FAILED", "Too many open files", "LimitNOFILE")
        assert len(house.vmm_pids()) == 1 + fork.ready_count
        for child in fork.children:
            if child.state == fork_pb2.FORK_CHILD_STATE_READY:
                await house.delete(child.sandbox_id)
        child_of_next = await house.child((await house.ready("src")).snapshot_id)
        assert await child_of_next.verify(REGION_MIB) == await source.verify(REGION_MIB)
        await nothing_half_made(house)
    finally:
        await house.close()
