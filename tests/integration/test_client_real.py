"""The client, async and sync, and its command line against a real server with real sandboxes."""

import asyncio
import json
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

import forkpoint
from forkpoint import BranchMode, BranchStage, errors, sync
from forkpoint.demo.guest import Memory, Witness
from forkpointd.vmm import Binary
from tests.integration.serving import House

MEMORY_MIB = 128
REGION_MIB = 16


@pytest.fixture
async def house(binary: Binary, witness_kernel: Path, tmp_path: Path) -> AsyncIterator[House]:
    """A server that serves."""
    made = House(tmp_path, binary, witness_kernel)
    try:
        await made.start()
        yield made
    finally:
        await made.close()


@pytest.fixture
async def fp(house: House) -> AsyncIterator[forkpoint.Client]:
    async with forkpoint.connect(house.socket) as client:
        yield client


async def boot(fp: forkpoint.Client, house: House, name: str = "source") -> Witness:
    sandbox = await fp.sandboxes.create(name, kernel=house.kernel, memory_mib=MEMORY_MIB)
    guest = Witness(sandbox)
    await guest.ready()
    return guest


async def test_ten_copies_of_one_moment(house: House, fp: forkpoint.Client) -> None:
    source = await boot(fp, house)
    memory = await source.stamp(Memory.fresh(REGION_MIB), 0, REGION_MIB * 256)
    full = await source.sandbox.branch(mode="full")
    assert full.mode is BranchMode.FULL
    memory = await source.stamp(memory, 700, 30)
    branching = source.sandbox.branch(mode="diff", max_pause="60s")
    stages = [update.stage async for update in branching]
    assert stages[-1] is BranchStage.READY
    pause = branching.pause
    assert pause is not None
    assert pause.total >= pause.vmm_total > pause.snapshot
    assert 30 * 4096 <= pause.dirty_bytes < MEMORY_MIB * 2**20 / 2
    memory = await source.stamp(memory, 0, 256)
    async with source.sandbox.fork(10, mode="diff", ttl="10m") as children:
        met = []
        async for child in children:
            guest = Witness(child)
            assert await guest.ask(f"v{REGION_MIB}") == memory.verdict()
            assert child.source_sandbox_id == "source"
            met.append(child.id)
        assert len(met) == 10
        assert children.pause is not None
        assert children.failed == []
        snapshot = children.snapshot
        assert snapshot is not None
    left = [each.id async for each in fp.sandboxes.list()]
    assert left == ["source"]
    with pytest.raises(errors.SnapshotNotFound):
        await fp.snapshots.get(snapshot.id)
    assert (await source.sandbox.refresh()).state is forkpoint.SandboxState.RUNNING


async def test_a_server_that_is_killed_is_found_again_by_who_follows(
    house: House, fp: forkpoint.Client
) -> None:
    source = await boot(fp, house)
    memory = await source.stamp(Memory.fresh(REGION_MIB), 0, REGION_MIB * 256)
    branching = source.sandbox.branch()
    await branching.started()
    following = asyncio.create_task(branching.wait())
    await house.restart()
    try:
        snapshot = await following
    except errors.Aborted as error:
        assert error.reason == "SERVER_RESTARTED"
        snapshot = await source.sandbox.branch(mode="full")
    async with snapshot.fork(1) as children:
        async for child in children:
            assert await Witness(child).ask(f"v{REGION_MIB}") == memory.verdict()


async def test_a_console_is_shared(house: House, fp: forkpoint.Client) -> None:
    source = await boot(fp, house)
    async with source.sandbox.console.attach(from_offset=0) as console:
        assert await console.expect(b"READY\n") == b"READY\n"
        assert (await console.ask("t")).startswith(b"T 0 1")
        with pytest.raises(errors.ConsoleBusy):
            await source.sandbox.console.write("t\n")
        async with source.sandbox.console.attach(read_only=True) as reader:
            await console.write("d1\n")
            assert await reader.expect(b"\n") == b"D 1 1\n"


