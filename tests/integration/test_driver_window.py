"""The pause window on a live guest: what it leaves, whoever dies in it."""

import asyncio
import ctypes
import mmap
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from forkpointd.vmm import MAX_WINDOW_BYTES, VmmGone, WindowOutcome
from forkpointd.vmm.window import SWITCH_SECONDS
from forkpointd.witness import Stamp, page_offset_in_memory_file
from tests.integration.vmms import Bench, data_pages, guest_pages, stand_still, wait_for

MEMORY_MIB = 128


def stamps(memory: Path, pages: int) -> set[tuple[int, bool]]:
    """What stands in the guest's first pages: (generation, whether the index is right)."""
    with memory.open("rb") as opened, mmap.mmap(opened.fileno(), 0, prot=mmap.PROT_READ) as mapped:
        size = len(mapped)
        found = set()
        for index in range(pages):
            offset = page_offset_in_memory_file(index, size)
            stamp = Stamp.of(mapped[offset : offset + 16])
            found.add((stamp.generation, stamp.index == index))
    return found


async def test_a_window_leaves_a_snapshot_and_a_running_source(bench: Bench) -> None:
    source = await bench.boot()
    await source.ask("d10")
    outcome = await source.window("first")
    assert outcome.created
    assert (outcome.fault, outcome.resume_failed, outcome.process_gone) == ("", False, False)
    assert outcome.total_us > 0
    assert (await source.vmm.describe()).state == "Running"
    assert await source.generation() == 1

    # The first Diff of a booted guest is complete over zeros.
    child = await bench.load(
        "child", source.folder / "first.vmstate", source.folder / "first.memory"
    )
    assert await child.ask("v10") == ["V", "10", "1", "1", "0", "0"]
    # And a child's own dirty log is on: its Diff has what it wrote, not everything.
    await child.ask("p100,3")
    assert (await child.window("own")).created
    own = data_pages(child.folder / "own.memory")
    assert {page + 100 for page in (16384, 16385, 16386)} <= own
    assert len(own) < 200


async def test_a_diff_has_what_was_written_since_the_last_window(bench: Bench) -> None:
    source = await bench.boot()
    await source.ask("d10")
    assert (await source.window("base")).created
    await source.ask("p500,7")
    assert (await source.window("diff")).created
    pages = data_pages(source.folder / "diff.memory")
    assert {16384 + 500 + n for n in range(7)} <= pages
    assert not pages & guest_pages(1, MEMORY_MIB), "pages that were not written since"


async def test_a_full_has_everything(bench: Bench) -> None:
    source = await bench.boot()
    await source.ask("d10")
    assert (await source.window("base")).created
    assert (await source.window("full", full=True)).created
    child = await bench.load("child", source.folder / "full.vmstate", source.folder / "full.memory")
    assert await child.ask("v10") == ["V", "10", "1", "1", "0", "0"]


async def test_the_latencies_are_those_of_this_window(bench: Bench) -> None:
    source = await bench.boot()
    seen = set()
    for n in range(3):
        await source.ask("d5")
        full = n == 1
        outcome = await source.window(f"w{n}", full=full)
        latencies = await source.vmm.window_latencies()
        parts = (latencies.pause_us, latencies.snapshot_us, latencies.resume_us)
        assert all(part > 0 for part in parts)
        assert sum(parts) <= outcome.total_us
        seen.add(parts)
    assert len(seen) == 3


async def test_the_metrics_file_does_not_grow(bench: Bench) -> None:
    source = await bench.boot()
    metrics = source.folder / "metrics"
    for n in range(40):
        await source.window("w" if n == 0 else f"w{n}")
        await source.vmm.window_latencies()
        (source.folder / ("w.memory" if n == 0 else f"w{n}.memory")).unlink()
    stat = metrics.stat()
    assert stat.st_blocks * 512 <= 2 * 64 * 1024 + 4096


