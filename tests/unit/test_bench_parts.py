"""The bench's own parts, without a VMM: the floor's socket, the CSV, the folders of a run."""

import csv
import json
import os
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from rich.console import Console

from bench import machine as machine_module
from bench.__main__ import main
from bench.cp import cp_seconds, make_dense
from bench.floor import FloorError, load_bytes, receive, request_bytes
from bench.machine import Machine, filesystem_of
from bench.report import Report
from bench.results import COLUMNS, ResultLog
from bench.rounds import FORKPOINT, Trial
from bench.scratch import Scratch, end_processes, processes_in, scratch
from bench.stats import Estimate
from bench.targets import IDLE_DIFF_WINDOW, TARGETS, Finding

ROOT = Path(__file__).resolve().parents[2]
GOOD = b"HTTP/1.1 204 \r\nServer: x\r\nConnection: keep-alive\r\n\r\n"


def machine() -> Machine:
    return Machine("cpu", 2, 1024, "6.1", "ext4", "1.12.1", "0.1.0", "3.11.2", "1.85.0", "c0ffee")


# --- the floor's socket ---


def reply(body: bytes, status: int = 400) -> bytes:
    return b"HTTP/1.1 %d x\r\nContent-Length: %d\r\n\r\n%s" % (status, len(body), body)


@pytest.mark.parametrize("piece", [1, 7, 4096])
def test_replies_are_told_apart_however_they_arrive(piece: int) -> None:
    ours, theirs = socket.socketpair()
    data = GOOD + reply(b'{"a": 1}', 200) + GOOD
    with ours, theirs:

        def answer() -> None:
            for start in range(0, len(data), piece):
                theirs.sendall(data[start : start + piece])

        thread = threading.Thread(target=answer)
        thread.start()
        receive(ours, 3)
        thread.join()


def test_a_refusal_is_told_in_firecracker_s_words() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        theirs.sendall(GOOD + reply(b'{"fault_message":"no room"}') + GOOD)
        with pytest.raises(FloorError, match="no room"):
            receive(ours, 3)


def test_a_firecracker_that_went_is_no_reply() -> None:
    ours, theirs = socket.socketpair()
    with ours:
        theirs.sendall(GOOD)
        theirs.close()
        with pytest.raises(FloorError, match="closed"):
            receive(ours, 2)


def test_a_request_says_how_long_it_is() -> None:
    head, _, body = request_bytes("PUT", "/x", {"a": "b"}).partition(b"\r\n\r\n")
    assert head.startswith(b"PUT /x HTTP/1.1\r\n")
    assert f"Content-Length: {len(body)}".encode() in head
    assert json.loads(body) == {"a": "b"}


def test_the_floor_s_children_track_dirty_pages_as_forkpoint_s_do() -> None:
    body = json.loads(load_bytes(Path("v"), Path("m")).partition(b"\r\n\r\n")[2])
    assert body["enable_diff_snapshots"] is True
    assert body["resume_vm"] is True


# --- cp ---


def test_a_dense_file_is_cut_and_grows_and_has_no_hole(tmp_path: Path) -> None:
    path = tmp_path / "dense"
    for mebibytes in (2, 5, 1):
        make_dense(path, mebibytes)
        assert path.stat().st_size == mebibytes << 20
        assert path.stat().st_blocks * 512 >= mebibytes << 20


def test_cp_leaves_nothing_and_says_why_it_failed(tmp_path: Path) -> None:
    source = tmp_path / "source"
    make_dense(source, 1)
    assert cp_seconds([source], tmp_path) > 0
    assert [path.name for path in tmp_path.iterdir()] == ["source"]
    with pytest.raises(FloorError, match="missing"):
        cp_seconds([tmp_path / "missing"], tmp_path)


# --- the CSV ---


def test_every_trial_is_a_row_failed_ones_too(tmp_path: Path) -> None:
    with ResultLog(tmp_path / "results", "quick", machine()) as log:
        log.add(Trial("m", 3, 1, FORKPOINT, 0.0, {"a_us": 1.5, "b_us": 2.0}))
        log.add(Trial("m", 4, 0, FORKPOINT, 0.0, {}, 'it said "no", twice'))
    with log.path.open(newline="") as opened:
        rows = list(csv.DictReader(opened))
    assert [(row["metric"], row["value"], row["outcome"]) for row in rows] == [
        ("a_us", "1.5", "ok"),
        ("b_us", "2.0", "ok"),
        ("", "", "failed"),
    ]
    assert rows[2]["error"] == 'it said "no", twice'
    assert {(row["commit"], row["kernel"], row["firecracker"]) for row in rows} == {
        ("c0ffee", "6.1", "1.12.1")
    }
    assert tuple(rows[0]) == COLUMNS


