"""What deletions would free, as the registry tells it, and what they free."""

from __future__ import annotations

import asyncio
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from forkpointd.model import Layout, SnapshotRoom
from forkpointd.registry import Registry
from tests.unit.registry_making import fork, snapshot

nodes = st.lists(
    st.tuples(st.integers(-1, 8), st.integers(0, 1000), st.booleans()), min_size=1, max_size=9
)
"""Of each: what it stands on (an earlier one, else nothing), its bytes, whether it is deleted."""


async def _collected(registry: Registry, held: dict[str, int]) -> int:
    """Removes what nobody needs, as the server does; returns its bytes."""
    freed = 0
    while unneeded := await registry.snapshots_nobody_needs():
        for each in unneeded:
            await registry.remove_snapshot_row(each)
            freed += held[each]
    return freed


async def _filled(path: Path, rows: list[tuple[int, int, bool]]) -> Registry:
    registry = await Registry.open(path)
    for number, (below, disk_bytes, deleted) in enumerate(rows):
        stands = 0 <= below < number
        await registry.insert_snapshot(
            replace(
                snapshot(f"snap-{number}"),
                parent_snapshot_id=f"snap-{below}" if stands else None,
                layout=Layout.LAYERED if stands else Layout.FLAT,
                disk_bytes=disk_bytes,
                deleted=deleted,
            )
        )
    return registry


@given(nodes)
@settings(max_examples=25, deadline=None)
def test_exclusive_is_what_the_delete_frees(
    tmp_path_factory: Any, rows: list[tuple[int, int, bool]]
) -> None:
    folder: Path = tmp_path_factory.mktemp("registry")
    held = {f"snap-{number}": row[1] for number, row in enumerate(rows)}

    async def compare() -> None:
        for number, (_, _, deleted) in enumerate(rows):
            if deleted:
                continue
            snapshot_id = f"snap-{number}"
            registry = await _filled(folder / f"{snapshot_id}.sqlite", rows)
            try:
                await _collected(registry, held)
                everything = await registry.bytes_of_chain(snapshot_id)
                room = (await registry.rooms_of_snapshots(list(held)))[snapshot_id]
                await registry.mark_snapshot_deleted(snapshot_id)
                assert room.exclusive_bytes == await _collected(registry, held)
                assert room.exclusive_bytes + room.shared_bytes == everything
            finally:
                await registry.close()

    asyncio.run(compare())


async def test_what_is_needed_is_not_freed_by_a_delete(tmp_path: Path) -> None:
    registry = await _filled(tmp_path / "registry.sqlite", [(-1, 5, True), (0, 7, False)])
    try:
        free = SnapshotRoom(exclusive_bytes=12, shared_bytes=0)
        kept = SnapshotRoom(exclusive_bytes=0, shared_bytes=12)
        assert await registry.rooms_of_snapshots(["snap-1", "no-such"]) == {"snap-1": free}
        await registry.insert_fork(fork("fork-1", snapshot_id="snap-1"))
        assert await registry.rooms_of_snapshots(["snap-1"]) == {"snap-1": kept}
    finally:
        await registry.close()


async def test_a_page_over_a_long_chain_looks_at_each_row_once(tmp_path: Path) -> None:
    chain = [(number - 1, 1, number % 2 == 1) for number in range(1000)]
    registry = await _filled(tmp_path / "registry.sqlite", chain)
    try:
        began = time.monotonic()
        rooms = await registry.rooms_of_snapshots([f"snap-{number}" for number in range(1000)])
        assert time.monotonic() - began < 1
        assert rooms["snap-999"] == SnapshotRoom(1, 999)
        assert rooms["snap-998"] == SnapshotRoom(0, 999)
    finally:
        await registry.close()