async def test_a_window_of_a_paused_source_leaves_it_paused(bench: Bench) -> None:
    source = await bench.boot()
    await source.ask("d2")
    await source.vmm.pause()
    outcome = await source.window("a", was_paused=True)
    assert outcome.created
    assert (outcome.pause_reply, outcome.resume_reply) == (None, None)
    assert (await source.vmm.describe()).state == "Paused"
    await source.vmm.resume()
    assert await source.generation() == 1
    child = await bench.load("child", source.folder / "a.vmstate", source.folder / "a.memory")
    assert await child.ask("v2") == ["V", "2", "1", "1", "0", "0"]


async def test_a_create_that_is_refused_leaves_the_source_running(bench: Bench) -> None:
    source = await bench.boot()
    outcome = await source.window("a", memory_name="no-such-folder/m")
    assert not outcome.created
    assert "memory backing file" in outcome.fault
    assert not outcome.memory_write_failed
    assert (outcome.resume_failed, outcome.process_gone) == (False, False)
    assert (await source.vmm.describe()).state == "Running"
    assert await source.generation() == 0


async def test_a_window_longer_than_a_read_of_firecracker_is_refused_before(bench: Bench) -> None:
    source = await bench.boot()
    with pytest.raises(ValueError, match=str(MAX_WINDOW_BYTES)):
        await source.window("x" * 800)
    assert await source.generation() == 0


async def test_the_process_ends_in_the_window(bench: Bench) -> None:
    source = await bench.boot()
    window = await source.vmm.prepare_window(
        full=False, vmstate_name="v", memory_name="m", was_paused=False
    )
    await stand_still(source.pid)
    running = asyncio.create_task(source.vmm.run_window(window))
    os.kill(source.pid, signal.SIGKILL)
    async with asyncio.timeout(10):
        outcome = await running
    assert outcome.process_gone
    assert not outcome.created


async def test_a_window_of_a_process_that_has_ended_is_not_prepared(bench: Bench) -> None:
    source = await bench.boot()
    await source.vmm.kill()
    with pytest.raises(VmmGone):
        await source.window("a")


async def test_a_stopped_vmm_answers_late_and_is_waited_for(bench: Bench) -> None:
    source = await bench.boot()
    await source.ask("d3")
    late: list[WindowOutcome] = []
    window = await source.vmm.prepare_window(
        full=False, vmstate_name="v", memory_name="m", was_paused=False
    )
    await stand_still(source.pid)
    try:
        with pytest.raises(TimeoutError):
            await source.vmm.run_window(window, deadline_seconds=0.2, late=late.append)
        assert late == []
    finally:
        os.kill(source.pid, signal.SIGCONT)
    await wait_for(lambda: bool(late))
    assert late[0].created
    assert late[0].total_us > 200_000
    assert (await source.vmm.describe()).state == "Running"
    assert await source.generation() == 1
    child = await bench.load("child", source.folder / "v", source.folder / "m")
    assert await child.ask("v3") == ["V", "3", "1", "1", "0", "0"]


async def test_a_caller_that_is_cancelled_ends_no_window(bench: Bench) -> None:
    source = await bench.boot()
    late: list[WindowOutcome] = []
    window = await source.vmm.prepare_window(
        full=False, vmstate_name="v", memory_name="m", was_paused=False
    )
    await stand_still(source.pid)
    running = asyncio.create_task(source.vmm.run_window(window, late=late.append))
    await asyncio.sleep(0)
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    os.kill(source.pid, signal.SIGCONT)
    await wait_for(lambda: bool(late))
    assert late[0].created
    assert await source.generation() == 0


