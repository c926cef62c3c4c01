"""What a restarted server does with the sandboxes it finds (docs/design/promises.md, 4).

The row of a sandbox is durable before its process is spawned, so every VMM in our folders has a
row; one without is ended. A process is adopted when boot id, pid, start time, executable, working
folder and the id that it answers all fit (`Vmm.adopt`); then the owner's wish is restored.
"""

from __future__ import annotations

import asyncio
import logging
import shutil
from collections.abc import Callable
from concurrent.futures import Executor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

from forkpointd.model import ForkpointError, Sandbox, SandboxExit, SandboxState, now
from forkpointd.sandboxes.live import LiveSandbox
from forkpointd.sandboxes.service import Sandboxes
from forkpointd.vmm import Vmm, boot_id, end_orphans

T = TypeVar("T")

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Adoption:
    """What was found."""

    adopted: int
    stopped: int
    """Their processes ended while no server ran."""
    removed: int
    """Half made or half deleted: gone now."""
    orphans_ended: int


async def adopt_all(
    sandboxes: Sandboxes, *, files: Executor, calls: Executor, fork_children: frozenset[str]
) -> Adoption:
    """Takes every row into the house, and its process where it still runs.

    `fork_children` are the ids of children whose fork is not finished: those that never came to
    run stay, without a process, for the fork to start.
    """
    loop = asyncio.get_running_loop()

    def run(work: Callable[..., T], *arguments: object) -> asyncio.Future[T]:
        return loop.run_in_executor(files, work, *arguments)

    await run(sandboxes.folders.forget_spares)
    rows = await sandboxes.registry.all_sandboxes()
    adopted = stopped = 0
    doomed: list[LiveSandbox] = []
    keep: set[int] = set()
    for row in rows:
        live = sandboxes.hold_row(row)
        if row.state is SandboxState.CREATING:
            if row.sandbox_id not in fork_children:
                doomed.append(live)
        elif row.process is not None and row.state is not SandboxState.STOPPED:
            vmm = await Vmm.adopt(row.process, live.folder, row.sandbox_id, calls)
            if vmm is not None:
                keep.add(row.process.pid)
                await run(sandboxes.folders.link_staging, live.folder)
                sandboxes.attach(live, vmm)
                adopted += 1
            elif row.state is not SandboxState.DELETING:
                stopped += 1
                await _note_lost(sandboxes, live, row)
    orphans = await run(end_orphans, sandboxes.folders.root, frozenset(keep))
    for orphan in orphans:
        log.warning("ended %s, which belongs to no sandbox", orphan)
    await sandboxes.discard(doomed)
    removed = len(doomed)
    for live in list(sandboxes.live.values()):
        if live.row.state is SandboxState.DELETING:
            await sandboxes.delete(live.sandbox_id)
            removed += 1
        elif live.vmm is not None:
            try:
                await sandboxes.reconcile(live)
            except ForkpointError as error:
                log.error("sandbox %s: its wish is not restored: %s", live.sandbox_id, error)
    root = sandboxes.folders.root
    for folder in await run(lambda: sorted(root.iterdir())):
        if folder.name not in sandboxes.live:
            log.warning("removing %s, which belongs to no sandbox", folder)
            await run(_remove, folder)
    return Adoption(adopted, stopped, removed, len(orphans))


def _remove(path: Path) -> None:
    """Removes what has no business among the sandboxes' folders, as far as it goes."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


async def _note_lost(sandboxes: Sandboxes, live: LiveSandbox, row: Sandbox) -> None:
    """The process ended while no server ran: how is not known, its last words are."""
    words = await sandboxes.last_words(live)
    exit_ = SandboxExit(time=now(), exit_code=-1, signal=0, last_words=words)
    if row.process is not None and row.process.boot_id == boot_id():
        exit_ = await sandboxes.with_cause(exit_, row.process, just_now=False)
    log.warning("sandbox %s ended while no server ran", row.sandbox_id)
    await live.edit(
        lambda row: replace(row, state=SandboxState.STOPPED, exit=exit_, expire_time=None)
    )
