"""HTTP as Firecracker speaks it: strict, in order, ended by its process or a time limit."""

import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from forkpointd.vmm import ApiConnection, ApiRequest, VmmFault, VmmGone
from forkpointd.vmm.api import FolderSocket, GoneAfter, ReplyParser

NO_CONTENT = b"HTTP/1.1 204 \r\nServer: Firecracker API\r\nConnection: keep-alive\r\n\r\n"
"""As Firecracker v1.12.1 sends it."""


def answer(status: int, value: object) -> bytes:
    body = json.dumps(value).encode()
    return (
        b"HTTP/1.1 %d \r\nServer: Firecracker API\r\nConnection: keep-alive\r\n"
        b"Content-Type: application/json\r\nContent-Length: %d\r\n\r\n%b"
        % (status, len(body), body)
    )


REFUSED = answer(400, {"fault_message": "no such thing"})


@contextmanager
def listening(folder: Path, serve: Callable[[socket.socket], None]) -> Iterator[None]:
    """Somebody at the folder's socket who serves one connection."""
    with socket.socket(socket.AF_UNIX) as listener, FolderSocket(folder) as there:
        listener.bind(there._address)
        listener.listen(1)
        listener.settimeout(10)

        def accept() -> None:
            with suppress(OSError):
                connected, _ = listener.accept()
                with connected:
                    serve(connected)

        thread = threading.Thread(target=accept)
        thread.start()
        try:
            yield
        finally:
            listener.shutdown(socket.SHUT_RDWR)
            thread.join()


def replies_with(*data: bytes) -> Callable[[socket.socket], None]:
    """Answers each read by the next piece, and then hangs up."""

    def serve(connected: socket.socket) -> None:
        for piece in data:
            connected.recv(65536)
            connected.sendall(piece)

    return serve


# --- the parser ---


def test_what_firecracker_sends_is_understood() -> None:
    described = answer(200, {"id": "a", "state": "Running"})
    replies = ReplyParser().feed(NO_CONTENT + REFUSED + described)
    assert [reply.status for reply in replies] == [204, 400, 200]
    assert [reply.fault_message for reply in replies] == ["", "no such thing", ""]
    assert replies[0].value() is None
    assert replies[2].value() == {"id": "a", "state": "Running"}
    with pytest.raises(VmmFault) as caught:
        replies[1].value()
    assert (caught.value.status, caught.value.fault_message) == (400, "no such thing")


@given(st.lists(st.integers(1, 200), max_size=20))
def test_replies_may_come_in_any_pieces(cuts: list[int]) -> None:
    data, parser, seen = NO_CONTENT + REFUSED + NO_CONTENT, ReplyParser(), []
    start = 0
    for cut in cuts:
        seen += parser.feed(data[start : start + cut])
        start += cut
    seen += parser.feed(data[start:])
    assert [reply.status for reply in seen] == [204, 400, 204]
    assert parser.pending_bytes == 0


@pytest.mark.parametrize(
    "data",
    [
        b"SSH-2.0-OpenSSH_9.2\r\n\r\n",
        b"HTTP/2 204\r\n\r\n",
        b"HTTP/1.1 20\r\n\r\n",
        b"HTTP/1.1 abc \r\n\r\n",
        b"HTTP/1.1 200 \r\nContent-Length: many\r\n\r\n",
        b"HTTP/1.1 200 \r\nContent-Length: -1\r\n\r\n",
        b"HTTP/1.1 200 \r\nContent-Length: 99999999999\r\n\r\n",
        b"HTTP/1.1 200 \r\nTransfer-Encoding: chunked\r\n\r\n",
        b"HTTP/1.1 200 \r\nno colon\r\n\r\n",
        b"HTTP/1.1 200 \xff\r\n\r\n",
        b"x" * 10_000,
    ],
)
def test_what_is_not_http_is_an_error_and_never_guessed_at(data: bytes) -> None:
    with pytest.raises(VmmFault) as caught:
        ReplyParser().feed(data)
    assert caught.value.status == 0


def test_a_refusal_in_other_words_is_shown_as_it_is() -> None:
    (reply,) = ReplyParser().feed(b"HTTP/1.1 503 \r\nContent-Length: 9\r\n\r\nToo many.")
    assert reply.fault_message == "Too many."
    (silent,) = ReplyParser().feed(b"HTTP/1.1 500 \r\n\r\n")
    assert silent.fault_message == "status 500 without a word"


def test_a_success_that_is_not_json_is_an_error() -> None:
    (reply,) = ReplyParser().feed(b"HTTP/1.1 200 \r\nContent-Length: 3\r\n\r\n<p>")
    with pytest.raises(VmmFault, match="not JSON"):
        reply.value()


# --- requests ---


