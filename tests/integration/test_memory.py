"""Memory on a real server: what is refused before it starts, who goes first where the kernel runs
out of it, and what a sandbox that went is shown with."""

from __future__ import annotations

import os
import signal
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path

import pytest
from google.rpc import error_details_pb2

from forkpoint.v1 import fork_pb2, sandbox_pb2, sandbox_service_pb2, server_service_pb2
from forkpointd.model import MIB
from forkpointd.vmm import Binary
from forkpointd.vmm.oom_kills import KernelLog
from tests.integration.limits import Limit
from tests.integration.refusals import (
    MEMORY_MIB,
    HeldHouse,
    refused,
    stopped,
    until,
)
from tests.integration.serving import Guest, House
from tests.integration.vmms import wait_for

Pb = sandbox_service_pb2

BIG_MIB = 2048
"""Memory of a source whose children are counted with what they touch."""
HEADROOM_MIB = 8


async def memory_of(house: House) -> server_service_pb2.MemoryUse:
    """The budget and what of it is used."""
    info = await house.server.GetServerInfo(server_service_pb2.GetServerInfoRequest())
    return info.memory


def score_of(pid: int) -> int:
    """Where a process stands in the order of the out-of-memory killer."""
    return int(Path(f"/proc/{pid}/oom_score_adj").read_text())


Start = Callable[..., AbstractAsyncContextManager[HeldHouse]]


@pytest.fixture
def serve(binary: Binary, tmp_path: Path, witness_kernel: Path) -> Start:
    """Starts a server with settings; it ends with the block."""

    @asynccontextmanager
    async def start(**settings: object) -> AsyncIterator[HeldHouse]:
        house = HeldHouse(tmp_path / "house", binary, witness_kernel, **settings)
        try:
            await house.start()
            yield house
        finally:
            await house.close()

    return start


async def snapshot_of(house: House, sandbox_id: str) -> str:
    """A snapshot, after whose making nothing is left in staging."""
    snapshot_id = (await house.ready(sandbox_id)).snapshot_id

    async def nothing_staged() -> bool:
        return (await memory_of(house)).staging_bytes == 0

    await until(nothing_staged)
    return snapshot_id


# --- the budget --------------------------------------------------------------------------------


TIGHT = {"memory_budget_bytes": 600 * MIB, "child_headroom_mib": HEADROOM_MIB}
"""A budget for a source and some twenty children."""


async def test_twenty_children_of_a_large_snapshot_fit_a_small_budget(serve: Start) -> None:
    async with serve(**TIGHT) as house:
        assert (await memory_of(house)).sandbox_bytes == 0
        source = await house.boot("source", BIG_MIB)
        await source.dirty(20)
        snapshot = await snapshot_of(house, "source")
        fork = await house.fork(snapshot, count=20)
        assert fork.ready_count == 20, fork
        for child in fork.children:
            assert (await Guest(house, child.sandbox_id).ask("t"))[0] == "T"

        async def counted() -> bool:
            return (await memory_of(house)).headroom_bytes == 21 * HEADROOM_MIB * MIB

        await until(counted)
        use = await memory_of(house)
        assert use.budget_bytes == 600 * MIB
        assert use.child_headroom_bytes == HEADROOM_MIB * MIB
        assert use.used_bytes == use.sandbox_bytes + use.headroom_bytes + use.staging_bytes
        assert 20 * MIB <= use.sandbox_bytes < use.budget_bytes < 21 * BIG_MIB * MIB


async def test_what_would_cross_the_budget_is_refused_and_says_what_to_do(
    serve: Start,
) -> None:
    async with serve(**TIGHT) as house:
        source = await house.boot("source", BIG_MIB)
        await source.dirty(1)
        snapshot = await snapshot_of(house, "source")
        words = ("no memory for 100 children", f"100 x {HEADROOM_MIB}.0 MiB", "ask for")
        async with refused(house, "RESOURCE_EXHAUSTED", "NO_MEMORY", *words) as refusal:
            await house.fork(snapshot, count=100)
        possible = int(refusal.metadata["possible_count"])
        assert 0 < possible < 100
        assert int(refusal.metadata["needed_bytes"]) == 100 * HEADROOM_MIB * MIB
        [violation] = refusal.detail(error_details_pb2.QuotaFailure).violations
        assert violation.subject == "memory"
        async with refused(house, "RESOURCE_EXHAUSTED", "NO_MEMORY", "no memory for 100 children"):
            await house.branch("source", fork=fork_pb2.ForkSpec(count=100))

        # Nothing was promised to those: what was possible still is.
        fork = await house.fork(snapshot, count=possible - 5)
        assert fork.ready_count == possible - 5

        async def no_room_for_ten() -> bool:
            use = await memory_of(house)
            return bool(use.budget_bytes - use.used_bytes < 10 * HEADROOM_MIB * MIB)

        await until(no_room_for_ten)
        async with refused(
            house, "RESOURCE_EXHAUSTED", "NO_MEMORY", "delete sandboxes that nobody needs"
        ) as refusal:
            await house.branch("source", fork=fork_pb2.ForkSpec(count=10))
        assert refusal.detail(error_details_pb2.RetryInfo).retry_delay.seconds > 0
        for child in fork.children:
            await house.delete(child.sandbox_id)

        async def room_for_ten() -> bool:
            return not await no_room_for_ten()

        await until(room_for_ten)
        branch = await house.ready("source", fork=fork_pb2.ForkSpec(count=10))
        assert branch.fork.ready_count == 10


