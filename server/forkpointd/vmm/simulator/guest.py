"""The witness guest's state and commands, one small step at a time.

All that the guest knows lies in one block of guest memory (STATE_PAGE) whenever the machine is
paused, so an image of that memory is the whole guest: a child goes on in the middle of a command,
of a typed line or of a round of the writer. This file knows nothing of threads, pauses or files;
`vcpu` runs it. The commands and their answers are those of `forkpointd/witness/witness.c`.
"""

from __future__ import annotations

import operator
import struct
from array import array
from collections.abc import Callable
from typing import Final

from .memory import PAGE_BYTES, WORDS_PER_PAGE, GuestMemory

STATE_PAGE: Final = 8
"""Index, from guest-physical 0, of the page with the guest's state."""
REGION_PAGE: Final = (64 << 20) // PAGE_BYTES
"""Index, from guest-physical 0, of page 0 of the region that is stamped."""
PAGES_PER_MIB: Final = 256

_STEP_PAGES: Final = 256
"""Pages handled between two looks at whether a pause is wanted: 0.1 ms or so."""
_LINE_BYTES: Final = 64
"""Of a longer line only so much is kept: no number of that length is in range."""
_MAGIC: Final = b"WITNESS1"
_NUMBERS: Final = (
    "generation",
    "commands",
    "first",
    "count",
    "cursor",
    "lowest",
    "highest",
    "changes",
    "misplaced",
    "before",
    "last_tick",
    "longest_gap",
)
_STATE: Final = struct.Struct(f"<8s1s{len(_NUMBERS)}QI{_LINE_BYTES}s")
_NONE: Final = (1 << 64) - 1

# What the guest is doing; D, P, Z, V, F and W are the commands' letters.
READING: Final = "-"
HALTED: Final = "H"
CRASHED: Final = "!"


class GuestState:
    """What the block in guest memory holds."""

    def __init__(self) -> None:
        self.doing = READING
        self.generation = 0
        self.commands = 0
        self.first = 0  # the command's arguments, in pages
        self.count = 0
        self.cursor = 0  # pages of the command done so far
        self.lowest = 0  # v
        self.highest = 0
        self.changes = 0
        self.misplaced = 0
        self.before = 0
        self.last_tick = 0  # f and w, in TSC cycles
        self.longest_gap = 0
        self.line = bytearray()

    def pack(self) -> bytes:
        """As the block in guest memory."""
        numbers = [getattr(self, name) for name in _NUMBERS]
        doing = self.doing.encode()
        return _STATE.pack(_MAGIC, doing, *numbers, len(self.line), bytes(self.line))

    @classmethod
    def unpack(cls, block: memoryview) -> GuestState | None:
        """From the block in guest memory; None where there is none."""
        magic, doing, *numbers, length, line = _STATE.unpack_from(block)
        if magic != _MAGIC:
            return None
        state = cls()
        state.doing = doing.decode()
        for name, number in zip(_NUMBERS, numbers, strict=True):
            setattr(state, name, number)
        state.line += line[:length]
        return state


