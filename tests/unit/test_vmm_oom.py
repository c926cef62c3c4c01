"""The out-of-memory killer: its order, and how its work is told from a `kill -9`."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from forkpointd.model import ExitCause, ProcessRecord
from forkpointd.vmm import OomKills, oom_kills, oom_order, take_place
from forkpointd.vmm.cgroups import memory_cgroup
from forkpointd.vmm.oom_kills import KernelLog, KillCounter
from forkpointd.vmm.oom_order import OomOrder, place
from forkpointd.vmm.process import record_of

# --- the order --------------------------------------------------------------------------------


class Score:
    """`/proc/self/oom_score_adj` of a process that may go down to `lowest`."""

    def __init__(self, own: int, lowest: int) -> None:
        self.value = own
        self._lowest = lowest

    def read_text(self, encoding: str) -> str:
        return f"{self.value}\n"

    def write_text(self, text: str, encoding: str) -> None:
        if int(text) < self._lowest:
            raise PermissionError(13, "Permission denied")
        self.value = int(text)


@pytest.mark.parametrize(
    ("own", "lowest", "order"),
    [
        (0, -1000, OomOrder(-999, -500, 1000)),
        (0, 0, OomOrder(0, 0, 1000)),
        (200, 100, OomOrder(100, 100, 1000)),
        (0, -1, OomOrder(-1, -1, 1000)),
        (0, -998, OomOrder(-998, -500, 1000)),
        (1000, 1000, OomOrder(1000, 1000, 1000)),
        (-1000, -1000, OomOrder(-1000, -500, 1000)),
    ],
)
def test_the_server_takes_the_lowest_place_that_it_may_have(
    own: int, lowest: int, order: OomOrder
) -> None:
    score = Score(own, lowest)
    assert take_place(score) == order  # type: ignore[arg-type]
    assert score.value == order.server


def test_where_proc_cant_be_written_nobody_is_moved(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert take_place(tmp_path / "not" / "there") is None
    assert "takes whom it likes" in caplog.text


@pytest.fixture
def sleeper() -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen(["sleep", "600"])
    yield process
    process.kill()
    process.wait()


def score_of(pid: int) -> int:
    return int(Path(f"/proc/{pid}/oom_score_adj").read_text())


def test_a_process_is_raised_and_lowered_again_without_any_right(
    sleeper: subprocess.Popen[bytes],
) -> None:
    own = score_of(os.getpid())
    place(sleeper.pid, oom_order.CHILD_SCORE_ADJ)
    assert score_of(sleeper.pid) == 1000
    place(sleeper.pid, own)
    assert score_of(sleeper.pid) == own


def test_a_process_that_is_gone_needs_no_place(caplog: pytest.LogCaptureFixture) -> None:
    gone = subprocess.Popen(["true"])
    gone.wait()
    place(gone.pid, 1000)
    assert caplog.text == ""


def test_a_place_that_cant_be_had_is_told(
    sleeper: subprocess.Popen[bytes], caplog: pytest.LogCaptureFixture
) -> None:
    place(sleeper.pid, 2000)
    assert f"process {sleeper.pid} keeps its oom_score_adj" in caplog.text


# --- the kernel's log -------------------------------------------------------------------------

CHOSEN = (
    "oom-kill:constraint=CONSTRAINT_NONE,nodemask=(null),cpuset=/,mems_allowed=0,global_oom,"
    "task_memcg=/,task=firecracker,pid={pid},uid=0"
)
HOST_KILL = (
    "Out of memory: Killed process {pid} (firecracker) total-vm:4305812kB, anon-rss:3011kB, "
    "file-rss:0kB, shmem-rss:0kB, UID:0 pgtables:6kB oom_score_adj:1000"
)
CGROUP_KILL = "Memory cgroup out of memory: Killed process {pid} (firecracker) total-vm:1kB"


class FakeLog:
    """A pipe that is read as /dev/kmsg is: a record for each read, then EAGAIN."""

    def __init__(self, path: Path) -> None:
        os.mkfifo(path)
        self._fd = os.open(path, os.O_RDWR | os.O_NONBLOCK)
        self._waiting: list[bytes] = []
        self.path = path

    def says(self, text: str, boot_seconds: float | None = None) -> None:
        at = time.clock_gettime(time.CLOCK_MONOTONIC) if boot_seconds is None else boot_seconds
        self._waiting.append(f"3,1,{round(at * 1e6)},-;{text}\n SUBSYSTEM=x\n".encode())

    def read(self, _fd: int, _count: int) -> bytes:
        if not self._waiting:
            raise BlockingIOError
        record = self._waiting.pop(0)
        if record == b"overwritten":
            raise BrokenPipeError
        return record

    def overwrites(self) -> None:
        self._waiting.append(b"overwritten")

    def close(self) -> None:
        os.close(self._fd)


@pytest.fixture
def fake_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeLog]:
    log = FakeLog(tmp_path / "kmsg")

    class FakeOs:
        """The module's `os`, but for the reads of the log."""

        read = staticmethod(log.read)

        def __getattr__(self, name: str) -> object:
            return getattr(os, name)

    monkeypatch.setattr(oom_kills, "os", FakeOs())
    yield log
    log.close()


