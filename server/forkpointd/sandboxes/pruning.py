"""Old snapshots that are deleted when nobody asks."""

from __future__ import annotations

import asyncio
import logging
from dataclasses import dataclass
from datetime import timedelta

from forkpointd.model import ForkpointError, Reason, now
from forkpointd.registry import Registry
from forkpointd.sandboxes.snapshots import Snapshots

log = logging.getLogger(__name__)

LOOK_SECONDS = 5.0


@dataclass(frozen=True, slots=True)
class PrunePolicy:
    """Which go: as `forkpoint snapshot prune` has it, where both rules let them go."""

    keep_last: int | None
    """The newest so many of each source stay; None: no such rule."""
    max_age: timedelta | None
    """What is younger stays; None: no such rule."""

    @property
    def deletes(self) -> bool:
        """Whether there is a rule at all."""
        return self.keep_last is not None or self.max_age is not None


async def prune_as_due(policy: PrunePolicy, registry: Registry, snapshots: Snapshots) -> None:
    """Deletes what is due, for good, the oldest first. Nothing that was made from it breaks."""
    while True:
        try:
            limit = None if policy.max_age is None else now() - policy.max_age
            due = await registry.prunable_snapshots(policy.keep_last, limit)
        except Exception:
            log.exception("what is to be pruned can't be found; it is tried again")
            due = []
        for snapshot_id in due:
            await _prune(snapshots, snapshot_id)
        await asyncio.sleep(LOOK_SECONDS)


async def _prune(snapshots: Snapshots, snapshot_id: str) -> None:
    try:
        await snapshots.delete(snapshot_id)
    except ForkpointError as error:
        if error.reason is not Reason.SNAPSHOT_NOT_FOUND:  # somebody was faster
            log.warning("snapshot %s is due to be pruned, and stays: %s", snapshot_id, error)
    except Exception:
        log.exception("snapshot %s is due to be pruned, and stays", snapshot_id)
    else:
        log.info("snapshot %s is pruned", snapshot_id)
