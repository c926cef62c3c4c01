"""Simulated faults: each does what the simulator's docstring says, when it says, and no more."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from forkpointd.vmm.simulator.faults import ENVIRONMENT, POINTS, FaultRuleError, Faults, Rule
from tests.integration.vmm_contract.vm import Vm, data_pages, encode, mem, region
from tests.unit.simulators import Simulators

PAGES = 512
"""How many pages are dirty when a snapshot is to fail."""


@pytest.fixture
def simulators(tmp_path: Path) -> Iterator[Simulators]:
    made = Simulators(tmp_path)
    try:
        yield made
    finally:
        made.close()


def order(vm: Vm, *rules: dict[str, Any]) -> None:
    """Puts these rules in force."""
    vm.do("PUT", "/simulator/faults", {"rules": list(rules)})


def dirtied(simulators: Simulators) -> Vm:
    """A paused machine with a snapshot behind it and PAGES pages dirty since."""
    vm = simulators.booted()
    vm.snapshot("Diff", "base")
    vm.ask("d2")
    vm.pause()
    return vm


def region_pages(vm: Vm, name: str) -> set[int]:
    """Pages of the region in a snapshot's memory file."""
    return data_pages(vm.folder / mem(name)) & region(0, 4096)


@pytest.mark.parametrize("kind", ["Diff", "Full"])
def test_no_space_after_some_pages_keeps_the_dirty_log(simulators: Simulators, kind: str) -> None:
    vm = dirtied(simulators)
    order(vm, {"at": "create.memory", "do": "error", "errno": "ENOSPC", "after_pages": 10})
    assert vm.create(kind, "a").fault == (
        "Create snapshot error: Cannot write memory file: Cannot dump memory: Guest memory error: "
        "No space left on device (os error 28)"
    )
    assert len(data_pages(vm.folder / mem("a"))) == 10
    assert (vm.folder / "a.vmstate").stat().st_size > 0, "vmstate comes first"
    assert vm.create("Diff", "b").status == 204, "the rule applied once"
    assert region_pages(vm, "b") == region(0, PAGES)


def test_a_sync_that_fails_has_lost_the_dirty_log(simulators: Simulators) -> None:
    vm = dirtied(simulators)
    order(vm, {"at": "create.sync", "do": "error", "errno": "EIO"})
    assert vm.create("Diff", "a").fault == (
        "Create snapshot error: Cannot perform sync_all on the memory backing file: "
        "Input/output error (os error 5)"
    )
    assert region_pages(vm, "a") == region(0, PAGES)
    assert vm.create("Diff", "b").status == 204
    assert region_pages(vm, "b") == set(), "which is why the base is invalid after it"


@pytest.mark.parametrize(
    ("point", "told"),
    [
        (
            "create.vmstate",
            (
                "Create snapshot error: Cannot serialize the microVM state: An error occured with "
                "serialization/deserialization: Io { inner: Os { code: 28, kind: StorageFull, "
                'message: "No space left on device" }, index: 0 }'
            ),
        ),
        (
            "create.open",
            (
                "Create snapshot error: Cannot perform open on the memory backing file: "
                "No space left on device (os error 28)"
            ),
        ),
    ],
)
def test_failures_before_the_memory_keep_the_dirty_log(
    simulators: Simulators, point: str, told: str
) -> None:
    vm = dirtied(simulators)
    order(vm, {"at": point, "do": "error"})
    assert vm.create("Diff", "a").fault == told
    assert not (vm.folder / mem("a")).exists()
    assert vm.create("Diff", "b").status == 204
    assert region_pages(vm, "b") == region(0, PAGES)


def test_a_short_write_is_reported_as_success(simulators: Simulators) -> None:
    vm = dirtied(simulators)
    order(vm, {"at": "create.memory", "do": "short", "after_pages": 5})
    assert vm.create("Diff", "a").status == 204
    assert len(data_pages(vm.folder / mem("a"))) == 5
    assert vm.create("Diff", "b").status == 204
    assert region_pages(vm, "b") == set()


@pytest.mark.parametrize("point", ["load.vmstate", "load.memory"])
def test_a_load_that_fails_ends_the_process(simulators: Simulators, point: str) -> None:
    vm = dirtied(simulators)
    vm.create("Diff", "a")
    child = simulators.new()
    order(child, {"at": point, "do": "error", "errno": "EACCES"})
    assert child.load(vm.folder, "a").fault.endswith("Permission denied (os error 13)")
    assert child.exit_code() == 1


def test_the_nth_time_and_so_many_times(simulators: Simulators) -> None:
    vm = dirtied(simulators)
    order(vm, {"at": "create", "do": "refuse", "nth": 2, "times": 2, "message": "no"})
    assert [vm.create("Diff", f"a{n}").status for n in range(5)] == [204, 400, 400, 204, 204]
    assert vm.get("/simulator/faults")["rules"][0]["applied"] == 2
    order(vm, {"at": "create", "do": "refuse", "times": 0})
    assert [vm.create("Diff", f"b{n}").status for n in range(5)] == [400] * 5
    order(vm)
    assert vm.create("Diff", "c").status == 204


