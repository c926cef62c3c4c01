"""What is refused at the edge: one table of rules, and all wrong fields of a request at once.

The table has a line for every field of every request, so that a new field can't be forgotten (a
test compares it with the contract). Beyond the table, any enum value that this contract doesn't
know is wrong.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

from google.protobuf.descriptor import EnumDescriptor, FieldDescriptor
from google.protobuf.message import Message

from forkpointd.model import FieldViolation
from forkpointd.rpc import rules
from forkpointd.rpc.rules import Limits, Rule, anything
from forkpointd.rpc.status import invalid_fields


@dataclass(frozen=True, slots=True)
class Required:
    """A field that must be there and not empty."""

    rule: Rule = anything


@dataclass(frozen=True, slots=True)
class OneOf:
    """A choice that must be made."""

    names: tuple[str, ...]


_ID = rules.identifier
_NEEDED_ID = Required(rules.identifier)
_ONE_SANDBOX: Mapping[str, Rule | Required] = {"sandbox_id": _NEEDED_ID}
_ONE_BRANCH: Mapping[str, Rule | Required] = {"branch_id": _NEEDED_ID}
_ONE_FORK: Mapping[str, Rule | Required] = {"fork_id": Required(rules.fork_identifier)}
_ONE_SNAPSHOT: Mapping[str, Rule | Required] = {"snapshot_id": _NEEDED_ID}
_PAGE: Mapping[str, Rule | Required] = {
    "page_size": rules.at_most(rules.MAX_PAGE_SIZE),
    "page_token": rules.page_token,
}
_START: Mapping[str, Rule | Required] = {"from_offset": anything, "tail_bytes": anything}

TABLE: Mapping[str, Mapping[str, Rule | Required]] = {
    "CreateSandboxRequest": {
        "request_id": rules.request_identifier,
        "sandbox_id": _ID,
        "boot": anything,
        "snapshot_id": _NEEDED_ID,
        "labels": rules.labels,
        "ttl": rules.ttl,
        "on_expiry": anything,
        "allow_drive_copy": anything,
    },
    "BootSource": {
        "kernel_image": Required(rules.path),
        "initrd": rules.path,
        "boot_args": rules.boot_args,
        "vcpus": rules.at_most(rules.MAX_VCPUS),
        "memory_mib": Required(rules.memory_mib),
        "drives": rules.drive_list,
    },
    "Drive": {
        "drive_id": Required(rules.drive_identifier),
        "path": Required(rules.path),
        "read_only": anything,
        "root_device": anything,
    },
    "GetSandboxRequest": _ONE_SANDBOX,
    "ListSandboxesRequest": {**_PAGE, "labels": rules.labels, "states": anything},
    "UpdateSandboxRequest": {
        **_ONE_SANDBOX,
        "update_mask": Required(rules.update_mask("labels", "ttl", "on_expiry")),
        "labels": rules.labels,
        "ttl": rules.ttl,
        "on_expiry": anything,
    },
    "DeleteSandboxRequest": _ONE_SANDBOX,
    "PauseSandboxRequest": _ONE_SANDBOX,
    "ResumeSandboxRequest": _ONE_SANDBOX,
    "BranchSandboxRequest": {
        "request_id": rules.request_identifier,
        **_ONE_SANDBOX,
        "branch_id": _ID,
        "snapshot_id": _ID,
        "mode": anything,
        "layout": anything,
        "durability": anything,
        "max_pause": rules.max_pause,
        "labels": rules.labels,
        "fork": anything,
        "allow_drive_copy": anything,
    },
    "ForkSpec": {
        "count": Required(rules.fork_count),
        "fork_id": rules.fork_identifier,
        "labels": rules.labels,
        "ttl": rules.ttl,
        "on_expiry": anything,
        "on_failure": anything,
        "allow_drive_copy": anything,
    },
    "WatchBranchRequest": {**_ONE_BRANCH, "after_sequence": anything},
    "GetBranchRequest": _ONE_BRANCH,
    "ListBranchesRequest": {**_PAGE, "sandbox_id": _ID, "stages": anything},
    "CancelBranchRequest": _ONE_BRANCH,
    "ForkSandboxesRequest": {
        "request_id": rules.request_identifier,
        **_ONE_SNAPSHOT,
        "fork": Required(),
    },
    "WatchForkRequest": {**_ONE_FORK, "after_sequence": anything},
    "GetForkRequest": _ONE_FORK,
    "AttachConsoleRequest": {"attach": anything, "input": rules.console_input},
    "ConsoleAttach": {**_ONE_SANDBOX, **_START, "read_only": anything},
    "ReadConsoleRequest": {**_ONE_SANDBOX, **_START, "follow": anything},
    "WriteConsoleRequest": {**_ONE_SANDBOX, "data": rules.console_input},
    "GetSnapshotRequest": _ONE_SNAPSHOT,
    "ListSnapshotsRequest": {**_PAGE, "labels": rules.labels, "source_sandbox_id": _ID},
    "UpdateSnapshotRequest": {
        **_ONE_SNAPSHOT,
        "update_mask": Required(rules.update_mask("labels")),
        "labels": rules.labels,
    },
    "DeleteSnapshotRequest": _ONE_SNAPSHOT,
    "FlattenSnapshotRequest": _ONE_SNAPSHOT,
    "VerifySnapshotRequest": _ONE_SNAPSHOT,
    "ExportSnapshotRequest": {
        **_ONE_SNAPSHOT,
        "layout": anything,
        "level": rules.at_most(rules.MAX_ARCHIVE_LEVEL),
    },
    "ImportSnapshotRequest": {"options": anything, "data": anything},
    "ImportOptions": {
        "request_id": rules.request_identifier,
        "snapshot_id": _ID,
        "labels": rules.labels,
    },
    "GetServerInfoRequest": {},
}
"""The rule of each field, by message. A rule is asked where the field is there and not empty; a
field that is a message of this table is looked into as well."""

CHOICES: Mapping[str, OneOf] = {
    "CreateSandboxRequest": OneOf(("boot", "snapshot_id")),
    "AttachConsoleRequest": OneOf(("attach", "input")),
    "ImportSnapshotRequest": OneOf(("options", "data")),
}
"""Oneofs that must be set."""


def check(request: Message, limits: Limits, *more: FieldViolation) -> None:
    """Raises INVALID_FIELD with all wrong fields of a request; `more` was found elsewhere."""
    found = (*violations(request, limits), *more)
    if found:
        raise invalid_fields(found)


def violations(message: Message, limits: Limits, at: str = "") -> Iterator[FieldViolation]:
    """Every wrong field of a message, in the contract's order; `at` is the path to it."""
    table = TABLE[message.DESCRIPTOR.name]
    choice = CHOICES.get(message.DESCRIPTOR.name)
    if choice and not any(message.HasField(name) for name in choice.names):
        yield FieldViolation(f"{at}{choice.names[0]}", f"give one of {', '.join(choice.names)}")
    for field in cast("Sequence[FieldDescriptor]", message.DESCRIPTOR.fields):
        value = getattr(message, field.name)
        where = f"{at}{field.name}"
        wrong = _wrong(message, field, value, table[field.name], limits)
        if wrong:
            yield FieldViolation(where, wrong)
        for place, part in _parts(message, field, value):
            yield from violations(part, limits, f"{where}{place}.")


