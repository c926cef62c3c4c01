"""A VMM as an object with verbs: started, asked, paused, adopted, ended."""

import asyncio
import os
import signal
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

from forkpointd.model import VmmKind
from forkpointd.vmm import (
    ApiRequest,
    Vmm,
    VmmFault,
    VmmGone,
    end_orphans,
    find_orphans,
    load_requests,
)
from forkpointd.vmm.api import GoneAfter
from tests.integration.vmms import Bench, is_gone, stand_still, wait_for


async def test_a_booted_guest_runs_pauses_and_runs_on(bench: Bench) -> None:
    source = await bench.boot()
    info = await source.vmm.describe()
    assert (info.vmm_id, info.state) == ("source", "Running")
    assert info.version == bench.binary.version
    assert await source.ask("d4") == ["D", "4", "1"]

    await source.vmm.pause()
    await source.vmm.pause()
    assert (await source.vmm.describe()).state == "Paused"
    await source.vmm.resume()
    await source.vmm.resume()
    assert (await source.vmm.describe()).state == "Running"
    assert await source.generation() == 1


async def test_kill_ends_it_at_once_and_its_end_is_told(bench: Bench) -> None:
    source = await bench.boot()
    await source.vmm.kill()
    exit_ = source.vmm.exited.result()
    assert (exit_.exit_code, exit_.signal) == (-1, signal.SIGKILL)
    assert is_gone(source.pid), "it is still a zombie"
    await source.vmm.kill()
    with pytest.raises(VmmGone):
        await source.vmm.pause()


async def test_an_end_that_nobody_asked_for_is_noticed_with_last_words(bench: Bench) -> None:
    source = await bench.boot()
    (source.folder / "vmm.err").write_text("thread 'main' panicked\n")
    os.kill(source.pid, signal.SIGTERM)
    async with asyncio.timeout(10):
        exit_ = await source.vmm.exited
    assert exit_.signal == signal.SIGTERM or exit_.exit_code > 0
    assert "thread 'main' panicked" in exit_.last_words


async def test_a_paused_vmm_starts_no_second_time_in_its_folder(bench: Bench) -> None:
    source = await bench.boot()
    with pytest.raises(FileExistsError):
        await Vmm.start(bench.binary, source.folder, "source", (), bench.executor)
    assert await source.generation() == 0


async def test_a_refused_request_ends_the_process_and_says_why(bench: Bench) -> None:
    folder = bench.folder("refused")
    refused = (ApiRequest("PUT", "/boot-source", {"kernel_image_path": "/nowhere"}),)
    with pytest.raises(VmmFault, match="kernel file cannot be opened") as caught:
        await Vmm.start(
            bench.binary, folder, "refused", refused, bench.executor, prepare=folder.mkdir
        )
    assert caught.value.status == 400
    assert find_orphans(bench.root, ()) == []


async def test_a_load_that_fails_ends_the_process_and_says_why(bench: Bench) -> None:
    folder = bench.folder("refused")
    requests = load_requests(bench.root / "no.vmstate", bench.root / "no.memory", resume=True)
    with pytest.raises(VmmFault, match="snapshot"):
        await Vmm.start(
            bench.binary, folder, "refused", requests, bench.executor, prepare=folder.mkdir
        )
    assert find_orphans(bench.root, ()) == []


async def test_a_binary_that_ends_at_once_is_told_with_its_last_words(bench: Bench) -> None:
    script = bench.root / "not-a-vmm"
    script.write_text("#!/bin/sh\necho 'no such machine' >&2\nexit 3\n")
    script.chmod(0o755)
    folder = bench.folder("dead")
    binary = replace(bench.binary, kind=VmmKind.FIRECRACKER, argv=(str(script),))
    with pytest.raises(VmmGone, match="no such machine"):
        await Vmm.start(binary, folder, "dead", (), bench.executor, prepare=folder.mkdir)


async def test_a_start_that_is_cancelled_leaves_no_process(bench: Bench) -> None:
    script = bench.root / "never-listens"
    script.write_text("#!/bin/sh\nexec sleep 1000\n")
    script.chmod(0o755)
    folder = bench.folder("slow")
    binary = replace(bench.binary, kind=VmmKind.FIRECRACKER, argv=(str(script),))
    ended = asyncio.create_task(
        Vmm.start(binary, folder, "slow", (), bench.executor, prepare=folder.mkdir)
    )
    await wait_for((folder / "metrics").exists)  # the last file before the spawn
    ended.cancel()
    with pytest.raises(asyncio.CancelledError):
        async with asyncio.timeout(10):
            await ended
    running = [
        pid
        for pid in os.listdir("/proc")
        if pid.isdecimal() and _cwd(int(pid)) == str(folder.resolve())
    ]
    assert running == []


def _cwd(pid: int) -> str:
    try:
        return os.readlink(f"/proc/{pid}/cwd")
    except OSError:
        return ""


async def test_a_data_folder_of_200_characters_simply_works(bench: Bench, tmp_path: Path) -> None:
    deep = tmp_path / ("deep-" * 50)[:200] / ("deeper-" * 30)[:200]
    deep.mkdir(parents=True)
    bench.root = deep
    source = await bench.boot()
    assert await source.ask("d1") == ["D", "1", "1"]
    outcome = await source.window("a")
    assert outcome.created
    child = await bench.load("child", source.folder / "a.vmstate", source.folder / "a.memory")
    assert await child.generation() == 1
    adopted = await Vmm.adopt(child.vmm.record, child.folder, "child", bench.executor)
    assert adopted is not None
    adopted.close()


