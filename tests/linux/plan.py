"""What is written by whom in the story of the lab, and what a file must hold after that.

The story (story.py, in the outer machine) has the guests do the shell commands; the tests, outside,
compare what the guests then found with the bytes that `apply` makes. All contents come from one
seed of random bytes that is in the guest's initrd: a page that is lost, stale, moved or another's
never equals the right one.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Protocol

PAGE_BYTES = 4096
SEED_PAGES = 512
SEED_PATH = "/seed"
"""In the guest."""


def seed() -> bytes:
    """The same bytes each time."""
    return random.Random("forkpoint").randbytes(SEED_PAGES * PAGE_BYTES)


class Write(Protocol):
    """Something that is done to one file."""

    @property
    def path(self) -> str:
        """Of the file, in the guest."""
        ...

    def shell(self) -> str:
        """The command that does it."""
        ...

    def apply(self, before: bytes | None, seed: bytes) -> bytes:
        """The file's content after that."""
        ...


@dataclass(frozen=True)
class Whole:
    """A file is written anew: the seed behind `shift` zeros, so that no two shifts share a page."""

    path: str
    shift: int

    def shell(self) -> str:
        """See Write."""
        return f"{{ head -c {self.shift} /dev/zero; cat {SEED_PATH}; }} >{self.path}"

    def apply(self, before: bytes | None, seed: bytes) -> bytes:
        """See Write."""
        return bytes(self.shift) + seed


@dataclass(frozen=True)
class Pages:
    """Some pages of a file are overwritten in place by others of the seed."""

    path: str
    at: int
    count: int
    taken_from: int

    def shell(self) -> str:
        """See Write."""
        return (
            f"dd if={SEED_PATH} of={self.path} bs={PAGE_BYTES} conv=notrunc "
            f"skip={self.taken_from} seek={self.at} count={self.count} 2>/dev/null"
        )

    def apply(self, before: bytes | None, seed: bytes) -> bytes:
        """See Write."""
        assert before is not None
        start, size = self.at * PAGE_BYTES, self.count * PAGE_BYTES
        taken = seed[self.taken_from * PAGE_BYTES :][:size]
        return before[:start] + taken + before[start + size :]


@dataclass(frozen=True)
class Chapter:
    """The source writes, then it is branched."""

    snapshot: str
    mode: str
    layout: str
    synced: tuple[Write, ...]
    """These come first, and are on the drive before the next."""
    unsynced: tuple[Write, ...]
    """Of these the drive may know nothing yet when the source is branched: its memory does."""

    @property
    def writes(self) -> tuple[Write, ...]:
        """All that is written in it."""
        return self.synced + self.unsynced


BOOK = Whole("/book/book", 7)
"""On the read-only drive; the source reads it before the first branch, and nobody before its
children look."""


CHAPTERS = (
    Chapter(
        "over-zeros",
        mode="diff",
        layout="flat",
        synced=(Whole("/disk/first", 21),),
        unsynced=(Whole("/mem/first", 11), Whole("/mem/second", 12), Whole("/disk/second", 22)),
    ),
    Chapter(
        "diff",
        mode="diff",
        layout="flat",
        synced=(Pages("/disk/first", 40, 30, 301),),
        unsynced=(
            Pages("/mem/first", 40, 30, 300),
            Whole("/mem/third", 13),
            Pages("/disk/second", 10, 25, 77),
        ),
    ),
    Chapter(
        "layer",
        mode="diff",
        layout="layered",
        synced=(),
        unsynced=(
            Whole("/mem/second", 14),
            Pages("/mem/first", 60, 9, 1),
            Whole("/disk/third", 23),
        ),
    ),
    Chapter(
        "flattened",
        mode="diff",
        layout="layered",
        synced=(Whole("/disk/second", 24),),
        unsynced=(Whole("/mem/fourth", 15),),
    ),
)
FLATTENED = "flattened"
"""The snapshot that is made FLAT before anything starts from it; the one below stays a layer until
it is forked."""

AFTERWARDS: tuple[Write, ...] = (
    Pages("/mem/first", 0, 20, 100),
    Whole("/mem/third", 16),
    Pages("/disk/first", 0, 20, 202),
    Whole("/disk/third", 25),
)
"""What the source writes while it has children."""

CHILDREN = (0, 1)


def child_id(snapshot: str, number: int) -> str:
    """The id that the fork gives a child."""
    return f"of-{snapshot}-{number}"


def child_writes(snapshot: str, number: int) -> tuple[Write, ...]:
    """Both children write to the same paths; what, differs by child."""
    nth = [chapter.snapshot for chapter in CHAPTERS].index(snapshot)
    mark = 100 + 10 * nth + number
    return (
        Pages("/mem/first", 45, 20, mark),
        Whole("/mem/second", mark),
        Whole("/mem/own", mark + 5),
        Pages("/disk/first", 45, 20, mark + 200),
        Whole("/disk/own", mark + 7),
    )


def applied(writes: Iterable[Write], before: Mapping[str, bytes], seed: bytes) -> dict[str, bytes]:
    """All files after these writes."""
    files = dict(before)
    for write in writes:
        files[write.path] = write.apply(files.get(write.path), seed)
    return files
