"""Which snapshots `snapshot prune` takes, and what it says."""

import json
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner, Result

import forkpoint
from forkpoint import _wire
from forkpoint.cli.app import app
from forkpoint.cli.pruning import prunable
from forkpoint.v1 import snapshot_pb2
from tests.unit.client_fake import Fake, fresh_address

NOW = datetime(2026, 5, 1, tzinfo=UTC)


def message(snapshot_id: str, source: str, days_old: int, now: datetime) -> snapshot_pb2.Snapshot:
    made = snapshot_pb2.Snapshot(
        snapshot_id=snapshot_id, source_sandbox_id=source, disk_bytes=1 << 20
    )
    made.create_time.FromDatetime(now - timedelta(days=days_old))
    return made


@given(
    st.lists(st.tuples(st.sampled_from("ab"), st.integers(0, 30)), max_size=20),
    st.none() | st.integers(0, 5),
    st.none() | st.integers(0, 30).map(lambda days: timedelta(days=days)),
)
def test_both_rules_must_let_a_snapshot_go(
    made: list[tuple[str, int]], keep_last: int | None, older_than: timedelta | None
) -> None:
    found = [
        _wire.snapshot(message(f"snap-{number}", source, days, NOW))
        for number, (source, days) in enumerate(made)
    ]
    if keep_last is None and older_than is None:
        with pytest.raises(ValueError, match="--keep-last"):
            prunable(found, keep_last=None, older_than=None, now=NOW)
        return
    going = prunable(found, keep_last=keep_last, older_than=older_than, now=NOW)
    times = [each.create_time or NOW for each in going]
    assert times == sorted(times)
    for source in "ab":
        of_source = [each for each in found if each.source_sandbox_id == source]
        left = [each for each in of_source if each not in going]
        young = [
            each
            for each in of_source
            if older_than is not None and NOW - (each.create_time or NOW) <= older_than
        ]
        assert all(each in left for each in young)
        assert len(left) >= min(len(of_source), keep_last or 0)
        # What goes is older than what stays, but for what is too young to go.
        assert len(left) <= max(keep_last or 0, len(young))


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Fake]:
    server = Fake(fresh_address(tmp_path))
    server.version = forkpoint.__version__
    now = datetime.now(UTC)
    for number in range(5):
        made = message(f"snap-{number}", f"agent-{number % 2}", 10 - number, now)
        server.snapshots[made.snapshot_id] = made
    server.start()
    monkeypatch.setenv("FORKPOINT_ADDRESS", server.address)
    yield server
    server.release()
    server.stop()


def prune(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["snapshot", "prune", *arguments], catch_exceptions=False)


def data(*arguments: str) -> Any:
    result = prune(*arguments, "--json")
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def test_a_dry_run_deletes_nothing(fake: Fake) -> None:
    result = prune("--keep-last", "1", "--dry-run")
    assert result.exit_code == 0
    assert "would delete snap-0 (1 MiB, 10d old)" in result.stdout
    assert "3 snapshots, 3 MiB" in result.output
    assert data("--keep-last", "1", "--dry-run") == {"would_delete": ["snap-0", "snap-1", "snap-2"]}
    assert len(fake.snapshots) == 5


def test_pruning_keeps_what_it_is_told_to(fake: Fake) -> None:
    assert data("--older-than", "9d12h", "--source", "agent-1") == {"deleted": []}
    assert data("--keep-last", "1", "--older-than", "8d12h") == {"deleted": ["snap-0", "snap-1"]}
    assert prune("--keep-last", "1").stdout == "deleted snap-2\n"
    assert list(fake.snapshots) == ["snap-3", "snap-4"]
    assert "nothing to delete" in prune("--keep-last", "9").output


def test_pruning_without_a_rule_is_wrong_usage(fake: Fake) -> None:
    result = prune()
    assert result.exit_code == 2
    assert "--keep-last" in result.output
    assert prune("--older-than", "a while").exit_code == 2
    assert len(fake.snapshots) == 5