def test_a_resume_that_is_refused_leaves_it_paused(simulators: Simulators) -> None:
    vm = dirtied(simulators)
    order(vm, {"at": "resume", "do": "refuse", "message": "not today"})
    assert vm.api("PATCH", "/vm", {"state": "Resumed"}).fault == "not today"
    assert vm.state == "Paused"
    vm.resume()
    assert vm.state == "Running"


def test_an_ignored_request_is_not_run_and_those_behind_it_are(simulators: Simulators) -> None:
    vm = simulators.booted()
    order(vm, {"at": "pause", "do": "ignore"})
    vm.connection.send(encode("PATCH", "/vm", {"state": "Paused"}) + encode("GET", "/"))
    reply = vm.connection.reply()
    assert reply.json["state"] == "Running", "the second's answer comes first"


def test_a_hang_before_the_reply_answers_nobody_any_more(simulators: Simulators) -> None:
    vm = simulators.booted()
    order(vm, {"at": "create.reply", "do": "hang"})
    other = vm.connect()
    create = {"snapshot_type": "Diff", "snapshot_path": "v", "mem_file_path": "m"}
    vm.connection.send(
        encode("PATCH", "/vm", {"state": "Paused"})
        + encode("PUT", "/snapshot/create", create)
        + encode("PATCH", "/vm", {"state": "Resumed"})
    )
    other.send(encode("GET", "/"))
    for connection in (vm.connection, other):
        connection.socket.settimeout(0.2)
        with pytest.raises(TimeoutError):
            connection.reply()
    assert (vm.folder / "m").stat().st_size == 80 << 20, "it was done, and is not told"


def test_a_delay_is_seen_in_the_latencies(simulators: Simulators) -> None:
    vm = simulators.booted()
    order(vm, {"at": "pause", "do": "delay", "ms": 60}, {"at": "resume", "do": "delay", "ms": 30})
    vm.pause()
    vm.resume()
    vm.do("PUT", "/actions", {"action_type": "FlushMetrics"})
    told = json.loads((vm.folder / "metrics").read_text().splitlines()[-1])["latencies_us"]
    assert told["pause_vm"] >= 60_000
    assert told["resume_vm"] >= 30_000


@pytest.mark.parametrize("point", sorted(p for p in POINTS if p.startswith("create")))
def test_it_can_end_at_every_point_of_a_create(simulators: Simulators, point: str) -> None:
    vm = dirtied(simulators)
    order(vm, {"at": point, "do": "exit", "code": 7})
    with pytest.raises(EOFError):
        vm.create("Diff", "a")
    assert vm.exit_code() == 7
    memory = vm.folder / mem("a")
    assert (vm.folder / "a.vmstate").exists() is (point != "create")
    assert memory.exists() is (point in ("create.memory", "create.sync", "create.reply"))
    if memory.exists():
        written = region(0, PAGES) if point != "create.memory" else set()
        assert region_pages(vm, "a") == written


def test_it_can_be_killed(simulators: Simulators) -> None:
    vm = simulators.booted()
    order(vm, {"at": "pause.reply", "do": "kill"})
    with pytest.raises(EOFError):
        vm.pause()
    assert vm.exit_code() == -9


def test_rules_from_the_environment(
    simulators: Simulators, monkeypatch: pytest.MonkeyPatch
) -> None:
    rules = [{"at": "start", "do": "refuse", "message": "ordered before it was born"}]
    monkeypatch.setenv(ENVIRONMENT, json.dumps(rules))
    vm = simulators.new()
    start = vm.api("PUT", "/actions", {"action_type": "InstanceStart"})
    assert start.fault == "ordered before it was born"


@pytest.mark.parametrize(
    ("rules", "told"),
    [
        ({}, "rules are a list"),
        ([3], "a rule is an object"),
        ([{}], "missing"),
        ([{"at": "nowhere", "do": "exit"}], "unknown point"),
        ([{"at": "create", "do": "error"}], "at create one of"),
        ([{"at": "create.sync", "do": "short"}], "at create.sync one of"),
        ([{"at": "pause", "do": "delay", "bogus": 1}], "bogus"),
        ([{"at": "create.sync", "do": "error", "errno": "EWHAT"}], "unknown errno"),
        ([{"at": "pause", "do": "delay", "ms": "x"}], "are numbers"),
        ([{"at": "pause", "do": "delay", "nth": -1}], "are numbers"),
    ],
)
def test_rules_that_make_no_sense_change_nothing(rules: Any, told: str) -> None:
    faults = Faults([Rule(at="pause", do="hang")])
    with pytest.raises(FaultRuleError, match=told):
        faults.replace(rules)
    assert [rule.do for rule in faults.rules] == ["hang"]


def test_an_environment_that_makes_no_sense_is_no_start(
    simulators: Simulators, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(FaultRuleError, match="no JSON"):
        Faults.of_environment({ENVIRONMENT: "{"})
    assert Faults.of_environment({}).rules == []
