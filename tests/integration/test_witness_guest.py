"""The witness guest on real Firecracker: every command, its idleness, its children.

What the rest of the tests believe is what this guest says, so it is tried here by plain sockets,
with none of our server in between, and made to find faults that are planted in its memory.
"""

import contextlib
import errno
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from forkpointd import witness
from forkpointd.vmm import fetch
from forkpointd.witness import page_offset_in_memory_file, parse_answer
from forkpointd.witness.build import available_compilers, compile_witness
from tests.integration.plain_guest import Guest, wait_for

MIB = 1 << 20


@pytest.fixture(scope="module")
def firecracker() -> Path:
    if not os.access("/dev/kvm", os.R_OK | os.W_OK):
        pytest.skip("/dev/kvm can't be used here")
    found = fetch.find_firecracker()
    if found is None:
        pytest.skip(f"no Firecracker here. {fetch.REMEDY}")
    return found


@pytest.fixture(scope="module", params=["cc", "ziglang"])
def kernel(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    compilers = {c.name: c for c in available_compilers()}
    if request.param not in compilers:
        pytest.skip(f"{request.param} is not installed")
    out = tmp_path_factory.mktemp("kernel") / f"witness-{request.param}.elf"
    compile_witness(compilers[request.param], out)
    return out


@pytest.fixture
def new_guest(firecracker: Path, tmp_path: Path) -> Iterator[Callable[[str], Guest]]:
    with contextlib.ExitStack() as guests:

        def make(name: str) -> Guest:
            guest = Guest(firecracker, tmp_path / name)
            guests.callback(guest.close)
            return guest

        yield make


@pytest.fixture
def guest(new_guest: Callable[[str], Guest], kernel: Path) -> Guest:
    """128 MiB, of which pages 0 to 16383 can be stamped."""
    source = new_guest("source")
    source.boot(kernel, 128)
    return source


def child_of(source: tuple[Path, Path], child: Guest) -> Guest:
    child.load(*source)
    return child


def test_every_command_answers_as_written(guest: Guest) -> None:
    for command, answer in (
        ("t", "T 0 1"),
        ("v64", "V 64 0 0 0 0"),
        ("d3", "D 3 1"),
        ("v3", "V 3 1 1 0 0"),
        ("v4", "V 4 0 1 1 0"),
        ("r767", "R 767 1"),
        ("r768", "R 768 0"),
        ("p100,1", "P 100 1 2"),
        ("v3", "V 3 1 2 2 0"),
        ("p765,20", "P 765 20 3"),
        ("r784", "R 784 3"),
        ("r785", "R 785 0"),
        ("v4", "V 4 0 3 4 0"),
        ("z100,2", "Z 100 2 3"),
        ("v4", "V 4 0 3 4 0"),
        ("p16383,1", "P 16383 1 4"),
        ("d64", "D 64 5"),
        ("v64", "V 64 5 5 0 0"),
        ("z16380,4", "Z 16380 4 5"),
        ("v64", "V 64 0 5 1 0"),
        ("d0", "D 0 6"),
        ("v0", "V 0 0 0 0 0"),
        ("p0,0", "P 0 0 7"),
        ("t", "T 7 24"),
        ("h", "H"),
    ):
        assert guest.ask(command) == answer, command


def test_what_it_cannot_do_it_refuses_and_does_not_count(guest: Guest) -> None:
    for command, answer in (
        ("", "? 10"),
        ("x", f"? {ord('x')}"),
        ("hello world", f"? {ord('e')}"),
        ("t1", f"? {ord('1')}"),
        ("d", "? 10"),
        ("d1x2", f"? {ord('x')}"),
        ("d-1", f"? {ord('-')}"),
        ("d1,2", f"? {ord(',')}"),
        ("p5", "? 10"),
        ("p5,", "? 10"),
        ("p,5", f"? {ord(',')}"),
        ("p1,2,3", f"? {ord(',')}"),
        ("t\r", "? 13"),
        ("d65", "? range"),
        ("v65", "? range"),
        ("f65", "? range"),
        ("f0", "? range"),
        ("r16384", "? range"),
        ("p16383,2", "? range"),
        ("z16384,1", "? range"),
        (f"p{2**64 - 1},2", "? range"),
        (f"p1,{2**64}", "? range"),
        (f"d{2**64 + 1}", "? range"),
        (f"d{2**56}", "? range"),
        ("r" + "9" * 5000, "? range"),
        ("t", "T 0 1"),
    ):
        assert guest.ask(command) == answer, command


def test_a_guest_too_small_for_any_page(new_guest: Callable[[str], Guest], kernel: Path) -> None:
    guest = new_guest("small")
    guest.boot(kernel, 32)
    for command, answer in (
        ("d0", "D 0 1"),
        ("v0", "V 0 0 0 0 0"),
        ("d1", "? range"),
        ("r0", "? range"),
        ("t", "T 1 3"),
    ):
        assert guest.ask(command) == answer, command


def test_lines_and_bursts_longer_than_the_uart_fifo(guest: Guest) -> None:
    assert guest.ask("d" + "0" * 1000 + "2") == "D 2 1"
    count = 300
    guest.send("".join(f"p{n},1\n" for n in range(count)))
    assert [guest.line() for _ in range(count)] == [f"P {n} 1 {n + 2}" for n in range(count)]


def test_a_line_in_pieces(guest: Guest) -> None:
    guest.send("d")
    assert guest.ask("2") == "D 2 1"


def test_free_run_goes_round_until_a_byte(guest: Guest) -> None:
    assert guest.ask("f2") == "F 2"
    busy = guest.cpu_ticks()
    wait_for(lambda: guest.cpu_ticks() >= busy + 10)
    assert not guest.has_said_something()
    stopped = parse_answer(guest.ask(""))
    assert isinstance(stopped, witness.Stopped)
    assert stopped.generation > 2
    assert stopped.longest_gap_tsc > 0
    # The round that was ended, and behind its front the one before it.
    verified = parse_answer(guest.ask("v2"))
    assert isinstance(verified, witness.Verified)
    assert verified.highest == stopped.generation
    assert verified.lowest >= stopped.generation - 1
    assert verified.changes == verified.highest - verified.lowest
    assert verified.misplaced == 0
    assert guest.ask("t") == f"T {stopped.generation} 3"
    assert guest.ask("v3").startswith("V 3 0 ")


def clock(guest: Guest) -> int:
    answer = parse_answer(guest.ask("c"))
    assert isinstance(answer, witness.Clock)
    return answer.tsc_now


def test_the_clock_watcher_sees_a_pause(guest: Guest, tmp_path: Path) -> None:
    """No tolerance: the gap is at least as long as what certainly lay within the pause."""
    before_first = time.monotonic()
    first = clock(guest)
    assert guest.ask("w") == "W"
    guest.pause()
    paused = time.monotonic()
    guest.create(tmp_path / "vmstate", tmp_path / "memory")
    resumed = time.monotonic()
    guest.resume()
    gap = parse_answer(guest.ask(""))
    assert isinstance(gap, witness.Gap)
    last = clock(guest)
    after_last = time.monotonic()
    assert first < gap.tsc_now < last
    slowest_hz = (last - first) / (after_last - before_first)
    assert gap.longest_gap_tsc >= (resumed - paused) * slowest_hz
    assert gap.longest_gap_tsc < last - first


def test_idle_guests_use_no_cpu_and_children_wake_up(
    guest: Guest, new_guest: Callable[[str], Guest]
) -> None:
    """Ten idle children, their idle source and a halted guest, while another one is busy."""
    assert guest.ask("d2") == "D 2 1"
    snapshot = guest.snapshot("snapshot")
    children = [child_of(snapshot, new_guest(f"child-{n}")) for n in range(10)]
    busy = child_of(snapshot, new_guest("busy"))
    halted = child_of(snapshot, new_guest("halted"))
    assert halted.ask("h") == "H"
    halted.send("t\n")
    assert busy.ask("f1") == "F 1"
    idle = [guest, halted, *children]
    before = [each.cpu_ticks() for each in idle]
    until = busy.cpu_ticks() + 2 * os.sysconf("SC_CLK_TCK")
    wait_for(lambda: busy.cpu_ticks() >= until)
    used = [each.cpu_ticks() - b for each, b in zip(idle, before, strict=True)]
    assert sum(used) <= 2, used
    assert not halted.has_said_something()
    for each in children:
        assert each.ask("t") == "T 1 2"
        assert each.ask("v2") == "V 2 1 1 0 0"
    assert children[0].ask("d3") == "D 3 2"
    assert guest.ask("t") == "T 1 2"
    assert guest.ask("v3") == "V 3 0 1 1 0"


def test_a_child_of_a_free_running_source_runs_on(
    guest: Guest, new_guest: Callable[[str], Guest]
) -> None:
    assert guest.ask("f2") == "F 2"
    snapshot = guest.snapshot("running")
    child = child_of(snapshot, new_guest("child"))
    source_stopped = parse_answer(guest.ask(""))
    child_busy = child.cpu_ticks()
    wait_for(lambda: child.cpu_ticks() >= child_busy + 10)
    child_stopped = parse_answer(child.ask(""))
    assert isinstance(source_stopped, witness.Stopped)
    assert isinstance(child_stopped, witness.Stopped)
    for each, stopped in ((guest, source_stopped), (child, child_stopped)):
        verified = parse_answer(each.ask("v2"))
        assert isinstance(verified, witness.Verified)
        assert (verified.highest, verified.misplaced) == (stopped.generation, 0)
        assert verified.changes <= 1


def test_a_child_of_a_clock_watching_source_watches_on(
    guest: Guest, new_guest: Callable[[str], Guest]
) -> None:
    assert guest.ask("w") == "W"
    child = child_of(guest.snapshot("watching"), new_guest("child"))
    for each in (guest, child):
        assert isinstance(parse_answer(each.ask("")), witness.Gap)
        assert each.ask("t") == "T 0 2"


def test_planted_faults_are_found(guest: Guest, new_guest: Callable[[str], Guest]) -> None:
    """A stale page, a misplaced one and a lost one, each in a group of its own and in one."""
    assert guest.ask("d8") == "D 8 1"
    assert guest.ask("d8") == "D 8 2"
    vmstate, memory = guest.snapshot("snapshot")
    fd = os.open(memory, os.O_RDWR)
    size = os.fstat(fd).st_size

    def plant(index: int, generation: int, says: int) -> None:
        words = generation.to_bytes(8, "little") + says.to_bytes(8, "little")
        assert os.pwrite(fd, words, page_offset_in_memory_file(index, size)) == 16

    try:
        page = os.pread(fd, 4096, page_offset_in_memory_file(5, size))
        assert witness.Stamp.of(page) == witness.Stamp(2, 5)
        plant(37, 1, 37)  # stale
        plant(64, 2, 65)  # misplaced
        plant(79, 2, 2**40)
        plant(80, 0, 0)  # lost
        plant(128, 1, 5)  # stale and misplaced
        plant(2047, 2, 2046)
    finally:
        os.close(fd)
    child = child_of((vmstate, memory), new_guest("child"))
    assert child.ask("v8") == "V 8 0 2 6 4"
    assert [child.ask(f"r{n}") for n in (37, 80, 128)] == ["R 37 1", "R 80 0", "R 128 1"]
    assert guest.ask("v8") == "V 8 2 2 0 0"


def test_zeroed_pages_are_zero_throughout(guest: Guest) -> None:
    assert guest.ask("d1") == "D 1 1"
    assert guest.ask("z3,2") == "Z 3 2 1"
    _, memory = guest.snapshot("zeroed")
    with memory.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        pages = [
            os.pread(file.fileno(), 4096, page_offset_in_memory_file(n, size)) for n in range(2, 6)
        ]
    assert [page == bytes(4096) for page in pages] == [False, True, True, False]
    assert pages[0] == b"\x01" + bytes(7) + b"\x02" + bytes(4087)


def test_an_idle_guest_dirties_nothing(guest: Guest) -> None:
    """It may still be on its way to idleness when its answer is read, so not at the first look."""
    assert guest.ask("d1") == "D 1 1"
    looks = 0

    def dirtied_nothing() -> bool:
        nonlocal looks
        looks += 1
        _, memory = guest.snapshot(f"look-{looks}")
        with memory.open("rb") as file:
            try:
                os.lseek(file.fileno(), 0, os.SEEK_DATA)
            except OSError as error:
                assert error.errno == errno.ENXIO
                return True
        return False

    assert not dirtied_nothing()
    wait_for(dirtied_nothing)
    assert dirtied_nothing()


def test_pages_across_the_gap_below_4_gib(
    new_guest: Callable[[str], Guest], kernel: Path, tmp_path: Path
) -> None:
    """Wherever the gap is, the file has the pages one after the other, up to the last one."""
    memory_mib = 6144
    guest = new_guest("large")
    guest.boot(kernel, memory_mib)
    last = (memory_mib - 64) * witness.PAGES_PER_MIB - 1
    edges = [(gib_mib - 64) * witness.PAGES_PER_MIB for gib_mib in (3072, 3328, 4096)]
    stamped: dict[int, int] = {}
    for generation, edge in enumerate(edges, start=1):
        assert guest.ask(f"p{edge - 20},40") == f"P {edge - 20} 40 {generation}"
        stamped.update(dict.fromkeys(range(edge - 20, edge + 20), generation))
    assert guest.ask(f"p{last},1") == f"P {last} 1 4"
    stamped[last] = 4
    assert guest.ask(f"p{last},2") == "? range"
    assert guest.ask(f"z{edges[1] - 1},2") == f"Z {edges[1] - 1} 2 4"
    del stamped[edges[1] - 1], stamped[edges[1]]
    _, memory = guest.snapshot("large")
    with memory.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        assert size == memory_mib * MIB

        def stamp(index: int) -> witness.Stamp:
            offset = page_offset_in_memory_file(index, size)
            return witness.Stamp.of(os.pread(file.fileno(), 16, offset))

        for index, generation in stamped.items():
            assert stamp(index) == witness.Stamp(generation, index)
        for index in (edges[0] - 21, edges[0] + 20, edges[1], edges[2] + 20, last - 1):
            assert stamp(index) == witness.Stamp(0, 0)
    for index in (edges[0], edges[1] + 1, edges[2], last):
        assert guest.ask(f"r{index}") == f"R {index} {stamped[index]}"
