"""`kill -9` of the server at every step of a branch, with ten sandboxes running.

After each kill a new server starts on the same folder. Then: every sandbox runs and answers, no
half-made snapshot is shown, the branch has an end, and the source's next branch holds its memory
page by page.
"""

from __future__ import annotations

import asyncio
import itertools
import signal
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import grpc
import grpc.aio
import pytest

from forkpoint.v1 import (
    branch_pb2,
    fork_pb2,
    sandbox_pb2,
    sandbox_service_pb2,
    snapshot_pb2,
    snapshot_service_pb2,
)
from tests.integration.conftest import binary_for, vmm_params
from tests.integration.serving import AUTO, FULL, START_SECONDS, Guest, House
from tests.integration.test_branching import pause, resume, same_pages

COUNT = 10
MEMORY_MIB = 80
REGION_MIB = 12
SERVER = Path(__file__).with_name("killing_server.py")

LIFE = "forkpointd.branching.life"
STORE = "forkpointd.images.store:SnapshotStore"
WINDOWS = "forkpointd.branching.opening:Windows"

STEPS = {
    "admitted": "forkpointd.registry:Registry.insert_branch:after",
    "drafted": f"{STORE}.draft:after",
    "before-precopy": f"{LIFE}:make_image:before",
    "after-precopy": f"{LIFE}:make_image:after",
    "staged": f"{WINDOWS}.stage:after",
    "prepared": f"{WINDOWS}.prepare:after",
    "pending": "forkpointd.branching.source:Source._make_pending:after",
    "before-window": "forkpointd.vmm.window:Window.run:before",
    "requests-sent": (
        "forkpointd.vmm.window:Window.run:before>forkpointd.vmm.api:ApiConnection.receive:before"
    ),
    "after-window": "forkpointd.vmm.window:Window.run:after",
    "extents-stored": f"{WINDOWS}.read_extents:after",
    "figures-read": f"{WINDOWS}.describe:after",
    "resumed": f"{LIFE}:BranchLife._after_resumed:before",
    "before-merge": f"{LIFE}:merge_staged_diff:before",
    "after-merge": f"{LIFE}:merge_staged_diff:after",
    "before-finalise": f"{STORE}.finalise:before",
    "after-finalise": f"{STORE}.finalise:after",
    "before-ready": f"{LIFE}:BranchLife._commit_ready:before",
    "after-ready": f"{LIFE}:BranchLife._commit_ready:after",
    "before-forking": "forkpointd.sandboxes.forks:Forks.run_queued:before",
    "child-started": "forkpointd.sandboxes.forks:Forks._start_child:after",
    "children-committed": "forkpointd.sandboxes.forks:Forks._commit_outcomes:after",
}
FINISHED_AFTER_A_RESTART = (
    "resumed",
    "before-merge",
    "after-merge",
    "before-finalise",
    "after-finalise",
    "before-ready",
    "after-ready",
    "before-forking",
    "child-started",
    "children-committed",
)
"""Steps after which the next server has all that it needs to make the branch READY."""


LAYER_STEPS = {
    "requests-sent": STEPS["requests-sent"],
    "resumed": STEPS["resumed"],
    "before-layer": f"{LIFE}:place_layer:before",
    "after-layer": f"{LIFE}:place_layer:after",
    "after-finalise": STEPS["after-finalise"],
    "after-ready": STEPS["after-ready"],
    "before-flatten": f"{STORE}.flatten:before",
    # Checksums are put in their place likewise, at any time.
    "memory-replaced": f"{STORE}.flatten:before>{STORE}._replace:after",
    "after-flatten": f"{STORE}.flatten:after",
    "row-is-flat": "forkpointd.registry:Registry.snapshot_is_flat:after",
}
"""Steps of a branch that is kept as a layer, and whose children need it whole."""
SURVIVED = frozenset(LAYER_STEPS) - {"requests-sent"}


class KilledHouse(House):
    """A house whose next server is killed at a step."""

    point: str | None = None

    def command(self) -> list[str]:
        command = super().command()
        if self.point is None:
            return command
        return [sys.executable, str(SERVER), self.point, *command[3:]]


