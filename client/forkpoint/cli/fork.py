"""`forkpoint fork`."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Annotated, Any

import typer

import forkpoint
from forkpoint.cli import exits, output
from forkpoint.cli.branch import Durability, MaxPause, Mode, Timeout
from forkpoint.cli.common import Address, AllowDriveCopy, Json, Labels, Ttl, pairs, run
from forkpoint.cli.progress import BranchDisplay, pause_facts
from forkpoint.errors import SandboxNotFound, SnapshotNotFound
from forkpoint.views import BranchUpdate


def fork(
    origin: Annotated[
        str,
        typer.Argument(
            metavar="SANDBOX-OR-SNAPSHOT", help="What to copy: a running sandbox, or a snapshot."
        ),
    ],
    count: Annotated[int, typer.Option("--count", "-n", min=1, help="How many children.")] = 1,
    fork_id: Annotated[
        str | None, typer.Option("--id", metavar="ID", help="The children are ID-0, ID-1, ...")
    ] = None,
    ttl: Ttl = None,
    on_expiry: Annotated[
        forkpoint.ExpiryAction,
        typer.Option(case_sensitive=False, help="What happens when a child's time is over."),
    ] = forkpoint.ExpiryAction.DELETE,
    label: Labels = None,
    all_or_nothing: Annotated[
        bool, typer.Option("--all-or-nothing", help="Delete all children when one fails.")
    ] = False,
    mode: Mode = forkpoint.BranchMode.AUTO,
    durability: Durability = forkpoint.Durability.DISK,
    max_pause: MaxPause = None,
    allow_drive_copy: AllowDriveCopy = False,
    timeout: Timeout = None,
    address: Address = None,
    json: Json = False,
) -> None:
    """Start children: copies of a sandbox as it is this very moment, or of a snapshot.

    A sandbox is branched first, which makes a snapshot that stays. The children stay too, until
    their --ttl or `forkpoint sandbox rm`. Exit code 7: some of them did not start.

    Examples:

    - `forkpoint fork agent-7 -n 10 --ttl 10m`
    - `forkpoint fork snap-1 -n 100 --id try --all-or-nothing`
    """
    options: dict[str, Any] = {
        "fork_id": fork_id,
        "ttl": ttl,
        "on_expiry": on_expiry,
        "labels": pairs(label) if label else None,
        "on_failure": forkpoint.FailureAction.DELETE_ALL
        if all_or_nothing
        else forkpoint.FailureAction.KEEP,
        "allow_drive_copy": allow_drive_copy,
        "timeout": timeout,
    }

    async def work() -> forkpoint.Children:
        async with forkpoint.connect(address) as fp:
            found = await _find(fp, origin)
            if isinstance(found, forkpoint.Sandbox):
                children = found.fork(
                    count, mode=mode, durability=durability, max_pause=max_pause, **options
                )
            else:
                children = found.fork(count, **options)
            with BranchDisplay(output.err, quiet=json) as display, _interruptible(children):
                async with children:
                    children.keep()
                    if children.branch is not None:
                        display.update(children.branch)
                    while (update := await children.next()) is not None:
                        if isinstance(update, BranchUpdate):
                            display.update(update)
                        else:
                            display.update_fork(update)
                    await children.wait()
            return children

    children = run(work, json=json)
    _show(children, json=json)
    if children.failed:
        raise typer.Exit(exits.PARTIAL)


@contextmanager
def _interruptible(children: forkpoint.Children) -> Iterator[None]:
    """What becomes of a fork whose watching is interrupted."""
    try:
        yield
    except asyncio.CancelledError:
        if children.fork is not None:
            output.say(f"the fork goes on; its children will be {children.fork.id}-0 and on")
        raise


async def _find(fp: forkpoint.Client, name: str) -> forkpoint.Sandbox | forkpoint.Snapshot:
    """The sandbox or the snapshot of this id; ValueError where there are both."""
    sandbox: forkpoint.Sandbox | None = None
    with suppress(SandboxNotFound):
        sandbox = await fp.sandboxes.get(name)
    try:
        snapshot = await fp.snapshots.get(name)
    except SnapshotNotFound:
        if sandbox is not None:
            return sandbox
        raise forkpoint.errors.NotFound(
            f"there is neither a sandbox nor a snapshot {name!r}: see `forkpoint tree`"
        ) from None
    if sandbox is not None:
        raise ValueError(
            f"{name!r} is a sandbox and a snapshot: fork the snapshot with"
            f" `forkpoint sandbox create --snapshot {name}`, or give one of them another id"
        )
    return snapshot


def _show(children: forkpoint.Children, *, json: bool) -> None:
    order = {c.id: n for n, c in enumerate(children.fork.children)} if children.fork else {}
    ready = sorted(children.ready, key=lambda child: order.get(child.id, 0))
    if json:
        output.print_json(
            {
                "fork": children.fork,
                "branch": children.branch,
                "snapshot_id": children.snapshot.id if children.snapshot else None,
                "children": [child.id for child in ready],
                "failed": children.failed,
            }
        )
        return
    facts: list[tuple[str, str | None]] = []
    if children.fork is not None:
        facts.append(("fork", children.fork.id))
    if children.snapshot is not None:
        facts.append(("snapshot", children.snapshot.id))
    if children.pause is not None:
        facts += pause_facts(children.pause)
    output.facts(facts)
    starts = {c.id: c.start_duration for c in children.fork.children} if children.fork else {}
    rows = [[child.id, child.state.value, output.span(starts.get(child.id))] for child in ready]
    rows += [
        [child.id, "FAILED", str(child.error).splitlines()[0] if child.error else ""]
        for child in children.failed
    ]
    output.table(["CHILD", "STATE", "STARTED IN"], rows)
