"""What is refused at the edge, with all wrong fields at once and a word on what would be right."""

from __future__ import annotations

from typing import Any

import pytest
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass

from forkpoint.v1 import (
    fork_pb2,
    sandbox_pb2,
    sandbox_service_pb2,
    server_service_pb2,
    snapshot_service_pb2,
)
from forkpoint.v1 import sandbox_service_pb2 as pb
from forkpoint.v1 import snapshot_service_pb2 as spb
from forkpointd.model import ForkpointError, Reason
from forkpointd.rpc import rules, validation
from forkpointd.rpc.validation import Required

LIMITS = rules.Limits(max_fork_count=100, max_memory_mib=8192)
GOOD_BOOT: dict[str, Any] = {"kernel_image": "/images/vmlinux", "memory_mib": 256}


def wrong(message: Message) -> dict[str, str]:
    return {each.field: each.description for each in validation.violations(message, LIMITS)}


def request_kinds() -> dict[str, Any]:
    """All messages that clients send, nested ones included."""
    found: dict[str, Any] = {}

    def add(kind: Any) -> None:
        if kind.file.package != "forkpoint.v1" or kind.GetOptions().map_entry:
            return
        found[kind.name] = kind
        for field in kind.fields:
            if field.message_type is not None and field.message_type.name not in found:
                add(field.message_type)

    for module in (sandbox_service_pb2, snapshot_service_pb2, server_service_pb2):
        for service in module.DESCRIPTOR.services_by_name.values():
            for method in service.methods:
                add(method.input_type)
    return found


def test_the_table_has_a_line_for_every_field_that_clients_send() -> None:
    kinds = request_kinds()
    assert {name: set(lines) for name, lines in validation.TABLE.items()} == {
        name: {field.name for field in kind.fields} for name, kind in kinds.items()
    }


@pytest.mark.parametrize("name", sorted(validation.TABLE))
def test_an_empty_request_lacks_exactly_what_is_required(name: str) -> None:
    kind = request_kinds()[name]
    table = validation.TABLE[name]
    choice = validation.CHOICES.get(name)
    expected = {
        field
        for field, line in table.items()
        if isinstance(line, Required) and not kind.fields_by_name[field].containing_oneof
    } | ({choice.names[0]} if choice else set())
    assert set(wrong(GetMessageClass(kind)())) == expected


@pytest.mark.parametrize(
    "bad",
    ["", "A", "7up", "a_b", "a/b", "..", "a" * 64, "agent 7", "-a", "ä", "a\n", "a\0", "agent.7"],
)
def test_ids_that_are_not_ids(bad: str) -> None:
    assert set(wrong(pb.GetSandboxRequest(sandbox_id=bad))) == {"sandbox_id"}
    assert set(wrong(spb.GetSnapshotRequest(snapshot_id=bad))) == {"snapshot_id"}
    assert set(wrong(pb.GetBranchRequest(branch_id=bad))) == {"branch_id"}
    assert set(wrong(pb.GetForkRequest(fork_id=bad))) == {"fork_id"}
    if bad:
        assert set(wrong(pb.BranchSandboxRequest(sandbox_id="a", branch_id=bad))) == {"branch_id"}


@pytest.mark.parametrize("good", ["a", "agent-7", "a" * 63, "a--", "a0"])
def test_ids_that_are_ids(good: str) -> None:
    assert wrong(pb.GetSandboxRequest(sandbox_id=good)) == {}


def test_a_fork_id_is_short_enough_for_its_children() -> None:
    assert wrong(fork_pb2.ForkSpec(count=1, fork_id="f" * 58)) == {}
    assert set(wrong(fork_pb2.ForkSpec(count=1, fork_id="f" * 59))) == {"fork_id"}


@pytest.mark.parametrize(
    ("request_id", "good"),
    [
        ("7c1f8a52-61f3-4f0e-9b0a-3f1f6d0c2a11", True),
        ("7C1F8A52-61F3-4F0E-9B0A-3F1F6D0C2A11", True),
        ("7c1f8a52-61f3-1f0e-9b0a-3f1f6d0c2a11", False),  # version 1
        ("7c1f8a52-61f3-4f0e-cb0a-3f1f6d0c2a11", False),  # another variant
        ("7c1f8a5261f34f0e9b0a3f1f6d0c2a11", False),
        ("{7c1f8a52-61f3-4f0e-9b0a-3f1f6d0c2a11}", False),
        ("hello", False),
    ],
)
def test_a_request_id_is_a_uuid4(request_id: str, good: bool) -> None:
    found = wrong(pb.BranchSandboxRequest(sandbox_id="a", request_id=request_id))
    assert set(found) == (set() if good else {"request_id"})


