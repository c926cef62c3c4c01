"""How the words of the model lie in the registry: every one comes back as it went in, and what is
no such word is refused in both directions."""

import sqlite3
import typing
from collections.abc import Iterator
from dataclasses import fields, is_dataclass, replace
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from forkpointd.model import (
    DirtyBase,
    Drive,
    ForkChild,
    ForkSpec,
    Machine,
    PauseWindow,
    Problem,
    Reason,
    RememberedRequest,
    SandboxState,
    StagingKind,
    UnmergedDiff,
)
from forkpointd.registry.codec import (
    CodecError,
    codec_of,
    instant_text,
    parse_instant,
)
from forkpointd.registry.errors import RegistryDamaged
from forkpointd.registry.rows import BRANCHES, CHILDREN, FORKS, REQUESTS, SANDBOXES, SNAPSHOTS
from forkpointd.registry.schema import migrate
from forkpointd.registry.tables import Table
from tests.unit.registry_making import START, anything, at, branch, fork, sandbox, snapshot

EXTRA_COLUMNS = {
    "sandboxes": {"needed_snapshot_id"},
    "branches": {"sequence_limit"},
    "forks": {"sequence_limit"},
    "fork_children": {"fork_id", "child_index"},
    "requests": {"resource_kind", "create_time"},
}
ELSEWHERE: dict[str, dict[str, Any]] = {
    "forks": {"children": (), "flatten": None},
    "snapshots": {"room": None},
}
"""What of a model no column of its table holds."""
MORE: dict[str, dict[str, Any]] = {
    "branches": {"sequence_limit": 0},
    "forks": {"sequence_limit": 0},
    "fork_children": {"fork_id": "f", "child_index": 0},
    "requests": {"resource_kind": "FORK", "create_time": ""},
}
TABLES: list[Table[Any]] = [SANDBOXES, SNAPSHOTS, BRANCHES, FORKS, CHILDREN, REQUESTS]
by_name = pytest.mark.parametrize("table", TABLES, ids=lambda table: table.name)


@pytest.fixture
def connection() -> Iterator[sqlite3.Connection]:
    connection = sqlite3.connect(":memory:", isolation_level=None)
    migrate(connection)
    yield connection
    connection.close()


def kind_of(table: Table[Any]) -> Any:
    return {
        "sandboxes": type(sandbox()),
        "snapshots": type(snapshot()),
        "branches": type(branch()),
        "forks": type(fork()),
        "fork_children": ForkChild,
        "requests": RememberedRequest,
    }[table.name]


def nested_kinds(hint: Any) -> set[Any]:
    found = set()
    if is_dataclass(hint):
        found.add(hint)
        for inner in typing.get_type_hints(hint).values():
            found |= nested_kinds(inner)
    for inner in typing.get_args(hint):
        found |= nested_kinds(inner)
    return found


NESTED = sorted(
    {kind for table in TABLES for kind in nested_kinds(kind_of(table))},
    key=lambda kind: str(kind.__name__),
)


@by_name
@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_every_row_comes_back_as_it_went_in(
    table: Table[Any], connection: sqlite3.Connection, data: st.DataObject
) -> None:
    kind = kind_of(table)
    elsewhere = ELSEWHERE.get(table.name, {})
    first, second = (
        replace(data.draw(anything(kind)), **elsewhere, **{table.key: "the-id"}) for _ in range(2)
    )
    connection.execute(f"DELETE FROM {table.name}")
    connection.execute(
        "INSERT OR IGNORE INTO forks VALUES ('f','s',1,1,'READY','','',NULL,NULL,'')"
    )

    def stored() -> Any:
        row = connection.execute(f"{table.select} WHERE {table.key} = 'the-id'").fetchone()
        return table.decode(row, **elsewhere)

    table.insert(connection, [first], **MORE.get(table.name, {}))
    assert stored() == first
    assert table.update(connection, second)
    assert stored() == second


@pytest.mark.parametrize("kind", NESTED, ids=lambda kind: str(kind.__name__))
@settings(max_examples=15, deadline=None)
@given(data=st.data())
def test_every_nested_word_comes_back_as_it_went_in(kind: Any, data: st.DataObject) -> None:
    value = data.draw(anything(kind))
    text = codec_of(kind).to_json(value)
    assert text.isascii()
    assert codec_of(kind).from_json(text) == value


def test_the_nested_words_are_all_there() -> None:
    """Guards the two tests above against testing less than there is."""
    assert {kind.__name__ for kind in NESTED} >= {
        *("Boot", "Branch", "DirtyBase", "Drive", "FieldViolation", "Fork", "ForkChild"),
        *("ForkSpec", "Machine", "MergeProgress", "PauseWindow", "PrecopyProgress", "Problem"),
        *("ProcessRecord", "RememberedRequest", "Sandbox", "SandboxExit", "Snapshot"),
        *("StageEntry", "UnmergedDiff", "VmmVersion"),
    }


