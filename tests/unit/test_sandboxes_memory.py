"""The memory budget: what is counted, what is promised, what is refused and what it says."""

from __future__ import annotations

import asyncio
import os
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from forkpointd.model import MIB, ForkpointError, Reason
from forkpointd.sandboxes import memory
from forkpointd.sandboxes.memory import Counted, HostMemory, MemoryBudget
from forkpointd.sandboxes.memory_host import host_memory
from forkpointd.vmm import MemoryCgroup, resident_bytes

GIB = 1024 * MIB


class Figures:
    """What a budget reads, set by the test."""

    def __init__(self) -> None:
        self.resident: dict[int, int] = {}
        self.staging = 0
        self.host = HostMemory(24 * GIB, 20 * GIB)
        self.reads = 0

    def staging_bytes(self) -> int:
        self.reads += 1
        return self.staging


@pytest.fixture
def figures() -> Figures:
    return Figures()


@pytest.fixture
def files() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(1) as pool:
        yield pool


def budget_of(
    figures: Figures, files: ThreadPoolExecutor, budget_mib: int | None, headroom_mib: int = 16
) -> MemoryBudget:
    return MemoryBudget(
        budget_bytes=None if budget_mib is None else budget_mib * MIB,
        child_headroom_bytes=headroom_mib * MIB,
        staging_bytes=figures.staging_bytes,
        host=lambda: figures.host,
        files=files,
        resident=lambda pid: figures.resident.get(pid, 0),
    )


async def test_a_sandbox_counts_what_it_touched_and_its_headroom(
    figures: Figures, files: ThreadPoolExecutor
) -> None:
    figures.resident = {1: 100 * MIB, 2: 3 * MIB}
    figures.staging = 7 * MIB
    there = [Counted(1, 4 * GIB), Counted(2, 4 * GIB), Counted(None, 4 * GIB)]
    budget = budget_of(figures, files, 1024)
    await budget.refresh(there)
    use = budget.use(there)
    assert use.sandbox_bytes == 103 * MIB
    assert use.headroom_bytes == 3 * 16 * MIB
    assert use.staging_bytes == 7 * MIB
    assert use.used_bytes == (103 + 48 + 7) * MIB
    assert use.free_bytes == (1024 - 158) * MIB
    assert use.child_headroom_bytes == 16 * MIB


async def test_a_sandbox_has_no_headroom_beyond_its_memory(
    figures: Figures, files: ThreadPoolExecutor
) -> None:
    figures.resident = {1: 120 * MIB, 2: 140 * MIB}
    there = [Counted(1, 128 * MIB), Counted(2, 128 * MIB), Counted(3, 10 * MIB)]
    budget = budget_of(figures, files, 1024)
    await budget.refresh(there)
    # The second has touched more than its guest's memory: the VMM has some of its own.
    assert budget.use(there).headroom_bytes == (8 + 0 + 10) * MIB


async def test_a_promise_counts_until_it_is_released(
    figures: Figures, files: ThreadPoolExecutor
) -> None:
    budget = budget_of(figures, files, 100)
    await budget.refresh([])
    with budget.promise([], 4, 4 * GIB, "a"):
        assert budget.use([]).headroom_bytes == 64 * MIB
        with pytest.raises(ForkpointError) as caught:
            budget.promise([], 3, 4 * GIB, "b")
        assert caught.value.problem.metadata["free_bytes"] == str(36 * MIB)
        budget.promise([], 2, 4 * GIB, "c").release()
    assert budget.use([]).used_bytes == 0
    promise = budget.promise([], 6, 4 * GIB, "d")
    promise.release()
    promise.release()
    assert budget.use([]).used_bytes == 0


async def test_a_refusal_says_the_figures_and_how_many_would_fit(
    figures: Figures, files: ThreadPoolExecutor
) -> None:
    figures.resident = {1: 20 * MIB}
    figures.staging = 14 * MIB
    there = [Counted(1, GIB)]
    budget = budget_of(figures, files, 100)
    await budget.refresh(there)
    with pytest.raises(ForkpointError) as caught:
        budget.promise(there, 5, GIB, "5 children of snapshot s")
    problem = caught.value.problem
    assert problem.reason is Reason.NO_MEMORY
    assert "no memory for 5 children of snapshot s" in problem.message
    assert "80.0 MiB (5 x 16.0 MiB)" in problem.message
    assert "budget of 100.0 MiB there are 50.0 MiB left" in problem.message
    assert "ask for 3 at most, or delete sandboxes that nobody needs, or let" in problem.message
    assert problem.metadata == {
        "needed_bytes": str(80 * MIB),
        "free_bytes": str(50 * MIB),
        "budget_bytes": str(100 * MIB),
        "sandbox_bytes": str(20 * MIB),
        "headroom_bytes": str(16 * MIB),
        "staging_bytes": str(14 * MIB),
        "possible_count": "3",
    }
    assert problem.retry_after_seconds == memory.RETRY_SECONDS
    assert budget.use(there).headroom_bytes == 16 * MIB, "nothing is promised"


async def test_what_can_never_fit_is_not_to_be_retried(
    figures: Figures, files: ThreadPoolExecutor
) -> None:
    budget = budget_of(figures, files, 10)
    await budget.refresh([])
    with pytest.raises(ForkpointError) as caught:
        budget.promise([], 1, GIB, "sandbox a")
    assert caught.value.problem.retry_after_seconds is None
    assert "What helps: let the server's memory_budget_bytes" in caught.value.problem.message