def test_a_request_has_no_header_that_can_be_left_out() -> None:
    assert ApiRequest("GET", "/").encode() == b"GET / HTTP/1.1\r\n\r\n"
    assert ApiRequest("PUT", "/x", {"a": "ü"}).encode() == (
        b'PUT /x HTTP/1.1\r\nContent-Length: 10\r\n\r\n{"a":"\xc3\xbc"}'
    )


# --- the connection ---


def test_a_request_is_answered(tmp_path: Path) -> None:
    with (
        listening(tmp_path, replies_with(answer(200, {"id": "a"}), REFUSED)),
        ApiConnection.open(tmp_path, 10) as connection,
    ):
        assert connection.request("GET", "/", timeout=10) == {"id": "a"}
        with pytest.raises(VmmFault, match="no such thing"):
            connection.request("PATCH", "/vm", {"state": "Paused"}, timeout=10)


def test_a_folder_may_be_deeper_than_a_sockets_name_is_long(tmp_path: Path) -> None:
    deep = tmp_path / ("a" * 200) / ("b" * 200)
    deep.mkdir(parents=True)
    with (
        listening(deep, replies_with(NO_CONTENT)),
        ApiConnection.open(deep, 10) as connection,
    ):
        assert connection.request("PUT", "/x", {}, timeout=10) is None


def test_all_answers_of_a_pipeline_are_returned_refusals_too(tmp_path: Path) -> None:
    with (
        listening(tmp_path, replies_with(NO_CONTENT + REFUSED + NO_CONTENT)),
        ApiConnection.open(tmp_path, 10) as connection,
    ):
        replies = connection.pipeline(b"three requests", 3, timeout=10)
    assert [reply.status for reply in replies] == [204, 400, 204]


def test_the_end_tells_which_answers_came_before_it(tmp_path: Path) -> None:
    with (
        listening(tmp_path, replies_with(NO_CONTENT + REFUSED[:-5])),
        ApiConnection.open(tmp_path, 10) as connection,
    ):
        with pytest.raises(GoneAfter) as caught:
            connection.pipeline(b"three requests", 3, timeout=10)
        assert [reply.status for reply in caught.value.replies] == [204]


def test_what_was_said_before_a_hang_up_is_heard() -> None:
    ours, theirs = socket.socketpair()
    theirs.sendall(answer(503, {"fault_message": "Too many open connections"}))
    theirs.close()
    with ApiConnection(ours) as connection, pytest.raises(VmmFault, match="Too many"):
        connection.request("GET", "/", timeout=10)
    ours, theirs = socket.socketpair()
    theirs.close()
    with ApiConnection(ours) as connection, pytest.raises(VmmGone):
        connection.request("GET", "/", timeout=10)


def test_nobody_there_is_gone(tmp_path: Path) -> None:
    with pytest.raises(VmmGone):
        ApiConnection.open(tmp_path, 10)
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(tmp_path / "api.sock"))
    with pytest.raises(VmmGone):
        ApiConnection.open(tmp_path, 10)


def test_no_answer_ends_by_the_time_limit(tmp_path: Path) -> None:
    done = threading.Event()

    def serve(_: socket.socket) -> None:
        done.wait(10)

    with listening(tmp_path, serve):
        try:
            with ApiConnection.open(tmp_path, 10) as connection, pytest.raises(TimeoutError):
                connection.request("GET", "/", timeout=0.05)
        finally:
            done.set()


def test_answers_in_drops_do_not_stretch_the_time_limit(tmp_path: Path) -> None:
    def drip(connected: socket.socket) -> None:
        with suppress(OSError):
            for byte in REFUSED * 100:
                connected.sendall(bytes([byte]))
                time.sleep(0.001)

    with (
        listening(tmp_path, drip),
        ApiConnection.open(tmp_path, 10) as connection,
        pytest.raises(TimeoutError),
    ):
        connection.pipeline(b"x", 100, timeout=0.1)


def test_a_full_queue_of_connections_ends_by_the_time_limit(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "api.sock"))
        listener.listen(0)
        with ApiConnection.open(tmp_path, 10), pytest.raises(TimeoutError):
            ApiConnection.open(tmp_path, 0.05)


def test_an_aborted_wait_ends_at_once(tmp_path: Path) -> None:
    done = threading.Event()
    asked = threading.Event()

    def serve(connected: socket.socket) -> None:
        connected.recv(65536)
        asked.set()
        done.wait(10)

    with (
        listening(tmp_path, serve),
        ThreadPoolExecutor(1) as threads,
        ApiConnection.open(tmp_path, 10) as connection,
    ):
        waiting = threads.submit(connection.request, "GET", "/")
        assert asked.wait(10)
        connection.abort()
        with pytest.raises(VmmGone):
            waiting.result(10)
        done.set()
    connection.abort()  # of a closed one: nothing happens