@by_name
def test_the_columns_are_the_words_of_the_model(
    table: Table[Any], connection: sqlite3.Connection
) -> None:
    columns = {row[1] for row in connection.execute(f"PRAGMA table_xinfo({table.name})")}
    words = {each.name for each in fields(kind_of(table))} - set(ELSEWHERE.get(table.name, {}))
    assert columns == words | EXTRA_COLUMNS.get(table.name, set())


def test_what_lies_in_the_file_stays_readable_by_later_releases() -> None:
    """The stored form, literally: who changes it has to write a migration."""
    problem = Problem(Reason.NO_DISK_SPACE, "full", {"a": "b"}, (), 1.5)
    assert codec_of(Problem).to_json(problem) == (
        '{"reason":"NO_DISK_SPACE","message":"full","metadata":{"a":"b"},"fields":[],'
        '"retry_after_seconds":1.5}'
    )
    window = PauseWindow(START, 5, 1, 2, 1, 4096, StagingKind.TMPFS)
    before_drives = (
        '{"start_time":"2025-01-31T12:00:00.000005Z","total_us":5,"pause_us":1,"snapshot_us":2,'
        '"resume_us":1,"dirty_bytes":4096,"staging":"TMPFS","was_paused":false}'
    )
    assert codec_of(PauseWindow).from_json(before_drives) == window
    assert codec_of(PauseWindow).to_json(window) == (
        before_drives.removesuffix("}") + ',"drive_clone_us":0}'
    )
    row = SANDBOXES.encode(sandbox(dirty_base=DirtyBase.of("snap-1"), ttl_seconds=60))
    assert (row["state"], row["create_time"]) == ("RUNNING", "2025-01-31T12:00:00.000005Z")
    assert row["machine"] == '{"vcpus":1,"memory_mib":128,"drives":[]}'
    assert row["dirty_base"] == (
        '{"state":"VALID","snapshot_id":"snap-1","branch_id":null,"unmerged":[],'
        '"invalid_reason":""}'
    )
    assert (row["ttl_seconds"], row["boot"]) == (60.0, None)


def test_a_field_added_with_a_default_may_be_missing_in_what_is_stored() -> None:
    assert codec_of(Machine).from_json('{"vcpus":1,"memory_mib":64}') == Machine(1, 64, ())


@pytest.mark.parametrize(
    ("text", "hint", "complaint"),
    [
        ('{"vcpus":1}', Machine, "missing .*memory_mib"),
        ('{"vcpus":1,"memory_mib":64,"cpus":2}', Machine, "unknown fields .*cpus"),
        ('{"vcpus":true,"memory_mib":64}', Machine, "vcpus: True is no int"),
        ('{"vcpus":1.0,"memory_mib":64}', Machine, "vcpus: 1.0 is no int"),
        ('{"vcpus":1,"vcpus":2,"memory_mib":64}', Machine, "twice"),
        ('{"vcpus":1,"memory_mib":64,"drives":{}}', Machine, "no array"),
        ("[]", Machine, "no Machine"),
        ("null", Machine, "no Machine"),
        ('{"state":"FINE"}', DirtyBase, "state: 'FINE' is no DirtyBaseState"),
        ('{"count":1,"ttl_seconds":NaN}', ForkSpec, "NaN is no number"),
        ('{"count":1,"ttl_seconds":1e999}', ForkSpec, "not finite"),
        ('{"count":1,"ttl_seconds":true}', ForkSpec, "no number"),
        ('{"count":1,"labels":{"a":1}}', ForkSpec, "1 is no text"),
        ('{"count":1,"labels":[]}', ForkSpec, "no object"),
        ("{", Machine, "not JSON"),
        ("[" * 100_000, Machine, "nested too deeply"),
    ],
)
def test_what_is_stored_wrongly_is_refused(text: str, hint: Any, complaint: str) -> None:
    with pytest.raises(CodecError, match=complaint):
        codec_of(hint).from_json(text)