async def test_what_is_refused_is_told_apart(house: House, fp: forkpoint.Client) -> None:
    with pytest.raises(errors.SandboxNotFound):
        await fp.sandboxes.get("nobody")
    with pytest.raises(errors.InvalidArgument) as caught:
        await fp.sandboxes.create("No Id", kernel="/etc/passwd", memory_mib=1)
    assert {wrong.field for wrong in caught.value.fields} >= {"sandbox_id", "boot.memory_mib"}
    source = await boot(fp, house)
    with pytest.raises(errors.AlreadyExists):
        await fp.sandboxes.create("source", kernel=house.kernel, memory_mib=MEMORY_MIB)
    with pytest.raises(errors.PauseTooLong) as too_long:
        await source.sandbox.branch(mode="full", max_pause="1ms")
    assert too_long.value.predicted_pause is not None
    with pytest.raises(errors.BranchNotFound):
        await fp.branches.watch("nothing")


async def test_the_server_says_what_it_runs_on(
    house: House, fp: forkpoint.Client, binary: Binary
) -> None:
    info = await fp.server.info()
    assert info.version == info.client_version
    assert info.vmm is not None
    assert (info.vmm.kind.value, info.vmm.version) == (binary.kind.value, binary.version)
    assert {check.name for check in info.checks} >= {"kvm", "vmm", "staging"}


async def test_the_sync_client_does_the_same(house: House) -> None:
    def work() -> None:
        with sync.connect(house.socket) as fp:
            source = fp.sandboxes.create("source", kernel=house.kernel, memory_mib=MEMORY_MIB)
            source.console.expect(b"READY\n", timeout=60)
            assert source.console.ask("d4", timeout=60) == b"D 4 1\n"
            snapshot = source.branch()
            with source.fork(2) as children:
                for child in children:
                    assert child.console.ask("v4", timeout=60) == b"V 4 1 1 0 0\n"
                assert children.pause is not None
            with source.console.attach() as console:
                assert console.ask("t").startswith(b"T 1 ")
            assert [each.id for each in fp.sandboxes.list()] == ["source"]
            assert snapshot.id in [each.id for each in fp.snapshots.list(source="source")]

    await asyncio.to_thread(work)


def run(house: House, *arguments: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
    """The command line in a process of its own."""
    command = [sys.executable, "-c", "from forkpoint.cli import main; main()", *arguments]
    command += ["--address", str(house.socket)]
    return subprocess.run(command, input=stdin, capture_output=True, text=True, check=False)


async def test_the_command_line_from_create_to_rm(house: House) -> None:
    async def shell(*arguments: str, stdin: str = "") -> Any:
        done = await asyncio.to_thread(run, house, *arguments, "--json", stdin=stdin)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    kernel = str(house.kernel)
    memory = str(MEMORY_MIB)
    made = await shell("sandbox", "create", "agent-7", "--kernel", kernel, "--memory", memory)
    assert made["dirty_base"]["state"] == "VALID"
    told = await asyncio.to_thread(
        run, house, "sandbox", "console", "agent-7", "--until", "D .*\n", stdin="d4\n"
    )
    assert told.stdout.endswith("D 4 1\n"), told.stderr
    branch = await shell("branch", "start", "agent-7", "--snapshot", "snap")
    assert branch["stage"] == "READY"
    assert branch["pause"]["total_seconds"] > 0
    fork = await shell("fork", "agent-7", "-n", "3", "--id", "try")
    assert fork["children"] == ["try-0", "try-1", "try-2"]
    (root,) = await shell("tree")
    assert [each["id"] for each in root["children"]] == ["snap", fork["snapshot_id"]]
    assert len(root["children"][1]["children"]) == 3
    assert await shell("sandbox", "rm", "agent-7", *fork["children"])
    assert await shell("snapshot", "rm", "snap", fork["snapshot_id"])
    assert await shell("tree") == []
