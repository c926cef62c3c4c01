"""What needs no server: spans, addresses, errors, searches, the twin."""

import socket
import subprocess
import sys
from datetime import timedelta
from pathlib import Path
from typing import cast

import pytest
from google.rpc import code_pb2, error_details_pb2

import forkpoint
from forkpoint import durations, errors, sync
from forkpoint._expect import Searched
from forkpoint._orders import create_request, fork_spec, update_request
from forkpoint._status import from_status
from forkpoint.enums import BranchMode, choose
from forkpoint.target import Target, default_socket
from tests.unit.client_fake_state import status_of

sys.path.insert(0, str(Path(__file__).parents[2] / "tools"))
import unasync_client


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("10m", 600),
        ("1h30m", 5400),
        ("500ms", 0.5),
        ("90", 90),
        (90, 90),
        (0.25, 0.25),
        ("2d", 172800),
    ],
)
def test_a_span_is_read_as_people_write_it(text: durations.Duration, seconds: float) -> None:
    assert durations.parse(text) == timedelta(seconds=seconds)


@pytest.mark.parametrize("text", ["10 minuets", "", "m10", "-5", -1, "1h30"])
def test_what_is_no_span_is_refused(text: durations.Duration) -> None:
    with pytest.raises(ValueError):
        durations.parse(text)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.0042, "4.2 ms"), (0.00005, "50 µs"), (12.34, "12.3 s"), (3723, "1h2m3s"), (86400, "1d")],
)
def test_a_span_is_shown_with_three_digits(seconds: float, text: str) -> None:
    assert durations.show(timedelta(seconds=seconds)) == text


def test_the_default_socket_follows_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", "/run/user/7")
    assert str(default_socket()) == "/run/user/7/forkpoint/forkpoint.sock"
    monkeypatch.delenv("XDG_RUNTIME_DIR")
    monkeypatch.setattr("os.geteuid", lambda: 0)
    assert str(default_socket()) == "/run/forkpoint/forkpoint.sock"
    monkeypatch.setattr("os.geteuid", lambda: 1000)
    assert str(default_socket()) == "/tmp/forkpoint-1000/forkpoint.sock"


@pytest.mark.parametrize(
    ("address", "shown"),
    [
        ("unix:/a/b.sock", "unix:/a/b.sock"),
        ("unix:///a/b.sock", "unix:/a/b.sock"),
        ("/a/b.sock", "unix:/a/b.sock"),
        (Path("/a/b.sock"), "unix:/a/b.sock"),
        ("localhost:7443", "localhost:7443"),
    ],
)
def test_an_address_is_a_socket_or_host_and_port(address: str | Path, shown: str) -> None:
    assert str(Target.find(address)) == shown


@pytest.mark.parametrize("address", ["nonsense", "host:", "host:99999", ":7443"])
def test_what_is_no_address_is_refused(address: str) -> None:
    with pytest.raises(ValueError, match="is no address"):
        Target.find(address)


