"""Whether the kernel's out-of-memory killer ended a process: what its log and its counters say.

A process that ended by SIGKILL looks the same whoever sent it, so there must be evidence:

    sure       the kernel's log (/dev/kmsg) names the pid. It can be read by root, and by everyone
               where `kernel.dmesg_restrict` is 0
    probably   that log can't be read, and the kernel's count of such kills rose within the last
               seconds: of this control group (`memory.events` of cgroup v2, `memory.oom_control`
               of v1), else of the host (/proc/vmstat)

Where the log can be read and does not name the process, it was somebody's `kill -9`: then the
counters are not asked. Everything here blocks: call it in a thread.
"""

from __future__ import annotations

import os
import re
import threading
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from forkpointd.model import ExitCause, ProcessRecord
from forkpointd.vmm.cgroups import memory_cgroup

RECENT_SECONDS = 2.0
"""So long a kill that was counted is looked for; the counters are read as often."""
LATE_SECONDS = 0.2
LATE_RETRY_SECONDS = 0.01
"""The kernel counts a kill, sends the signal, and only then writes the line (mm/oom_kill.c)."""
PID_REUSE_SECONDS = 60.0
"""The clocks of the log and of processes may drift apart by this; no pid is given again so soon."""
KEPT_KILLS = 1024

_KMSG = Path("/dev/kmsg")
_VMSTAT = Path("/proc/vmstat")
_PID_NAMESPACE = Path("/proc/self/ns/pid")
_INITIAL_PID_NAMESPACE = "pid:[4026531836]"
"""PROC_PID_INIT_INO of include/linux/proc_ns.h: only there are our pids those of the log."""
_KMSG_RECORD_BYTES = 8192
"""A smaller buffer than the record makes the read fail (Documentation/ABI/testing/dev-kmsg)."""

_KILLED = re.compile(r"Killed process (\d+) ")
_CHOSEN = re.compile(r"^oom-kill:.*,pid=(\d+),")
_IN_CGROUP = re.compile(r"^Memory cgroup out of memory|CONSTRAINT_MEMCG")

_AGAIN = "Its snapshots are there: start it again from one"
_CGROUP_REMEDY = (
    "The control group it ran in has reached its limit: raise that (MemoryMax of the server's "
    "unit), or lower memory_budget_bytes"
)
_HOST_REMEDY = (
    "Lower memory_budget_bytes or raise child_headroom_mib, so that fewer sandboxes run at once, "
    "or give the host more memory"
)


@dataclass(frozen=True, slots=True)
class Verdict:
    """A process was ended for memory."""

    cause: ExitCause
    explanation: str
    """With what to do."""


@dataclass(frozen=True, slots=True)
class _Kill:
    boot_seconds: float
    line: str


class KernelLog:
    """The kills that the kernel's log tells of."""

    def __init__(self, path: Path = _KMSG) -> None:
        """Raises OSError where it can't be read."""
        self._fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        self._kills: dict[int, _Kill] = {}
        try:
            self._read_on()
        except BaseException:
            os.close(self._fd)
            raise

    def close(self) -> None:
        """Reads no more."""
        os.close(self._fd)

    def take(self, record: ProcessRecord) -> str | None:
        """The line that names a process, once. Raises OSError."""
        self._read_on()
        kill = self._kills.get(record.pid)
        if kill is None or kill.boot_seconds < _started_seconds(record) - PID_REUSE_SECONDS:
            return None
        del self._kills[record.pid]
        return kill.line

    def _read_on(self) -> None:
        for at, line in self._records():
            named = _KILLED.search(line) or _CHOSEN.search(line)
            if named is None:
                continue
            pid = int(named[1])
            # Of the two lines about one kill the later says how much memory it had.
            self._kills.pop(pid, None)
            self._kills[pid] = _Kill(at, line)
            while len(self._kills) > KEPT_KILLS:
                del self._kills[next(iter(self._kills))]

    def _records(self) -> Iterator[tuple[float, str]]:
        """The records since the last look: seconds since boot, and the text."""
        while True:
            try:
                record = os.read(self._fd, _KMSG_RECORD_BYTES)
            except BlockingIOError:
                return
            except BrokenPipeError:  # overwritten before they were read: what is left comes next
                continue
            if not record:
                return
            head, _, text = record.decode(errors="replace").partition(";")
            yield int(head.split(",")[2]) / 1e6, text.splitlines()[0] if text else ""


