"""Requests, last words, holes, latencies and processes: the small parts of the driver."""

import json
import os
import signal
import subprocess
from pathlib import Path

import pytest

from forkpointd.model import Boot, Drive, Machine
from forkpointd.vmm import (
    VmmGone,
    boot_requests,
    link_drives,
    load_requests,
    read_last_words,
    trim_head,
    trim_log,
)
from forkpointd.vmm.latencies import _last_line
from forkpointd.vmm.process import has_ended, kill, reap, record_of, start_ticks
from forkpointd.vmm.words import LAST_WORDS_BYTES

DRIVE = Drive("root", Path("/images/root.ext4"), root_device=True)

# --- requests ---


def test_a_boot_tracks_dirty_pages_and_names_drives_relative_to_the_folder() -> None:
    boot = Boot(Machine(2, 256, (DRIVE,)), Path("/k"), Path("/i"), "console=ttyS0")
    source, machine, drive, start = boot_requests(boot)
    assert source.body == {
        "kernel_image_path": "/k",
        "boot_args": "console=ttyS0",
        "initrd_path": "/i",
    }
    assert machine.body == {"vcpu_count": 2, "mem_size_mib": 256, "track_dirty_pages": True}
    assert drive.path == "/drives/root"
    assert drive.body == {
        "drive_id": "root",
        "path_on_host": "drives/root",
        "is_root_device": True,
        "is_read_only": True,
    }
    assert start.body == {"action_type": "InstanceStart"}


def test_what_is_not_given_is_firecrackers_own_choice() -> None:
    source = boot_requests(Boot(Machine(1, 128), Path("/k")))[0]
    assert source.body == {"kernel_image_path": "/k"}


def test_a_load_asks_for_dirty_tracking_each_time() -> None:
    (load,) = load_requests(Path("/s/vmstate"), Path("/s/memory"), resume=True)
    assert load.body is not None
    assert load.body["enable_diff_snapshots"] is True
    assert load.body["resume_vm"] is True
    assert load.body["mem_backend"] == {"backend_type": "File", "backend_path": "/s/memory"}


def test_drives_are_found_by_links(tmp_path: Path) -> None:
    link_drives(tmp_path, [])
    assert list(tmp_path.iterdir()) == []
    link_drives(tmp_path, [DRIVE])
    assert (tmp_path / "drives" / "root").readlink() == DRIVE.path
    (tmp_path / "own").mkdir()
    link_drives(tmp_path / "own", [Drive("data", Path("/images/data"), read_only=False)])
    assert list((tmp_path / "own" / "drives").iterdir()) == [], "a writable one is never a link"
    for name in ("..", "", "a/b"):
        with pytest.raises(ValueError, match="can't name a drive"):
            link_drives(tmp_path / "x", [Drive(name, Path("/x"))])


# --- last words and holes ---


def test_last_words_are_the_ends_of_both_files(tmp_path: Path) -> None:
    assert read_last_words(tmp_path) == ""
    (tmp_path / "vmm.err").write_text("thread panicked\n")
    (tmp_path / "vmm.log").write_text("one\nexiting with error\n")
    assert read_last_words(tmp_path) == "thread panicked\none\nexiting with error"


def test_last_words_are_few(tmp_path: Path) -> None:
    (tmp_path / "vmm.err").write_text("e" * 50_000 + "the error")
    (tmp_path / "vmm.log").write_text("ü" * 50_000 + "the log")
    words = read_last_words(tmp_path)
    assert len(words.encode()) <= LAST_WORDS_BYTES
    assert "the error" in words
    assert words.endswith("the log")


def test_last_words_behind_a_hole_are_words(tmp_path: Path) -> None:
    (tmp_path / "vmm.log").write_bytes(b"\0" * 9000 + b"after the hole\n")
    assert read_last_words(tmp_path) == "after the hole"


def test_a_trimmed_file_keeps_its_length_and_end(tmp_path: Path) -> None:
    path = tmp_path / "f"
    path.write_bytes(os.urandom(100_000))
    before = path.read_bytes()
    trim_head(path, 10_000)
    after = path.read_bytes()
    assert len(after) == len(before)
    kept = 90_000 // 4096 * 4096
    assert after == bytes(kept) + before[kept:]
    trim_head(path, 10_000)
    trim_head(path, 200_000)
    assert path.read_bytes() == after
    trim_head(tmp_path / "nothing", 1)
    trim_log(tmp_path)


# --- latencies ---


def test_the_last_complete_line_counts(tmp_path: Path) -> None:
    path = tmp_path / "metrics"
    lines = [json.dumps({"n": n, "filling": "x" * 7000}) for n in range(20)]
    path.write_text("\n".join(lines) + "\n")
    assert json.loads(_last_line(path))["n"] == 19
    path.write_text(lines[0] + "\n" + lines[1][:100])
    assert json.loads(_last_line(path))["n"] == 0
    path.write_bytes(bytes(8192) + b'{"n": 1}\n')
    assert _last_line(path).lstrip(b"\0") == b'{"n": 1}'
    for nothing in (b"", b"half a line"):
        path.write_bytes(nothing)
        with pytest.raises(ValueError, match="not found"):
            _last_line(path)


# --- processes ---


def test_a_process_is_described_whatever_it_calls_itself(tmp_path: Path) -> None:
    odd = tmp_path / "a) S 1 (b"
    odd.symlink_to("/bin/sleep")
    process = subprocess.Popen([odd, "1000"])
    try:
        record = record_of(process.pid)
        assert record.pid == process.pid
        assert record.start_ticks == start_ticks(process.pid) > start_ticks(os.getpid()) - 1
        assert record.executable == Path("/bin/sleep").resolve()
        stat = os.stat(record.executable)
        assert (record.executable_device, record.executable_inode) == (stat.st_dev, stat.st_ino)
    finally:
        process.kill()
        process.wait()
    with pytest.raises(VmmGone):
        record_of(process.pid)


@pytest.mark.parametrize(
    ("command", "how"),
    [("exit 7", (7, 0)), ("kill -TERM $$", (-1, signal.SIGTERM))],
)
def test_an_own_process_tells_how_it_ended_and_is_reaped(
    command: str, how: tuple[int, int]
) -> None:
    process = subprocess.Popen(["/bin/sh", "-c", command])
    pidfd = os.pidfd_open(process.pid)
    try:
        os.waitid(os.P_PIDFD, pidfd, os.WEXITED | os.WNOWAIT)
        assert has_ended(pidfd)
        assert reap(pidfd) == how
        assert reap(pidfd) == (-1, 0), "once only"
        kill(pidfd)
    finally:
        os.close(pidfd)
        process.returncode = 0


def test_a_process_that_lives_is_not_reaped() -> None:
    process = subprocess.Popen(["sleep", "1000"])
    pidfd = os.pidfd_open(process.pid)
    try:
        assert not has_ended(pidfd)
        assert reap(pidfd) == (-1, 0)
        kill(pidfd)
        assert reap(pidfd) == (-1, signal.SIGKILL)
    finally:
        os.close(pidfd)
        process.returncode = 0