@pytest.fixture
def victim(sleeper: subprocess.Popen[bytes]) -> ProcessRecord:
    return record_of(sleeper.pid)


def test_a_kill_that_the_log_names_is_sure(fake_log: FakeLog, victim: ProcessRecord) -> None:
    kills = OomKills(KernelLog(fake_log.path), None)
    fake_log.says("usb 1-1: something else")
    fake_log.says(CHOSEN.format(pid=victim.pid))
    fake_log.overwrites()
    fake_log.says(HOST_KILL.format(pid=victim.pid))
    verdict = kills.find(victim)
    assert verdict is not None
    assert verdict.cause is ExitCause.OUT_OF_MEMORY
    assert f"Killed process {victim.pid} (firecracker)" in verdict.explanation
    assert "Lower memory_budget_bytes or raise child_headroom_mib" in verdict.explanation
    assert kills.find(victim) is None, "it is told once: the pid may be another's soon"
    kills.close()


def test_a_kill_in_a_control_group_has_another_remedy(
    fake_log: FakeLog, victim: ProcessRecord
) -> None:
    kills = OomKills(KernelLog(fake_log.path), None)
    fake_log.says(CGROUP_KILL.format(pid=victim.pid))
    verdict = kills.find(victim)
    assert verdict is not None
    assert "control group it ran in has reached its limit" in verdict.explanation
    kills.close()


def test_a_kill_of_another_process_is_not_ours(fake_log: FakeLog, victim: ProcessRecord) -> None:
    kills = OomKills(KernelLog(fake_log.path), None)
    fake_log.says(HOST_KILL.format(pid=victim.pid + 1))
    fake_log.says(HOST_KILL.format(pid=int(f"{victim.pid}0")))
    assert kills.find(victim) is None
    kills.close()


def test_a_kill_of_who_had_the_pid_before_is_not_ours(
    fake_log: FakeLog, victim: ProcessRecord
) -> None:
    kills = OomKills(KernelLog(fake_log.path), None)
    fake_log.says(HOST_KILL.format(pid=victim.pid), boot_seconds=0.0)
    assert kills.find(victim) is None
    kills.close()