@pytest.mark.parametrize(
    ("labels", "good"),
    [
        ({"k": ""}, True),
        ({"k" * 63: "v" * 255}, True),
        ({f"k{i}": "v" for i in range(64)}, True),
        ({"ü" * 63: "日" * 255}, True),
        ({"": "v"}, False),
        ({"k" * 64: "v"}, False),
        ({"k": "v" * 256}, False),
        ({f"k{i}": "v" for i in range(65)}, False),
    ],
)
def test_labels(labels: dict[str, str], good: bool) -> None:
    for request in (
        pb.CreateSandboxRequest(snapshot_id="s", labels=labels),
        pb.BranchSandboxRequest(sandbox_id="a", labels=labels),
        pb.ListSandboxesRequest(labels=labels),
        spb.ListSnapshotsRequest(labels=labels),
    ):
        assert set(wrong(request)) == (set() if good else {"labels"})


@pytest.mark.parametrize(
    ("seconds", "nanos", "good"),
    [
        (1, 0, True),
        (365 * 86_400, 0, True),
        (0, 999_999_999, False),
        (365 * 86_400, 1, False),
        (-1, 0, False),
        (5, -1, False),
        (5, 1_000_000_000, False),
        (2**63 - 1, 0, False),
        (-(2**63), 0, False),
        (0, 0, False),
    ],
)
def test_a_time_to_live(seconds: int, nanos: int, good: bool) -> None:
    ttl = Duration(seconds=seconds, nanos=nanos)
    found = wrong(pb.CreateSandboxRequest(snapshot_id="s", ttl=ttl))
    assert set(found) == (set() if good else {"ttl"})


@pytest.mark.parametrize(
    ("micros", "good"), [(999, False), (1000, True), (3_600_000_000, True), (3_600_000_001, False)]
)
def test_max_pause(micros: int, good: bool) -> None:
    request = pb.BranchSandboxRequest(sandbox_id="a")
    request.max_pause.FromMicroseconds(micros)
    assert set(wrong(request)) == (set() if good else {"max_pause"})


@pytest.mark.parametrize(
    ("mib", "good"),
    [(0, False), (15, False), (16, True), (8192, True), (8193, False), (2**64 - 1, False)],
)
def test_memory(mib: int, good: bool) -> None:
    boot = pb.BootSource(**{**GOOD_BOOT, "memory_mib": mib})
    found = wrong(pb.CreateSandboxRequest(boot=boot))
    assert set(found) == (set() if good else {"boot.memory_mib"})
    if not good:
        assert "16 to 8192" in found["boot.memory_mib"]


@pytest.mark.parametrize(("vcpus", "good"), [(0, True), (1, True), (32, True), (33, False)])
def test_vcpus(vcpus: int, good: bool) -> None:
    found = wrong(pb.CreateSandboxRequest(boot=pb.BootSource(**GOOD_BOOT, vcpus=vcpus)))
    assert set(found) == (set() if good else {"boot.vcpus"})


@pytest.mark.parametrize("path", ["", "vmlinux", "./vmlinux", "/a\0b", "/" + "a" * 4095])
def test_paths(path: str) -> None:
    boot = pb.BootSource(**{**GOOD_BOOT, "kernel_image": path})
    assert set(wrong(pb.CreateSandboxRequest(boot=boot))) == {"boot.kernel_image"}


@pytest.mark.parametrize(
    ("args", "good"),
    [
        ("console=ttyS0", True),
        ("a" * 2048, True),
        ("a" * 2049, False),
        ("a\nb", False),
        ("ü", False),
    ],
)
def test_boot_args(args: str, good: bool) -> None:
    found = wrong(pb.CreateSandboxRequest(boot=pb.BootSource(**GOOD_BOOT, boot_args=args)))
    assert set(found) == (set() if good else {"boot.boot_args"})


def drive(drive_id: str = "d", path: str = "/images/d", **more: Any) -> sandbox_pb2.Drive:
    return sandbox_pb2.Drive(drive_id=drive_id, path=path, read_only=True, **more)