def test_a_row_is_there_before_the_run_ends(tmp_path: Path) -> None:
    with ResultLog(tmp_path, "quick", machine()) as log:
        log.add(Trial("m", 0, 0, FORKPOINT, 0.0, {"a_us": 1.0}))
        assert len(log.path.read_text().splitlines()) == 2


def test_the_file_system_of_a_folder_is_the_one_that_statfs_counts(tmp_path: Path) -> None:
    assert filesystem_of(Path("/proc")) == "proc"
    assert filesystem_of(tmp_path) not in ("proc", "unknown")


# --- folders and processes ---

CHILD = """
import subprocess, sys, time
from bench.scratch import scratch
with scratch(None) as place:
    child = subprocess.Popen(["sleep", "1000"], cwd=place.disk, process_group=0)
    print(place.disk, place.memory, child.pid, flush=True)
    child.wait()
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_run_that_is_broken_off_leaves_no_process_and_no_file(number: signal.Signals) -> None:
    in_background = 'trap "" INT; exec "$0" -c "$1"'  # as a shell's & starts it
    run = subprocess.Popen(
        ["sh", "-c", in_background, sys.executable, CHILD],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert run.stdout is not None
    disk, memory, pid = run.stdout.readline().split()
    assert os.path.isdir(disk) and os.path.isdir(memory)
    run.send_signal(number)
    _, errors = run.communicate(timeout=60)
    assert "KeyboardInterrupt" in errors
    assert not os.path.exists(disk) and not os.path.exists(memory)
    assert not os.path.exists(f"/proc/{pid}")


def test_only_processes_in_the_folder_are_ended(tmp_path: Path) -> None:
    inside, beside = tmp_path / "a", tmp_path / "ab"
    (inside / "deeper").mkdir(parents=True)
    beside.mkdir()
    ours = subprocess.Popen(["sleep", "1000"], cwd=inside / "deeper")
    other = subprocess.Popen(["sleep", "1000"], cwd=beside)
    try:
        assert processes_in(inside) == [ours.pid]
        assert end_processes(inside) == 1
        assert ours.wait(10) == -signal.SIGKILL
        assert other.poll() is None
    finally:
        for process in (ours, other):
            process.kill()
            process.wait()


def test_the_images_lie_where_they_are_told_to(tmp_path: Path) -> None:
    with scratch(tmp_path) as place:
        assert isinstance(place, Scratch)
        assert place.disk.parent == tmp_path.resolve()
        assert filesystem_of(place.memory) == "tmpfs"
    assert not list(tmp_path.iterdir())


# --- what is said ---


def test_without_kvm_it_is_skipped_with_the_reason_and_nothing_is_claimed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(machine_module, "KVM", tmp_path / "kvm")
    assert main(["quick", "--results", str(tmp_path / "results")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert any(line.startswith("skipped: ") and "kvm can't be opened" in line for line in lines)
    assert lines[-len(TARGETS) :] == [
        f"target {target.name} value - goal {target.goal} undecided" for target in TARGETS
    ]
    assert not (tmp_path / "results").exists()


def test_the_table_fits_a_terminal_and_the_lines_come_last(
    capsys: pytest.CaptureFixture[str],
) -> None:
    found = Finding(
        IDLE_DIFF_WINDOW,
        Estimate(1.02, 0.98, 1.06, 400),
        Estimate(1.0, 0.97, 1.03, 400),
        "12.34 ms",
        "12.56 ms",
        failed=2,
    )
    report = Report(Console(width=80))
    report.table([found])
    report.lines([found])
    out = capsys.readouterr().out
    assert "1.02 [0.98,1.06]" in out and "1.00 [0.97,1.03]" in out and " 400" in out
    assert "2 trials failed" in out
    assert out.splitlines()[-1] == "target idle_diff_window value 1.020 goal <=1.1 met"
