"""Which layers are flattened when nobody asks: where chains have grown too deep or too large, and
the ends of chains that stopped growing."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta

from forkpointd.branching.flattening import Flattener
from forkpointd.model import ForkpointError, LayeredRow, Reason, now
from forkpointd.registry import Registry

log = logging.getLogger(__name__)

LOOK_SECONDS = 5.0
RETRY_SECONDS = 60.0
"""A flatten that failed is not tried again before."""


@dataclass(frozen=True, slots=True)
class FlattenPolicy:
    """What is due. A 0 is no reason."""

    max_depth: int
    """Layers over a flat image: the layer that makes them so many is due."""
    max_chain_bytes: int
    """The same of what they hold."""
    max_age: timedelta
    """The newest layer of a chain is due when it is as old as that."""

    def due(self, rows: Sequence[LayeredRow], at: datetime) -> list[str]:
        """The layers to be flattened, each before those that stand on it. A layer over one that is
        due counts as if that were done."""
        layered = {row.snapshot_id for row in rows}
        above: dict[str, list[LayeredRow]] = {}
        for row in rows:
            above.setdefault(row.parent_snapshot_id, []).append(row)
        due = []
        # By the parents, not by the clock, which can be set back. With what lies below each.
        left = [(row, 0, 0) for row in rows if row.parent_snapshot_id not in layered]
        while left:
            row, depth, held = left.pop()
            depth, held = depth + 1, held + row.disk_bytes
            is_end = row.snapshot_id not in above and not row.deleted
            if (
                (self.max_depth and depth >= self.max_depth)
                or (self.max_chain_bytes and held >= self.max_chain_bytes)
                or (self.max_age and is_end and at - row.create_time >= self.max_age)
            ):
                due.append(row.snapshot_id)
                depth, held = 0, 0
            left += [(each, depth, held) for each in above.get(row.snapshot_id, ())]
        return due


async def flatten_as_due(policy: FlattenPolicy, registry: Registry, flattener: Flattener) -> None:
    """Flattens what is due, for good, one after the other."""
    failed: dict[str, float] = {}
    while True:
        await asyncio.sleep(LOOK_SECONDS)
        clock = time.monotonic()
        failed = {each: at for each, at in failed.items() if clock - at < RETRY_SECONDS}
        try:
            due = policy.due(await registry.layered_snapshots(), now())
        except Exception:
            log.exception("what is to be flattened can't be found; it is tried again")
            continue
        for snapshot_id in due:
            if snapshot_id not in failed and not await _flattened(flattener, snapshot_id):
                failed[snapshot_id] = time.monotonic()


async def _flattened(flattener: Flattener, snapshot_id: str) -> bool:
    """Whether that worked, or nobody has the snapshot any more."""
    try:
        await flattener.flatten(snapshot_id)
    except ForkpointError as error:
        if error.reason is not Reason.SNAPSHOT_NOT_FOUND:
            log.warning("layered snapshot %s stays so: %s", snapshot_id, error)
            return False
    except Exception:
        log.exception("layered snapshot %s stays so", snapshot_id)
        return False
    return True
