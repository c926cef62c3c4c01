"""The command line against a fake server: what it prints, and the codes it ends with."""

import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from google.rpc import code_pb2
from typer.testing import CliRunner, Result

import forkpoint
from forkpoint import _versions
from forkpoint.cli import exits
from forkpoint.cli.app import app
from forkpoint.v1 import sandbox_pb2
from tests.unit.client_fake import Fake, fresh_address
from tests.unit.client_fake_state import status_of


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Fake]:
    server = Fake(fresh_address(tmp_path))
    server.version = forkpoint.__version__
    server.page_size = 1000
    server.start()
    monkeypatch.setenv("FORKPOINT_ADDRESS", server.address)
    yield server
    server.release()
    server.stop()


def forkpoint_(*arguments: str) -> Result:
    """Runs the command line; what it raises besides its exit code is raised here."""
    return CliRunner().invoke(app, list(arguments), catch_exceptions=False)


def piped(*arguments: str, stdin: str) -> subprocess.CompletedProcess[str]:
    """The same in a process of its own, with a pipe to its standard input."""
    command = [sys.executable, "-c", "from forkpoint.cli import main; main()", *arguments]
    return subprocess.run(command, input=stdin, capture_output=True, text=True, check=False)


def data(*arguments: str) -> Any:
    """What a command prints with --json, which must have worked."""
    result = forkpoint_(*arguments, "--json")
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def test_a_sandbox_from_create_to_rm(fake: Fake) -> None:
    created = data(
        "sandbox", "create", "agent-7", "--kernel", "/images/vmlinux", "--memory", "1G",
        "--vcpus", "2", "--drive", "rootfs=/images/root.ext4:root", "-l", "a=b", "--ttl", "10m",
        "--drive", "data=/images/data:rw", "--drive", "both=/images/both:root:rw",
        "--allow-drive-copy",
    )  # fmt: skip
    assert created["id"] == "agent-7"
    assert created["state"] == "RUNNING"
    assert created["ttl_seconds"] == 600
    request = fake.called("CreateSandbox")[0]
    boot = request.boot
    assert (boot.memory_mib, boot.vcpus) == (1024, 2)
    assert request.allow_drive_copy
    assert [
        (each.drive_id, each.path, each.read_only, each.root_device) for each in boot.drives
    ] == [
        ("rootfs", "/images/root.ext4", True, True),
        ("data", "/images/data", False, False),
        ("both", "/images/both", False, True),
    ]

    assert data("sandbox", "get", "agent-7")["labels"] == {"a": "b"}
    assert [each["id"] for each in data("sandbox", "list")] == ["agent-7"]
    assert data("sandbox", "list", "--state", "paused") == []
    assert data("sandbox", "pause", "agent-7")["state"] == "PAUSED"
    assert data("sandbox", "resume", "agent-7")["state"] == "RUNNING"
    assert data("sandbox", "update", "agent-7", "--no-ttl", "-l", "c=d")["labels"] == {"c": "d"}
    assert data("sandbox", "rm", "agent-7") == {"deleted": ["agent-7"]}
    assert forkpoint_("sandbox", "rm", "agent-7").exit_code == exits.NOT_FOUND
    assert forkpoint_("sandbox", "rm", "-f", "agent-7").exit_code == exits.OK


def test_text_for_people_is_never_cut(fake: Fake) -> None:
    fake.add_sandbox("a" * 60, labels={"purpose": "x" * 100})
    result = forkpoint_("sandbox", "list")
    header, row = result.stdout.splitlines()
    assert header.split()[:2] == ["SANDBOX", "STATE"]
    assert "a" * 60 in row
    assert "x" * 100 in row
    assert "\x1b" not in result.stdout
    shown = forkpoint_("sandbox", "get", "a" * 60).stdout
    assert "next diff" in shown
    assert "on the empty image (freshly booted)" in shown
    assert forkpoint_("snapshot", "list").stderr == "no snapshots\n"


