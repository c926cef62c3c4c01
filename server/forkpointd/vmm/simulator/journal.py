"""Firecracker's two diaries: the log, which goes to stdout unless sent elsewhere, and the metrics.

Log lines are `TIME [id:thread] message`. Metrics are one JSON object a line, appended at start, at
every FlushMetrics and once a minute; `latencies_us` holds each action's last successful duration.
"""

from __future__ import annotations

import json
import os
import time
from typing import Final

LEVELS: Final = {"off": 0, "error": 1, "warn": 2, "warning": 2, "info": 3, "debug": 4, "trace": 5}
_NAMES: Final = {1: "ERROR", 2: "WARN", 3: "INFO", 4: "DEBUG"}
_LATENCIES: Final = (
    "full_create_snapshot",
    "diff_create_snapshot",
    "load_snapshot",
    "pause_vm",
    "resume_vm",
)


class Journal:
    """Where log lines go."""

    def __init__(self, instance_id: str) -> None:
        self.instance_id = instance_id
        self.level = LEVELS["info"]
        self.show_level = False
        self._fd = 1

    def send_to(self, path: str) -> None:
        """Appends to an existing file or FIFO from now on. Raises OSError."""
        self._fd = os.open(path, os.O_RDWR | os.O_APPEND | os.O_NONBLOCK | os.O_CLOEXEC)

    def error(self, message: str, thread: str = "main") -> None:
        """What went wrong."""
        self._line(1, message, thread)

    def warn(self, message: str, thread: str = "main") -> None:
        """What is odd."""
        self._line(2, message, thread)

    def info(self, message: str, thread: str = "main") -> None:
        """What happens."""
        self._line(3, message, thread)

    def _line(self, level: int, message: str, thread: str) -> None:
        if level > self.level:
            return
        now = time.time_ns()
        clock = time.strftime("%Y-%m-%dT%H:%M:%S", time.localtime(now // 10**9))
        shown = f":{_NAMES[level]}" if self.show_level else ""
        line = f"{clock}.{now % 10**9:09d} [{self.instance_id}:{thread}{shown}] {message}\n"
        try:
            os.write(self._fd, line.encode())
        except OSError:
            return  # a full FIFO or a full disk loses lines, as Firecracker's log does


class Metrics:
    """The figures, and the file they are appended to."""

    PERIOD_S: Final = 60.0

    def __init__(self) -> None:
        self.latencies_us = {f"{prefix}{name}": 0 for prefix in ("", "vmm_") for name in _LATENCIES}
        self.due_s: float | None = None
        self._fd: int | None = None

    @property
    def open(self) -> bool:
        """A file was given."""
        return self._fd is not None

    def send_to(self, path: str) -> None:
        """Appends to an existing file or FIFO. Raises OSError."""
        self._fd = os.open(path, os.O_RDWR | os.O_APPEND | os.O_NONBLOCK | os.O_CLOEXEC)

    def took(self, name: str, since_ns: int) -> None:
        """Enters the duration of an action that succeeded just now."""
        self.latencies_us[name] = (time.monotonic_ns() - since_ns) // 1000

    def write(self) -> None:
        """Appends a line, if there is a file; the next one is due in a minute. Raises OSError."""
        self.due_s = time.monotonic() + self.PERIOD_S
        if self._fd is not None:
            line = {
                "utc_timestamp_ms": time.time_ns() // 10**6,
                "simulator": True,
                "latencies_us": self.latencies_us,
            }
            os.write(self._fd, json.dumps(line).encode() + b"\n")
