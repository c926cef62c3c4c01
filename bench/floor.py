"""The floor: Firecracker driven by nothing but a socket, as well as that can be done.

One connection that stays open, requests written by hand, all three of a window in one write, the
memory file there before the window opens. What forkpoint takes beyond this is its own doing.
"""

from __future__ import annotations

import json
import os
import select
import socket
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

REPLY_SECONDS = 60.0
POLL_SECONDS = 0.000_5
METRICS = "metrics"


class FloorError(Exception):
    """Firecracker refused, or did not answer, what the floor asked of it."""


@dataclass(frozen=True, slots=True)
class FloorWindow:
    """What one window took, in microseconds."""

    total_us: float
    """From before the first byte was sent to the last reply, by the floor's clock."""
    pause_us: int
    """Firecracker's latencies_us."""
    snapshot_us: int
    resume_us: int

    @property
    def vmm_total_us(self) -> int:
        """Firecracker's own view of the window."""
        return self.pause_us + self.snapshot_us + self.resume_us


def request_bytes(method: str, path: str, body: dict[str, Any]) -> bytes:
    """One request to Firecracker's API."""
    text = json.dumps(body)
    head = f"{method} {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    return f"{head}Content-Length: {len(text)}\r\n\r\n{text}".encode()


def create_bytes(vmstate: Path, memory: Path, *, full: bool) -> bytes:
    """The request that writes a snapshot: a Diff, or all of the memory."""
    body = {"snapshot_path": str(vmstate), "mem_file_path": str(memory)}
    return request_bytes(
        "PUT", "/snapshot/create", {**body, "snapshot_type": "Full" if full else "Diff"}
    )


def load_bytes(vmstate: Path, memory: Path) -> bytes:
    """The request that loads a snapshot and lets its guest run."""
    backend = {"backend_type": "File", "backend_path": str(memory)}
    body = {"snapshot_path": str(vmstate), "mem_backend": backend, "resume_vm": True}
    return request_bytes("PUT", "/snapshot/load", {**body, "enable_diff_snapshots": True})


def connect(path: Path, process: subprocess.Popen[bytes]) -> socket.socket:
    """Connects to a Firecracker that is starting, as soon as it listens."""
    deadline = time.monotonic() + REPLY_SECONDS
    while True:
        connection = socket.socket(socket.AF_UNIX)
        try:
            connection.connect(str(path))
        except (FileNotFoundError, ConnectionRefusedError):
            connection.close()
            if process.poll() is not None or time.monotonic() > deadline:
                raise FloorError(f"Firecracker does not listen on {path}") from None
            time.sleep(POLL_SECONDS)
        else:
            connection.settimeout(REPLY_SECONDS)
            return connection


def receive(connection: socket.socket, count: int) -> None:
    """Waits for so many replies, all of which must be good."""
    unread = b""
    while count:
        head, separator, rest = unread.partition(b"\r\n\r\n")
        length = _body_length(head) if separator else 0
        if not separator or len(rest) < length:
            more = connection.recv(65536)
            if not more:
                raise FloorError("Firecracker closed the connection")
            unread += more
            continue
        if int(head.split(b" ", 2)[1]) >= 300:
            raise FloorError(f"Firecracker refused: {rest[:length].decode(errors='replace')}")
        unread = rest[length:]
        count -= 1


def _body_length(head: bytes) -> int:
    for line in head.split(b"\r\n")[1:]:
        name, _, value = line.partition(b":")
        if name.strip().lower() == b"content-length":
            return int(value)
    return 0


