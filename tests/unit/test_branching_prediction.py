"""What the next window is expected to write, and how long it is expected to be."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest

from forkpointd.branching.admission import expected_diff_bytes
from forkpointd.images import Extents
from forkpointd.model import MIB, ProcessRecord, Sandbox
from forkpointd.sandboxes.live import LastDiff
from forkpointd.vmm import resident_bytes
from tests.unit.registry_making import sandbox

PROCESS = ProcessRecord("boot", 17, 1, Path("/firecracker"), 1, 1)


@pytest.fixture
def row() -> Sandbox:
    made = sandbox("sb", process=PROCESS)
    return replace(made, machine=replace(made.machine, memory_mib=128))


def last(resident_mib: int) -> LastDiff:
    return LastDiff(Extents.of(()), resident_mib * MIB)


@pytest.mark.parametrize(
    ("last_mib", "resident_then", "resident_now", "expected_mib"),
    [
        (None, None, 50, 50),
        (None, None, 5_000, 128),
        (3, None, 90, 3),
        (3, 50, 52, 3),
        (3, 50, 90, 40),
        (3, 50, 10, 3),
        (3, 50, 5_000, 128),
    ],
    ids=[
        "before the first window all that it holds",
        "and no more than it can",
        "after a restart what the last one wrote",
        "what the last one wrote",
        "what it has grown by since",
        "a balloon took some back",
        "never more than its memory",
    ],
)
def test_the_next_diff_is_expected_to_be(
    row: Sandbox,
    last_mib: int | None,
    resident_then: int | None,
    resident_now: int,
    expected_mib: int,
) -> None:
    row = replace(row, last_diff_bytes=None if last_mib is None else last_mib * MIB)
    expected = expected_diff_bytes(
        row,
        None if resident_then is None else last(resident_then),
        lambda pid: resident_now * MIB if pid == PROCESS.pid else 0,
    )
    assert expected == expected_mib * MIB


def test_resident_memory_is_what_the_process_wrote() -> None:
    before = resident_bytes(os.getpid())
    block = bytearray(b"x") * (64 * MIB)
    assert len(block) <= resident_bytes(os.getpid()) - before < 80 * MIB
    del block
    assert resident_bytes(2**22 + 1) == 0
