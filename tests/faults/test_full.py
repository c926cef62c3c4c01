"""Full disks and full staging: the source runs on, no page is lost, and room heals it.

The disks are real: small tmpfs mounts that the test fills while the server is held at a step
(needs root; skipped with the reason elsewhere).
"""

from __future__ import annotations

import asyncio
import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from forkpoint.v1 import branch_pb2, sandbox_pb2
from forkpointd.vmm import Binary
from tests.faults.test_kill import KilledHouse, next_branch_is_right
from tests.integration.serving import DIFF, FULL, READY_STAGE, Guest, stage_error

MEMORY_MIB = 96
REGION_MIB = 24
HELD_SECONDS = 20.0

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small disk needs root")

LIFE = "forkpointd.branching.life"


@contextmanager
def small_disk(path: Path, size_mib: int) -> Iterator[Path]:
    """A tmpfs of its own size, unmounted in any case."""
    path.mkdir(parents=True)
    subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size_mib}m,huge=never", "forkpoint-test", path],
        check=True,
    )
    try:
        yield path
    finally:
        subprocess.run(["umount", "--lazy", path], check=True)


def fill(path: Path, leave_bytes: int = 0) -> Path:
    """Takes all room there is, or all but so much."""
    filler = path / "filler"
    left = path / "left"
    left.write_bytes(b"\xff" * leave_bytes)
    with filler.open("wb", buffering=0) as file:
        try:
            while True:
                file.write(b"\xff" * (1 << 20))
        except OSError:
            left.unlink()
    return filler


async def reached(step: Path) -> None:
    """Waits until the server is held at its step."""
    async with asyncio.timeout(HELD_SECONDS):
        while not step.with_suffix(".reached").exists():
            await asyncio.sleep(0.01)


class FilledHouse(KilledHouse):
    """A house whose server is held at one step, while the test fills a disk."""

    def hold_at(self, step: str) -> Path:
        file = self.root / "hold"
        file.touch()
        self.point = f"{step}:hold={file}"
        return file


async def check_source_runs(house: FilledHouse, source: Guest, generation: int) -> None:
    """By the server's word and by its own: nobody paused it, and it lost nothing."""
    assert (await house.get(source.id)).state == sandbox_pb2.SANDBOX_STATE_RUNNING
    assert await source.verify(REGION_MIB) == (generation, generation, 0, 0)


async def test_staging_full_in_the_window_leaves_a_valid_base(
    binary: Binary, witness_kernel: Path, tmp_path: Path
) -> None:
    with small_disk(tmp_path / "staging", MEMORY_MIB + 32) as staging:
        house = FilledHouse(tmp_path / "h", binary, witness_kernel, staging_dir=staging)
        step = house.hold_at("forkpointd.branching.source:Source._make_pending")
        try:
            await house.start()
            source = await house.boot("src", MEMORY_MIB)
            generation = await source.dirty(REGION_MIB)
            branching = asyncio.create_task(house.branch("src", snapshot_id="s1"))
            await reached(step)
            # The vmstate still fits, the memory does not.
            filler = await asyncio.to_thread(fill, staging, 1 << 20)
            step.unlink()
            branch = await branching
            assert branch.stage == branch_pb2.BRANCH_STAGE_FAILED
            assert stage_error(branch) == "WRITE_FAILED"
            await check_source_runs(house, source, generation)
            base = (await house.get("src")).dirty_base
            assert base.state == sandbox_pb2.DIRTY_BASE_STATE_VALID, base
            filler.unlink()
            again = await house.ready("src", mode=DIFF)
            assert again.mode == DIFF
            await next_branch_is_right(house, source, "after")
            assert house.half_made() == []
        finally:
            await house.close()


@pytest.mark.parametrize("mode", [DIFF, FULL], ids=["diff", "full"])
async def test_disk_full_after_the_window_keeps_the_pages_for_the_next_branch(
    binary: Binary, witness_kernel: Path, tmp_path: Path, mode: int
) -> None:
    with small_disk(tmp_path / "disk", 6 * MEMORY_MIB) as disk:
        house = FilledHouse(tmp_path / "h", binary, witness_kernel)
        house.data_dir = disk / "data"
        merge = "merge_staged_diff" if mode == DIFF else "place_staged_full"
        step = house.hold_at(f"{LIFE}:{merge}")
        try:
            await house.start()
            source = await house.boot("src", MEMORY_MIB)
            await source.dirty(REGION_MIB)
            branching = asyncio.create_task(house.branch("src", mode=mode))
            await reached(step)
            filler = await asyncio.to_thread(fill, disk)
            step.unlink()
            branch = await branching
            assert branch.stage == branch_pb2.BRANCH_STAGE_FAILED, branch
            assert stage_error(branch) in ("WRITE_FAILED", "NO_DISK_SPACE")
            generation = await source.generation()
            await check_source_runs(house, source, generation)
            filler.unlink()
            base = (await house.get("src")).dirty_base
            assert base.state == sandbox_pb2.DIRTY_BASE_STATE_VALID, base
            await source.ask("p100,5")  # the next diff alone holds five pages only
            again = await house.ready("src", mode=DIFF)
            assert again.stage == READY_STAGE
            child = await house.child(again.snapshot_id)
            assert await child.verify(REGION_MIB) == await source.verify(REGION_MIB)
            await next_branch_is_right(house, source, "after")
            assert house.half_made() == []
        finally:
            await house.close()


async def test_a_kept_diff_is_merged_when_room_returns(
    binary: Binary, witness_kernel: Path, tmp_path: Path
) -> None:
    with small_disk(tmp_path / "disk", 6 * MEMORY_MIB) as disk:
        house = FilledHouse(tmp_path / "h", binary, witness_kernel)
        house.data_dir = disk / "data"
        step = house.hold_at(f"{LIFE}:merge_staged_diff")
        try:
            await house.start()
            source = await house.boot("src", MEMORY_MIB)
            generation = await source.dirty(REGION_MIB)
            branching = asyncio.create_task(house.branch("src"))
            await reached(step)
            filler = await asyncio.to_thread(fill, disk)
            step.unlink()
            assert (await branching).stage == branch_pb2.BRANCH_STAGE_FAILED
            filler.unlink()
            async with asyncio.timeout(HELD_SECONDS):
                while house.half_made():
                    await asyncio.sleep(0.05)
            assert not (await house.get("src")).dirty_base.unmerged_bytes
            branch = await house.ready("src", mode=DIFF)
            assert branch.pause_window.dirty_bytes < REGION_MIB << 20
            child = await house.child(branch.snapshot_id)
            assert await child.verify(REGION_MIB) == (generation, generation, 0, 0)
        finally:
            await house.close()