def test_the_environment_names_the_server(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORKPOINT_ADDRESS", "unix:/elsewhere.sock")
    assert str(Target.find()) == "unix:/elsewhere.sock"


def test_a_server_that_is_not_there_is_explained(tmp_path: Path) -> None:
    missing = Target.find(tmp_path / "no.sock").explain()
    assert "does not exist" in str(missing)
    assert f"forkpointd serve --data-dir DIR --listen unix:{tmp_path / 'no.sock'}" in str(missing)
    left_behind = tmp_path / "old.sock"
    with socket.socket(socket.AF_UNIX) as old:
        old.bind(str(left_behind))
    assert "nobody listens" in str(Target.find(left_behind).explain())
    with socket.socket(socket.AF_UNIX) as other:
        other.bind(str(tmp_path / "other.sock"))
        other.listen()
        assert "is no forkpoint server" in str(Target.find(tmp_path / "other.sock").explain())
    (tmp_path / "file").write_text("")
    assert "not a folder" in str(Target.find(tmp_path / "file" / "x.sock").explain())


@pytest.mark.parametrize(
    ("code", "reason", "kind"),
    [
        (code_pb2.NOT_FOUND, "SANDBOX_NOT_FOUND", errors.SandboxNotFound),
        (code_pb2.NOT_FOUND, "BRANCH_NOT_FOUND", errors.BranchNotFound),
        (code_pb2.FAILED_PRECONDITION, "PAUSE_TOO_LONG", errors.PauseTooLong),
        (code_pb2.RESOURCE_EXHAUSTED, "BRANCH_QUEUE_FULL", errors.BranchQueueFull),
        (code_pb2.RESOURCE_EXHAUSTED, "NO_DISK_SPACE", errors.ResourceExhausted),
        (code_pb2.FAILED_PRECONDITION, "A_REASON_OF_TOMORROW", errors.FailedPrecondition),
        (code_pb2.UNAVAILABLE, "SANDBOX_UNRESPONSIVE", errors.SandboxUnresponsive),
        (code_pb2.DATA_LOSS, "IMAGE_DAMAGED", errors.DataLoss),
    ],
)
def test_a_status_becomes_the_error_of_its_reason(
    code: int, reason: str, kind: type[errors.ForkpointError]
) -> None:
    error = from_status(status_of(code, reason, "what happened", a="b"))
    assert type(error) is kind
    assert (error.reason, error.message, error.metadata) == (reason, "what happened", {"a": "b"})
    assert error.code == code_pb2.Code.Name(code)


def test_every_reason_of_the_contract_has_an_error_of_its_code() -> None:
    from forkpoint.v1 import errors_pb2

    text = Path(__file__).parents[2].joinpath("proto/forkpoint/v1/errors.proto").read_text()
    for name in errors_pb2.ErrorReason.keys()[1:]:
        code = text[: text.index(f"  {name} = ")].rpartition("// [")[2].partition("]")[0]
        status = status_of(code_pb2.Code.Value(code), name.removeprefix("ERROR_REASON_"), "why")
        assert from_status(status).code == code


def test_details_become_fields_and_a_time_to_wait() -> None:
    wrong = error_details_pb2.BadRequest(
        field_violations=[
            error_details_pb2.BadRequest.FieldViolation(field="fork.count", description="0 is none")
        ]
    )
    wait = error_details_pb2.RetryInfo()
    wait.retry_delay.FromMilliseconds(1500)
    error = from_status(
        status_of(code_pb2.INVALID_ARGUMENT, "INVALID_FIELD", "1 field is wrong", wrong, wait)
    )
    assert isinstance(error, errors.InvalidArgument)
    assert error.fields == (errors.FieldViolation("fork.count", "0 is none"),)
    assert error.retry_after == timedelta(seconds=1.5)
    assert "fork.count: 0 is none" in str(error)


def test_a_pause_too_long_names_its_prediction() -> None:
    status = status_of(
        code_pb2.FAILED_PRECONDITION, "PAUSE_TOO_LONG", "too long", predicted_pause_ms="2300.5"
    )
    error = from_status(status)
    assert isinstance(error, errors.PauseTooLong)
    assert error.predicted_pause == timedelta(milliseconds=2300.5)


def test_a_pattern_is_found_across_chunks() -> None:
    searched = Searched(b"READY\n")
    assert searched.add(b"boot REA") is None
    assert searched.add(b"DY") is None
    assert searched.add(b"\nmore") == b"boot READY\n"
    assert searched.said == b"boot READY\nmore"
    with pytest.raises(ValueError, match="empty"):
        Searched(b"")


def test_a_word_is_chosen_in_any_case() -> None:
    assert choose(BranchMode, "diff") is BranchMode.DIFF
    with pytest.raises(ValueError, match="choose one of"):
        choose(BranchMode, "quick")


def test_orders_are_checked_before_they_are_sent() -> None:
    def create(**given: object) -> None:
        options: dict[str, object] = dict.fromkeys(
            (
                "kernel",
                "memory_mib",
                "initrd",
                "boot_args",
                "snapshot_id",
                "labels",
                "ttl",
                "request_id",
            )
        )
        options |= {"vcpus": 0, "drives": (), "on_expiry": "delete"}
        create_request(None, **(options | given))  # type: ignore[arg-type]

    with pytest.raises(ValueError, match="either a kernel or a snapshot"):
        create()
    with pytest.raises(ValueError, match="either a kernel or a snapshot"):
        create(kernel="/k", memory_mib=64, snapshot_id="s")
    with pytest.raises(ValueError, match="memory_mib is missing"):
        create(kernel="/k")
    with pytest.raises(ValueError, match="leave memory_mib"):
        create(snapshot_id="s", memory_mib=64)
    with pytest.raises(ValueError, match="at least one child"):
        fork_spec(0, None, None, None, "delete", "keep")
    with pytest.raises(ValueError, match="nothing to update"):
        update_request("x", forkpoint.UNCHANGED, forkpoint.UNCHANGED, forkpoint.UNCHANGED)


def test_an_update_names_what_it_clears() -> None:
    request = update_request("x", None, None, forkpoint.UNCHANGED)
    assert list(request.update_mask.paths) == ["labels", "ttl"]
    assert not request.HasField("ttl")


def test_the_sync_client_is_the_async_one() -> None:
    assert unasync_client.stale(unasync_client.wanted()) == [], "run python tools/unasync_client.py"


def test_both_clients_have_the_same_names() -> None:
    for name in sync.__all__:
        one, other = getattr(forkpoint, name), getattr(sync, name)
        if isinstance(one, type):
            public = {each for each in dir(one) if not each.startswith("_")}
            assert public == {each for each in dir(cast("type", other)) if not each.startswith("_")}


def test_every_public_name_is_there_and_imported_when_it_is_used() -> None:
    assert all(getattr(forkpoint, name) is not None for name in forkpoint.__all__)
    assert set(forkpoint.__all__) == {*forkpoint._MODULES, "__version__", "errors"}
    assert dir(forkpoint) == sorted(forkpoint.__all__)
    with pytest.raises(AttributeError, match="no attribute 'snapshoot'"):
        _ = forkpoint.snapshoot  # type: ignore[attr-defined]
    lean = (
        "import sys, forkpoint, forkpoint.errors, forkpoint.cli; assert 'grpc' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", lean], check=True)


def test_nothing_asynchronous_is_left_in_the_twin() -> None:
    for name, text in unasync_client.wanted().items():
        code = text if name != "__init__.py" else ""
        for word in ("await ", "async ", "asyncio", "__aenter__", "AsyncIterator", "._async"):
            assert word not in code, f"{word!r} in {name}"
