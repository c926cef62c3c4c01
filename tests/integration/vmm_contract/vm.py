"""One VMM process driven by plain sockets and pipes: what the contract suite speaks through.

None of the server's own driver is in between: here a request is bytes, and an answer is a status
and a text.
"""

import contextlib
import json
import os
import select
import signal
import socket
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from forkpointd.vmm import Binary

DEADLINE_S = 60.0
JSON = dict[str, Any]


class Reply(NamedTuple):
    """An answer: status, headers in lower case, body."""

    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def fault(self) -> str:
        """The fault_message of a 400."""
        assert self.status == 400, self
        return str(self.json["fault_message"])


def wait_for(holds: Callable[[], bool], what: str) -> None:
    """Waits for a state that nothing announces."""
    deadline = time.monotonic() + DEADLINE_S
    while not holds():
        assert time.monotonic() < deadline, f"it never came to be: {what}"
        time.sleep(0.002)


def encode(method: str, path: str, body: Any = None, headers: str = "") -> bytes:
    """A request as bytes; a body that is bytes or text goes as it is."""
    head = f"{method} {path} HTTP/1.1\r\n{headers}"
    if body is None:
        return f"{head}\r\n".encode()
    text = body if isinstance(body, (bytes, str)) else json.dumps(body)
    content = text.encode() if isinstance(text, str) else text
    return f"{head}Content-Length: {len(content)}\r\n\r\n".encode() + content


class Connection:
    """One connection to the API."""

    def __init__(self, folder: Path) -> None:
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.settimeout(DEADLINE_S)
        self._buffer = b""
        fd = os.open(folder, os.O_PATH | os.O_DIRECTORY)
        try:
            wait_for(lambda: self._connected(f"/proc/self/fd/{fd}/api.sock"), "the API socket")
        finally:
            os.close(fd)

    def _connected(self, path: str) -> bool:
        with contextlib.suppress(FileNotFoundError, ConnectionRefusedError):
            self.socket.connect(path)
            return True
        return False

    def send(self, data: bytes) -> None:
        self.socket.sendall(data)

    def reply(self) -> Reply:
        """The next answer. Raises EOFError where the connection ends instead."""
        head = self._until(b"\r\n\r\n").decode()
        status_line, *lines = head.split("\r\n")
        headers = {}
        for line in lines:
            name, _, value = line.partition(":")
            headers[name.lower()] = value.strip()
        body = self._take(int(headers.get("content-length", "0")))
        return Reply(int(status_line.split()[1]), headers, body)

    def _until(self, end: bytes) -> bytes:
        while end not in self._buffer:
            self._fill()
        found, _, self._buffer = self._buffer.partition(end)
        return found

    def _take(self, count: int) -> bytes:
        while len(self._buffer) < count:
            self._fill()
        found, self._buffer = self._buffer[:count], self._buffer[count:]
        return found

    def _fill(self) -> None:
        try:
            data = self.socket.recv(65536)
        except ConnectionResetError as error:
            raise EOFError(self._buffer) from error
        if not data:
            raise EOFError(self._buffer)
        self._buffer += data

    def close(self) -> None:
        self.socket.close()


