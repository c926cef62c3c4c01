"""The floor of a fork: many Firecrackers that load one snapshot, as fast as plain sockets go.

All are spawned at once, then each is sent its load as soon as it listens, then the answers are
read. Their folders are on tmpfs, they have no console, log or metrics, and nobody writes down that
they exist.
"""

from __future__ import annotations

import shutil
import socket
import subprocess
import time
from pathlib import Path

from bench.floor import FloorVmm, connect, load_bytes, receive

TOUCHED_MIB = 50


class ForkFloor:
    """A snapshot, and children of it."""

    def __init__(self, firecracker: Path, folder: Path) -> None:
        self._firecracker = firecracker
        self._folder = folder
        self._memory = folder / "memory"
        self._vmstate = folder / "vmstate"
        self._forks = 0

    def snapshot(self, kernel: Path, memory_mib: int) -> None:
        """Takes the snapshot that children are loaded from. The guest touched TOUCHED_MIB."""
        source = FloorVmm(self._firecracker, self._folder / "source")
        try:
            source.boot(kernel, memory_mib)
            source.ask(f"d{TOUCHED_MIB}")
            source.snapshot(self._memory, self._vmstate)
        finally:
            source.close()

    def fork(self, count: int) -> tuple[float, float]:
        """Starts children and ends them; returns how long each of both took, in seconds."""
        self._forks += 1
        root = self._folder / f"children-{self._forks}"
        root.mkdir()
        processes: list[subprocess.Popen[bytes]] = []
        connections: list[socket.socket] = []
        load = load_bytes(self._vmstate, self._memory)
        try:
            start = time.perf_counter()
            for number in range(count):
                processes.append(self._spawn(root / str(number)))  # noqa: PERF401 - ended if one fails
            for number, process in enumerate(processes):
                connection = connect(root / str(number) / "api.sock", process)
                connections.append(connection)
                connection.sendall(load)
            for connection in connections:
                receive(connection, 1)
            loaded = time.perf_counter()
        finally:
            begin = time.perf_counter()
            for connection in connections:
                connection.close()
            for process in processes:
                process.kill()
            for process in processes:
                process.wait()
            shutil.rmtree(root)
            ended = time.perf_counter()
        return loaded - start, ended - begin

    def _spawn(self, folder: Path) -> subprocess.Popen[bytes]:
        folder.mkdir()
        return subprocess.Popen(
            [self._firecracker, "--api-sock", "api.sock", "--level", "Off"],
            cwd=folder,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            process_group=0,  # a Ctrl-C is for the bench
        )
