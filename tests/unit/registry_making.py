"""Objects for the registry's tests: plain ones, and any that the types allow."""

import types
import typing
from collections.abc import Mapping
from dataclasses import fields, is_dataclass, replace
from datetime import UTC, datetime, timedelta
from enum import StrEnum
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

from forkpointd.model import (
    Branch,
    BranchMode,
    BranchStage,
    Fork,
    ForkChild,
    ForkSpec,
    ForkStage,
    Layout,
    Machine,
    RequestKey,
    Sandbox,
    SandboxState,
    Snapshot,
    StageEntry,
    VmmKind,
    VmmVersion,
    WishedState,
)

START = datetime(2025, 1, 31, 12, 0, 0, 5, UTC)
MACHINE = Machine(vcpus=1, memory_mib=128)
VMM = VmmVersion(VmmKind.FIRECRACKER, "1.12.1")


def at(seconds: float) -> datetime:
    return START + timedelta(seconds=seconds)


def sandbox(sandbox_id: str = "sb-1", **changes: Any) -> Sandbox:
    plain = Sandbox(
        sandbox_id=sandbox_id,
        state=SandboxState.RUNNING,
        wished_state=WishedState.RUNNING,
        machine=MACHINE,
        vmm=VMM,
        create_time=START,
    )
    return replace(plain, **changes)


def snapshot(snapshot_id: str = "snap-1", **changes: Any) -> Snapshot:
    plain = Snapshot(
        snapshot_id=snapshot_id,
        create_time=START,
        source_sandbox_id="sb-1",
        branch_id="br-1",
        parent_snapshot_id=None,
        mode=BranchMode.DIFF,
        layout=Layout.FLAT,
        machine=MACHINE,
        vmm=VMM,
        disk_bytes=4096,
        dirty_bytes=4096,
    )
    return replace(plain, **changes)


def branch(branch_id: str = "br-1", **changes: Any) -> Branch:
    stage: BranchStage = changes.get("stage", BranchStage.QUEUED)
    plain = Branch(
        branch_id=branch_id,
        sandbox_id="sb-1",
        snapshot_id=f"snap-of-{branch_id}",
        sequence=1,
        stage=stage,
        stages=(StageEntry(stage, START),),
        requested_mode=BranchMode.AUTO,
        requested_layout=Layout.AUTO,
        layout=Layout.FLAT,
        create_time=START,
        end_time=START if stage.ended else None,
    )
    return replace(plain, **changes)


def fork(fork_id: str = "fork-1", count: int = 2, **changes: Any) -> Fork:
    stage: ForkStage = changes.get("stage", ForkStage.QUEUED)
    plain = Fork(
        fork_id=fork_id,
        snapshot_id="snap-1",
        sequence=1,
        stage=stage,
        spec=ForkSpec(count=count, fork_id=fork_id),
        children=tuple(ForkChild(f"{fork_id}-{index}") for index in range(count)),
        create_time=START,
        end_time=START if stage.ended else None,
    )
    return replace(plain, **changes)


def key(request_id: str = "req-1", method: str = "M", fingerprint: str = "f") -> RequestKey:
    return RequestKey(request_id, method, fingerprint)


# --- anything that the types allow ---

_INT64 = st.integers(-(2**63), 2**63 - 1)
_INSTANTS = st.builds(
    lambda microseconds, zone: (datetime(1970, 1, 1, tzinfo=UTC) + microseconds).astimezone(zone),
    st.timedeltas(timedelta(0), timedelta(days=2_900_000)),
    st.timezones(),
).map(lambda instant: instant.astimezone(UTC))
# Bytes, as paths are: also those that are no UTF-8.
_PATHS = st.binary(min_size=1, max_size=30).map(
    lambda name: Path("/" + name.replace(b"\0", b"").decode("utf-8", "surrogateescape"))
)


def anything(hint: Any) -> st.SearchStrategy[Any]:
    """Values of a type of the model."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return st.one_of(st.none(), *(anything(a) for a in arguments if a is not types.NoneType))
    if origin is tuple:
        return st.lists(anything(arguments[0]), max_size=3).map(tuple)
    if origin is not None and issubclass(origin, Mapping):
        return st.dictionaries(st.text(max_size=10), st.text(max_size=10), max_size=3)
    if issubclass(hint, StrEnum):
        return st.sampled_from(list(hint))
    if is_dataclass(hint):
        hints = typing.get_type_hints(hint)
        return st.builds(
            typing.cast("Any", hint),
            **{each.name: anything(hints[each.name]) for each in fields(hint)},
        )
    simple: dict[Any, st.SearchStrategy[Any]] = {
        str: st.text(max_size=20),
        int: _INT64,
        bool: st.booleans(),
        float: st.floats(allow_nan=False, allow_infinity=False),
        datetime: _INSTANTS,
        Path: _PATHS,
    }
    return simple[hint]
