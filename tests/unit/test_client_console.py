"""Consoles as a client sees them, over a real channel to a fake server."""

import re
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

import forkpoint
from forkpoint import errors, sync
from tests.unit.client_fake import Fake, fresh_address


@pytest.fixture
def fake(tmp_path: Path) -> Iterator[Fake]:
    server = Fake(fresh_address(tmp_path))
    server.version = forkpoint.__version__
    server.start()
    server.add_sandbox("agent-7")
    yield server
    server.stop()


@pytest.fixture
async def guest(fake: Fake) -> AsyncIterator[forkpoint.Sandbox]:
    async with forkpoint.connect(fake.address) as fp:
        yield await fp.sandboxes.get("agent-7")


async def test_a_console_is_read_and_written(fake: Fake, guest: forkpoint.Sandbox) -> None:
    assert await guest.console.read() == b"READY\n"
    offset = await guest.console.write("t\n")
    assert offset == 6
    assert await guest.console.read(from_offset=offset) == b"you said t\n"
    assert await guest.console.read(tail_bytes=2) == b"t\n"


async def test_an_answer_is_what_comes_after_the_question(
    fake: Fake, guest: forkpoint.Sandbox
) -> None:
    assert await guest.console.ask("t") == b"you said t\n"
    assert await guest.console.ask(b"again\n", until=re.compile(rb"ag.in")) == b"you said again"


async def test_long_input_goes_in_pieces(fake: Fake, guest: forkpoint.Sandbox) -> None:
    await guest.console.write(b"x" * 80_000)
    assert [len(each.data) for each in fake.called("WriteConsole")] == [32768, 32768, 14464]


async def test_waiting_for_what_is_never_said_ends_with_what_was(
    guest: forkpoint.Sandbox,
) -> None:
    with pytest.raises(errors.DeadlineExceeded, match=r"did not say b'login:'.*READY"):
        await guest.console.expect(b"login:", timeout=0.2)


async def test_following_finds_its_place_after_a_broken_connection(
    fake: Fake, guest: forkpoint.Sandbox
) -> None:
    fake.cut_after = [1]
    seen = b""
    async for offset, data in guest.console.follow():
        assert offset == len(seen)
        seen += data
        if seen == b"READY\n":
            fake.say("agent-7", b"more\n")
        if seen.endswith(b"more\n"):
            break
    assert seen == b"READY\nmore\n"
    assert fake.called("ReadConsole")[-1].from_offset == 6


async def test_an_attached_console_goes_both_ways(fake: Fake, guest: forkpoint.Sandbox) -> None:
    async with guest.console.attach(tail_bytes=100) as console:
        assert await console.read() == b"READY\n"
        assert console.offset == 6
        assert await console.ask("t") == b"you said t\n"
        await console.write("a\nb\n")
        assert await console.expect(b"a\n") == b"you said a\n"
        assert await console.expect(re.compile(rb"said \w")) == b"you said b"
        assert await console.read() == b"\n"
        with pytest.raises(errors.DeadlineExceeded, match="said nothing"):
            await console.read(timeout=0.1)
        with pytest.raises(errors.DeadlineExceeded, match="did not say"):
            await console.expect(b"never", timeout=0.1)
        fake.say("agent-7", b"later\n")
        assert await console.expect(b"later\n") == b"later\n"
    fake.wait_for(lambda: not fake.writers)


async def test_what_was_not_said_in_time_is_not_lost(fake: Fake, guest: forkpoint.Sandbox) -> None:
    async with guest.console.attach(from_offset=0) as console:
        with pytest.raises(errors.DeadlineExceeded):
            await console.expect(b"READY\nset", timeout=0.1)
        assert console.offset == 0
        fake.say("agent-7", b"set\n")
        assert await console.expect(b"set\n") == b"READY\nset\n"


async def test_one_writes_and_many_read(fake: Fake, guest: forkpoint.Sandbox) -> None:
    async with guest.console.attach() as writer:
        with pytest.raises(errors.ConsoleBusy):
            async with guest.console.attach():
                pytest.fail("there is a writer")
        with pytest.raises(errors.ConsoleBusy):
            await guest.console.write("x")
        async with guest.console.attach(read_only=True) as reader:
            await writer.write("t\n")
            assert await reader.expect(b"\n") == b"you said t\n"


async def test_the_end_of_input_leaves_the_output(fake: Fake, guest: forkpoint.Sandbox) -> None:
    async with guest.console.attach() as console:
        await console.write("t\n")
        await console.end_input()
        assert await console.expect(b"t\n") == b"you said t\n"
        with pytest.raises(ValueError, match="ended the input"):
            await console.write("u\n")


async def test_the_end_of_the_sandbox_ends_the_console(
    fake: Fake, guest: forkpoint.Sandbox
) -> None:
    async with guest.console.attach(from_offset=0) as console:
        assert await console.read() == b"READY\n"
        await guest.delete()
        assert [data async for data in console] == []
    with pytest.raises(errors.SandboxNotFound):
        async with guest.console.attach():
            pytest.fail("it is gone")


async def test_a_lost_connection_ends_an_attachment(fake: Fake, guest: forkpoint.Sandbox) -> None:
    async with guest.console.attach(from_offset=0) as console:
        await console.read()
        fake.stop()
        with pytest.raises(errors.ConnectionLost):
            await console.read()


def test_the_sync_console_does_the_same(fake: Fake) -> None:
    with sync.connect(fake.address) as fp:
        guest = fp.sandboxes.get("agent-7")
        assert guest.console.ask("t") == b"you said t\n"
        with guest.console.attach() as console:
            assert console.ask("u") == b"you said u\n"
            with pytest.raises(errors.DeadlineExceeded):
                console.expect(b"never", timeout=0.1)
            fake.say("agent-7", b"one\ntwo\n")
            assert console.expect(b"one\n") == b"one\n"
            assert console.expect(b"two\n") == b"two\n"
        fake.wait_for(lambda: not fake.writers)
        with pytest.raises(errors.DeadlineExceeded, match="did not say"):
            guest.console.expect(b"login:", timeout=0.2)
