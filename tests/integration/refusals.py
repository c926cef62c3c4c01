"""What tests of bad input share: a server that is started once a module, and the proof that a
refusal left nothing behind.

`refused` is the heart: the block's call must fail with this code and reason and with words that say
what to do, and afterwards the server must look as it did before: the same processes, folders and
rows, no half-made file, and every source running as its owner wishes.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest
from google.protobuf.message import Message
from google.rpc import error_details_pb2, status_pb2
from grpc_status import rpc_status

from forkpoint.v1 import (
    sandbox_pb2,
    sandbox_service_pb2,
    snapshot_service_pb2,
)
from tests.faults import killing_server
from tests.integration.conftest import binary_for, vmm_params
from tests.integration.serving import START_SECONDS, Guest, House

MEMORY_MIB = 80
REGION_MIB = 12
"""What the witness can dirty of it: its regions begin at 64 MiB."""

RUNNING = sandbox_pb2.SANDBOX_STATE_RUNNING
PAUSED = sandbox_pb2.SANDBOX_STATE_PAUSED

NOT_ALIVE = (
    sandbox_pb2.SANDBOX_STATE_CREATING,
    sandbox_pb2.SANDBOX_STATE_DELETING,
    sandbox_pb2.SANDBOX_STATE_STOPPED,
)

STEPS = {
    "boot": "forkpointd.sandboxes.starting:Starter.boot",
    "load": "forkpointd.sandboxes.starting:Starter.load",
    "remove": "forkpointd.sandboxes.folders:Folders.remove",
    "precopy": "forkpointd.branching.life:make_image",
    "drives": "forkpointd.branching.life:make_ready",
    "window": "forkpointd.vmm.window:Window.run",
    "merge": "forkpointd.branching.life:merge_staged_diff",
    "layer": "forkpointd.branching.life:place_layer",
    "flatten": "forkpointd.images.store:SnapshotStore.flatten",
    "delete": "forkpointd.images.store:SnapshotStore.delete",
    "keep": "forkpointd.branching.unmerged:make_image",
    "compute": "forkpointd.branching.checksumming:compute",
    "compare": "forkpointd.branching.checksumming:compare",
    "finalise": "forkpointd.images.store:SnapshotStore.finalise",
    "write-back": "forkpointd.images.store:SnapshotStore.write_back",
}
"""Steps of its work at which a `HeldHouse`'s server can be held."""


class HeldHouse(House):
    """A house whose server can be held at any of `STEPS` while a test does something else."""

    def _file(self, step: str) -> Path:
        return self.root / f"hold-{step}"

    @property
    def channel(self) -> grpc.aio.Channel:
        """For bytes that no stub would send."""
        assert self._channel is not None
        return self._channel

    def command(self) -> list[str]:
        points = ",".join(f"{place}:hold={self._file(step)}" for step, place in STEPS.items())
        return [sys.executable, killing_server.__file__, points, *super().command()[3:]]

    def release_all(self) -> None:
        """Lets the server go on wherever it is held: a test that ran out of time holds on."""
        for step in STEPS:
            self._file(step).unlink(missing_ok=True)

    @asynccontextmanager
    async def held(self, step: str) -> AsyncIterator[Hold]:
        """Holds whoever comes to this step until the block ends, or `Hold.release`."""
        hold = Hold(self._file(step))
        hold.file.touch()
        try:
            yield hold
        finally:
            hold.release()


class Hold:
    """A step at which the server stands still."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self._seen = file.with_suffix(".reached")
        self._seen.unlink(missing_ok=True)

    async def reached(self) -> None:
        """Waits until the server is held."""
        async with asyncio.timeout(START_SECONDS):
            while not self._seen.exists():
                await asyncio.sleep(0.005)

    def release(self) -> None:
        """Lets it go on. Idempotent."""
        self.file.unlink(missing_ok=True)


@contextmanager
def running_house(param: str, root: Path, kernel: Path, **settings: object) -> Iterator[HeldHouse]:
    """A server for all tests of a module. Each test connects by itself: its loop is its own."""
    made = HeldHouse(root, binary_for(param), kernel, **settings)

    async def start() -> None:
        await made.start()
        await made.disconnect()

    try:
        asyncio.run(start())
        yield made
    finally:
        asyncio.run(made.close())


@asynccontextmanager
async def connected(house: HeldHouse) -> AsyncIterator[HeldHouse]:
    """A test's own connection."""
    await house.connect()
    try:
        yield house
    finally:
        await house.disconnect()


def served_with(**settings: object) -> Any:
    """The fixture of a server with settings, one for a whole module; on each VMM in turn."""

    @pytest.fixture(scope="module", params=vmm_params())
    def served(
        request: pytest.FixtureRequest,
        witness_kernel: Path,
        tmp_path_factory: pytest.TempPathFactory,
    ) -> Iterator[HeldHouse]:
        root = tmp_path_factory.mktemp("house")
        with running_house(request.param, root, witness_kernel, **settings) as house:
            yield house

    return served


# --- what there is -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Traces:
    """Everything that a piece of work could leave behind."""

    vmms: list[int]
    folders: dict[str, list[str]]
    half_made: list[str] = field(compare=False)
    """Not compared: what a branch needs no more goes right after it is READY."""
    sandboxes: dict[str, tuple[int, int]]
    """State and wished state by id."""
    snapshots: list[str]
    branches: list[str]


