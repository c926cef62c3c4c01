"""What a VMM does on a bad day: faults that the simulator plays, and limits of the real one."""

import asyncio
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from forkpointd.model import Boot, Drive, Machine
from forkpointd.vmm import (
    ApiConnection,
    Vmm,
    VmmFault,
    WindowOutcome,
    boot_requests,
    link_drives,
    load_requests,
    simulator_binary,
)
from tests.integration.vmms import Bench, Guest, data_pages, guest_pages, wait_for

CONNECTIONS = 10
"""That Firecracker's API server holds at once."""


@pytest.fixture
async def simulator(
    witness_kernel: Path, tmp_path: Path, executor: ThreadPoolExecutor
) -> AsyncIterator[Bench]:
    """Only the simulator plays faults."""
    made = Bench(simulator_binary(), witness_kernel, tmp_path, executor)
    yield made
    await made.close()


def play(guest: Guest, *rules: dict[str, Any]) -> None:
    """Has the simulator do something wrong from now on."""
    with ApiConnection.open(guest.folder, 10) as connection:
        connection.request("PUT", "/simulator/faults", {"rules": list(rules)}, timeout=10)


async def test_memory_that_was_written_but_not_synced_is_no_whole_dirty_log(
    simulator: Bench,
) -> None:
    source = await simulator.boot()
    assert (await source.window("base")).created
    await source.ask("d4")
    play(source, {"at": "create.sync", "do": "error", "errno": "EIO"})
    outcome = await source.window("a")
    assert not outcome.created
    assert "sync_all" in outcome.fault
    assert not outcome.memory_write_failed, "the next diff would lack pages"
    assert (await source.window("next")).created
    assert not guest_pages(4, 128) <= data_pages(source.folder / "next.memory"), "it does lack them"


async def test_a_vmm_that_dies_before_its_reply_has_not_created_for_all_we_know(
    simulator: Bench,
) -> None:
    source = await simulator.boot()
    play(source, {"at": "create.reply", "do": "exit", "code": 5})
    outcome = await source.window("a")
    assert (outcome.process_gone, outcome.created) == (True, False)
    async with asyncio.timeout(10):
        assert (await source.vmm.exited).exit_code == 5


async def test_a_resume_that_is_refused_is_told_and_can_be_asked_again(simulator: Bench) -> None:
    source = await simulator.boot()
    play(source, {"at": "resume", "do": "refuse", "message": "not now"})
    outcome = await source.window("a")
    assert (outcome.created, outcome.resume_failed, outcome.fault) == (True, True, "not now")
    assert (await source.vmm.describe()).state == "Paused"
    await source.vmm.resume()
    assert await source.generation() == 0


async def test_a_pause_that_is_refused_makes_no_snapshot(simulator: Bench) -> None:
    source = await simulator.boot()
    play(source, {"at": "pause", "do": "refuse", "message": "not now"})
    outcome = await source.window("a")
    assert (outcome.created, outcome.fault, outcome.resume_failed) == (False, "not now", False)
    assert outcome.create_reply is not None
    assert await source.generation() == 0


async def test_a_vmm_that_hangs_in_the_window_is_left_waiting_until_it_ends(
    simulator: Bench,
) -> None:
    source = await simulator.boot()
    play(source, {"at": "create", "do": "hang"})
    late: list[WindowOutcome] = []
    window = await source.vmm.prepare_window(
        full=False, vmstate_name="v", memory_name="m", was_paused=False
    )
    with pytest.raises(TimeoutError):
        await source.vmm.run_window(window, deadline_seconds=0.1, late=late.append)
    await source.vmm.kill()
    await wait_for(lambda: bool(late))
    assert late[0].process_gone


async def test_a_vmm_that_hangs_before_the_window_is_not_opened(simulator: Bench) -> None:
    source = await simulator.boot()
    play(source, {"at": "get", "do": "hang"})
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.2):
            await source.window("a")
    assert not (source.folder / "a.vmstate").exists()


async def test_more_connections_than_it_holds_are_refused_and_come_free_again(
    bench: Bench,
) -> None:
    source = await bench.boot()
    held = [ApiConnection.open(source.folder, 10) for _ in range(CONNECTIONS)]
    try:
        for connection in held:
            assert connection.request("GET", "/", timeout=10)["id"] == "source"
        with pytest.raises(VmmFault) as caught:
            await source.vmm.describe()
        assert caught.value.status == 503
    finally:
        for connection in held:
            connection.close()

    async def answers() -> bool:
        try:
            return (await source.vmm.describe()).state == "Running"
        except VmmFault:
            return False

    async with asyncio.timeout(10):
        while not await answers():
            pass


async def test_children_of_one_snapshot_find_each_its_own_drives(
    bench: Bench, tmp_path: Path
) -> None:
    image = tmp_path / "image"
    image.write_bytes(bytes(1 << 20))
    drives = (Drive("data", image),)
    boot = Boot(Machine(1, 128, drives), bench.kernel, boot_args="console=ttyS0")

    async def start(sandbox_id: str, requests: Any, linked: tuple[Drive, ...]) -> Guest:
        folder = bench.folder(sandbox_id)

        def prepare() -> None:
            folder.mkdir(mode=0o700)
            link_drives(folder, linked)

        vmm = await Vmm.start(
            bench.binary, folder, sandbox_id, requests, bench.executor, prepare=prepare
        )
        return bench.keep(Guest(vmm))

    source = await start("source", boot_requests(boot), drives)
    await source.ready()
    assert (await source.window("a")).created
    load = load_requests(source.folder / "a.vmstate", source.folder / "a.memory", resume=True)
    for n in range(3):
        child = await start(f"child-{n}", load, drives)
        assert await child.generation() == 0
    with pytest.raises(VmmFault, match="No such file"):
        await start("without", load, ())
