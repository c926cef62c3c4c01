"""The API's HTTP: order, limits, and what becomes of requests whose client is gone."""

import contextlib
import os
from pathlib import Path

import pytest

from tests.integration.vmm_contract.conftest import Vmms
from tests.integration.vmm_contract.vm import Vm, encode, wait_for

PAUSE = encode("PATCH", "/vm", {"state": "Paused"})
RESUME = encode("PATCH", "/vm", {"state": "Resumed"})


def create(name: str, padding: int = 0) -> bytes:
    """A Diff; `padding` makes the request longer, by a path that means the same."""
    path = "./" * (padding // 2) + "/" * (padding % 2) + f"{name}.vmstate"
    body = {"snapshot_type": "Diff", "snapshot_path": path, "mem_file_path": f"{name}.memory"}
    return encode("PUT", "/snapshot/create", body)


def test_pipelined_requests_are_answered_in_order(vmms: Vmms) -> None:
    vm = vmms.booted()
    info = encode("GET", "/")
    vm.connection.send(PAUSE + info + create("a") + RESUME + info)
    replies = [vm.connection.reply() for _ in range(5)]
    assert [r.status for r in replies] == [204, 200, 204, 204, 200]
    assert [r.json["state"] for r in replies if r.body] == ["Paused", "Running"]


def test_an_error_in_the_middle_does_not_stop_those_behind_it(vmms: Vmms) -> None:
    vm = vmms.booted()
    vm.connection.send(PAUSE + create("nowhere/a") + RESUME)
    assert [vm.connection.reply().status for _ in range(3)] == [204, 400, 204]
    assert vm.state == "Running"


def test_a_request_may_come_byte_by_byte(vmms: Vmms) -> None:
    vm = vmms.new()
    for byte in encode("PUT", "/machine-config", {"vcpu_count": 1, "mem_size_mib": 64}):
        vm.connection.send(bytes([byte]))
    assert vm.connection.reply().status == 204
    assert vm.get("/machine-config")["mem_size_mib"] == 64


def sent_while_stopped(vm: Vm, requests: bytes) -> None:
    """Sends, while the VMM stands still, on a connection that is closed before it goes on."""
    connection = vm.connect()
    vm.stop()
    connection.send(requests)
    connection.close()
    vm.go_on()


def test_nothing_is_run_for_a_client_that_hung_up_before_it_was_read(vmms: Vmms) -> None:
    vm = vmms.booted()
    sent_while_stopped(vm, PAUSE + create("a") + RESUME)
    for _ in range(3):
        assert vm.state == "Running"
    assert not (vm.folder / "a.vmstate").exists()


class Gate:
    """A FIFO in vmstate's place, full already: a create stands still in it until it is opened."""

    def __init__(self, vm: Vm, name: str) -> None:
        self._vm = vm
        self._path = vm.folder / f"{name}.vmstate"
        os.mkfifo(self._path)
        self._fd = os.open(self._path, os.O_RDWR | os.O_NONBLOCK)
        with contextlib.suppress(BlockingIOError):
            while os.write(self._fd, bytes(4096)):
                pass

    def entered(self) -> bool:
        """Whether a create is in it."""
        folder = Path(f"/proc/{self._vm.process.pid}/fd")
        for fd in list(folder.iterdir()):
            with contextlib.suppress(FileNotFoundError):
                if fd.readlink() == self._path:
                    return True
        return False

    def open(self) -> None:
        """Lets the create go on and waits until it has left. It fails then: a FIFO has no sync."""
        while self.entered():
            with contextlib.suppress(BlockingIOError):
                os.read(self._fd, 65536)
        os.close(self._fd)


def window_of_a_dead_client(vm: Vm, length: int) -> None:
    """Sends a window of so many bytes, and hangs up in the middle of its create."""
    short = PAUSE + create("a", padding=600) + RESUME
    window = PAUSE + create("a", padding=600 + length - len(short)) + RESUME
    assert len(window) == length
    gate = Gate(vm, "a")
    connection = vm.connect()
    connection.send(window)
    wait_for(gate.entered, "the create has begun")
    connection.close()
    gate.open()


@pytest.mark.parametrize("length", [1000, 1024])
def test_a_window_of_up_to_1024_bytes_is_run_whole_though_its_client_is_gone(
    vmms: Vmms, length: int
) -> None:
    """Once its first bytes are read."""
    vm = vmms.booted()
    window_of_a_dead_client(vm, length)
    wait_for(lambda: vm.state == "Running", "it runs again")


@pytest.mark.parametrize("length", [1025, 1080])
def test_a_longer_window_leaves_it_paused_when_its_client_is_gone(vmms: Vmms, length: int) -> None:
    """Why the server's windows are at most 1,000 bytes: the resume is never read whole.

    (Longer still, and the create is not in the first read either.)
    """
    vm = vmms.booted()
    window_of_a_dead_client(vm, length)
    assert vm.state == "Paused"
    vm.resume()
    assert vm.state == "Running"


BAD = [
    (b"garbage\r\n\r\n", "Invalid request."),
    (b"GET /\r\n\r\n", "Invalid request."),
    (b"GET / HTTP/2.0\r\n\r\n", "Invalid HTTP Version: Unsupported HTTP version."),
    (b"HEAD / HTTP/1.1\r\n\r\n", "Invalid HTTP Method: Unsupported HTTP method."),
    (
        b"GET / HTTP/1.1\r\nbad header\r\n\r\n",
        "Invalid header. Reason: Header is incorrectly formatted. Key: bad header",
    ),
    (
        b"PUT /vm HTTP/1.1\r\nContent-Length: abc\r\n\r\n",
        "Invalid header. Reason: Invalid value. Key:Content-Length; Value: abc",
    ),
    (
        b"PUT /vm HTTP/1.1\r\nContent-Length: 51201\r\n\r\n",
        "Request payload with size 51201 is larger than the limit of 51200 allowed by server.",
    ),
]


@pytest.mark.parametrize(("sent", "told"), BAD)
def test_what_is_no_request(vmms: Vmms, sent: bytes, told: str) -> None:
    vm = vmms.new()
    connection = vm.connect()
    connection.send(sent)
    reply = connection.reply()
    assert reply.status == 400
    text = f'{{ "error": "{told}\nAll previous unanswered requests will be dropped." }}'
    assert reply.body.decode() == text
    assert vm.state == "Not started", "other connections are not touched"


def test_requests_read_together_with_a_broken_one_are_dropped(vmms: Vmms) -> None:
    vm = vmms.new()
    machine = encode("PUT", "/machine-config", {"vcpu_count": 1, "mem_size_mib": 64})
    vm.connection.send(machine + b"garbage\r\n\r\n")
    assert vm.connection.reply().status == 400
    assert vm.get("/machine-config")["mem_size_mib"] == 128


def test_without_content_length_there_is_no_body(vmms: Vmms) -> None:
    vm = vmms.new()
    vm.connection.send(b"PUT /machine-config HTTP/1.1\r\n\r\n")
    assert vm.connection.reply().fault == "Empty PUT request."


def test_a_body_of_51200_bytes_is_read(vmms: Vmms) -> None:
    vm = vmms.new()
    body = '{"vcpu_count": 1, "mem_size_mib": 64}'.ljust(51_200)
    assert vm.api("PUT", "/machine-config", body).status == 204
    assert vm.get("/machine-config")["mem_size_mib"] == 64


def test_expect_continue_is_answered(vmms: Vmms) -> None:
    vm = vmms.new()
    body = b'{"vcpu_count": 1, "mem_size_mib": 64}'
    head = f"PUT /machine-config HTTP/1.1\r\nContent-Length: {len(body)}\r\n"
    vm.connection.send(f"{head}Expect: 100-continue\r\n\r\n".encode())
    assert vm.connection.reply().status == 100
    vm.connection.send(body)
    assert vm.connection.reply().status == 204


def test_answers_are_json_and_keep_the_connection(vmms: Vmms) -> None:
    vm = vmms.new()
    reply = vm.api("GET", "/")
    assert reply.headers["content-type"] == "application/json"
    assert reply.headers["connection"] == "keep-alive"
    assert "content-length" not in vm.api("PUT", "/logger", {}).headers, "204 has none"


def test_ten_connections_are_served_and_the_eleventh_is_turned_away(vmms: Vmms) -> None:
    vm = vmms.new()
    others = [vm.connect() for _ in range(9)]
    for connection in others:
        connection.send(encode("GET", "/"))
        assert connection.reply().status == 200
    eleventh = vm.connect()
    reply = eleventh.reply()
    assert (reply.status, reply.headers["connection"]) == (503, "close")
    assert reply.body == b'{ "error": "Too many open connections" }'
    others[0].close()

    def served() -> bool:
        again = vm.connect()
        try:
            again.send(encode("GET", "/"))
            return again.reply().status == 200
        except (EOFError, OSError):
            return False
        finally:
            again.close()

    wait_for(served, "there is room again")
