"""Every field of the contract is filled from the model, and nothing of the model is forgotten."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from google.protobuf.message import Message
from hypothesis import given
from hypothesis import strategies as st

from forkpoint.v1 import branch_pb2, fork_pb2, sandbox_pb2, snapshot_pb2
from forkpoint.v1 import sandbox_service_pb2 as pb
from forkpointd import model
from forkpointd.rpc import convert, orders, scalars
from tests.unit.rpc import samples


def unset(message: Message, at: str = "") -> set[str]:
    """Every field, at any depth, that has its default."""
    found = set()
    present = {field.name for field, _ in message.ListFields()}
    for field in message.DESCRIPTOR.fields:
        if field.name not in present:
            found.add(f"{at}{field.name}")
            continue
        value = getattr(message, field.name)
        kind = field.message_type
        if kind is not None and kind.file.package == "forkpoint.v1" and not _is_map(field):
            for each in value if field.is_repeated else [value]:
                found |= unset(each, f"{at}{field.name}.")
    return found


def _is_map(field: Any) -> bool:
    return bool(field.message_type.GetOptions().map_entry)


FULL: dict[Callable[[Any], Message], tuple[Any, set[str]]] = {
    convert.sandbox: (
        samples.sandbox(),
        {"dirty_base.invalid_reason", "memory"},  # GetSandbox adds what is of now
    ),
    convert.snapshot: (samples.snapshot(), set()),
    convert.branch: (
        samples.branch_view(),
        {
            "pause_window.was_paused",
            "fork.children.error",
            "fork.children.start_duration",
        },
    ),
    convert.fork: (samples.fork(), {"children.error", "children.start_duration"}),
    convert.server_info: (samples.facts(), set()),
}


@pytest.mark.parametrize("convert_one", FULL, ids=lambda it: it.__name__)
def test_a_full_object_fills_every_field(convert_one: Callable[[Any], Message]) -> None:
    it, empty = FULL[convert_one]
    assert unset(convert_one(it)) == empty


KEPT_INSIDE = {
    model.Sandbox: {
        "boot",  # where it came from is the operator's; what it is, is shown by machine
        "last_diff_bytes",
        "process",  # but its pid
        "machine",  # vcpus, memory_mib, drives
        "ttl_seconds",  # ttl
    },
    model.Snapshot: {"machine", "deleted"},
    model.Branch: {
        "snapshot_labels",  # the snapshot has them
        "max_pause_us",
        "staging_serial",
        "staging",  # the window has it
        "base_snapshot_id",  # parent_snapshot_id of the snapshot
        "fork_id",  # the fork is there whole
        "predicted_pause_us",  # predicted_pause
    },
    model.Fork: {"spec"},  # its count and on_failure; the rest is seen at the children
    model.ForkChild: {"start_us"},
    model.PauseWindow: {"total_us", "pause_us", "snapshot_us", "resume_us", "drive_clone_us"},
    model.PrecopyProgress: set(),
    model.MergeProgress: set(),
    model.SandboxExit: {"time"},
    model.DirtyBase: {"unmerged"},
    model.Drive: set(),
    model.HostCheck: set(),
    model.ServerFacts: set(),
    model.MemoryUse: set(),
    model.VmmVersion: set(),
    model.StageEntry: set(),
}
"""What the model has under no name or another name in the contract."""

MESSAGES = {
    model.SandboxExit: "SandboxExit",
    model.VmmVersion: "Vmm",
    model.StageEntry: "BranchStageEntry",
    model.ServerFacts: "GetServerInfoResponse",
}


@pytest.mark.parametrize("kind", KEPT_INSIDE, ids=lambda it: it.__name__)
def test_what_the_model_has_is_shown_or_left_out_on_purpose(kind: Any) -> None:
    from forkpoint.v1 import server_service_pb2

    name = MESSAGES.get(kind, kind.__name__)
    modules = (sandbox_pb2, snapshot_pb2, branch_pb2, fork_pb2, server_service_pb2)
    [message] = [getattr(each, name) for each in modules if hasattr(each, name)]
    attributes = {each.name for each in dataclasses.fields(kind)}
    fields = {each.name for each in message.DESCRIPTOR.fields}
    assert attributes - fields == KEPT_INSIDE[kind]


def test_a_sandbox_that_was_just_admitted_has_little() -> None:
    it = model.Sandbox(
        "a",
        model.SandboxState.CREATING,
        model.WishedState.RUNNING,
        model.Machine(1, 16),
        samples.VMM,
        samples.T0,
    )
    shown = convert.sandbox(it)
    for absent in ("ttl", "expire_time", "exit", "start_time"):
        assert not shown.HasField(absent), absent
    assert shown.pid == 0
    assert shown.snapshot_id == ""
    assert shown.on_expiry == sandbox_pb2.EXPIRY_ACTION_DELETE
    assert shown.dirty_base == sandbox_pb2.DirtyBase(state=sandbox_pb2.DIRTY_BASE_STATE_VALID)


def test_an_invalid_base_says_why_and_names_no_snapshot() -> None:
    base = dataclasses.replace(model.DirtyBase.of("s"), state=model.DirtyBaseState.INVALID)
    shown = convert.dirty_base(dataclasses.replace(base, invalid_reason="the diff is gone"))
    assert (shown.snapshot_id, shown.invalid_reason) == ("", "the diff is gone")


def test_successive_messages_of_a_fork_are_those_that_stand_alone() -> None:
    children = tuple(model.ForkChild(f"f-{index}") for index in range(5))
    states = [samples.fork("f", children=(), sequence=1)]
    for sequence, index in enumerate([0, 3, 1, 4, 2], start=2):
        done = model.ForkChild(f"f-{index}", model.ForkChildState.READY, None, sequence)
        if index == 1:
            done = model.ForkChild(f"f-{index}", model.ForkChildState.FAILED, samples.problem())
        children = (*children[:index], done, *children[index + 1 :])
        states.append(samples.fork("f", children=children, sequence=sequence, error=None))
    deleted = tuple(model.ForkChild(each.sandbox_id) for each in children)
    states += [samples.fork("f", children=deleted), samples.fork("f", children=deleted[:2])]
    messages = convert.ForkMessages()
    kept = [messages.message(state) for state in states]
    assert kept == [convert.fork(state) for state in states]
    views = [model.BranchView(samples.branch(), None, state) for state in states]
    forks = convert.ForkMessages()
    assert [convert.branch(view, forks) for view in views] == [convert.branch(it) for it in views]


def test_a_queued_branch_has_no_mode_and_no_parts() -> None:
    it = samples.branch(
        mode=None,
        precopy=None,
        pause_window=None,
        merge=None,
        error=None,
        end_time=None,
        predicted_pause_us=None,
    )
    shown = convert.branch(model.BranchView(it))
    assert shown.mode == snapshot_pb2.BRANCH_MODE_UNSPECIFIED
    for absent in (
        "precopy",
        "pause_window",
        "merge",
        "snapshot",
        "fork",
        "error",
        "end_time",
        "predicted_pause",
    ):
        assert not shown.HasField(absent), absent


def test_the_last_words_are_the_last_and_at_most_4_kib() -> None:
    words = "first" + "ü" * 4000 + "last"
    shown = convert.sandbox_exit(model.SandboxExit(samples.T0, 1, 0, words)).last_words
    assert shown.endswith("ülast")
    assert 4090 < len(shown.encode()) <= 4096


def test_names_that_are_no_text_are_shown_escaped() -> None:
    path = Path(b"/images/\xff.img".decode("utf-8", "surrogateescape"))
    assert convert.drive(model.Drive("d", path)).path == "/images/\\udcff.img"


def test_a_naive_instant_is_a_fault() -> None:
    with pytest.raises(ValueError, match="no time zone"):
        scalars.timestamp(datetime(2026, 1, 1))  # noqa: DTZ001


@given(st.integers(-(2**53), 2**53))
def test_micros_survive_a_duration(micros: int) -> None:
    span = scalars.duration(micros)
    assert scalars.micros(span) == micros
    assert span.ToMicroseconds() == micros
    assert span.seconds * span.nanos >= 0


@given(st.integers(0, 365 * 86_400 * 1_000_000))
def test_a_ttl_survives_to_the_microsecond(micros: int) -> None:
    as_model = scalars.seconds(scalars.duration(micros))
    assert scalars.duration_of_seconds(as_model) == scalars.duration(micros)


@given(st.datetimes(datetime(1, 1, 2), datetime(9999, 12, 30), timezones=st.just(UTC)))  # noqa: DTZ001
def test_instants_survive_to_the_microsecond(instant: datetime) -> None:
    assert scalars.timestamp(instant).ToDatetime(UTC) == instant


@given(st.integers(-(10**12), 10**12), st.integers(1, 999))
def test_what_is_below_a_microsecond_is_cut_towards_zero(micros: int, nanos: int) -> None:
    sign = -1 if micros < 0 else 1
    span = scalars.duration(micros)
    span.nanos += sign * nanos
    if abs(span.nanos) < 1_000_000_000:
        assert scalars.micros(span) == micros


def test_enums_of_both_sides_have_the_same_names_both_ways() -> None:
    maps = [each for each in vars(scalars).values() if isinstance(each, scalars.EnumMap)]
    assert len(maps) == 19
    for each in maps:
        for member, number in each._to_wire.items():
            assert each.to_model(number) is member
            assert each.or_default(number, None) is member
        assert 0 not in each._to_model


def test_enums_that_differ_are_found_at_import() -> None:
    with pytest.raises(TypeError, match="SANDBOX_STATE_CREATING"):
        scalars.EnumMap(model.WishedState, sandbox_pb2.SandboxState)


ids = st.from_regex(model.ID_PATTERN, fullmatch=True)
label_maps = st.dictionaries(st.text(min_size=1, max_size=8), st.text(max_size=8), max_size=3)
ttls = st.none() | st.integers(1_000_000, 10**13).map(lambda it: it / 1_000_000)
fork_specs = st.builds(
    model.ForkSpec,
    st.integers(1, 2**32 - 1),
    st.none() | ids,
    label_maps,
    ttls,
    st.sampled_from(model.ExpiryAction),
    st.sampled_from(model.FailureAction),
)
branch_orders = st.builds(
    model.BranchOrder,
    ids,
    st.none() | ids,
    st.none() | ids,
    st.sampled_from(model.BranchMode),
    st.sampled_from(model.Layout),
    st.none() | st.integers(1, 10**12),
    label_maps,
    st.none() | fork_specs,
)


def spec_message(spec: model.ForkSpec) -> fork_pb2.ForkSpec:
    return fork_pb2.ForkSpec(
        count=spec.count,
        fork_id=spec.fork_id or "",
        labels=spec.labels,
        ttl=scalars.duration_of_seconds(spec.ttl_seconds),
        on_expiry=scalars.EXPIRY_ACTION.to_wire(spec.on_expiry),
        on_failure=scalars.FAILURE_ACTION.to_wire(spec.on_failure),
    )


@given(branch_orders)
def test_branch_orders_survive_the_wire(order: model.BranchOrder) -> None:
    request = pb.BranchSandboxRequest(
        sandbox_id=order.sandbox_id,
        branch_id=order.branch_id or "",
        snapshot_id=order.snapshot_id or "",
        mode=scalars.BRANCH_MODE.to_wire(order.mode),
        layout=scalars.LAYOUT.to_wire(order.layout),
        max_pause=scalars.optional_duration(order.max_pause_us),
        labels=order.labels,
        fork=None if order.fork is None else spec_message(order.fork),
    )
    decoded = pb.BranchSandboxRequest.FromString(request.SerializeToString())
    assert orders.branch_order(decoded) == order


@given(ids, fork_specs)
def test_fork_orders_survive_the_wire(snapshot_id: str, spec: model.ForkSpec) -> None:
    request = pb.ForkSandboxesRequest(snapshot_id=snapshot_id, fork=spec_message(spec))
    decoded = pb.ForkSandboxesRequest.FromString(request.SerializeToString())
    assert orders.fork_order(decoded) == model.ForkOrder(snapshot_id, spec)


instants = st.integers(0, 10**15).map(lambda it: samples.T0 + timedelta(microseconds=it % 10**13))
spans = st.integers(0, 10**10)


@given(
    st.builds(
        model.PauseWindow,
        instants,
        spans,
        spans,
        spans,
        spans,
        st.integers(0, 2**63),
        st.sampled_from(model.StagingKind),
        st.booleans(),
    )
)
def test_pause_windows_survive_the_wire(window: model.PauseWindow) -> None:
    message = branch_pb2.PauseWindow.FromString(convert.pause_window(window).SerializeToString())
    back = model.PauseWindow(
        message.start_time.ToDatetime(UTC),
        message.total.ToMicroseconds(),
        message.pause.ToMicroseconds(),
        message.snapshot.ToMicroseconds(),
        message.resume.ToMicroseconds(),
        message.dirty_bytes,
        scalars.STAGING_KIND.to_model(message.staging),
        message.was_paused,
    )
    assert back == window
    assert message.vmm_total.ToMicroseconds() == window.vmm_total_us
