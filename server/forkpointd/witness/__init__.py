"""The witness guest as the host sees it: where its pages lie and what its answers mean.

The guest (`witness.c`, built by `forkpointd.witness.build`) is a freestanding kernel that stamps
its memory with generations and tells what it finds there. The simulator serves the same commands.
Every command is one line ended by a newline, and so is every answer; numbers are decimal.

    (boot)             READY
    t                  T generation commands              commands: served so far, this one included
    d<MiB>             D MiB generation                   stamps pages [0, MiB) one generation on
    p<first>,<count>   P first count generation           stamps single pages one generation on
    z<first>,<count>   Z first count generation           fills pages with zeros, same generation
    v<MiB>             V MiB lowest highest changes misplaced
    r<page>            R page generation
    f<MiB>             F MiB, and after any byte: S generation longest_gap_tsc
    w                  W, and after any byte: G longest_gap_tsc tsc_now
    c                  C tsc_now
    h                  H, then it halts for good
    anything else      ? byte      the first byte that does not fit, as a number; 10 where the
                                   line ended too early. Does not count as a command.
    past the memory    ? range

**Pages.** Page `i` of the region is 4 KiB of memory. Its first 8 bytes are its generation (0: never
stamped), the next 8 its own index `i`, both little-endian. The region begins at guest-physical
64 MiB and ends with the memory. Where the memory has a gap for devices below 4 GiB (Firecracker
1.12: from 3.25 GiB, 1.16: from 3 GiB) the guest skips it, as the e820 map that Firecracker gave it
says: the page after the last one before the gap lies at 4 GiB. A memory file has the two pieces
back to back, so in the *file* page `i` is always at 64 MiB + 4096 * i, wherever the gap was.

**Clocks.** `f` looks at the TSC after every 16 pages, `w` in every turn of its loop, and both look
for input every 2^22 cycles (1 to 4 ms). The first look is before `F` or `W` is said, the last one
after the byte was seen: a pause that began after the one and ended before the other is always in
the gap. So is whatever takes longer than it should, the writing of that answer and the host's
scheduler included. Gaps are in cycles of the guest's TSC: calibrate with `c`. A child's TSC goes on
from the snapshot's value, so the time between snapshot and restore is no gap there; but a KVM that
can't offset the TSC (seen where it emulates guest code) shows the host's, and then that time is
one. A TSC that went backward never counts.

**Branches.** A child goes on where its source was: in `f` and `w` until a byte reaches the child
itself, and with a half-read line or a half-written answer as well. A guest that idled between two
snapshots has dirtied no page at all; one that answered a command, only its stack and variables.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Final

READY: Final = "READY"
PAGE_BYTES: Final = 4096
PAGES_PER_MIB: Final = 256
REGION_BYTES: Final = 64 << 20
"""Guest-physical address, and offset in a memory file, of page 0 of the region."""
MAPPED_BYTES: Final = 64 << 30
"""Memory above this guest-physical address is not mapped by the guest, hence out of range."""

_STAMP: Final = struct.Struct("<QQ")


def page_offset_in_memory_file(index: int, memory_bytes: int) -> int:
    """Byte offset of page `index` in the memory file of a guest of `memory_bytes`.

    Raises ValueError for a page that such a guest does not have (it would answer `? range`).
    """
    offset = REGION_BYTES + index * PAGE_BYTES
    if index < 0 or offset + PAGE_BYTES > memory_bytes:
        raise ValueError(f"a guest of {memory_bytes} bytes has no page {index}")
    return offset


@dataclass(frozen=True, slots=True)
class Stamp:
    """What the first 16 bytes of a page say."""

    generation: int
    index: int

    @classmethod
    def of(cls, page: bytes | bytearray | memoryview) -> Stamp:
        """Reads the stamp of a page given from its first byte."""
        return cls(*_STAMP.unpack_from(page))


@dataclass(frozen=True, slots=True)
class Status:
    """Answer to `t`."""

    generation: int
    commands: int


@dataclass(frozen=True, slots=True)
class Dirtied:
    """Answer to `d`."""

    mib: int
    generation: int


@dataclass(frozen=True, slots=True)
class Stamped:
    """Answer to `p`."""

    first: int
    count: int
    generation: int


@dataclass(frozen=True, slots=True)
class Zeroed:
    """Answer to `z`."""

    first: int
    count: int
    generation: int


@dataclass(frozen=True, slots=True)
class Verified:
    """Answer to `v`; one generation throughout is `lowest == highest` and no changes."""

    mib: int
    lowest: int
    highest: int
    changes: int
    misplaced: int


@dataclass(frozen=True, slots=True)
class Read:
    """Answer to `r`."""

    page: int
    generation: int


@dataclass(frozen=True, slots=True)
class FreeRunning:
    """First answer to `f`."""

    mib: int


@dataclass(frozen=True, slots=True)
class Stopped:
    """Second answer to `f`, after a byte; the generation is that of the round that was ended."""

    generation: int
    longest_gap_tsc: int


@dataclass(frozen=True, slots=True)
class Watching:
    """First answer to `w`."""


@dataclass(frozen=True, slots=True)
class Gap:
    """Second answer to `w`, after a byte."""

    longest_gap_tsc: int
    tsc_now: int


@dataclass(frozen=True, slots=True)
class Clock:
    """Answer to `c`."""

    tsc_now: int


@dataclass(frozen=True, slots=True)
class Halted:
    """Answer to `h`."""


Answer = (
    Status
    | Dirtied
    | Stamped
    | Zeroed
    | Verified
    | Read
    | FreeRunning
    | Stopped
    | Watching
    | Gap
    | Clock
    | Halted
)

_ANSWERS: Final[dict[str, tuple[type[Answer], int]]] = {
    "T": (Status, 2),
    "D": (Dirtied, 2),
    "P": (Stamped, 3),
    "Z": (Zeroed, 3),
    "V": (Verified, 5),
    "R": (Read, 2),
    "F": (FreeRunning, 1),
    "S": (Stopped, 2),
    "W": (Watching, 0),
    "G": (Gap, 2),
    "C": (Clock, 1),
    "H": (Halted, 0),
}


class WitnessError(Exception):
    """The guest refused a command, or what it said is no answer."""


def parse_answer(line: str) -> Answer:
    """One line of the guest, without or with its newline, as what it means.

    Raises WitnessError, naming the line, for `? ...`, `! exception` and all that is no answer.
    """
    name, *words = line.split()[:7] or [""]
    kind, count = _ANSWERS.get(name, (None, 0))
    if kind is None or len(words) != count or not all(w.isascii() and w.isdigit() for w in words):
        raise WitnessError(f"not an answer of the witness guest: {line!r}")
    return kind(*map(int, words))