class WitnessGuest:
    """Runs the commands. `say` sends bytes to the console, `tsc` is the guest's clock."""

    def __init__(
        self, memory: GuestMemory, say: Callable[[bytes], None], tsc: Callable[[], int]
    ) -> None:
        self._memory = memory
        self._say = say
        self._tsc = tsc
        self.state = GuestState()
        self._stored = b""

    # --- life --------------------------------------------------------------------------------

    def boot(self) -> None:
        """A fresh guest; says READY."""
        self._say(b"READY\n")

    def restore(self) -> None:
        """Takes its state from guest memory; without one there, the next interrupt ends it."""
        block = self._memory.bytes[STATE_PAGE * PAGE_BYTES : (STATE_PAGE + 1) * PAGE_BYTES]
        state = GuestState.unpack(block)
        self.state = state or GuestState()
        if state is None:
            self.state.doing = CRASHED
        self._stored = self.state.pack()

    def store(self) -> None:
        """Puts its state into guest memory; dirties that page only where something changed."""
        block = self.state.pack()
        if block != self._stored:
            self._memory.write(STATE_PAGE * PAGE_BYTES, block)
            self._stored = block

    # --- what the vcpu asks ------------------------------------------------------------------

    @property
    def reads(self) -> bool:
        """It waits for input and does nothing else."""
        return self.state.doing == READING

    @property
    def watches(self) -> bool:
        """It watches the clock until input comes."""
        return self.state.doing == "W"

    @property
    def writes_freely(self) -> bool:
        """It stamps round and round until input comes."""
        return self.state.doing == "F"

    @property
    def halted(self) -> bool:
        """It does nothing any more."""
        return self.state.doing == HALTED

    @property
    def crashed(self) -> bool:
        """It ran into a triple fault."""
        return self.state.doing == CRASHED

    # --- input -------------------------------------------------------------------------------

    def take(self, byte: int) -> None:
        """One byte from the console, in a state that reads, watches or writes freely."""
        if self.writes_freely:
            self._done("S", self.state.generation, self.state.longest_gap)
        elif self.watches:
            self._done("G", self.state.longest_gap, self._tsc())
        elif byte == 0x0A:
            line, self.state.line = bytes(self.state.line), bytearray()
            self._begin(line)
        elif len(self.state.line) < _LINE_BYTES:
            self.state.line.append(byte)

    def _begin(self, line: bytes) -> None:
        letter, bad, numbers = parse_line(line)
        if bad:
            self._answer("?", bad)
            return
        by_mib = letter in "dvf"
        first = 0 if by_mib or not numbers else numbers[0]
        count = 0
        if by_mib:
            count = numbers[0] * PAGES_PER_MIB
        elif letter == "r":
            count = 1
        elif letter in "pz":
            count = numbers[1]
        pages = max(0, self._memory.pages - REGION_PAGE)
        if first > pages or count > pages - first or (letter == "f" and not count):
            self._say(b"? range\n")
            return
        state = self.state
        state.commands += 1
        state.first, state.count, state.cursor = first, count, 0
        if letter == "t":
            self._answer("T", state.generation, state.commands)
        elif letter == "c":
            self._answer("C", self._tsc())
        elif letter == "r":
            self._answer("R", first, self._memory.words[self._word(first)])
        elif letter == "h":
            self._answer("H")
            state.doing = HALTED
        else:
            self._begin_long(letter.upper())

    def _begin_long(self, doing: str) -> None:
        state = self.state
        state.doing = doing
        if doing in "DPF":
            state.generation += 1
        if doing == "V":
            state.lowest, state.highest, state.changes, state.misplaced = _NONE, 0, 0, 0
            state.before = self._memory.words[self._word(0)] if state.count else 0
        if doing in "FW":
            state.last_tick, state.longest_gap = self._tsc(), 0
            self._answer(*(("F", state.count // PAGES_PER_MIB) if doing == "F" else ("W",)))

    # --- work --------------------------------------------------------------------------------

    def step(self) -> None:
        """A little of a command that takes long."""
        state = self.state
        if state.doing == "F" and state.cursor == state.count:
            state.generation += 1  # a new round
            state.cursor = 0
        first, count = state.first + state.cursor, min(_STEP_PAGES, state.count - state.cursor)
        if count:
            if state.doing == "V":
                self._verify(first, count)
            elif state.doing == "Z":
                self._zero(first, count)
            else:
                self._stamp(first, count)
            state.cursor += count
        if state.doing == "F":
            self.tick()
        elif state.cursor == state.count:
            self._end()

    def tick(self, allowance: int = 0) -> None:
        """Looks at the clock; `allowance` cycles of the gap were slept on purpose."""
        now = self._tsc()
        self.state.longest_gap = max(self.state.longest_gap, now - self.state.last_tick - allowance)
        self.state.last_tick = now

    def _end(self) -> None:
        state = self.state
        mib = state.count // PAGES_PER_MIB
        if state.doing == "D":
            self._done("D", mib, state.generation)
        elif state.doing == "V":
            lowest = state.lowest if state.count else 0
            self._done("V", mib, lowest, state.highest, state.changes, state.misplaced)
        else:
            self._done(state.doing, state.first, state.count, state.generation)

    def _word(self, page: int) -> int:
        return (REGION_PAGE + page) * WORDS_PER_PAGE

    def _stamp(self, first: int, count: int) -> None:
        begin, end = self._word(first), self._word(first + count)
        words = self._memory.words
        words[begin:end:WORDS_PER_PAGE] = memoryview(array("Q", [self.state.generation]) * count)
        words[begin + 1 : end : WORDS_PER_PAGE] = memoryview(
            array("Q", range(first, first + count))
        )
        self._memory.mark(REGION_PAGE + first, count)

    def _zero(self, first: int, count: int) -> None:
        self._memory.write((REGION_PAGE + first) * PAGE_BYTES, bytes(count * PAGE_BYTES))

    def _verify(self, first: int, count: int) -> None:
        state, words = self.state, self._memory.words
        begin, end = self._word(first), self._word(first + count)
        generations = words[begin:end:WORDS_PER_PAGE].tolist()
        indices = words[begin + 1 : end : WORDS_PER_PAGE].tolist()
        state.lowest = min(state.lowest, *generations)
        state.highest = max(state.highest, *generations)
        state.changes += sum(map(operator.ne, generations, [state.before, *generations]))
        state.before = generations[-1]
        state.misplaced += sum(
            1
            for page, (generation, index) in enumerate(
                zip(generations, indices, strict=True), start=first
            )
            if generation and index != page
        )

    # --- answers -----------------------------------------------------------------------------

    def _done(self, name: str, *values: int) -> None:
        self.state.doing = READING
        self._answer(name, *values)

    def _answer(self, name: str, *values: int) -> None:
        self._say(" ".join([name, *map(str, values)]).encode() + b"\n")


_WANTED: Final = {"d": 1, "v": 1, "f": 1, "r": 1, "p": 2, "z": 2, "t": 0, "w": 0, "c": 0, "h": 0}


def parse_line(line: bytes) -> tuple[str, int, list[int]]:
    """Letter, the first byte that does not fit (0 where all do) and the numbers of a command."""
    if not line:
        return "", 0x0A, []
    letter = chr(line[0])
    wanted = _WANTED.get(letter)
    if wanted is None:
        return letter, line[0], []
    numbers, digits = [0] * wanted, 0
    have = 0
    for byte in line[1:]:
        if 0x30 <= byte <= 0x39 and have < wanted:
            digits += 1
            numbers[have] = numbers[have] * 10 + byte - 0x30
        elif byte == 0x2C and digits and have + 1 < wanted:
            have, digits = have + 1, 0
        else:
            return letter, byte, numbers
    if wanted and (have + 1 != wanted or not digits):
        return letter, 0x0A, numbers
    return letter, 0, numbers
