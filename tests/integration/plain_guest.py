"""A witness guest in a Firecracker driven by plain sockets, with none of our server in between."""

import http.client
import json
import os
import select
import socket
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from forkpointd import witness

DEADLINE_S = 60.0


class _Connection(http.client.HTTPConnection):
    """HTTP over a Unix socket in a folder whose path may be longer than a socket's may be."""

    def __init__(self, folder: Path) -> None:
        super().__init__("localhost", timeout=DEADLINE_S)
        self._folder = folder

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(DEADLINE_S)
        folder = os.open(self._folder, os.O_PATH | os.O_DIRECTORY)
        try:
            wait_for(lambda: self._connected(f"/proc/self/fd/{folder}/api.sock"))
        finally:
            os.close(folder)

    def _connected(self, path: str) -> bool:
        try:
            self.sock.connect(path)
        except (FileNotFoundError, ConnectionRefusedError):  # not bound, or not listening, yet
            return False
        return True


class Guest:
    """One Firecracker process and its console."""

    def __init__(self, firecracker: Path, folder: Path) -> None:
        folder.mkdir()
        self.folder = folder
        with (folder / "errors").open("wb") as errors:
            self.process = subprocess.Popen(
                [firecracker, "--api-sock", "api.sock", "--level", "Off"],
                cwd=folder,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                bufsize=0,
            )
        self._unread = b""
        self._connection = _Connection(folder)

    def close(self) -> None:
        self._connection.close()
        self.process.kill()
        self.process.wait()
        for stream in (self.process.stdin, self.process.stdout):
            assert stream is not None
            stream.close()

    def api(self, method: str, path: str, body: dict[str, Any]) -> None:
        self._connection.request(method, path, json.dumps(body))
        response = self._connection.getresponse()
        text = response.read().decode()
        assert response.status < 300, (method, path, text)

    def boot(self, kernel: Path, memory_mib: int) -> None:
        self.api("PUT", "/boot-source", {"kernel_image_path": str(kernel)})
        machine = {"vcpu_count": 1, "mem_size_mib": memory_mib, "track_dirty_pages": True}
        self.api("PUT", "/machine-config", machine)
        self.api("PUT", "/actions", {"action_type": "InstanceStart"})
        assert self.line() == witness.READY

    def load(self, vmstate: Path, memory: Path) -> None:
        backend = {"backend_type": "File", "backend_path": str(memory)}
        body = {"snapshot_path": str(vmstate), "mem_backend": backend, "resume_vm": True}
        self.api("PUT", "/snapshot/load", {**body, "enable_diff_snapshots": True})

    def pause(self) -> None:
        self.api("PATCH", "/vm", {"state": "Paused"})

    def resume(self) -> None:
        self.api("PATCH", "/vm", {"state": "Resumed"})

    def create(self, vmstate: Path, memory: Path) -> None:
        """A Diff, into a sparse file where there is none yet."""
        body = {"snapshot_path": str(vmstate), "mem_file_path": str(memory)}
        self.api("PUT", "/snapshot/create", {**body, "snapshot_type": "Diff"})

    def snapshot(self, name: str) -> tuple[Path, Path]:
        files = self.folder / f"{name}.vmstate", self.folder / f"{name}.memory"
        self.pause()
        self.create(*files)
        self.resume()
        return files

    def send(self, text: str) -> None:
        assert self.process.stdin is not None
        os.write(self.process.stdin.fileno(), text.encode())

    def has_said_something(self) -> bool:
        assert self.process.stdout is not None
        return bool(self._unread or select.select([self.process.stdout], [], [], 0)[0])

    def line(self) -> str:
        assert self.process.stdout is not None
        deadline = time.monotonic() + DEADLINE_S
        while b"\n" not in self._unread:
            left = deadline - time.monotonic()
            if left <= 0 or not select.select([self.process.stdout], [], [], left)[0]:
                pytest.fail(f"no answer within {DEADLINE_S} s, only {self._unread!r}")
            read = os.read(self.process.stdout.fileno(), 65536)
            assert read, "Firecracker ended: " + (self.folder / "errors").read_text()
            self._unread += read
        line, _, self._unread = self._unread.partition(b"\n")
        return line.decode("ascii")

    def ask(self, command: str) -> str:
        self.send(command + "\n")
        return self.line()

    def cpu_ticks(self) -> int:
        """User and system time of all its threads, in clock ticks (proc(5), fields 14 and 15)."""
        stat = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        return int(stat[11]) + int(stat[12])


def wait_for(state: Callable[[], bool]) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while not state():
        if time.monotonic() > deadline:
            pytest.fail(f"not so after {DEADLINE_S} s")
        time.sleep(0.01)
