"""The witness guest: its commands over a console, and what its memory should hold.

The guest stamps its pages with generations and tells what it finds; `python -m forkpointd.witness
--help` lists its commands. What it should find is computed here, page by page, and nothing of that
comes from the server.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from itertools import pairwise

import forkpoint

PAGES_PER_MIB = 256

_ANSWER_SECONDS = 120
"""Some machines emulate guest code, at about a microsecond an instruction."""


class Unexpected(Exception):
    """The guest answered something that is not the answer."""


@dataclass(frozen=True)
class Memory:
    """What a guest's stamped region should hold: the generation of each page, and the counters."""

    pages: tuple[int, ...]
    generation: int = 0
    commands: int = 0

    @classmethod
    def fresh(cls, mib: int) -> Memory:
        """A region of a freshly booted guest."""
        return cls((0,) * (mib * PAGES_PER_MIB))

    def stamped(self, first: int, count: int) -> Memory:
        """After these pages were stamped with the next generation."""
        new = self.generation + 1
        pages = self.pages[:first] + (new,) * count + self.pages[first + count :]
        return Memory(pages, new, self.commands + 1)

    def asked(self, commands: int = 1) -> Memory:
        """After commands that change no page."""
        return replace(self, commands=self.commands + commands)

    @property
    def mib(self) -> int:
        """Size of the region."""
        return len(self.pages) // PAGES_PER_MIB

    def verdict(self) -> tuple[int, int, int, int, int]:
        """What `v` over the whole region should say."""
        changes = sum(a != b for a, b in pairwise(self.pages))
        return (self.mib, min(self.pages), max(self.pages), changes, 0)


class Witness:
    """One guest, talked to through its sandbox's console."""

    def __init__(self, sandbox: forkpoint.Sandbox) -> None:
        self.sandbox = sandbox
        self._console = sandbox.console

    async def ready(self) -> None:
        """Waits until it has booted."""
        await self._console.expect(b"READY\n", timeout=_ANSWER_SECONDS)

    async def ask(self, command: str) -> tuple[int, ...]:
        """A command's answer, as numbers."""
        said = await self._console.ask(command, timeout=_ANSWER_SECONDS)
        return self._numbers(command[0].upper(), said)

    def _numbers(self, letter: str, said: bytes) -> tuple[int, ...]:
        words = said.decode("ascii", "replace").split()
        if not words or words[0] != letter:
            raise Unexpected(f"{self.sandbox.id} answered {said!r}, not {letter} ...")
        return tuple(int(word) for word in words[1:])

    async def stamp(self, memory: Memory, first: int, count: int) -> Memory:
        """Dirties pages; returns what its memory should hold then."""
        after = memory.stamped(first, count)
        if first == 0 and count % PAGES_PER_MIB == 0:
            mib = count // PAGES_PER_MIB
            wanted: tuple[int, ...] = (mib, after.generation)
            said = await self.ask(f"d{mib}")
        else:
            wanted = (first, count, after.generation)
            said = await self.ask(f"p{first},{count}")
        if said != wanted:
            raise Unexpected(f"{self.sandbox.id} said {said}, not {wanted}")
        return after

    async def watch_clock(self) -> None:
        """Starts the tight loop that sees every pause."""
        await self.ask("w")

    async def longest_gap(self) -> tuple[int, int]:
        """Ends the loop: the longest gap it saw and the time, in cycles of its clock (TSC)."""
        offset = await self._console.write(b"\n")
        said = await self._console.expect(b"\n", from_offset=offset, timeout=_ANSWER_SECONDS)
        gap, now = self._numbers("G", said)
        return gap, now

    async def page(self, index: int) -> int:
        """The generation of one page."""
        said, generation = await self.ask(f"r{index}")
        if said != index:
            raise Unexpected(f"{self.sandbox.id} read page {said}, not {index}")
        return generation


@dataclass
class GuestClock:
    """Turns cycles of a guest's clock into seconds, by the host's clock."""

    _first: tuple[float, int] | None = None
    _last: tuple[float, int] | None = None

    async def look(self, witness: Witness) -> None:
        """Compares the two clocks; the more time between the first and last look, the better."""
        before = time.monotonic()
        (cycles,) = await witness.ask("c")
        moment = (before + time.monotonic()) / 2, cycles
        self._first, self._last = self._first or moment, moment

    def seconds(self, cycles: int) -> float:
        """The length of a gap."""
        if self._first is None or self._last is None or self._first == self._last:
            raise ValueError("look at the clock twice")
        rate = (self._last[1] - self._first[1]) / (self._last[0] - self._first[0])
        return cycles / rate
