"""Copies where memory is short: what running guests use of the page cache stays."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from forkpointd.model import MIB, VmmKind
from forkpointd.vmm import Binary
from tests.integration.limits import Limit
from tests.integration.serving import DIFF, House

MAPPED_MIB = 64
IMAGE_MIB = 192
LIMIT_MIB = 640
"""Holds the server, both sources, what the child has mapped, and not two images beside that."""


class LimitedHouse(House):
    """A house whose server, and all that it starts, is in a control group."""

    limit: Limit

    def command(self) -> list[str]:
        move = 'echo $$ > "$0" && exec "$@"'
        return ["sh", "-c", move, str(self.limit.processes), *super().command()]


@pytest.fixture
async def house(
    binary: Binary, witness_kernel: Path, tmp_path: Path
) -> AsyncIterator[LimitedHouse]:
    """A server that has little memory."""
    if binary.kind is not VmmKind.FIRECRACKER:
        pytest.skip("only a real VMM maps its snapshot's file")
    made = LimitedHouse(tmp_path, binary, witness_kernel)
    made.limit = Limit(LIMIT_MIB * MIB)
    try:
        await made.start()
        yield made
    finally:
        await made.close()
        await made.limit.remove()


def mapped_bytes(pid: int) -> int:
    """What a process has mapped of files."""
    lines = Path(f"/proc/{pid}/status").read_text(encoding="ascii").splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith("RssFile:"))


async def test_branches_of_one_source_take_no_page_from_the_child_of_another(
    house: LimitedHouse,
) -> None:
    source = await house.boot("mapped", 128)
    generation = await source.dirty(MAPPED_MIB)
    await house.ready("mapped", snapshot_id="kept")
    await house.delete("mapped")
    child = await house.child("kept")
    other = await house.boot("other", 512)
    await other.dirty(IMAGE_MIB)
    # This window is staged in memory, which may take pages: what is judged are copies.
    await house.ready("other")

    pid = (await house.get(child.id)).pid
    assert await child.verify(MAPPED_MIB) == (generation, generation, 0, 0)
    before = mapped_bytes(pid)
    assert before >= MAPPED_MIB * MIB
    for _ in range(4):
        await other.dirty(8)
        branch = await house.ready("other", mode=DIFF)
        assert branch.precopy.done_bytes >= IMAGE_MIB * MIB
    assert mapped_bytes(pid) >= before * 9 // 10
    assert await child.verify(MAPPED_MIB) == (generation, generation, 0, 0)
