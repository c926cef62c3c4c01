"""The simulated guest: its commands in small steps, and its whole state in guest memory."""

import itertools
import random

import pytest

from forkpointd.vmm.simulator.guest import STATE_PAGE, GuestState, WitnessGuest, parse_line
from forkpointd.vmm.simulator.memory import PAGE_BYTES, GuestMemory, limited, regions

MIB = 1 << 20
SIZE_BYTES = 96 * MIB


class Machine:
    """A guest on some memory, without a thread."""

    def __init__(self, memory: GuestMemory | None = None) -> None:
        self.memory = memory or GuestMemory.anonymous(SIZE_BYTES, tracked=True)
        self.now = 1000
        self.said = b""
        self.guest = WitnessGuest(self.memory, self._say, self._tsc)
        if memory is not None:
            self.guest.restore()

    def _say(self, data: bytes) -> None:
        self.said += data

    def _tsc(self) -> int:
        self.now += 7
        return self.now

    def type(self, text: str) -> None:
        for byte in text.encode():
            self.guest.take(byte)

    def work(self, steps: int = 10**6) -> None:
        """Steps until the guest reads again, or so many."""
        while not self.guest.reads and steps:
            self.guest.step()
            steps -= 1

    def ask(self, command: str) -> str:
        self.said = b""
        self.type(command + "\n")
        self.work()
        return self.said.decode().rstrip("\n")

    def restored(self) -> "Machine":
        """Another machine on a copy of this one's memory, as by a snapshot and a load."""
        self.guest.store()
        memory = GuestMemory.anonymous(SIZE_BYTES, tracked=True)
        for first, end in self.memory.dirty_runs():
            at, stop = first * PAGE_BYTES, end * PAGE_BYTES
            memory.bytes[at:stop] = self.memory.bytes[at:stop]
        return Machine(memory)


@pytest.mark.parametrize("steps", range(9))
@pytest.mark.parametrize("command", ["d3", "v3", "p5,900", "z5,900"])
def test_a_command_goes_on_in_a_child_from_wherever_it_was_interrupted(
    command: str, steps: int
) -> None:
    plain = Machine()
    plain.ask("d2")
    wanted = plain.ask(command), plain.ask("v8"), plain.ask("t")

    source = Machine()
    source.ask("d2")
    source.said = b""
    source.type(command + "\n")
    source.work(steps)
    said = source.said
    child = source.restored()
    child.work()
    answer = (said + child.said).decode().rstrip("\n")
    assert (answer, child.ask("v8"), child.ask("t")) == wanted


def test_a_line_is_finished_in_a_child() -> None:
    source = Machine()
    source.type("p1")
    child = source.restored()
    assert child.ask("2,3") == "P 12 3 1"


def test_a_free_writer_goes_on_in_a_child_at_the_next_page() -> None:
    source = Machine()
    source.type("f2\n")
    for _ in range(3):  # one round of two steps, and half of the next
        source.guest.step()
    child = source.restored()
    assert (child.guest.state.generation, child.guest.state.cursor) == (2, 256)
    child.guest.step()
    child.type("x")
    assert child.said == b"S 2 %d\n" % child.guest.state.longest_gap
    assert child.ask("v2") == "V 2 2 2 0 0"


def test_a_writer_that_is_stopped_between_two_rounds_tells_the_finished_one() -> None:
    machine = Machine()
    machine.type("f1\n")
    machine.guest.step()
    machine.type("x")
    assert machine.said.startswith(b"F 1\nS 1 ")
    assert machine.ask("v1") == "V 1 1 1 0 0"


def test_storing_dirties_the_state_page_only_where_something_changed() -> None:
    machine = Machine()
    machine.guest.store()
    machine.memory.clear_dirty()
    machine.guest.store()
    assert list(machine.memory.dirty_runs()) == []
    machine.ask("t")
    machine.guest.store()
    assert list(machine.memory.dirty_runs()) == [(STATE_PAGE, STATE_PAGE + 1)]


def test_memory_without_a_guest_is_a_crash() -> None:
    machine = Machine(GuestMemory.anonymous(SIZE_BYTES, tracked=True))
    assert machine.guest.crashed
    assert not machine.guest.reads


def test_every_state_survives_its_block() -> None:
    for doing in "-HDPZVFW!":
        state = GuestState()
        state.doing = doing
        state.generation = 2**64 - 1
        state.longest_gap = 17
        state.line += b"d12"
        assert vars(GuestState.unpack(memoryview(state.pack()))) == vars(state)


def test_a_verify_counts_what_is_wrong() -> None:
    machine = Machine()
    machine.ask("d1")
    machine.ask("p10,1")
    machine.memory.words[(16384 + 20) * 512 + 1] = 99
    assert machine.ask("v1") == "V 1 1 2 2 1"


def test_a_very_long_line_is_refused_not_kept() -> None:
    machine = Machine()
    assert machine.ask("d" + "9" * 5000) == "? range"
    assert machine.ask("t") == "T 0 1"


@pytest.mark.parametrize(
    ("line", "wanted"),
    [
        (b"p1,2", ("p", 0, [1, 2])),
        (b"p1;2", ("p", ord(";"), [1, 0])),
        (b"p1", ("p", 10, [1, 0])),
        (b"t", ("t", 0, [])),
        (b"", ("", 10, [])),
        (b"\xff", ("\xff", 255, [])),
    ],
)
def test_a_line_is_read_as_the_real_guest_reads_it(
    line: bytes, wanted: tuple[str, int, list[int]]
) -> None:
    assert parse_line(line) == wanted


# --- memory --------------------------------------------------------------------------------------


def test_dirty_runs_are_exactly_the_pages_marked() -> None:
    memory = GuestMemory.anonymous(4 * MIB, tracked=True)
    dice = random.Random(7)
    for _ in range(50):
        memory.clear_dirty()
        marked: set[int] = set()
        for _ in range(dice.randrange(20)):
            first, count = dice.randrange(memory.pages), dice.randrange(1, 9)
            count = min(count, memory.pages - first)
            memory.mark(first, count)
            marked |= set(range(first, first + count))
        runs = list(memory.dirty_runs())
        assert {page for first, end in runs for page in range(first, end)} == marked
        assert all(a[1] < b[0] for a, b in itertools.pairwise(runs)), "and they are whole"


def test_a_write_marks_every_page_it_touches() -> None:
    memory = GuestMemory.anonymous(MIB, tracked=True)
    memory.write(2 * PAGE_BYTES - 1, b"ab")
    assert list(memory.dirty_runs()) == [(1, 3)]


def test_untracked_memory_has_no_log() -> None:
    memory = GuestMemory.anonymous(MIB, tracked=False)
    memory.write(0, b"x")
    assert list(memory.dirty_runs()) == []


@pytest.mark.parametrize(
    ("pages", "wanted"), [(0, []), (1, [(5, 6)]), (3, [(5, 8)]), (4, [(5, 8), (9, 10)])]
)
def test_limited(pages: int, wanted: list[tuple[int, int]]) -> None:
    assert list(limited(iter([(5, 8), (9, 20)]), pages)) == wanted


def test_regions() -> None:
    assert regions(3328 * MIB) == [(0, 3328 * MIB)]
    assert regions(4096 * MIB) == [(0, 3328 * MIB), (4096 * MIB, 768 * MIB)]