async def test_a_hundred_children_of_4_gib_fit_a_host_of_24(
    figures: Figures, files: ThreadPoolExecutor
) -> None:
    budget = budget_of(figures, files, None)
    await budget.refresh([])
    assert budget.promise([], 100, 4 * GIB, "children").reserved_bytes == 1600 * MIB
    budget.promise([], 900, 4 * GIB, "more of them")


async def test_without_a_setting_the_budget_is_what_the_host_has_for_us(
    figures: Figures, files: ThreadPoolExecutor
) -> None:
    budget = budget_of(figures, files, None)
    reserve = 24 * GIB // 16
    await budget.refresh([], older_seconds=0)
    assert budget.use([]).budget_bytes == 20 * GIB - reserve
    # What our own sandboxes take is not lost to them.
    figures.resident, figures.staging = {1: 3 * GIB}, GIB
    figures.host = HostMemory(24 * GIB, 16 * GIB)
    there = [Counted(1, 4 * GIB)]
    await budget.refresh(there, older_seconds=0)
    assert budget.use(there).budget_bytes == 20 * GIB - reserve
    # What others take is.
    figures.host = HostMemory(24 * GIB, 2 * GIB)
    await budget.refresh(there, older_seconds=0)
    assert budget.use(there).budget_bytes == 6 * GIB - reserve
    figures.host = HostMemory(600 * MIB, 0)
    figures.resident, figures.staging = {}, 0
    await budget.refresh([], older_seconds=0)
    assert budget.use([]).budget_bytes == 0, "never negative"
    figures.host = HostMemory(600 * MIB, 600 * MIB)
    await budget.refresh([], older_seconds=0)
    assert budget.use([]).budget_bytes == 88 * MIB, "512 MiB at least are nobody's"


async def test_calls_at_once_share_one_reading_that_is_not_read_again_at_once(
    figures: Figures, files: ThreadPoolExecutor
) -> None:
    budget = budget_of(figures, files, 100)
    await asyncio.gather(*(budget.refresh([], older_seconds=3600) for _ in range(10)))
    await budget.refresh([], older_seconds=3600)
    assert figures.reads == 1
    await budget.refresh([], older_seconds=0)
    assert figures.reads == 2


async def test_a_reading_that_fails_is_told_and_tried_again(
    figures: Figures, files: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse() -> int:
        raise PermissionError(13, "no")

    budget = budget_of(figures, files, 100)
    with monkeypatch.context() as patched:
        patched.setattr(budget, "_staging_bytes", refuse)
        with pytest.raises(PermissionError):
            await budget.refresh([])
    await budget.refresh([])
    assert budget.use([]).used_bytes == 0


# --- what is read -----------------------------------------------------------------------------


def test_a_process_is_counted_with_its_own_memory_only() -> None:
    code = "import sys; block = bytearray(64 << 20); print('there', flush=True); sys.stdin.read()"
    with subprocess.Popen(
        ["python3", "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"there\n"
        rollup = Path(f"/proc/{process.pid}/smaps_rollup").read_text(encoding="ascii")
        private_kib = sum(
            int(line.split()[1]) for line in rollup.splitlines() if line.startswith("Private_Dirty")
        )
        counted = resident_bytes(process.pid)
        assert 64 * MIB <= counted < 64 * MIB + 32 * MIB
        # The kernel keeps the counters in batches for each CPU.
        slack = 2 * MIB + 512 * 1024 * (os.cpu_count() or 1)
        assert abs(counted - private_kib * 1024) < slack
        process.communicate()
    assert resident_bytes(process.pid) == 0


def written(folder: Path, **files: object) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name.replace("__", ".")).write_text(f"{text}\n")
    return folder


@pytest.fixture
def meminfo(tmp_path: Path) -> Path:
    path = tmp_path / "meminfo"
    path.write_text("MemTotal:  8388608 kB\nMemFree: 1 kB\nMemAvailable:  6291456 kB\n")
    return path


def test_without_a_control_group_the_host_has_what_it_says(meminfo: Path) -> None:
    assert host_memory(None, meminfo) == HostMemory(8 * GIB, 6 * GIB)


def test_the_host_of_this_test_can_be_read() -> None:
    found = host_memory(None)
    assert 0 < found.available_bytes <= found.total_bytes


def test_the_narrowest_limit_counts_and_cached_files_can_be_had_back(
    tmp_path: Path, meminfo: Path
) -> None:
    mount = written(tmp_path / "cg")
    written(
        mount / "a",
        memory__max=4 * GIB,
        memory__current=3 * GIB,
        memory__stat=f"anon 1\nactive_file {GIB}\ninactive_file {GIB // 2}",
    )
    own = written(mount / "a/b", memory__max="max", memory__current=5, memory__stat="anon 1")
    found = host_memory(MemoryCgroup(own, mount, 2), meminfo)
    assert found == HostMemory(4 * GIB, 4 * GIB - 3 * GIB // 2)


def test_a_limit_of_version_1_counts_too(tmp_path: Path, meminfo: Path) -> None:
    none = 9223372036854771712
    mount = written(
        tmp_path / "cg",
        memory__limit_in_bytes=none,
        memory__usage_in_bytes=10 * GIB,
        memory__stat="total_active_file 1",
    )
    own = written(
        mount / "a",
        memory__limit_in_bytes=GIB,
        memory__usage_in_bytes=2 * GIB,
        memory__stat=f"active_file 7\ntotal_active_file {GIB // 2}\ntotal_inactive_file 0",
    )
    found = host_memory(MemoryCgroup(own, mount, 1), meminfo)
    assert found == HostMemory(GIB, 0), "it has more than its limit already"