async def test_an_adopted_vmm_is_driven_and_its_end_noticed(bench: Bench) -> None:
    source = await bench.boot()
    record = source.vmm.record
    source.vmm.close()  # as if another server had started it
    adopted = await Vmm.adopt(record, source.folder, "source", bench.executor)
    assert adopted is not None
    source.vmm = adopted
    bench.keep(source)
    assert (await source.window("a")).created
    assert await source.generation() == 0
    os.kill(record.pid, signal.SIGKILL)
    async with asyncio.timeout(10):
        await adopted.exited


async def test_a_process_is_adopted_only_when_everything_fits(bench: Bench, tmp_path: Path) -> None:
    source = await bench.boot()
    record, folder = source.vmm.record, source.folder
    other = tmp_path / "other"
    other.mkdir()
    (other / "api.sock").symlink_to(folder / "api.sock")
    wrong = {
        "boot": (replace(record, boot_id="another"), folder, "source"),
        "pid": (replace(record, pid=os.getpid()), folder, "source"),
        "no such pid": (replace(record, pid=2**22 - 1), folder, "source"),
        "start": (replace(record, start_ticks=record.start_ticks - 1), folder, "source"),
        "device": (
            replace(record, executable_device=record.executable_device + 1),
            folder,
            "source",
        ),
        "inode": (
            replace(record, executable_inode=record.executable_inode + 1),
            folder,
            "source",
        ),
        "folder": (record, other, "source"),
        "folder gone": (record, tmp_path / "gone", "source"),
        "id": (record, folder, "another"),
    }
    for what, (described, where, sandbox_id) in wrong.items():
        adopted = await Vmm.adopt(described, where, sandbox_id, bench.executor)
        assert adopted is None, f"adopted in spite of another {what}"
    adopted = await Vmm.adopt(record, folder, "source", bench.executor)
    assert adopted is not None
    adopted.close()


async def test_a_replaced_binary_does_not_hinder_adoption(bench: Bench, tmp_path: Path) -> None:
    if bench.binary.kind is VmmKind.SIMULATOR:
        pytest.skip("the simulator's executable is the interpreter, which is not copied")
    copy = tmp_path / "vmm"
    copy.write_bytes(bench.binary.path.read_bytes())
    copy.chmod(0o755)
    bench.binary = replace(bench.binary, argv=(str(copy),))
    source = await bench.boot()
    newer = tmp_path / "newer"
    newer.write_bytes(b"a newer version")
    newer.rename(copy)
    assert os.readlink(f"/proc/{source.pid}/exe").endswith(" (deleted)")
    adopted = await Vmm.adopt(source.vmm.record, source.folder, "source", bench.executor)
    assert adopted is not None
    adopted.close()


async def test_orphans_are_found_and_ended_and_others_left_alone(
    bench: Bench, executor: ThreadPoolExecutor
) -> None:
    known = await bench.boot("known")
    orphan = await bench.boot("orphan")
    bystander = await asyncio.create_subprocess_exec("sleep", "1000", cwd=orphan.folder)
    try:
        found = find_orphans(bench.root, {known.pid})
        assert [(o.pid, o.folder) for o in found] == [(orphan.pid, orphan.folder)]
        orphan.vmm.close()
        ended = await asyncio.to_thread(end_orphans, bench.root, {known.pid})
        assert [o.pid for o in ended] == [orphan.pid]
        assert is_gone(orphan.pid)
        assert bystander.returncode is None
        assert await known.generation() == 0
    finally:
        bystander.kill()
        await bystander.wait()


async def test_a_stopped_vmm_keeps_no_caller_and_no_thread(bench: Bench) -> None:
    source = await bench.boot()
    await stand_still(source.pid)
    try:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.2):
                await source.vmm.pause()
    finally:
        os.kill(source.pid, signal.SIGCONT)
    # What it had not read when its client left is never executed.
    assert (await source.vmm.describe()).state == "Running"
    assert await source.generation() == 0


async def test_a_stopped_vmm_is_adopted_all_the_same(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("forkpointd.vmm.identity.ANSWER_SECONDS", 0.2)
    source = await bench.boot()
    await stand_still(source.pid)
    try:
        adopted = await Vmm.adopt(source.vmm.record, source.folder, "source", bench.executor)
        assert adopted is not None
        adopted.close()
    finally:
        os.kill(source.pid, signal.SIGCONT)
    assert await source.generation() == 0


async def test_a_window_whose_preparation_is_left_holds_no_connection(bench: Bench) -> None:
    source = await bench.boot()
    before = len(os.listdir("/proc/self/fd"))
    for turns in range(40):
        preparing = asyncio.create_task(source.window(f"w{turns}"))
        for _ in range(turns):
            await asyncio.sleep(0)
        preparing.cancel()
        await asyncio.gather(preparing, return_exceptions=True)
    await wait_for(lambda: len(os.listdir("/proc/self/fd")) <= before)
    await wait_for(lambda: threading.active_count() < 20)
    state = ""
    # Firecracker takes ten connections, and lets go of those that were left in its own time.
    async with asyncio.timeout(10):
        while not state:
            try:
                state = (await source.vmm.describe()).state
            except GoneAfter:
                await asyncio.sleep(0.01)
    assert state == "Running"


async def test_starts_and_ends_leave_no_descriptor(bench: Bench) -> None:
    source = await bench.boot("warm-up")
    await source.vmm.kill()
    before = sorted(os.listdir("/proc/self/fd"))
    for n in range(5):
        guest = await bench.boot(f"g{n}")
        await guest.window("a")
        await guest.vmm.window_latencies()
        await guest.vmm.kill()
        with pytest.raises(FileExistsError):
            await Vmm.start(bench.binary, guest.folder, f"g{n}", (), bench.executor)
    assert sorted(os.listdir("/proc/self/fd")) == before