def test_a_branch_ends_with_its_pause(fake: Fake) -> None:
    fake.add_sandbox("agent-7")
    result = forkpoint_("branch", "start", "agent-7", "--mode", "diff", "--snapshot", "snap")
    assert result.exit_code == 0
    assert "READY after" in result.stdout
    assert "4.2 ms by the server's clock" in result.stdout
    assert "4 ms = pause 100 µs + write 3.8 ms + resume 100 µs" in result.stdout
    assert "100 KiB, staged in memory" in result.stdout
    assert "the source stood still for 4.2 ms" in result.stderr
    branch = data("branch", "start", "agent-7")
    assert branch["stage"] == "READY"
    assert branch["pause"]["total_seconds"] == 0.0042
    assert branch["snapshot"]["source_sandbox_id"] == "agent-7"
    assert len(data("branch", "list", "--source", "agent-7", "--stage", "ready")) == 2
    assert "4.2 ms" in forkpoint_("branch", "list").stdout
    assert data("snapshot", "get", "snap")["mode"] == "DIFF"
    assert data("snapshot", "update", "snap", "-l", "k=v")["labels"] == {"k": "v"}
    assert data("snapshot", "list", "-l", "k=v")[0]["id"] == "snap"
    assert data("snapshot", "flatten", "snap")["layout"] == "FLAT"
    flat = forkpoint_("snapshot", "flatten", "snap")
    assert (flat.exit_code, "FLAT" in flat.stdout) == (0, True)
    assert "LAYOUT" in forkpoint_("snapshot", "list").stdout
    assert data("snapshot", "rm", "snap") == {"deleted": ["snap"]}


def test_a_branch_can_be_let_go_watched_and_cancelled(fake: Fake) -> None:
    fake.add_sandbox("agent-7")
    fake.hold_before = "PRECOPYING"
    started = data("branch", "start", "agent-7", "--branch", "b", "--no-wait")
    assert started["stage"] == "QUEUED"
    late = forkpoint_("branch", "watch", "b", "--timeout", "100ms")
    assert late.exit_code == exits.TIMED_OUT
    assert "goes on in the server" in late.stderr
    fake.release()
    lines = forkpoint_("branch", "watch", "b", "--json").stdout.splitlines()
    assert [json.loads(line)["id"] for line in lines] == ["b"] * len(lines)
    assert json.loads(lines[-1])["stage"] == "READY"
    cancelled = forkpoint_("branch", "cancel", "b")
    assert cancelled.exit_code == exits.REFUSED
    assert "too late" in cancelled.stderr