class FloorVmm:
    """One Firecracker with a witness guest on its serial console."""

    def __init__(self, firecracker: Path, folder: Path) -> None:
        folder.mkdir(parents=True)
        self.folder = folder
        (folder / METRICS).touch()
        with (folder / "errors").open("wb") as errors:
            self._process = subprocess.Popen(
                [firecracker, "--api-sock", "api.sock", "--level", "Off"],
                cwd=folder,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                bufsize=0,
                process_group=0,  # a Ctrl-C is for the bench
            )
        self._unread = b""
        self._windows = 0
        try:
            self._connection = connect(folder / "api.sock", self._process)
        except BaseException:
            self._end()
            raise

    def close(self) -> None:
        """Ends it. Its folder stays. Idempotent."""
        self._connection.close()
        self._end()

    def _end(self) -> None:
        self._process.kill()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout):
            if stream is not None:
                stream.close()

    def call(self, method: str, path: str, body: dict[str, Any]) -> None:
        """One request and its reply."""
        self._connection.sendall(request_bytes(method, path, body))
        receive(self._connection, 1)

    def boot(self, kernel: Path, memory_mib: int) -> None:
        """Boots the witness and waits until it says so."""
        self.call("PUT", "/metrics", {"metrics_path": METRICS})
        self.call("PUT", "/boot-source", {"kernel_image_path": str(kernel)})
        machine = {"vcpu_count": 1, "mem_size_mib": memory_mib, "track_dirty_pages": True}
        self.call("PUT", "/machine-config", machine)
        self.call("PUT", "/actions", {"action_type": "InstanceStart"})
        if (line := self._line()) != "READY":
            raise FloorError(f"the guest said {line!r} instead of READY")

    def ask(self, command: str) -> str:
        """One command to the guest, and its answer."""
        assert self._process.stdin is not None
        os.write(self._process.stdin.fileno(), f"{command}\n".encode())
        return self._line()

    def _line(self) -> str:
        assert self._process.stdout is not None
        output = self._process.stdout.fileno()
        deadline = time.monotonic() + REPLY_SECONDS
        while b"\n" not in self._unread:
            left = deadline - time.monotonic()
            if left <= 0 or not select.select([output], [], [], left)[0]:
                raise FloorError(f"the guest did not answer within {REPLY_SECONDS:.0f} s")
            read = os.read(output, 65536)
            if not read:
                raise FloorError(f"Firecracker ended: {(self.folder / 'errors').read_text()}")
            self._unread += read
        line, _, self._unread = self._unread.partition(b"\n")
        return line.decode("ascii").strip()

    def window(
        self,
        staging: Path,
        memory_bytes: int,
        *,
        full: bool = False,
        allocated: Sequence[tuple[int, int]] = (),
    ) -> FloorWindow:
        """Pause, create and resume in one write. What was written is removed again.

        `allocated`: offset and length, in bytes, of the parts of the memory file whose pages are
        had from the file system before the window opens.
        """
        memory, vmstate = self._stage(staging, memory_bytes, allocated)
        requests = (
            request_bytes("PATCH", "/vm", {"state": "Paused"})
            + create_bytes(vmstate, memory, full=full)
            + request_bytes("PATCH", "/vm", {"state": "Resumed"})
        )
        try:
            start = time.perf_counter_ns()
            self._connection.sendall(requests)
            receive(self._connection, 3)
            end = time.perf_counter_ns()
            return self._with_latencies((end - start) / 1000, full=full)
        finally:
            for path in (memory, vmstate):
                path.unlink(missing_ok=True)

    def sequential_window(self, memory: Path, vmstate: Path, *, full: bool = False) -> FloorWindow:
        """Pause, create and resume one by one, each sent after the reply to the one before. The
        files stay."""
        start = time.perf_counter_ns()
        for request in (
            request_bytes("PATCH", "/vm", {"state": "Paused"}),
            create_bytes(vmstate, memory, full=full),
            request_bytes("PATCH", "/vm", {"state": "Resumed"}),
        ):
            self._connection.sendall(request)
            receive(self._connection, 1)
        end = time.perf_counter_ns()
        return self._with_latencies((end - start) / 1000, full=full)

    def load(self, vmstate: Path, memory: Path) -> None:
        """Becomes a child of a snapshot, which goes on where its source was."""
        self._connection.sendall(load_bytes(vmstate, memory))
        receive(self._connection, 1)

    def snapshot(self, memory: Path, vmstate: Path) -> None:
        """A Diff over zeros: all that the guest has touched since it was booted."""
        self.call("PATCH", "/vm", {"state": "Paused"})
        body = {"snapshot_path": str(vmstate), "mem_file_path": str(memory)}
        self.call("PUT", "/snapshot/create", {**body, "snapshot_type": "Diff"})
        self.call("PATCH", "/vm", {"state": "Resumed"})

    def _stage(
        self, staging: Path, memory_bytes: int, allocated: Sequence[tuple[int, int]]
    ) -> tuple[Path, Path]:
        self._windows += 1
        name = f"{self._process.pid}-{self._windows}"
        memory = staging / f"{name}.m"
        with memory.open("xb") as opened:
            opened.truncate(memory_bytes)
            for offset, length in allocated:
                os.posix_fallocate(opened.fileno(), offset, length)
        return memory, staging / f"{name}.v"

    def _with_latencies(self, total_us: float, *, full: bool) -> FloorWindow:
        self.call("PUT", "/actions", {"action_type": "FlushMetrics"})
        lines = (self.folder / METRICS).read_bytes().splitlines()
        figures = json.loads(lines[-1])["latencies_us"]
        return FloorWindow(
            total_us,
            pause_us=int(figures["pause_vm"]),
            snapshot_us=int(figures["full_create_snapshot" if full else "diff_create_snapshot"]),
            resume_us=int(figures["resume_vm"]),
        )
