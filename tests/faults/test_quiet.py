"""While a window is open no copy of the server moves a byte."""

from __future__ import annotations

import asyncio
from pathlib import Path

from forkpoint.v1 import branch_pb2, sandbox_service_pb2
from forkpointd.vmm import Binary
from tests.faults.test_full import reached
from tests.faults.test_kill import KilledHouse
from tests.integration.serving import READY_STAGE

MEMORY_MIB = 96
REGION_MIB = 24
HELD_SECONDS = 1.0
"""The copy would take some milliseconds."""


async def test_a_precopy_waits_for_another_sources_window(
    binary: Binary, witness_kernel: Path, tmp_path: Path
) -> None:
    house, hold = KilledHouse(tmp_path, binary, witness_kernel), tmp_path / "hold"
    house.point = f"forkpointd.vmm.window:Window.run:hold={hold}"
    try:
        await house.start()
        await house.boot("open", MEMORY_MIB)
        copied = await house.boot("copied", MEMORY_MIB)
        generation = await copied.dirty(REGION_MIB)
        await house.ready("copied")
        hold.touch()
        opening = asyncio.create_task(house.ready("open"))
        await reached(hold)
        copying = asyncio.create_task(house.branch("copied", branch_id="held"))
        async with asyncio.timeout(HELD_SECONDS * 10):
            while (await held_branch(house)).stage != branch_pb2.BRANCH_STAGE_PRECOPYING:
                await asyncio.sleep(0.01)
        await asyncio.wait([copying], timeout=HELD_SECONDS)
        branch = await held_branch(house)
        assert branch.stage == branch_pb2.BRANCH_STAGE_PRECOPYING
        assert branch.precopy.done_bytes == 0
        hold.unlink()
        await opening
        assert (await copying).stage == READY_STAGE
        child = await house.child((await copying).snapshot.snapshot_id)
        assert await child.verify(REGION_MIB) == (generation, generation, 0, 0)
    finally:
        await house.close()


async def held_branch(house: KilledHouse) -> branch_pb2.Branch:
    """The branch that is to hold still; empty until it is admitted."""
    listed = await house.sandboxes.ListBranches(
        sandbox_service_pb2.ListBranchesRequest(sandbox_id="copied")
    )
    found = [branch for branch in listed.branches if branch.branch_id == "held"]
    return found[0] if found else branch_pb2.Branch()
