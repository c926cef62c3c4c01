"""Consoles of live guests: read, followed, written, trimmed, ended."""

import asyncio
import fcntl
import os
import shutil
import signal
import threading
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest

from forkpointd.model import ForkpointError, Reason
from forkpointd.sandboxes import console
from forkpointd.sandboxes.console import Consoles
from forkpointd.vmm import CONSOLE_INPUT_NAME, CONSOLE_OUTPUT_NAME
from tests.integration.vmms import Bench, Guest, stand_still, wait_for


def future(*, done: bool) -> asyncio.Future[Any]:
    """The end of a sandbox that has ended, or never will."""
    made: asyncio.Future[None] = asyncio.get_running_loop().create_future()
    if done:
        made.set_result(None)
    return made


class House:
    """Stands for the server's sandboxes: folders and ends by id."""

    def __init__(self) -> None:
        self.guests: dict[str, Guest] = {}
        self.folders: dict[str, Path] = {}

    def folder_of(self, sandbox_id: str) -> Path:
        try:
            return self.folders[sandbox_id]
        except KeyError:
            raise ForkpointError(Reason.SANDBOX_NOT_FOUND, sandbox_id) from None

    def end_of(self, sandbox_id: str) -> asyncio.Future[Any]:
        guest = self.guests.get(sandbox_id)
        return future(done=True) if guest is None else guest.vmm.exited

    def add(self, guest: Guest) -> Guest:
        self.guests[guest.vmm.sandbox_id] = guest
        self.folders[guest.vmm.sandbox_id] = guest.folder
        return guest

    def add_file(self, sandbox_id: str, folder: Path, content: bytes) -> Path:
        """A console without a VMM."""
        folder.mkdir()
        self.folders[sandbox_id] = folder
        (folder / CONSOLE_OUTPUT_NAME).write_bytes(content)
        return folder / CONSOLE_OUTPUT_NAME


@pytest.fixture
def house() -> House:
    return House()


@pytest.fixture
async def consoles(house: House) -> AsyncIterator[Consoles]:
    made = Consoles(house.folder_of, house.end_of)
    yield made
    made.close()


class Collected:
    """A reader that follows a console in a task."""

    def __init__(self, consoles: Consoles, sandbox_id: str, from_offset: int = 0) -> None:
        self.chunks: list[tuple[int, bytes]] = []
        self.task = asyncio.create_task(self._collect(consoles, sandbox_id, from_offset))

    async def _collect(self, consoles: Consoles, sandbox_id: str, from_offset: int) -> None:
        async for offset, data in consoles.read(sandbox_id, from_offset, follow=True):
            self.chunks.append((offset, data))

    @property
    def text(self) -> bytes:
        return b"".join(data for _, data in self.chunks)

    async def until(self, wanted: bytes) -> None:
        await wait_for(lambda: wanted in self.text or self.task.done(), wanted.decode())
        assert wanted in self.text


async def all_of(consoles: Consoles, sandbox_id: str, offset: int = 0) -> list[tuple[int, bytes]]:
    return [chunk async for chunk in consoles.read(sandbox_id, offset, follow=False)]


async def test_what_the_guest_says_is_read_and_followed(
    bench: Bench, house: House, consoles: Consoles
) -> None:
    house.add(await bench.boot())
    first, end = await consoles.bounds("source")
    assert first == 0
    text = b"".join(data for _, data in await all_of(consoles, "source"))
    assert len(text) == end
    assert text.endswith(b"READY\n")

    follower, late_follower = Collected(consoles, "source"), Collected(consoles, "source", end)
    writer = await consoles.writer("source")
    await writer.write(b"d1\n")
    await follower.until(b"READY\nD 1 1\n")
    await late_follower.until(b"D 1 1\n")
    assert late_follower.text == b"D 1 1\n"
    assert late_follower.chunks[0][0] == end
    writer.close()


async def test_followers_end_when_the_process_does_with_all_it_said(
    bench: Bench, house: House, consoles: Consoles
) -> None:
    guest = house.add(await bench.boot())
    follower = Collected(consoles, "source")
    await follower.until(b"READY\n")
    os.kill(guest.pid, signal.SIGKILL)
    async with asyncio.timeout(5):
        await follower.task
    assert (await all_of(consoles, "source"))[0][1] == follower.text, "it can still be read"


async def test_followers_end_when_the_sandbox_is_deleted(
    bench: Bench, house: House, consoles: Consoles
) -> None:
    guest = house.add(await bench.boot())
    follower = Collected(consoles, "source")
    await follower.until(b"READY\n")
    await guest.vmm.kill()
    shutil.rmtree(guest.folder)
    del house.folders["source"], house.guests["source"]
    async with asyncio.timeout(5):
        await follower.task


