"""A Firecracker that stands still (SIGSTOP): its window is late, and nothing is lost or paused."""

from __future__ import annotations

import asyncio
import os
import signal
from pathlib import Path

import grpc
import grpc.aio
import pytest

from forkpoint.v1 import branch_pb2, sandbox_pb2
from forkpointd.vmm import Binary
from tests.faults.test_full import reached
from tests.faults.test_kill import KilledHouse, next_branch_is_right
from tests.integration.serving import DIFF, reason, stage_error
from tests.integration.vmms import stand_still

MEMORY_MIB = 96
REGION_MIB = 24


@pytest.mark.parametrize("when", ["before the window", "in the window"])
async def test_a_stopped_vmm_is_unknown_until_it_answers_and_loses_nothing(
    binary: Binary, witness_kernel: Path, tmp_path: Path, when: str
) -> None:
    house = KilledHouse(
        tmp_path,
        binary,
        witness_kernel,
        window_deadline_seconds=1.0,
        vmm_call_timeout_seconds=1.0,
    )
    hold = tmp_path / "hold"
    if when == "in the window":
        house.point = f"forkpointd.vmm.window:Window.run:hold={hold}"
    pid = 0
    try:
        await house.start()
        source = await house.boot("src", MEMORY_MIB)
        generation = await source.dirty(REGION_MIB)
        await house.ready("src", snapshot_id="before")
        pid = (await house.get("src")).pid
        generation = await source.dirty(REGION_MIB)
        if when == "in the window":
            hold.touch()
            branching = asyncio.create_task(house.branch("src"))
            await reached(hold)
            await stand_still(pid)
            hold.unlink()
        else:
            await stand_still(pid)
            branching = asyncio.create_task(house.branch("src"))
        branch = await branching
        assert branch.stage == branch_pb2.BRANCH_STAGE_FAILED
        assert stage_error(branch) == (
            "WINDOW_TIMED_OUT" if when == "in the window" else "SANDBOX_UNRESPONSIVE"
        )
        assert (await house.get("src")).state == sandbox_pb2.SANDBOX_STATE_UNKNOWN
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await house.branch("src")
        assert caught.value.code() == grpc.StatusCode.UNAVAILABLE
        assert reason(caught.value) == "SANDBOX_UNRESPONSIVE"
        os.kill(pid, signal.SIGCONT)
        async with asyncio.timeout(20):
            while (await house.get("src")).state != sandbox_pb2.SANDBOX_STATE_RUNNING:
                await asyncio.sleep(0.05)
        assert await source.verify(REGION_MIB) == (generation, generation, 0, 0)
        base = (await house.get("src")).dirty_base
        assert base.state == sandbox_pb2.DIRTY_BASE_STATE_VALID
        if when == "in the window":
            assert base.unmerged_bytes >= REGION_MIB << 20
        child = await house.child((await house.ready("src", mode=DIFF)).snapshot_id)
        assert await child.verify(REGION_MIB) == (generation, generation, 0, 0)
        await next_branch_is_right(house, source, "after")
    finally:
        if pid:
            os.kill(pid, signal.SIGCONT)
        await house.close()