@pytest.fixture(scope="module", params=vmm_params())
def house(
    request: pytest.FixtureRequest, witness_kernel: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[KilledHouse]:
    """A house with ten running sandboxes, and no server."""
    binary = binary_for(request.param)
    made = KilledHouse(tmp_path_factory.mktemp("house"), binary, witness_kernel)

    async def boot_all() -> None:
        await made.start()
        for number in range(COUNT):
            await made.boot(f"sb-{number}", MEMORY_MIB)
        await made.kill()

    async def close() -> None:
        await made.close()

    try:
        asyncio.run(boot_all())
        yield made
    finally:
        asyncio.run(close())


_serial = itertools.count()


@pytest.mark.parametrize("step", STEPS)
async def test_killed_at(house: KilledHouse, step: str) -> None:
    finished = step in FINISHED_AFTER_A_RESTART
    flat = snapshot_pb2.LAYOUT_FLAT
    await killed_at(house, next(_serial), STEPS[step], flat, finished=finished)


@pytest.mark.parametrize("step", LAYER_STEPS)
async def test_killed_with_a_layer_at(house: KilledHouse, step: str) -> None:
    turn = next(_serial)
    await house.start()
    try:
        await house.ready(f"sb-{turn % COUNT}")  # else there is nothing to stand on
    finally:
        await house.kill()
    layered = snapshot_pb2.LAYOUT_LAYERED
    await killed_at(house, turn, LAYER_STEPS[step], layered, finished=step in SURVIVED)


async def killed_at(
    house: KilledHouse,
    turn: int,
    place: str,
    layout: snapshot_pb2.Layout.ValueType,
    *,
    finished: bool,
) -> None:
    """A branch with two children, killed at a place; then all that must hold."""
    source_id = f"sb-{turn % COUNT}"
    snapshot_id = f"killed-{turn}"
    house.point = place
    await house.start()
    source = Guest(house, source_id)
    generation = await source.dirty(REGION_MIB)
    with suppress(grpc.aio.AioRpcError):
        await house.branch(
            source_id,
            mode=AUTO,
            layout=layout,
            branch_id=f"br-{turn}",
            snapshot_id=snapshot_id,
            fork=fork_pb2.ForkSpec(count=2, fork_id=f"kids-{turn}"),
        )
    assert await wait_for_death(house) == -signal.SIGKILL
    house.point = None
    await house.start()
    try:
        await everyone_runs(house)
        branch = await ended_branch(house, f"br-{turn}")
        if finished:
            assert branch.stage == branch_pb2.BRANCH_STAGE_READY, branch
            assert branch.fork.ready_count == 2
            for child in branch.fork.children:
                child_guest = Guest(house, child.sandbox_id)
                assert await child_guest.verify(REGION_MIB) == (generation, generation, 0, 0)
        else:
            assert branch.stage == branch_pb2.BRANCH_STAGE_FAILED, branch
            assert snapshot_id not in await snapshot_ids(house)
        assert house.half_made() == []
        await next_branch_is_right(house, source, f"again-{turn}")
        for child_id in (f"kids-{turn}-0", f"kids-{turn}-1"):
            with suppress(grpc.aio.AioRpcError):
                await house.delete(child_id)
    finally:
        await house.kill()


async def wait_for_death(house: House) -> int:
    """The exit code of a server that was killed at its step."""
    assert house.process is not None
    code = await asyncio.to_thread(house.process.wait, START_SECONDS)
    await house.disconnect()
    return code


async def everyone_runs(house: House) -> None:
    """All ten run, by the server's word and by their own."""
    for number in range(COUNT):
        sandbox = await house.get(f"sb-{number}")
        assert sandbox.state == sandbox_pb2.SANDBOX_STATE_RUNNING, sandbox
        assert (await Guest(house, f"sb-{number}").ask("t"))[0] == "T"


async def ended_branch(house: House, branch_id: str) -> branch_pb2.Branch:
    """The branch once it has ended."""
    request = sandbox_service_pb2.WatchBranchRequest(branch_id=branch_id)
    last = None
    async with asyncio.timeout(START_SECONDS):
        async for response in house.sandboxes.WatchBranch(request):
            last = response.branch
    assert last is not None
    return last


async def snapshot_ids(house: House) -> list[str]:
    """All snapshots that are shown."""
    response = await house.snapshots.ListSnapshots(
        snapshot_service_pb2.ListSnapshotsRequest(page_size=1000)
    )
    return [snapshot.snapshot_id for snapshot in response.snapshots]


async def next_branch_is_right(house: House, source: Guest, prefix: str) -> None:
    """The source's next branch holds all of its memory: compared with a FULL one of the same
    moment page by page, and seen through a child."""
    generation = await source.dirty(REGION_MIB)
    await pause(house, source)
    auto = await house.ready(source.id, mode=AUTO, snapshot_id=f"{prefix}-auto")
    full = await house.ready(source.id, mode=FULL, snapshot_id=f"{prefix}-full")
    compared = same_pages(house.memory_file(auto.snapshot_id), house.memory_file(full.snapshot_id))
    assert compared == (await house.get(source.id)).memory_mib * 256
    await resume(house, source)
    child = await house.child(auto.snapshot_id)
    assert await child.verify(REGION_MIB) == (generation, generation, 0, 0)
    await house.delete(child.id)
    for snapshot_id in (auto.snapshot_id, full.snapshot_id):
        await house.delete_snapshot(snapshot_id)
