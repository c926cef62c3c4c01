"""The window's bytes and what its answers mean, without a VMM."""

import asyncio
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator

import pytest

from forkpointd.vmm import MAX_WINDOW_BYTES, Window, WindowOutcome
from forkpointd.vmm.api import ApiConnection, ApiReply, ReplyParser
from forkpointd.vmm.window import run_in_thread
from tests.unit.test_vmm_api import NO_CONTENT, answer

DUMP_FAILED = (
    "Create snapshot error: Cannot write memory file: Cannot dump memory: Guest memory error: "
    "No space left on device (os error 28)"
)


@pytest.fixture
def ends() -> Iterator[tuple[ApiConnection, socket.socket]]:
    ours, theirs = socket.socketpair()
    with ApiConnection(ours) as connection, theirs:
        yield connection, theirs


def window_on(connection: ApiConnection, *, was_paused: bool = False, full: bool = False) -> Window:
    return Window(
        connection,
        "1.12.1",
        full=full,
        vmstate_name="t/k3.s",
        memory_name="t/k3.m",
        was_paused=was_paused,
    )


def run(
    ends: tuple[ApiConnection, socket.socket], data: bytes, *, was_paused: bool = False
) -> WindowOutcome:
    """The outcome of a window that is answered by `data` and then a hang-up."""
    connection, theirs = ends
    theirs.sendall(data)
    theirs.shutdown(socket.SHUT_WR)
    return window_on(connection, was_paused=was_paused).run()


def refused(words: str) -> bytes:
    return answer(400, {"fault_message": words})


def test_three_requests_in_one_write(ends: tuple[ApiConnection, socket.socket]) -> None:
    connection, theirs = ends
    window = window_on(connection)
    theirs.sendall(3 * NO_CONTENT)
    assert window.run().created
    assert theirs.recv(MAX_WINDOW_BYTES) == (
        b'PATCH /vm HTTP/1.1\r\nContent-Length: 18\r\n\r\n{"state":"Paused"}'
        b"PUT /snapshot/create HTTP/1.1\r\nContent-Length: 74\r\n\r\n"
        b'{"snapshot_type":"Diff","snapshot_path":"t/k3.s","mem_file_path":"t/k3.m"}'
        b'PATCH /vm HTTP/1.1\r\nContent-Length: 19\r\n\r\n{"state":"Resumed"}'
    )


def test_a_paused_source_is_neither_paused_nor_resumed(
    ends: tuple[ApiConnection, socket.socket],
) -> None:
    connection, theirs = ends
    window = window_on(connection, was_paused=True, full=True)
    theirs.sendall(NO_CONTENT)
    outcome = window.run()
    assert (outcome.created, outcome.pause_reply, outcome.resume_reply) == (True, None, None)
    sent = theirs.recv(MAX_WINDOW_BYTES)
    assert b"/vm " not in sent
    assert b'"Full"' in sent


@pytest.mark.parametrize(("more", "fits"), [(0, True), (1, False)])
def test_at_most_1000_bytes_whatever_the_names(
    ends: tuple[ApiConnection, socket.socket], more: int, fits: bool
) -> None:
    room = MAX_WINDOW_BYTES - len(window_on(ends[0]).request_bytes) + len("t/k3.m")
    room -= 1  # Content-Length has a digit more
    name = "m" * (room + more)

    def make() -> Window:
        return Window(
            ends[0],
            "1.12.1",
            full=False,
            vmstate_name="t/k3.s",
            memory_name=name,
            was_paused=False,
        )

    if fits:
        assert len(make().request_bytes) == MAX_WINDOW_BYTES
    else:
        with pytest.raises(ValueError, match="1001 bytes"):
            make()


def test_a_window_runs_once(ends: tuple[ApiConnection, socket.socket]) -> None:
    connection, theirs = ends
    theirs.sendall(3 * NO_CONTENT)
    window = window_on(connection)
    window.run()
    with pytest.raises(RuntimeError):
        window.run()
    window.close()


def test_looking_at_the_replies_is_no_part_of_the_window(
    ends: tuple[ApiConnection, socket.socket], monkeypatch: pytest.MonkeyPatch
) -> None:
    feed = ReplyParser.feed

    def slowly(parser: ReplyParser, data: bytes) -> list[ApiReply]:
        time.sleep(0.2)
        return feed(parser, data)

    monkeypatch.setattr(ReplyParser, "feed", slowly)
    connection, theirs = ends
    theirs.sendall(3 * NO_CONTENT)
    outcome = window_on(connection).run()
    assert outcome.created
    assert 0 < outcome.total_us < 200_000