async def test_a_follower_ends_with_the_sandbox_though_its_file_says_nothing(
    house: House, tmp_path: Path
) -> None:
    house.add_file("a", tmp_path / "a", b"last words")
    end = future(done=False)
    consoles = Consoles(house.folder_of, lambda _: end)
    follower = Collected(consoles, "a")
    await follower.until(b"last words")
    end.set_result(None)
    async with asyncio.timeout(5):  # without being told it looks again after half a minute
        await follower.task
    assert follower.text == b"last words"
    consoles.close()


async def test_a_follower_of_a_deleted_file_ends_though_its_id_is_in_use_again(
    house: House, tmp_path: Path
) -> None:
    output = house.add_file("a", tmp_path / "a", b"old")
    consoles = Consoles(house.folder_of, lambda _: future(done=False))
    follower = Collected(consoles, "a")
    await follower.until(b"old")
    output.unlink()
    async with asyncio.timeout(5):
        await follower.task
    consoles.close()


async def test_what_a_guest_writes_meanwhile_is_not_taken_for_trimmed(
    house: House, consoles: Consoles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = house.add_file("a", tmp_path / "a", b"")
    real = console._first_data

    def first_data(fd: int, offset: int) -> int | None:
        found = real(fd, offset)
        output.write_bytes(b"hello")
        return found

    monkeypatch.setattr(console, "_first_data", first_data)
    first, _ = await consoles.bounds("a")
    assert first == 0
    assert await consoles.bounds("a") == (0, 5)


async def test_an_unknown_sandbox_has_no_console(consoles: Consoles) -> None:
    for ask in (
        consoles.bounds("nobody"),
        consoles.writer("nobody"),
        all_of(consoles, "nobody"),
    ):
        with pytest.raises(ForkpointError) as caught:
            await ask
        assert caught.value.reason is Reason.SANDBOX_NOT_FOUND


async def test_one_writes_and_the_next_when_it_is_done(
    bench: Bench, house: House, consoles: Consoles
) -> None:
    house.add(await bench.boot())
    writer = await consoles.writer("source")
    with pytest.raises(ForkpointError) as caught:
        await consoles.writer("source")
    assert caught.value.reason is Reason.CONSOLE_BUSY
    writer.close()
    writer.close()
    with pytest.raises(RuntimeError):
        await writer.write(b"t\n")
    (await consoles.writer("source")).close()


async def test_a_console_whose_process_has_ended_takes_no_input(
    bench: Bench, house: House, consoles: Consoles
) -> None:
    guest = house.add(await bench.boot())
    writer = await consoles.writer("source")
    await guest.vmm.kill()
    with pytest.raises(ForkpointError) as caught:
        await writer.write(b"t\n")
    assert caught.value.reason is Reason.SANDBOX_NOT_RUNNING
    writer.close()
    with pytest.raises(ForkpointError) as caught:
        await consoles.writer("source")
    assert caught.value.reason is Reason.SANDBOX_NOT_RUNNING
    with pytest.raises(ForkpointError):  # and the failed try left it free
        await consoles.writer("source")


async def test_input_waits_for_a_stopped_guest_and_is_not_lost(
    bench: Bench, house: House, consoles: Consoles
) -> None:
    guest = house.add(await bench.boot())
    follower = Collected(consoles, "source")
    fifo = os.open(guest.folder / CONSOLE_INPUT_NAME, os.O_RDWR)
    fcntl.fcntl(fifo, fcntl.F_SETPIPE_SZ, 4096)  # what guests read slowly need not be more
    os.close(fifo)
    writer = await consoles.writer("source")
    await stand_still(guest.pid)
    try:
        taken = await writer.try_write(b"t\n" * 50_000, 0.1)
        assert taken == 4096
        assert await writer.try_write(b"t\n", 0.0) == 0
        rest = asyncio.create_task(writer.write(b"d1\n"))
        await asyncio.sleep(0)
        assert not rest.done()
    finally:
        os.kill(guest.pid, signal.SIGCONT)
    async with asyncio.timeout(60):
        await rest
    await follower.until(b"D 1 1\n")
    assert follower.text.count(b"T 0 ") == taken // 2
    writer.close()


async def test_a_writer_that_waits_can_be_cancelled_and_the_console_is_free(
    bench: Bench, house: House, consoles: Consoles
) -> None:
    guest = house.add(await bench.boot())
    writer = await consoles.writer("source")
    await stand_still(guest.pid)
    try:
        assert await writer.try_write(b"x" * 100_000, 0.0) == 65_536
        waiting = asyncio.create_task(writer.write(b"x"))
        await asyncio.sleep(0)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        writer.close()
        (await consoles.writer("source")).close()
    finally:
        os.kill(guest.pid, signal.SIGCONT)


async def test_a_process_that_ends_wakes_a_waiting_writer(
    bench: Bench, house: House, consoles: Consoles
) -> None:
    guest = house.add(await bench.boot())
    writer = await consoles.writer("source")
    await stand_still(guest.pid)
    waiting = asyncio.create_task(writer.write(b"x" * 100_000))
    await asyncio.sleep(0)
    os.kill(guest.pid, signal.SIGKILL)
    with pytest.raises(ForkpointError) as caught:
        async with asyncio.timeout(5):
            await waiting
    assert caught.value.reason is Reason.SANDBOX_NOT_RUNNING
    writer.close()


async def test_trimming_keeps_offsets_and_the_newest(
    house: House, consoles: Consoles, tmp_path: Path
) -> None:
    lines = b"".join(b"line %08d\n" % n for n in range(20_000))
    output = house.add_file("a", tmp_path / "a", lines)
    await consoles.trim(["a", "nobody"], 64 * 1024)
    first, end = await consoles.bounds("a")
    assert end == len(lines)
    assert 64 * 1024 <= end - first < 64 * 1024 + 4096
    assert output.stat().st_blocks * 512 <= 64 * 1024 + 4096
    chunks = await all_of(consoles, "a", first)
    assert b"".join(data for _, data in chunks) == lines[first:]
    assert all(len(data) <= 64 * 1024 for _, data in chunks)

    # Another server finds the same bounds, and a trim that has nothing to do changes nothing.
    again = Consoles(house.folder_of, house.end_of)
    assert await again.bounds("a") == (first, end)
    await again.trim(["a"], 64 * 1024)
    assert await again.bounds("a") == (first, end)
    again.close()


async def test_a_reader_of_what_was_trimmed_goes_on_behind_the_hole(
    house: House, consoles: Consoles, tmp_path: Path
) -> None:
    house.add_file("a", tmp_path / "a", b"x" * 300_000)
    reading = consoles.read("a", 0, follow=False)
    offset, data = await anext(reading)
    assert (offset, len(data)) == (0, 64 * 1024)
    await consoles.trim(["a"], 10_000)
    first, end = await consoles.bounds("a")
    rest = [chunk async for chunk in reading]
    assert rest[0][0] == first
    assert sum(len(data) for _, data in rest) == end - first
    assert all(b"\0" not in data for _, data in rest)


async def test_a_live_console_is_trimmed_under_guest_and_readers(
    bench: Bench, house: House, consoles: Consoles
) -> None:
    house.add(await bench.boot())
    follower = Collected(consoles, "source")
    writer = await consoles.writer("source")
    for n in range(1, 13):
        await writer.write(b"t\n" * 150 + b"d1\n")
        await follower.until(b"D 1 %d\n" % n)
        await consoles.trim(["source"], 4096)
    first, end = await consoles.bounds("source")
    assert 4096 <= end - first < 8192 < end
    assert len(follower.text) == end, "who reads as it comes misses nothing"
    assert b"\0" not in follower.text
    writer.close()


async def test_many_readers_of_many_consoles_need_one_inotify_instance(
    house: House, consoles: Consoles, tmp_path: Path
) -> None:
    outputs = [house.add_file(f"c{n}", tmp_path / f"c{n}", b"") for n in range(150)]
    live = Consoles(house.folder_of, lambda _: future(done=False))
    followers = [Collected(live, f"c{n}") for n in range(150) for _ in range(2)]
    for n, output in enumerate(outputs):
        with output.open("ab") as opened:
            opened.write(b"hello %d\n" % n)
    for n in range(150):
        for follower in followers[2 * n : 2 * n + 2]:
            await follower.until(b"hello %d\n" % n)
    for follower in followers:
        follower.task.cancel()
    await asyncio.gather(*(follower.task for follower in followers), return_exceptions=True)
    live.close()


async def test_no_file_is_touched_on_the_loops_thread(
    bench: Bench, house: House, consoles: Consoles, monkeypatch: pytest.MonkeyPatch
) -> None:
    guest = house.add(await bench.boot())
    loop_thread = threading.get_ident()
    touched: list[str] = []

    def noting(name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            if threading.get_ident() == loop_thread:
                touched.append(f"{name}{arguments}")
            return real(*arguments, **options)

        return call

    with monkeypatch.context() as patch:
        for name in ("open", "stat", "fstat", "lseek", "pread", "read", "readlink", "unlink"):
            patch.setattr(os, name, noting(name, getattr(os, name)))
        follower = Collected(consoles, "source")
        writer = await consoles.writer("source")
        await writer.write(b"d1\n")
        await consoles.bounds("source")
        await consoles.trim(["source"], 4096)
        await follower.until(b"D 1 1\n")
        writer.close()
        await guest.vmm.describe()
        outcome = await guest.window("a")
        await guest.vmm.window_latencies()
        await guest.vmm.kill()
        await follower.task
    assert outcome.created
    # What is read on the loop's thread is an announcement that is there already.
    assert [touch for touch in touched if not touch.startswith("read(")] == []