async def traces(house: House) -> Traces:
    """What there is now."""
    folders = {
        name: sorted(path.name for path in (house.data_dir / name).iterdir())
        for name in ("sandboxes", "snapshots")
    }
    sandboxes = await house.sandboxes.ListSandboxes(
        sandbox_service_pb2.ListSandboxesRequest(page_size=1000)
    )
    branches = await house.sandboxes.ListBranches(
        sandbox_service_pb2.ListBranchesRequest(page_size=1000)
    )
    assert not (sandboxes.next_page_token or branches.next_page_token)
    return Traces(
        vmms=sorted(house.vmm_pids()),
        folders=folders,
        half_made=house.half_made(),
        sandboxes={one.sandbox_id: (one.state, one.wished_state) for one in sandboxes.sandboxes},
        snapshots=await snapshot_ids(house),
        branches=[one.branch_id for one in branches.branches],
    )


async def stopped(house: HeldHouse, sandbox_id: str) -> None:
    """Waits until a sandbox's end is noticed."""

    async def noticed() -> bool:
        return bool((await house.get(sandbox_id)).state == sandbox_pb2.SANDBOX_STATE_STOPPED)

    await until(noticed)


async def crash(house: HeldHouse, call: asyncio.Future[Any]) -> None:
    """kill -9 of the server, which the call hears of."""
    assert house.process is not None
    house.process.kill()
    with pytest.raises(grpc.aio.AioRpcError):
        await call
    await house.kill()


async def nothing_half_made(house: House) -> None:
    """Waits until there is nothing but finished work: a branch's staging files go right after it
    is READY."""

    async def nothing() -> bool:
        return not house.half_made()

    await until(nothing)


async def snapshot_ids(house: House) -> list[str]:
    """All snapshots that are shown."""
    response = await house.snapshots.ListSnapshots(
        snapshot_service_pb2.ListSnapshotsRequest(page_size=1000)
    )
    return [snapshot.snapshot_id for snapshot in response.snapshots]


async def everyone_answers(house: House) -> None:
    """By the server's word each sandbox is as its owner wishes, and each that runs answers."""
    response = await house.sandboxes.ListSandboxes(
        sandbox_service_pb2.ListSandboxesRequest(page_size=1000)
    )
    for sandbox in response.sandboxes:
        if sandbox.state in NOT_ALIVE:
            continue
        wished_running = sandbox.wished_state == sandbox_pb2.WISHED_STATE_RUNNING
        assert sandbox.state == (RUNNING if wished_running else PAUSED), sandbox
        if wished_running:
            assert (await Guest(house, sandbox.sandbox_id).ask("t"))[0] == "T"


# --- refusals ----------------------------------------------------------------------------------


@dataclass
class Refusal:
    """What a refused call was told; there once the block of `refused` has ended."""

    words: str = ""
    metadata: dict[str, str] = field(default_factory=dict)
    status: status_pb2.Status = field(default_factory=status_pb2.Status)

    def detail(self, kind: type[Any]) -> Any:
        """The error detail of one kind; fails where there is none."""
        return detail_of(self.status, kind)

    @property
    def wrong_fields(self) -> list[str]:
        """The fields that a BadRequest names."""
        bad = self.detail(error_details_pb2.BadRequest)
        return [violation.field for violation in bad.field_violations]


def detail_of(status: status_pb2.Status, kind: type[Any]) -> Any:
    """The error detail of one kind; fails where there is none."""
    found: Message = kind()
    assert any(detail.Unpack(found) for detail in status.details), f"no {kind}: {status}"
    return found


def told(error: Any, code: str, reason: str, *words: str) -> Refusal:
    """Checks what an error says, and gives it back in parts."""
    status = rpc_status.from_call(error)  # it takes an AioRpcError too, which its hints don't say
    assert status is not None, f"no details: {error}"
    info = detail_of(status, error_details_pb2.ErrorInfo)
    assert (error.code().name, info.reason, info.domain) == (code, reason, "forkpoint"), error
    for part in words:
        assert part in status.message, f"{part!r} is not in {status.message!r}"
    return Refusal(status.message, dict(info.metadata), status)


@asynccontextmanager
async def refused(house: House, code: str, reason: str, *words: str) -> AsyncIterator[Refusal]:
    """The block's call is refused like this, says these words, and leaves nothing behind."""
    before = await traces(house)
    refusal = Refusal()
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        yield refusal
    seen = told(caught.value, code, reason, *words)
    refusal.words, refusal.metadata, refusal.status = seen.words, seen.metadata, seen.status
    after = await traces(house)
    assert after == before
    assert set(after.half_made) <= set(before.half_made)
    await everyone_answers(house)


def problem_of(status: status_pb2.Status, reason: str, *words: str) -> None:
    """Checks the error that a failed branch, fork or child carries."""
    info = detail_of(status, error_details_pb2.ErrorInfo)
    assert (info.reason, info.domain) == (reason, "forkpoint"), status
    for part in words:
        assert part in status.message, f"{part!r} is not in {status.message!r}"


async def until(condition: Any) -> None:
    """Waits for an async condition."""
    async with asyncio.timeout(START_SECONDS):
        while not await condition():
            await asyncio.sleep(0.01)