async def test_a_sandbox_that_is_booted_or_made_from_a_snapshot_is_refused_as_well(
    serve: Start,
) -> None:
    async with serve(memory_budget_bytes=400 * MIB) as house:
        await house.boot("source", MEMORY_MIB)
        snapshot = await snapshot_of(house, "source")
        house.settings["memory_budget_bytes"] = MIB
        await house.restart()
        words = ("no memory for sandbox second", "let the server's memory_budget_bytes")
        async with refused(house, "RESOURCE_EXHAUSTED", "NO_MEMORY", *words):
            await house.boot("second", MEMORY_MIB)
        async with refused(house, "RESOURCE_EXHAUSTED", "NO_MEMORY", *words):
            await house.sandboxes.CreateSandbox(
                Pb.CreateSandboxRequest(sandbox_id="second", snapshot_id=snapshot)
            )
        # What is over its budget runs on, and is branched.
        use = await memory_of(house)
        assert use.used_bytes > use.budget_bytes == MIB
        await house.ready("source")


async def test_without_a_setting_the_budget_is_less_than_the_host_has(
    serve: Start,
) -> None:
    async with serve() as house:
        await house.boot("source", MEMORY_MIB)
        use = await memory_of(house)
        host_bytes = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        assert 0 < use.used_bytes < use.budget_bytes < host_bytes


# --- who goes first ----------------------------------------------------------------------------


async def test_children_go_before_sources_and_the_server_last(serve: Start) -> None:
    async with serve() as house:
        await house.boot("source", MEMORY_MIB)
        snapshot = await snapshot_of(house, "source")
        child = await house.child(snapshot)
        await house.sandboxes.CreateSandbox(
            Pb.CreateSandboxRequest(sandbox_id="made", snapshot_id=snapshot)
        )
        assert house.process is not None
        server = score_of(house.process.pid)
        source = score_of((await house.get("source")).pid)
        first = score_of((await house.get(child.id)).pid)
        assert server <= score_of(os.getpid())
        assert source == max(server, -500)
        assert server <= source < first == 1000
        assert score_of((await house.get("made")).pid) == first

        pid = (await house.get(child.id)).pid
        await house.ready(child.id)

        async def moved() -> bool:
            return score_of(pid) == source

        await until(moved)
        await house.restart()
        assert (await house.get(child.id)).pid == pid
        assert score_of(pid) == source, "an adopted sandbox stays where it is"
        assert score_of((await house.get("made")).pid) == first


# --- what went ---------------------------------------------------------------------------------


async def test_a_kill_by_hand_is_no_lack_of_memory(serve: Start) -> None:
    async with serve() as house:
        await house.boot("victim", MEMORY_MIB)
        os.kill((await house.get("victim")).pid, signal.SIGKILL)
        await stopped(house, "victim")
        end = (await house.get("victim")).exit
        assert end.signal == signal.SIGKILL
        assert end.cause == sandbox_pb2.SANDBOX_EXIT_CAUSE_UNSPECIFIED
        assert end.explanation == ""


def require_kernel_log() -> None:
    """Skips where the server can't be sure: then it says 'probably', by the count of a control
    group that this test's is not always below; the unit tests have that."""
    try:
        KernelLog().close()
    except OSError as error:
        pytest.skip(f"the kernel's log can't be read here: {error.strerror}")


@pytest.mark.parametrize("server", ["there", "away"])
async def test_a_sandbox_that_was_ended_for_memory_says_so(serve: Start, server: str) -> None:
    require_kernel_log()
    async with serve() as house:
        await house.boot("hungry", 512)
        pid = (await house.get("hungry")).pid
        limit = Limit(48 * MIB)
        try:
            limit.take(pid)
            if server == "away":
                await house.kill()
            # Not by the server: it may be away, and nobody is left to answer.
            with (house.data_dir / "sandboxes/hungry/console.in").open("wb") as console:
                console.write(b"d256\n")

            await wait_for(lambda: not Path(f"/proc/{pid}/cwd").exists())
            if server == "away":
                await house.start()
            await stopped(house, "hungry")
        finally:
            await limit.remove()

        async def explained() -> bool:
            return bool((await house.get("hungry")).exit.explanation)

        await until(explained)  # a moment after its end: the kernel kills first and then tells
        end = (await house.get("hungry")).exit
        assert end.cause == sandbox_pb2.SANDBOX_EXIT_CAUSE_OUT_OF_MEMORY, end
        assert f"Killed process {pid} " in end.explanation
        assert "raise that (MemoryMax" in end.explanation
        assert "start it again from one" in end.explanation
        # Whoever calls it hears the same.
        async with refused(
            house, "FAILED_PRECONDITION", "SANDBOX_NOT_RUNNING", "out-of-memory killer ended it"
        ):
            await house.branch("hungry")