def test_the_line_that_comes_after_the_signal_is_waited_for(
    fake_log: FakeLog, victim: ProcessRecord, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    vmstat = tmp_path / "vmstat"
    vmstat.write_text("nr_free 1\noom_kill 4\n")
    kills = OomKills(KernelLog(fake_log.path), KillCounter(vmstat, in_cgroup=False))
    vmstat.write_text("nr_free 1\noom_kill 5\n")

    def write_late(_seconds: float) -> None:
        fake_log.says(HOST_KILL.format(pid=victim.pid))

    monkeypatch.setattr("forkpointd.vmm.oom_kills.time.sleep", write_late)
    assert kills.find(victim) is not None
    kills.close()


def test_where_the_log_can_be_read_a_count_alone_proves_nothing(
    fake_log: FakeLog, victim: ProcessRecord, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An operator's kill -9, while something else on the host was ended for memory."""
    monkeypatch.setattr(oom_kills, "LATE_SECONDS", 0.05)
    vmstat = tmp_path / "vmstat"
    vmstat.write_text("oom_kill 4\n")
    kills = OomKills(KernelLog(fake_log.path), KillCounter(vmstat, in_cgroup=False))
    vmstat.write_text("oom_kill 5\n")
    assert kills.find(victim) is None
    assert not kills.must_look
    kills.close()


# --- the counters -----------------------------------------------------------------------------


@pytest.fixture
def events(tmp_path: Path) -> Path:
    path = tmp_path / "memory.events"
    path.write_text("low 0\noom 3\noom_kill 2\noom_group_kill 0\n")
    return path


def test_without_the_log_a_count_that_rose_is_probable(events: Path, victim: ProcessRecord) -> None:
    kills = OomKills(None, KillCounter(events, in_cgroup=True))
    assert kills.must_look
    assert kills.find(victim) is None, "what was counted before was another's"
    events.write_text("oom_kill 4\n")
    for _ in range(2):
        verdict = kills.find(victim)
        assert verdict is not None
        assert verdict.cause is ExitCause.PROBABLY_OUT_OF_MEMORY
        assert "probably" in verdict.explanation
        assert str(events) in verdict.explanation
    assert kills.find(victim) is None, "two were counted, two were told"


def test_an_old_count_is_no_cause_of_a_later_end(
    events: Path, victim: ProcessRecord, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An operator's kill -9, some time after something else was ended for memory."""
    clock = [1000.0]
    monkeypatch.setattr("forkpointd.vmm.oom_kills.time.monotonic", lambda: clock[0])
    kills = OomKills(None, KillCounter(events, in_cgroup=True))
    events.write_text("oom_kill 3\n")
    kills.look()
    clock[0] += oom_kills.RECENT_SECONDS + 0.1
    assert kills.find(victim) is None


def test_a_count_says_nothing_about_who_ended_while_no_server_ran(
    events: Path, victim: ProcessRecord
) -> None:
    kills = OomKills(None, KillCounter(events, in_cgroup=True))
    events.write_text("oom_kill 3\n")
    assert kills.find(victim, just_now=False) is None


def test_without_any_evidence_nothing_is_said(victim: ProcessRecord) -> None:
    kills = OomKills(None, None)
    kills.look()
    assert kills.find(victim) is None
    assert not kills.must_look


def test_a_file_that_counts_no_kills_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "memory.events"
    path.write_text("low 0\n")
    with pytest.raises(ValueError, match="does not count"):
        KillCounter(path, in_cgroup=True)


def test_the_real_evidence_of_this_host_calls_a_kill_by_hand_nothing(
    sleeper: subprocess.Popen[bytes],
) -> None:
    kills = OomKills.open()
    record = record_of(sleeper.pid)
    os.kill(sleeper.pid, signal.SIGKILL)
    sleeper.wait()
    assert kills.find(record) is None
    kills.close()


# --- control groups ---------------------------------------------------------------------------


def mountinfo(path: Path, *lines: str) -> Path:
    path.write_text("".join(f"{line}\n" for line in lines))
    return path


@pytest.mark.parametrize("root", ["/", "/docker/abc"])
def test_the_control_group_of_version_1_is_found_below_what_is_mounted(
    tmp_path: Path, root: str
) -> None:
    mount = tmp_path / "memory"
    (mount / "unit").mkdir(parents=True)
    own = f"{root.rstrip('/')}/unit"
    cgroups = tmp_path / "cgroup"
    cgroups.write_text(f"4:cpu,memory:{own}\n0::/other\n")
    mounts = mountinfo(
        tmp_path / "mounts",
        "22 1 0:20 / / rw - ext4 /dev/vda rw",
        f"30 22 0:26 / {tmp_path} rw - cgroup2 cgroup2 rw",
        f"31 22 0:27 {root} {mount} rw shared:1 - cgroup cgroup rw,cpu,memory",
    )
    found = memory_cgroup(cgroups, mounts)
    assert found is not None
    assert (found.folder, found.mount, found.version) == (mount / "unit", mount, 1)
    assert found.kills_path == mount / "unit/memory.oom_control"
    assert [group.folder for group in found.upwards()] == [mount / "unit", mount]


def test_the_control_group_of_version_2_is_found(tmp_path: Path) -> None:
    (tmp_path / "system.slice").mkdir()
    cgroups = tmp_path / "cgroup"
    cgroups.write_text("0::/system.slice\n")
    mounts = mountinfo(tmp_path / "mounts", f"30 22 0:26 / {tmp_path} rw - cgroup2 cgroup2 rw")
    found = memory_cgroup(cgroups, mounts)
    assert found is not None
    assert found.kills_path == tmp_path / "system.slice/memory.events"
    assert found.version == 2


@pytest.mark.parametrize("own", ["/elsewhere", "/docker/abcdef"])
def test_a_control_group_that_cant_be_seen_from_here_is_none(tmp_path: Path, own: str) -> None:
    cgroups = tmp_path / "cgroup"
    cgroups.write_text(f"0::{own}\n")
    mounts = mountinfo(
        tmp_path / "mounts", f"30 22 0:26 /docker/abc {tmp_path} rw - cgroup2 cgroup2 rw"
    )
    assert memory_cgroup(cgroups, mounts) is None
    assert memory_cgroup(tmp_path / "nothing", mounts) is None