class KillCounter:
    """A count of kills that the kernel keeps in a file, by the key `oom_kill`."""

    def __init__(self, path: Path, *, in_cgroup: bool) -> None:
        """Raises OSError, or ValueError where there is no such key."""
        self.path = path
        self.in_cgroup = in_cgroup
        self._seen = self._count()
        self._unclaimed: deque[float] = deque()

    def look(self) -> None:
        """Takes notice of what was counted since the last look. Raises OSError."""
        count = self._count()
        self._unclaimed.extend([time.monotonic()] * max(0, count - self._seen))
        self._seen = count

    def rose(self) -> bool:
        """Whether there was a kill lately. Raises OSError."""
        self.look()
        oldest = time.monotonic() - RECENT_SECONDS
        while self._unclaimed and self._unclaimed[0] < oldest:
            self._unclaimed.popleft()
        return bool(self._unclaimed)

    def claim(self) -> bool:
        """Whether there was a kill lately that nobody else claimed; it is claimed then. Raises
        OSError."""
        if not self.rose():
            return False
        self._unclaimed.popleft()
        return True

    def _count(self) -> int:
        for line in self.path.read_text(encoding="ascii").splitlines():
            key, _, value = line.partition(" ")
            if key == "oom_kill":
                return int(value)
        raise ValueError(f"{self.path} does not count kills for memory")


class OomKills:
    """Tells whether a process that is gone was ended for memory. Safe in any thread."""

    def __init__(self, kernel_log: KernelLog | None, counter: KillCounter | None) -> None:
        """`counter` is of the host where there is a log, else of the nearest thing."""
        self._log = kernel_log
        self._counter = counter
        self._lock = threading.Lock()

    @classmethod
    def open(cls) -> OomKills:
        """With the best evidence that this process may read."""
        kernel_log = _open_log()
        if kernel_log is not None:
            return cls(kernel_log, _counter_at(_VMSTAT, in_cgroup=False))
        cgroup = memory_cgroup()
        counter = None if cgroup is None else _counter_at(cgroup.kills_path, in_cgroup=True)
        return cls(None, counter or _counter_at(_VMSTAT, in_cgroup=False))

    @property
    def must_look(self) -> bool:
        """Whether `look` has to be called every RECENT_SECONDS: a count says nothing about when."""
        return self._log is None and self._counter is not None

    def close(self) -> None:
        """Looks no more."""
        if self._log is not None:
            self._log.close()

    def look(self) -> None:
        """Takes notice of the kills so far. Raises OSError."""
        with self._lock:
            if self._counter is not None:
                self._counter.look()

    def find(self, record: ProcessRecord, *, just_now: bool = True) -> Verdict | None:
        """Whether this process, which ended without this server's doing, was ended for memory.

        `just_now`: it has this moment; else some time ago, and counters say nothing about it.
        Raises OSError.
        """
        with self._lock:
            if self._log is not None:
                return self._find_in(self._log, record, just_now=just_now)
            if just_now and self._counter is not None and self._counter.claim():
                return _probable(self._counter)
            return None

    def _find_in(
        self, kernel_log: KernelLog, record: ProcessRecord, *, just_now: bool
    ) -> Verdict | None:
        line = kernel_log.take(record)
        if line is None and just_now and self._counter is not None and self._counter.rose():
            deadline = time.monotonic() + LATE_SECONDS
            while line is None and time.monotonic() < deadline:
                time.sleep(LATE_RETRY_SECONDS)
                line = kernel_log.take(record)
        if line is None:
            return None
        remedy = _CGROUP_REMEDY if _IN_CGROUP.search(line) else _HOST_REMEDY
        return Verdict(
            ExitCause.OUT_OF_MEMORY,
            f"the kernel's out-of-memory killer ended it ({line[:500]}). {remedy}. {_AGAIN}",
        )


def _probable(counter: KillCounter) -> Verdict:
    where = "this control group" if counter.in_cgroup else "this host"
    remedy = _CGROUP_REMEDY if counter.in_cgroup else _HOST_REMEDY
    return Verdict(
        ExitCause.PROBABLY_OUT_OF_MEMORY,
        f"it was probably the kernel's out-of-memory killer: {counter.path} counted a process of "
        f"{where} that it ended within the last seconds. The kernel's log, which this server may "
        f"not read, says which. {remedy}. {_AGAIN}",
    )


def _started_seconds(record: ProcessRecord) -> float:
    """When a process started, by the clock of the kernel's log: that one stands still while the
    host sleeps, the one of /proc/PID/stat does not. A sleep before the start makes it too early."""
    slept = time.clock_gettime(time.CLOCK_BOOTTIME) - time.clock_gettime(time.CLOCK_MONOTONIC)
    return record.start_ticks / os.sysconf("SC_CLK_TCK") - slept


def _open_log() -> KernelLog | None:
    try:
        if os.readlink(_PID_NAMESPACE) != _INITIAL_PID_NAMESPACE:
            return None
        return KernelLog()
    except OSError:
        return None


def _counter_at(path: Path, *, in_cgroup: bool) -> KillCounter | None:
    try:
        return KillCounter(path, in_cgroup=in_cgroup)
    except (OSError, ValueError):
        return None
