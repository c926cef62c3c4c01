"""Expiry: what happens when a sandbox's ttl is over. A paused sandbox doesn't expire."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable

from forkpointd.model import ExpiryAction, ForkpointError, Reason, SandboxState, now
from forkpointd.sandboxes.live import LiveSandbox
from forkpointd.sandboxes.service import Sandboxes
from forkpointd.sandboxes.tasks import Tasks

log = logging.getLogger(__name__)

RETRY_SECONDS = 5.0
"""After an action that failed."""

_WAITING_HELPS = frozenset({Reason.BRANCH_QUEUE_FULL, Reason.SANDBOX_UNRESPONSIVE})


class Expiry:
    """Waits for the next expiry, acts, and waits again."""

    def __init__(self, sandboxes: Sandboxes, branch: Callable[[str], Awaitable[bool]]) -> None:
        """`branch` branches a sandbox (mode AUTO) and tells whether its snapshot is READY."""
        self._sandboxes = sandboxes
        self._branch = branch
        self._changed = asyncio.Event()
        self._tasks = Tasks("expiry")
        self._acting: set[str] = set()
        sandboxes.expiry_changed = self._changed.set

    def start(self) -> None:
        """Begins to watch."""
        self._tasks.start_unwatched(self._watch(), "watch")

    async def close(self) -> None:
        """Ends the watch."""
        await self._tasks.cancel()

    async def _watch(self) -> None:
        while True:
            self._changed.clear()
            at = now()
            waits = [
                (live.row.expire_time - at).total_seconds()
                for live in self._sandboxes.live.values()
                if live.row.expire_time is not None
                and live.row.state is SandboxState.RUNNING
                and live.sandbox_id not in self._acting
            ]
            try:
                async with asyncio.timeout(max(0.0, min(waits)) if waits else None):
                    await self._changed.wait()
            except TimeoutError:
                self._expire_due()

    def _expire_due(self) -> None:
        for live in list(self._sandboxes.live.values()):
            if is_due(live) and live.sandbox_id not in self._acting:
                self._acting.add(live.sandbox_id)
                self._tasks.start_unwatched(self._expire(live), live.sandbox_id)

    async def _expire(self, live: LiveSandbox) -> None:
        sandbox_id, action = live.sandbox_id, live.row.on_expiry
        log.info("the ttl of sandbox %s is over: %s", sandbox_id, action)
        try:
            if action is ExpiryAction.BRANCH:
                branched = await self._is_branched(sandbox_id)
                if not is_due(live):
                    return  # its owner gave it more time, or paused it, while it was branched
                action = ExpiryAction.DELETE if branched else ExpiryAction.PAUSE
            if action is ExpiryAction.DELETE:
                await self._sandboxes.delete(sandbox_id)
            else:
                await self._sandboxes.pause(sandbox_id)
        except Exception as error:  # noqa: BLE001 - whatever it was, it is tried again
            log.error("expiry of sandbox %s: %s; it is tried again", sandbox_id, error)
            await asyncio.sleep(RETRY_SECONDS)
        finally:
            self._acting.discard(sandbox_id)
            self._changed.set()

    async def _is_branched(self, sandbox_id: str) -> bool:
        """Branches it; a branch that is refused is a branch that failed, unless waiting helps."""
        try:
            return await self._branch(sandbox_id)
        except ForkpointError as error:
            if error.reason in _WAITING_HELPS:
                raise
            log.error("sandbox %s can't be branched at its expiry: %s", sandbox_id, error)
            return False


def is_due(live: LiveSandbox) -> bool:
    """Whether a sandbox's time is over."""
    due = live.row.expire_time
    return due is not None and due <= now() and live.row.state is SandboxState.RUNNING