@pytest.mark.parametrize(
    ("drives", "bad"),
    [
        ([drive("root_1"), drive("data")], set()),
        ([drive("a-b")], {"boot.drives[0].drive_id"}),
        ([drive(), drive("")], {"boot.drives[1].drive_id"}),
        ([drive("a" * 33)], {"boot.drives[0].drive_id"}),
        ([drive(), drive()], {"boot.drives"}),
        ([drive("a", root_device=True), drive("b", root_device=True)], {"boot.drives"}),
        ([drive(f"d{i}") for i in range(17)], {"boot.drives"}),
        ([drive(path="x")], {"boot.drives[0].path"}),
    ],
)
def test_drives(drives: list[sandbox_pb2.Drive], bad: set[str]) -> None:
    boot = pb.BootSource(**GOOD_BOOT, drives=drives)
    assert set(wrong(pb.CreateSandboxRequest(boot=boot))) == bad


def test_enums_of_a_newer_contract_are_refused() -> None:
    assert set(wrong(pb.BranchSandboxRequest(sandbox_id="a", mode=99))) == {"mode"}  # type: ignore[arg-type]
    assert set(wrong(pb.BranchSandboxRequest(sandbox_id="a", layout=-1))) == {"layout"}  # type: ignore[arg-type]
    found = wrong(pb.ListSandboxesRequest(states=[2, 99]))  # type: ignore[list-item]
    assert set(found) == {"states"}
    assert "99" in found["states"]
    assert "SANDBOX_STATE_RUNNING" in found["states"]


def test_a_filter_for_no_state_is_refused() -> None:
    assert set(wrong(pb.ListBranchesRequest(stages=[0]))) == {"stages"}  # type: ignore[list-item]


def test_page_sizes() -> None:
    assert wrong(pb.ListSandboxesRequest(page_size=1000)) == {}
    assert set(wrong(pb.ListSandboxesRequest(page_size=1001))) == {"page_size"}


@pytest.mark.parametrize(
    ("paths", "good"),
    [
        (["labels"], True),
        (["labels", "ttl", "on_expiry"], True),
        ([], False),
        (["state"], False),
        (["labels", "*"], False),
        ([""], False),
    ],
)
def test_update_masks(paths: list[str], good: bool) -> None:
    request = pb.UpdateSandboxRequest(sandbox_id="a")
    request.update_mask.paths.extend(paths)
    assert set(wrong(request)) == (set() if good else {"update_mask"})


def test_a_snapshots_labels_are_all_that_can_be_changed() -> None:
    request = spb.UpdateSnapshotRequest(snapshot_id="a")
    request.update_mask.paths.append("ttl")
    assert set(wrong(request)) == {"update_mask"}


def test_a_source_must_be_chosen() -> None:
    assert set(wrong(pb.CreateSandboxRequest())) == {"boot"}
    assert set(wrong(pb.CreateSandboxRequest(snapshot_id=""))) == {"snapshot_id"}
    assert wrong(pb.CreateSandboxRequest(snapshot_id="s")) == {}


def test_console_input_is_at_most_32_kib() -> None:
    limit = 32 * 1024
    assert wrong(pb.WriteConsoleRequest(sandbox_id="a", data=b"x" * limit)) == {}
    assert set(wrong(pb.WriteConsoleRequest(sandbox_id="a", data=b"x" * (limit + 1)))) == {"data"}
    assert set(wrong(pb.AttachConsoleRequest(input=b"x" * (limit + 1)))) == {"input"}


def test_all_wrong_fields_are_told_at_once() -> None:
    request = pb.CreateSandboxRequest(
        request_id="x",
        sandbox_id="X",
        boot=pb.BootSource(drives=[sandbox_pb2.Drive()], vcpus=99),
        labels={"": ""},
        ttl=Duration(),
        on_expiry=9,  # type: ignore[arg-type]
    )
    with pytest.raises(ForkpointError) as caught:
        validation.check(request, LIMITS)
    assert caught.value.reason is Reason.INVALID_FIELD
    assert [each.field for each in caught.value.problem.fields] == [
        "request_id",
        "sandbox_id",
        "boot.kernel_image",
        "boot.vcpus",
        "boot.memory_mib",
        "boot.drives[0].drive_id",
        "boot.drives[0].path",
        "labels",
        "ttl",
        "on_expiry",
    ]
    assert "sandbox_id: 'X' is not an id" in caught.value.problem.message
