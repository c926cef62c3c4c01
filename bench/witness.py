"""Where the witness guest's pages lie, and how it is told to write some."""

from __future__ import annotations

from typing import Protocol

from bench.floor import FloorError

BEFORE_REGION_MIB = 64
"""Of a guest's memory lies below the region that the witness writes to."""
PAGES_PER_MIB = 256

PageRange = tuple[int, int]
"""First page and number of pages of the witness's region."""


class Asked(Protocol):
    """A guest, whoever runs it."""

    def ask(self, command: str, /) -> str:
        """A command, and its answer."""


def write_pages(guest: Asked, first: int, count: int) -> None:
    """Has these pages written. Raises FloorError where the guest says that it didn't."""
    answer = guest.ask(f"p{first},{count}")
    if not answer.startswith(f"P {first} {count} "):
        raise FloorError(f"the guest answered {answer!r} instead of P {first} {count} ...")


def region_mib(memory_mib: int) -> int:
    """What a guest with so much memory can write to."""
    return memory_mib - BEFORE_REGION_MIB


def file_range(first_page: int, pages: int) -> tuple[int, int]:
    """Offset and length in a memory file of pages of the witness's region."""
    return (BEFORE_REGION_MIB << 20) + first_page * 4096, pages * 4096