@pytest.mark.parametrize(
    ("command", "words"),
    [
        (("branch", "start", "agent-7", "--branch", "b"), "the branch goes on"),
        (("fork", "agent-7", "--id", "try"), "its children will be try-0 and on"),
    ],
)
def test_ctrl_c_ends_the_watching_and_not_the_work(
    fake: Fake, command: tuple[str, ...], words: str
) -> None:
    fake.add_sandbox("agent-7")
    fake.hold_before = "MERGING"
    # Where this is run in the background, a shell has SIGINT ignored in all that it starts.
    start = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler);"
    start += "from forkpoint.cli import main; main()"
    line = [sys.executable, "-c", start, *command]
    with subprocess.Popen(line, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        while "stood still" not in process.stderr.readline():
            assert process.poll() is None
        process.send_signal(signal.SIGINT)
        said = process.stderr.read()
        assert process.wait(60) == exits.INTERRUPTED
    assert words in said
    assert "Traceback" not in said
    fake.release()
    fake.wait_for(lambda: len(fake.snapshots) == 1)


def test_the_words_of_docker_and_kubectl_work_as_well(fake: Fake) -> None:
    fake.add_sandbox("agent-7")
    assert data("sandbox", "ls") == data("sandbox", "list")
    assert data("snapshot", "ls") == data("branch", "ls") == []
    assert data("sandbox", "delete", "agent-7") == {"deleted": ["agent-7"]}


def test_a_refusal_is_said_with_its_reason_and_its_code(fake: Fake) -> None:
    fake.add_sandbox("agent-7")
    fake.refusal = status_of(code_pb2.RESOURCE_EXHAUSTED, "NO_DISK_SPACE", "10 MiB are missing")
    result = forkpoint_("branch", "start", "agent-7", "--json")
    assert result.exit_code == exits.NO_ROOM
    error = json.loads(result.stderr)["error"]
    assert (error["reason"], error["code"]) == ("NO_DISK_SPACE", "RESOURCE_EXHAUSTED")
    assert error["message"] == "10 MiB are missing"
    fake.refusal = status_of(code_pb2.FAILED_PRECONDITION, "PAUSE_TOO_LONG", "it takes 3 s")
    result = forkpoint_("branch", "start", "agent-7")
    assert result.exit_code == exits.REFUSED
    assert result.stderr == "error: it takes 3 s\n"


def test_a_fork_starts_children_that_stay(fake: Fake) -> None:
    fake.add_sandbox("agent-7")
    made = data("fork", "agent-7", "-n", "3", "--id", "try", "--ttl", "10m", "-l", "a=b")
    assert made["children"] == ["try-0", "try-1", "try-2"]
    assert made["branch"]["pause"]["total_seconds"] == 0.0042
    assert made["failed"] == []
    assert {"try-0", "try-1", "try-2"} < set(fake.sandboxes)
    snapshot = made["snapshot_id"]
    fake.failing_children = {1}
    partial = forkpoint_("fork", snapshot, "-n", "2", "--id", "again")
    assert partial.exit_code == exits.PARTIAL
    assert "again-0" in partial.stdout
    assert "child 1 broke" in partial.stdout
    nothing = forkpoint_("fork", snapshot, "-n", "2", "--all-or-nothing")
    assert nothing.exit_code == exits.FAILED
    unknown = forkpoint_("fork", "nobody")
    assert unknown.exit_code == exits.NOT_FOUND
    assert "neither a sandbox nor a snapshot 'nobody'" in unknown.stderr
    fake.add_sandbox(snapshot)
    assert forkpoint_("fork", snapshot).exit_code == exits.USAGE


def test_the_tree_shows_who_came_from_whom(fake: Fake) -> None:
    fake.add_sandbox("agent-7")
    data("fork", "agent-7", "-n", "2", "--id", "try")
    (root,) = data("tree")
    assert (root["id"], root["kind"], root["deleted"]) == ("agent-7", "sandbox", False)
    (snapshot,) = root["children"]
    assert [child["id"] for child in snapshot["children"]] == ["try-0", "try-1"]
    lines = forkpoint_("tree").stdout.splitlines()
    assert lines[0].startswith("agent-7  sandbox RUNNING  booted")
    assert lines[1].startswith(f"└─ {snapshot['id']}  snapshot ")
    assert lines[2].startswith("   ├─ try-0")
    assert lines[3].startswith("   └─ try-1")
    del fake.sandboxes["agent-7"]
    del fake.snapshots[snapshot["id"]]
    gone = forkpoint_("tree").stdout
    assert "agent-7  sandbox, deleted" in gone
    assert f"{snapshot['id']}  snapshot, deleted" in gone


def test_a_console_takes_a_pipe(fake: Fake) -> None:
    fake.add_sandbox("agent-7")
    result = piped("sandbox", "console", "agent-7", "--until", "said u\\n", stdin="t\nu\n")
    assert result.returncode == 0, result.stderr
    assert result.stdout == "you said t\nyou said u\n"
    told = piped("sandbox", "console", "agent-7", "--json", "--quiet-after", "500ms", stdin="x")
    chunks = [json.loads(line) for line in told.stdout.splitlines()]
    assert "".join(chunk["text"] for chunk in chunks) == "you said x"
    late = piped(
        "sandbox", "console", "agent-7", "-r", "--tail", "6", "--until", "never",
        "--timeout", "50ms", stdin="",
    )  # fmt: skip
    assert late.returncode == exits.TIMED_OUT
    assert "did not say" in late.stderr


def test_a_console_does_not_wait_for_the_end_of_a_silent_pipe(fake: Fake) -> None:
    fake.add_sandbox("agent-7")
    script = f"{sys.executable} -c 'from forkpoint.cli import main; main()' sandbox console agent-7"
    process = subprocess.Popen(
        ["bash", "-c", f"{script} --until 'said t'"], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert process.stdin is not None
    process.stdin.write(b"t\n")
    process.stdin.flush()
    assert process.wait(60) == 0  # and the pipe is still open
    process.communicate()


def test_an_end_for_memory_is_shown_with_what_to_do(fake: Fake) -> None:
    data("sandbox", "create", "agent-7", "--kernel", "/images/vmlinux", "--memory", "1G")
    ended = fake.sandboxes["agent-7"]
    ended.state = sandbox_pb2.SANDBOX_STATE_STOPPED
    ended.exit.exit_code, ended.exit.signal = -1, 9
    ended.exit.exit_time.GetCurrentTime()
    by_hand = forkpoint_("sandbox", "get", "agent-7").stdout
    assert "by signal 9" in by_hand
    assert "memory killer" not in by_hand
    assert data("sandbox", "get", "agent-7")["exit"]["cause"] == "UNSPECIFIED"
    ended.exit.cause = sandbox_pb2.SANDBOX_EXIT_CAUSE_OUT_OF_MEMORY
    ended.exit.explanation = "the memory killer ended it. Take less"
    told = " ".join(forkpoint_("sandbox", "get", "agent-7").stdout.split())
    assert "by signal 9: the memory killer ended it. Take less" in told
    assert data("sandbox", "get", "agent-7")["exit"]["cause"] == "OUT_OF_MEMORY"


def test_the_server_and_both_versions_are_told(fake: Fake) -> None:
    info = data("server", "info")
    assert (info["version"], info["client_version"]) == (forkpoint.__version__,) * 2
    told = forkpoint_("server", "info").stdout
    assert "Simulator 1.12.1  (no guest code runs" in told
    assert "→ use XFS" in told
    assert (info["memory"]["budget_bytes"], info["memory"]["used_bytes"]) == (2**34, 7 * 2**28)
    assert "1.75 GiB of the budget of 16 GiB counted: 1 GiB in sandboxes" in " ".join(told.split())
    assert data("version") == {"client": forkpoint.__version__, "server": forkpoint.__version__}
    fake.version = "9.9.9"
    _versions._said.clear()
    result = forkpoint_("version")
    assert "9.9.9" in result.stdout
    assert "install the same version" in result.stderr
    _versions._said.clear()
    listed = forkpoint_("sandbox", "list")
    assert listed.stderr.count("install the same version") == 1
    assert listed.exit_code == 0


def test_a_server_that_is_not_there_has_a_code_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORKPOINT_ADDRESS", str(tmp_path / "no.sock"))
    result = forkpoint_("sandbox", "list")
    assert result.exit_code == exits.NO_SERVER
    assert "forkpointd serve" in result.stderr
    version = forkpoint_("--version")
    assert version.exit_code == 0
    assert f"forkpoint  {forkpoint.__version__}" in version.stdout
    assert "does not exist" in version.stdout


@pytest.mark.parametrize(
    "arguments",
    [
        ("sandbox", "create", "--kernel", "/k"),
        ("sandbox", "create", "--kernel", "/k", "--memory", "lots"),
        ("sandbox", "create", "--kernel", "/k", "--memory", "64", "--ttl", "soon"),
        ("sandbox", "create", "--kernel", "/k", "--memory", "64", "-l", "novalue"),
        ("sandbox", "create", "--kernel", "/k", "--memory", "64", "--drive", "nopath"),
        ("sandbox", "update", "x"),
        ("sandbox", "update", "x", "--ttl", "1m", "--no-ttl"),
        ("sandbox", "list", "--state", "asleep"),
        ("snapshot", "update", "x"),
        ("branch", "start", "x", "--mode", "quick"),
        ("fork", "x", "-n", "0"),
        ("sandbox", "list", "--address", "nonsense"),
        ("frobnicate",),
    ],
)
def test_wrong_usage_has_a_code_of_its_own(fake: Fake, arguments: tuple[str, ...]) -> None:
    result = forkpoint_(*arguments)
    assert result.exit_code == exits.USAGE
    assert result.stderr
    assert fake.called("CreateSandbox") == []


def test_an_invalid_field_is_named(fake: Fake) -> None:
    fake.add_sandbox("taken")
    result = forkpoint_("sandbox", "create", "taken", "--kernel", "/k", "--memory", "64")
    assert result.exit_code == exits.REFUSED
    assert "it is taken" in result.stderr


def test_help_defines_the_words_and_shows_examples() -> None:
    told = forkpoint_("--help").stdout
    for word in ("sandbox", "snapshot", "branch", "fork"):
        assert word in told
    assert "Exit codes" in told
    for group in ("sandbox", "branch", "snapshot", "server"):
        told = forkpoint_(group, "--help").stdout
        assert "Example" in told
        assert group in told


def every_command() -> list[list[str]]:
    """The path of every command there is."""
    import typer.main

    found: list[list[str]] = []

    def walk(command: Any, path: list[str]) -> None:
        below = getattr(command, "commands", None)
        if below is None:
            found.append(path)
        else:
            for name, each in below.items():
                walk(each, [*path, name])

    walk(typer.main.get_command(app), [])
    return found


@pytest.mark.parametrize("path", every_command(), ids=" ".join)
def test_every_command_has_json_and_help_with_an_example(path: list[str]) -> None:
    told = forkpoint_(*path, "--help").stdout
    assert "--json" in told
    assert "Example" in told


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("branch agent-7", "forkpoint branch start agent-7"),
        ("ps", "forkpoint sandbox list"),
        ("logs agent-7", "forkpoint sandbox console SANDBOX --no-follow"),
        ("rm agent-7", "forkpoint sandbox rm SANDBOX"),
    ],
)
def test_what_others_call_it_is_told(typed: str, meant: str) -> None:
    result = forkpoint_(*typed.split())
    assert result.exit_code == exits.USAGE
    assert meant in " ".join(result.stderr.replace("│", " ").split())


def test_what_is_gone_already_is_not_said_to_be_deleted(fake: Fake) -> None:
    fake.add_sandbox("there")
    result = forkpoint_("sandbox", "rm", "-f", "nobody", "there")
    assert result.exit_code == 0
    assert result.stdout.split() == ["deleted", "there"]
    assert forkpoint_("sandbox", "rm", "nobody").exit_code == exits.NOT_FOUND


def test_a_console_can_be_printed_without_following_it(fake: Fake) -> None:
    fake.add_sandbox("agent-7")
    fake.say("agent-7", b"hello\nlogin: ")
    result = forkpoint_("sandbox", "console", "agent-7", "--no-follow")
    assert result.exit_code == 0
    assert result.stdout.endswith("hello\nlogin: ")


def test_who_stops_reading_ends_it_quietly(fake: Fake) -> None:
    for number in range(300):
        fake.add_sandbox(f"sandbox-{number}")
    script = f"{sys.executable} -c 'from forkpoint.cli import main; main()' sandbox list --json"
    done = subprocess.run(
        ["bash", "-c", f"{script} | head -c 10"], capture_output=True, text=True, check=False
    )
    assert done.stderr == ""