@pytest.mark.parametrize(
    ("value", "hint"),
    [
        (Machine(True, 1), Machine),
        (Machine(1, 1.0), Machine),  # type: ignore[arg-type]
        (Machine(1, 1, [Drive("a", Path("/a"))]), Machine),  # type: ignore[arg-type]
        (Drive("a", "/a"), Drive),  # type: ignore[arg-type]
        (Drive(b"a", Path("/a")), Drive),  # type: ignore[arg-type]
        (ForkSpec(1, ttl_seconds=float("nan")), ForkSpec),
        (ForkSpec(1, labels={"a": 1}), ForkSpec),  # type: ignore[dict-item]
        (ForkSpec(1, labels=[("a", "b")]), ForkSpec),  # type: ignore[arg-type]
        (DirtyBase("VALID"), DirtyBase),  # type: ignore[arg-type]
        (DirtyBase.empty(), Machine),
        (Machine(1, 1, (None,)), Machine),  # type: ignore[arg-type]
    ],
)
def test_what_does_not_fit_its_type_is_not_stored(value: Any, hint: Any) -> None:
    with pytest.raises(CodecError):
        codec_of(hint).to_json(value)


@pytest.mark.parametrize("hint", [set[str], dict[str, int], tuple[int, str], int | str, "Machine"])
def test_a_type_without_a_stored_form_is_an_error_of_the_program(hint: Any) -> None:
    with pytest.raises(TypeError, match="no codec"):
        codec_of(hint)


# --- instants ---


def test_an_instant_is_stored_in_utc_whatever_its_zone() -> None:
    east = datetime(2025, 1, 31, 14, 0, 0, 5, timezone(timedelta(hours=2)))
    assert instant_text(east) == instant_text(START) == "2025-01-31T12:00:00.000005Z"


def test_an_instant_without_a_zone_is_refused() -> None:
    with pytest.raises(CodecError, match="no time zone"):
        instant_text(datetime(2025, 1, 31))  # noqa: DTZ001  # that is what is tested


@given(st.lists(anything(datetime), max_size=8))
def test_the_order_of_texts_is_the_order_of_time(instants: list[datetime]) -> None:
    assert sorted(instants) == [parse_instant(t) for t in sorted(map(instant_text, instants))]


@pytest.mark.parametrize(
    "text", ["", "2025-01-31", "2025-01-31T12:00:00.000005+", "2025-13-31T12:00:00.000005Z"]
)
def test_a_text_that_is_no_instant_is_refused(text: str) -> None:
    with pytest.raises(CodecError, match="no instant"):
        parse_instant(text)


# --- columns ---


def test_a_damaged_row_is_named(connection: sqlite3.Connection) -> None:
    SANDBOXES.insert(connection, [sandbox("sb-9")])
    connection.execute("UPDATE sandboxes SET state = 'FLYING'")
    with pytest.raises(RegistryDamaged, match=r"column state of 'sb-9' in table sandboxes.*FLYING"):
        SANDBOXES.get(connection, "sb-9")


def test_a_number_where_json_text_should_be_is_named(connection: sqlite3.Connection) -> None:
    SNAPSHOTS.insert(connection, [snapshot("snap-9")])
    connection.execute("UPDATE snapshots SET labels = x'00'")
    with pytest.raises(RegistryDamaged, match=r"column labels of 'snap-9'.*no JSON text"):
        SNAPSHOTS.get(connection, "snap-9")


def test_a_flag_is_0_or_1(connection: sqlite3.Connection) -> None:
    SNAPSHOTS.insert(connection, [snapshot("snap-9")])
    connection.execute("UPDATE snapshots SET deleted = 2")
    with pytest.raises(RegistryDamaged, match="neither 0 nor 1"):
        SNAPSHOTS.get(connection, "snap-9")


def test_a_number_that_no_column_holds_is_refused(connection: sqlite3.Connection) -> None:
    with pytest.raises(CodecError, match="last_diff_bytes"):
        SANDBOXES.insert(connection, [sandbox(last_diff_bytes=2**63)])


def test_a_message_with_a_path_that_is_no_utf8_never_keeps_a_row_from_being_stored(
    connection: sqlite3.Connection,
) -> None:
    path = b"/images/\xff".decode("utf-8", "surrogateescape")
    diff = UnmergedDiff(Path(path), Path(path + ".extents"), 1, "br-1")
    source = sandbox(dirty_base=replace(DirtyBase.empty(), unmerged=(diff,)))
    SANDBOXES.insert(connection, [source])
    BRANCHES.insert(connection, [branch(mode_reason=path)], sequence_limit=1)
    assert SANDBOXES.get(connection, "sb-1") == source
    stored = BRANCHES.get(connection, "br-1")
    assert stored is not None and stored.mode_reason == "/images/\\udcff"


def test_microseconds_survive(connection: sqlite3.Connection) -> None:
    SANDBOXES.insert(connection, [sandbox(start_time=at(0.000001))])
    stored = SANDBOXES.get(connection, "sb-1")
    assert stored is not None and stored.start_time == datetime(2025, 1, 31, 12, 0, 0, 6, UTC)
    assert stored.state is SandboxState.RUNNING