def test_a_window_that_is_given_up_is_closed(ends: tuple[ApiConnection, socket.socket]) -> None:
    connection, theirs = ends
    window = window_on(connection)
    window.close()
    window.close()
    assert theirs.recv(1) == b"", "nothing was sent, and the connection is closed"


def test_what_was_refused_is_told_apart(ends: tuple[ApiConnection, socket.socket]) -> None:
    outcome = run(ends, NO_CONTENT + refused("no room") + NO_CONTENT)
    assert (outcome.created, outcome.fault, outcome.resume_failed) == (False, "no room", False)
    assert not outcome.memory_write_failed
    assert not outcome.process_gone


def test_a_resume_that_failed_is_told(ends: tuple[ApiConnection, socket.socket]) -> None:
    outcome = run(ends, NO_CONTENT + NO_CONTENT + refused("it can't"))
    assert (outcome.created, outcome.fault, outcome.resume_failed) == (True, "it can't", True)


def test_memory_that_could_not_be_written_is_recognised(
    ends: tuple[ApiConnection, socket.socket],
) -> None:
    outcome = run(ends, NO_CONTENT + refused(DUMP_FAILED) + NO_CONTENT)
    assert outcome.memory_write_failed


@pytest.mark.parametrize("answered", [0, 1, 2])
def test_an_end_in_the_middle_tells_what_was_done_before(
    ends: tuple[ApiConnection, socket.socket], answered: int
) -> None:
    outcome = run(ends, NO_CONTENT * answered)
    assert outcome.process_gone
    assert outcome.created == (answered == 2)
    assert outcome.resume_reply is None
    assert not outcome.resume_failed


def test_nonsense_counts_as_the_end(ends: tuple[ApiConnection, socket.socket]) -> None:
    outcome = run(ends, NO_CONTENT + b"nonsense\r\n\r\n")
    assert (outcome.process_gone, outcome.created) == (True, False)


def test_the_switch_interval_is_as_before_after_overlapping_windows() -> None:
    usual = sys.getswitchinterval()
    pairs = [socket.socketpair() for _ in range(3)]
    threads = [threading.Thread(target=window_on(ApiConnection(ours)).run) for ours, _ in pairs]
    for thread in threads:
        thread.start()
    for _, theirs in pairs:
        assert theirs.recv(MAX_WINDOW_BYTES)
    assert sys.getswitchinterval() < usual
    for thread, (_, theirs) in zip(threads, pairs, strict=True):
        theirs.sendall(3 * NO_CONTENT)
        thread.join()
        theirs.close()
    assert sys.getswitchinterval() == usual


async def test_whoever_stops_waiting_is_told_later(
    ends: tuple[ApiConnection, socket.socket],
) -> None:
    connection, theirs = ends
    told: asyncio.Queue[WindowOutcome] = asyncio.Queue()
    with pytest.raises(TimeoutError):
        await run_in_thread(window_on(connection), "window", 0.01, told.put_nowait)
    assert told.empty()
    theirs.sendall(3 * NO_CONTENT)
    async with asyncio.timeout(10):
        outcome = await told.get()
    assert outcome.created
    assert outcome.total_us >= 10_000


async def test_who_waits_is_told_once(ends: tuple[ApiConnection, socket.socket]) -> None:
    connection, theirs = ends
    late: list[WindowOutcome] = []
    theirs.sendall(3 * NO_CONTENT)
    assert (await run_in_thread(window_on(connection), "window", None, late.append)).created
    assert late == []


@pytest.mark.parametrize("deadline", [None, 0.0], ids=["cancelled", "timed-out"])
async def test_an_outcome_that_comes_in_the_moment_of_leaving_is_not_lost(
    ends: tuple[ApiConnection, socket.socket],
    monkeypatch: pytest.MonkeyPatch,
    deadline: float | None,
) -> None:
    """Between the result's arrival and the waiter's waking the waiter is cancelled."""
    connection, theirs = ends
    theirs.sendall(3 * NO_CONTENT)
    loop = asyncio.get_running_loop()
    late: list[WindowOutcome] = []

    class InTheSameMoment:
        """Runs the thread's work at once, and cancels right after its result is delivered."""

        def __init__(self, target: Callable[[], None], **_: object) -> None:
            self._work = target

        def start(self) -> None:
            self._work()
            if deadline is None:
                loop.call_soon(running.cancel)

    monkeypatch.setattr("forkpointd.vmm.window.threading.Thread", InTheSameMoment)
    running = asyncio.create_task(
        run_in_thread(window_on(connection), "window", deadline, late.append)
    )
    if deadline is None:
        with pytest.raises(asyncio.CancelledError):
            await running
        assert [outcome.created for outcome in late] == [True]
    else:
        assert (await running).created
        assert late == []