def _wrong(
    message: Message,
    field: FieldDescriptor,
    value: Any,
    line: Rule | Required,
    limits: Limits,
) -> str | None:
    needed = isinstance(line, Required)
    rule = line.rule if isinstance(line, Required) else line
    if field.has_presence:  # messages, and what is in a oneof
        if not message.HasField(field.name):
            return "is required" if needed and field.containing_oneof is None else None
        if needed and field.message_type is None and not value:
            return "is required"
    elif not value:
        return _why_needed(rule, value, limits) if needed else None
    if field.enum_type is not None:
        return _unknown_enum(field.enum_type, value)
    return rule(value, limits)


def _why_needed(rule: Rule, value: Any, limits: Limits) -> str:
    """0 and the like break the rule too, whose words then say what would be right."""
    return (rule(value, limits) if isinstance(value, int) else None) or "is required"


def _unknown_enum(enum: EnumDescriptor, value: Any) -> str | None:
    if isinstance(value, int):
        numbers = [value]
        known = set(enum.values_by_number)
    else:
        numbers = list(value)
        known = set(enum.values_by_number) - {0}
    wrong = sorted(set(numbers) - known)
    if not wrong:
        return None
    names = ", ".join(each.name for each in enum.values if each.number in known)
    return f"{', '.join(map(str, wrong[:8]))} is none of {names}"


def _parts(message: Message, field: FieldDescriptor, value: Any) -> Iterator[tuple[str, Message]]:
    """The messages of our own in a field, each with its place."""
    kind = field.message_type
    if kind is None or kind.name not in TABLE or kind.file.package != "forkpoint.v1":
        return
    if field.is_repeated:
        yield from ((f"[{index}]", each) for index, each in enumerate(value[: rules.MAX_DRIVES]))
    elif message.HasField(field.name):
        yield "", value
