"""The witness guest's commands: the same in the real guest and in the simulator."""

import time

import pytest

from tests.integration.vmm_contract.conftest import Vmms

CONVERSATION = [
    ("t", "T 0 1"),
    ("d2", "D 2 1"),
    ("v2", "V 2 1 1 0 0"),
    ("v3", "V 3 0 1 1 0"),
    ("p100,5", "P 100 5 2"),
    ("v2", "V 2 1 2 2 0"),
    ("r99", "R 99 1"),
    ("r104", "R 104 2"),
    ("z102,1", "Z 102 1 2"),
    ("r102", "R 102 0"),
    ("v1", "V 1 0 2 4 0"),
    ("d0", "D 0 3"),
    ("v0", "V 0 0 0 0 0"),
    ("p0,0", "P 0 0 4"),
    ("z0,0", "Z 0 0 4"),
    ("t", "T 4 16"),
    # past the memory of 128 MiB, which is 64 MiB of region
    ("d64", "D 64 5"),
    ("d65", "? range"),
    ("r16383", "R 16383 5"),
    ("r16384", "? range"),
    ("p16383,1", "P 16383 1 6"),
    ("p16383,2", "? range"),
    ("v99999999999999999999999999", "? range"),
    ("f0", "? range"),
    # what does not fit is told by its first byte, and does not count as a command
    ("", "? 10"),
    ("q", "? 113"),
    ("t1", "? 49"),
    ("d", "? 10"),
    ("d1x", "? 120"),
    ("d1,2", "? 44"),
    ("p1", "? 10"),
    ("p1,", "? 10"),
    ("p,1", "? 44"),
    ("p1,2,3", "? 44"),
    ("d-1", "? 45"),
    (" t", "? 32"),
    ("t", "T 6 20"),
]


def test_a_conversation(vmms: Vmms) -> None:
    vm = vmms.booted()
    answers = [(command, vm.ask(command)) for command, _ in CONVERSATION]
    assert answers == CONVERSATION


def test_commands_may_be_typed_ahead(vmms: Vmms) -> None:
    vm = vmms.booted()
    vm.type("d1\nt\nr0\n")
    assert [vm.line() for _ in range(3)] == ["D 1 1", "T 1 2", "R 0 1"]


def test_the_writer_stops_at_any_byte(vmms: Vmms) -> None:
    vm = vmms.booted()
    assert vm.ask("f8") == "F 8"
    assert vm.silent(0.3)
    vm.type("x")
    name, generation, gap = vm.line().split()
    assert name == "S"
    assert int(generation) > 1, "it went round more than once"
    assert int(gap) > 0
    lowest, highest, changes, misplaced = vm.ask_numbers("v8")[1:]
    assert (highest, misplaced) == (int(generation), 0)
    assert highest - lowest <= 1
    assert changes <= 1


@pytest.mark.parametrize("watch", ["w", "f16"])
def test_a_pause_is_seen_from_inside(vmms: Vmms, watch: str) -> None:
    vm = vmms.booted()
    first = vm.ask_numbers("c")[0]
    began = time.monotonic()
    assert vm.ask(watch).startswith(watch[0].upper())
    vm.pause()
    paused = time.monotonic()
    assert vm.silent(0.3)
    at_least = time.monotonic() - paused
    vm.resume()
    vm.type("x")
    answer = vm.line().split()
    at_most = time.monotonic() - began
    cycles = vm.ask_numbers("c")[0] - first
    seconds = time.monotonic() - began
    gap = int(answer[1] if watch == "w" else answer[2]) * seconds / cycles
    assert 0.8 * at_least < gap < 1.2 * at_most


def test_the_clock_runs_forward_at_an_even_pace(vmms: Vmms) -> None:
    vm = vmms.booted()
    ticks = [vm.ask_numbers("c")[0] for _ in range(5)]
    assert ticks == sorted(set(ticks))


def test_a_halted_guest_says_nothing_more_and_can_still_be_branched(vmms: Vmms) -> None:
    vm = vmms.booted()
    vm.ask("d1")
    assert vm.ask("h") == "H"
    vm.type("t\n")
    assert vm.silent(0.2)
    vm.snapshot("Diff", "a")
    assert vm.state == "Running"
    child = vmms.child(vm.folder, "a")
    child.type("t\n")
    assert child.silent(0.2)
