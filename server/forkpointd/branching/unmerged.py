"""Diffs that could not be merged when they were taken, merged when room returns.

Such a diff holds pages that exist nowhere else, usually in memory. The source's next branch merges
it anyhow; this merges it earlier, into an image that is the source's dirty base and nothing else:
a snapshot that is deleted from the start, so that no one sees it and it goes when no longer needed.
"""

from __future__ import annotations

import asyncio
import logging
from dataclasses import replace

from forkpointd.branching.imaging import Meter, make_image
from forkpointd.branching.workshop import Workshop
from forkpointd.images import ImageError, Manifest, Reservation
from forkpointd.model import (
    BranchMode,
    DirtyBase,
    DirtyBaseState,
    Layout,
    Snapshot,
    now,
)
from forkpointd.sandboxes.live import LiveSandbox, remove_diffs
from forkpointd.sandboxes.service import new_id

log = logging.getLogger(__name__)

NO_VMSTATE = b"a dirty base: nothing starts from it"
"""In the place of a hidden image's vmstate."""


async def merge_kept_diffs(shop: Workshop, live: LiveSandbox) -> bool:
    """Makes a hidden image of a source's base and its kept diffs. Held: the source's branch turn,
    with nobody in line.

    Returns whether there was anything to do. Raises ForkpointError (no room) or OSError; then the
    diffs are kept as they were.
    """
    base = live.row.dirty_base
    if not base.unmerged or base.state is not DirtyBaseState.VALID:
        return False
    image_id = new_id("base")
    row = live.row
    reservation = await shop.run(lambda: shop.admission.reserve_image(row))
    try:
        with shop.sandboxes.snapshots.hold(image_id):
            await _make_hidden_image(shop, live, base, image_id, reservation)
            await live.edit(lambda row: replace(row, dirty_base=DirtyBase.of(image_id)))
    finally:
        reservation.release()
    await shop.run(lambda: remove_diffs(base))
    log.info("the kept diffs of %s are merged into %s", live.sandbox_id, image_id)
    return True


async def _make_hidden_image(
    shop: Workshop,
    live: LiveSandbox,
    base: DirtyBase,
    image_id: str,
    reservation: Reservation,
) -> None:
    row = live.row
    branch = await shop.registry.get_branch(base.unmerged[-1].branch_id)
    if branch is None:
        raise ImageError(f"branch {base.unmerged[-1].branch_id} of a kept diff is forgotten")
    manifest = Manifest.describe(
        branch=replace(branch, snapshot_id=image_id, layout=Layout.FLAT),
        machine=replace(row.machine, drives=()),  # nothing starts from it
        vmm=row.vmm,
        host=shop.host,
    )
    draft = await shop.run(lambda: shop.store.draft(image_id))
    try:
        async with shop.merges.slot(), shop.sandboxes.snapshots.reading_base(base) as chain:
            await shop.merges.run(
                lambda pace: make_image(
                    chain,
                    base.unmerged,
                    row.machine.memory_bytes,
                    draft.memory_path,
                    Meter(reservation),
                    pace,
                )
            )
        await shop.run(lambda: draft.vmstate_path.write_bytes(NO_VMSTATE))
        await shop.run(lambda: shop.store.finalise(draft, manifest))
    except BaseException:
        await asyncio.shield(shop.run(lambda: shop.store.discard(draft)))
        raise
    await shop.registry.insert_snapshot(
        Snapshot(
            snapshot_id=image_id,
            create_time=now(),
            source_sandbox_id=row.sandbox_id,
            branch_id=base.unmerged[-1].branch_id,
            parent_snapshot_id=base.snapshot_id,
            mode=BranchMode.DIFF,
            layout=Layout.FLAT,
            machine=row.machine,
            vmm=row.vmm,
            disk_bytes=0,
            dirty_bytes=sum(diff.data_bytes for diff in base.unmerged),
            deleted=True,
        )
    )