SEND_AND_DIE = """
import os, signal, sys
from pathlib import Path
from forkpointd.vmm.api import ApiConnection
from forkpointd.vmm.window import Window

connection = ApiConnection.open(Path(sys.argv[1]), 10)
connection.request("GET", "/", timeout=10)
window = Window(connection, "1.12.1", full=False, vmstate_name=sys.argv[2] + "v",
                memory_name=sys.argv[2] + "m", was_paused=False)
assert int(sys.argv[3]) <= len(window.request_bytes) <= 1000
connection.send(window.request_bytes)
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize("longest", [False, True], ids=["short", "nearly-the-most-bytes"])
async def test_a_client_killed_right_after_sending_never_leaves_the_source_paused(
    bench: Bench, longest: bool
) -> None:
    """Firecracker reads all of the window or, where it saw the hang-up first, nothing of it."""
    source = await bench.boot()
    (source.folder / ("s" * 200)).symlink_to(".")
    prefix = f"{'s' * 200}/{'n' * 120}" if longest else ""
    done = 0
    for n in range(1, 16):
        await source.ask("d20")
        killed = await asyncio.create_subprocess_exec(
            *(sys.executable, "-c", SEND_AND_DIE, str(source.folder), f"{prefix}{n}"),
            "850" if longest else "200",
        )
        assert await killed.wait() == -signal.SIGKILL
        assert (await source.vmm.describe()).state == "Running"
        assert await source.generation() == n
        memory = source.folder / f"{prefix}{n}m"
        if memory.exists():
            done += 1
            assert guest_pages(20, MEMORY_MIB) <= data_pages(memory), "it is complete"
            memory.unlink()
    assert done, "not once the window was read before its client was gone: this proves nothing"


async def test_the_servers_clock_is_right_while_another_thread_computes(bench: Bench) -> None:
    source = await bench.boot()
    busy = threading.Event()

    def compute() -> None:
        while not busy.is_set():
            sum(range(1000))

    usual = sys.getswitchinterval()
    computing = threading.Thread(target=compute)
    computing.start()
    try:
        seen = []
        for n in range(5):
            outcome = await source.window(f"w{n}")
            latencies = await source.vmm.window_latencies()
            seen.append(
                outcome.total_us - latencies.pause_us - latencies.snapshot_us - latencies.resume_us
            )
    finally:
        busy.set()
        computing.join()
    assert sys.getswitchinterval() == usual
    assert usual > SWITCH_SECONDS
    assert all(difference >= 0 for difference in seen)


# --- a full staging folder ----------------------------------------------------------------------


@pytest.fixture
def small_tmpfs(tmp_path: Path) -> object:
    """A mount of 8 MiB, for root."""
    if os.geteuid() != 0:
        pytest.skip("a full file system is made by mounting one, which only root may")
    folder = tmp_path / "small"
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "forkpoint-test", folder], check=True)
    try:
        yield folder
    finally:
        libc = ctypes.CDLL(None, use_errno=True)
        assert libc.umount2(os.fsencode(folder), 2) == 0, "MNT_DETACH"


@pytest.mark.parametrize("full", [False, True], ids=["diff", "full"])
async def test_after_memory_that_could_not_be_written_the_next_diff_has_every_page(
    bench: Bench, small_tmpfs: Path, full: bool
) -> None:
    """The one exception of step 6, page by page, for each version."""
    source = await bench.boot()
    (source.folder / "t").symlink_to(small_tmpfs)
    await source.ask("d30")
    assert (await source.window("base")).created
    await source.ask("d30")
    await source.ask("p9000,100")

    failed = await source.window("vm", memory_name="t/m", full=full)
    assert not failed.created
    assert failed.memory_write_failed, f"not recognised: {failed.fault}"
    assert await source.generation() == 3, "the source runs"
    written = data_pages(small_tmpfs / "m")
    assert written, "the failure came in the middle"

    assert (await source.window("next")).created
    pages = data_pages(source.folder / "next.memory")
    missing = (guest_pages(30, MEMORY_MIB) | {16384 + 9000 + n for n in range(100)}) - pages
    assert not missing, f"{len(missing)} pages are lost"
    assert stamps(source.folder / "next.memory", 30 * 256) == {(2, True)}


async def test_other_failures_of_a_create_are_not_taken_for_a_whole_dirty_log(
    bench: Bench, small_tmpfs: Path
) -> None:
    source = await bench.boot()
    (source.folder / "t").symlink_to(small_tmpfs)
    room = os.statvfs(small_tmpfs)
    (small_tmpfs / "fill").write_bytes(bytes(room.f_bavail * room.f_bsize))
    outcome = await source.window("t/x", memory_name="memory")  # no room for vmstate
    assert not outcome.created
    assert "serialize the microVM state" in outcome.fault
    assert not outcome.memory_write_failed
    assert await source.generation() == 0