class Vm:
    """A VMM in a folder of its own, with its console on pipes."""

    def __init__(self, binary: Binary, folder: Path, vm_id: str, *options: str) -> None:
        self.folder = folder
        self.binary = binary
        folder.mkdir(parents=True)
        (folder / "log").touch()
        with (folder / "errors").open("wb") as errors:
            self.process = subprocess.Popen(
                [
                    *binary.argv,
                    *("--api-sock", "api.sock", "--id", vm_id),
                    *("--log-path", "log", "--level", "Error"),
                    *options,
                ],
                cwd=folder,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                bufsize=0,
            )
        self._unread = b""
        self._connections: list[Connection] = []
        self.connection = self.connect()

    # --- API ---------------------------------------------------------------------------------

    def connect(self) -> Connection:
        """A further connection, closed with the machine."""
        made = Connection(self.folder)
        self._connections.append(made)
        return made

    def api(self, method: str, path: str, body: Any = None) -> Reply:
        self.connection.send(encode(method, path, body))
        return self.connection.reply()

    def get(self, path: str) -> Any:
        reply = self.api("GET", path)
        assert reply.status == 200, reply
        return reply.json

    def do(self, method: str, path: str, body: Any) -> None:
        """A request that has to succeed."""
        reply = self.api(method, path, body)
        assert reply.status == 204, (method, path, body, reply)

    # --- the machine's life --------------------------------------------------------------------

    def boot(self, kernel: Path, memory_mib: int = 128, *, tracked: bool = True) -> None:
        """Boots the witness guest and waits until it is ready."""
        self.do("PUT", "/boot-source", {"kernel_image_path": str(kernel), "boot_args": "quiet"})
        machine = {"vcpu_count": 1, "mem_size_mib": memory_mib, "track_dirty_pages": tracked}
        self.do("PUT", "/machine-config", machine)
        self.do("PUT", "/actions", {"action_type": "InstanceStart"})
        assert self.line() == "READY"

    @property
    def state(self) -> str:
        return str(self.get("/")["state"])

    def pause(self) -> None:
        self.do("PATCH", "/vm", {"state": "Paused"})

    def resume(self) -> None:
        self.do("PATCH", "/vm", {"state": "Resumed"})

    def create(self, kind: str, name: str, memory: str | None = None) -> Reply:
        """Asks for a snapshot in `name`.vmstate and `name`.memory (or another memory file)."""
        body = {"snapshot_type": kind, "snapshot_path": f"{name}.vmstate"}
        return self.api("PUT", "/snapshot/create", {**body, "mem_file_path": memory or mem(name)})

    def snapshot(self, kind: str, name: str) -> Path:
        """Pause, snapshot, resume; returns the memory file."""
        self.pause()
        reply = self.create(kind, name)
        assert reply.status == 204, reply
        self.resume()
        return self.folder / mem(name)

    def load(self, source: Path, name: str, **changes: Any) -> Reply:
        """Loads `name` from the folder `source`, tracked and resumed unless changed."""
        return self.api("PUT", "/snapshot/load", load_body(source, name, **changes))

    # --- console -------------------------------------------------------------------------------

    def type(self, text: str) -> None:
        assert self.process.stdin is not None
        os.write(self.process.stdin.fileno(), text.encode())

    def silent(self, seconds: float = 0.0) -> bool:
        """Whether nothing is said within this time."""
        assert self.process.stdout is not None
        return not (self._unread or select.select([self.process.stdout], [], [], seconds)[0])

    def line(self) -> str:
        """The next line of the console."""
        assert self.process.stdout is not None
        while b"\n" not in self._unread:
            ready, _, _ = select.select([self.process.stdout], [], [], DEADLINE_S)
            assert ready, f"no line on the console, only {self._unread!r}"
            read = os.read(self.process.stdout.fileno(), 65536)
            assert read, f"the VMM ended: {self.said()}"
            self._unread += read
        line, _, self._unread = self._unread.partition(b"\n")
        return line.decode("ascii").strip()

    def ask(self, command: str) -> str:
        self.type(command + "\n")
        return self.line()

    def ask_numbers(self, command: str) -> list[int]:
        """The numbers of a command's answer."""
        return [int(word) for word in self.ask(command).split()[1:]]

    # --- process ---------------------------------------------------------------------------------

    def said(self) -> str:
        """What it left on stderr and in its log."""
        return (self.folder / "errors").read_text() + (self.folder / "log").read_text()

    def exit_code(self) -> int:
        """Waits for its end."""
        return self.process.wait(DEADLINE_S)

    def cpu_ticks(self) -> int:
        """User and system time in clock ticks (proc(5), fields 14 and 15)."""
        stat = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        return int(stat[11]) + int(stat[12])

    def stop(self) -> None:
        """SIGSTOP, and waits until it stands still."""
        self.process.send_signal(signal.SIGSTOP)
        status = Path(f"/proc/{self.process.pid}/stat")
        wait_for(lambda: status.read_text().rpartition(")")[2].split()[0] == "T", "stopped")

    def go_on(self) -> None:
        self.process.send_signal(signal.SIGCONT)

    def close(self) -> None:
        for connection in self._connections:
            connection.close()
        self.process.kill()
        self.process.wait()
        for stream in (self.process.stdin, self.process.stdout):
            assert stream is not None
            stream.close()


def mem(name: str) -> str:
    """The memory file's name of a snapshot."""
    return f"{name}.memory"


def load_body(source: Path, name: str, **changes: Any) -> JSON:
    """The body of a load; a change to None leaves the field out."""
    backend = {"backend_type": "File", "backend_path": str(source / mem(name))}
    body = {
        "snapshot_path": str(source / f"{name}.vmstate"),
        "mem_backend": backend,
        "enable_diff_snapshots": True,
        "resume_vm": True,
    } | changes
    return {name: value for name, value in body.items() if value is not None}


# --- memory files --------------------------------------------------------------------------------

PAGE = 4096


def data_pages(file: Path) -> set[int]:
    """The pages of a sparse file that are data."""
    pages: set[int] = set()
    with file.open("rb") as opened:
        size, offset = os.fstat(opened.fileno()).st_size, 0
        while offset < size:
            try:
                start = os.lseek(opened.fileno(), offset, os.SEEK_DATA)
            except OSError:  # ENXIO: a hole up to the end
                break
            offset = os.lseek(opened.fileno(), start, os.SEEK_HOLE)
            pages.update(range(start // PAGE, -(-offset // PAGE)))
    return pages


def region(first: int, count: int) -> set[int]:
    """Numbers, in a memory file, of pages of the region that the witness guest stamps."""
    begin = (64 << 20) // PAGE + first
    return set(range(begin, begin + count))


def lay_over(base: Path, diff: Path) -> None:
    """Merges a diff's data into a base: what the server does, in its simplest form."""
    with base.open("r+b") as into, diff.open("rb") as source:
        for page in sorted(data_pages(diff)):
            into.seek(page * PAGE)
            source.seek(page * PAGE)
            into.write(source.read(PAGE))
