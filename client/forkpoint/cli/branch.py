"""`forkpoint branch`."""

from __future__ import annotations

import asyncio
from typing import Annotated

import typer

import forkpoint
from forkpoint.cli import output
from forkpoint.cli.common import Address, AllowDriveCopy, Json, Labels, collect, pairs, run
from forkpoint.cli.hints import BranchGroup
from forkpoint.cli.progress import BranchDisplay, pause_facts
from forkpoint.views import BranchUpdate, SnapshotView

app = typer.Typer(
    help="""Make a snapshot of a sandbox while it runs.

The sandbox (the *source*) stands still for the *pause window* only, in which the memory that
changed since its last snapshot is written; the rest is copied before and after. The branch
belongs to the server: Ctrl-C stops the watching, `forkpoint branch cancel` stops the branch.

Example: `forkpoint branch start agent-7`
""",
    cls=BranchGroup,
    no_args_is_help=True,
    rich_markup_mode="markdown",
)

BranchId = Annotated[str, typer.Argument(metavar="BRANCH", help="The branch's id.")]
Mode = Annotated[
    forkpoint.BranchMode,
    typer.Option(
        case_sensitive=False,
        help="What the window writes: only what changed (diff), everything (full), or auto.",
    ),
]
Layout = Annotated[
    forkpoint.Layout,
    typer.Option(
        case_sensitive=False,
        help="How the snapshot is kept: whole (flat), what changed over its parent (layered), or "
        "auto.",
    ),
]
Durability = Annotated[
    forkpoint.Durability,
    typer.Option(
        case_sensitive=False,
        help="What ready means: synced to the disk, or in memory, which waits for no disk and is "
        "gone after a reboot unless it was written back by then.",
    ),
]
MaxPause = Annotated[
    str | None,
    typer.Option(
        metavar="SPAN", help="Refuse if the source would stand still for longer, such as 50ms."
    ),
]
Timeout = Annotated[
    str | None,
    typer.Option(metavar="SPAN", help="Stop following after this long. The work goes on."),
]


@app.command()
def start(
    sandbox_id: Annotated[str, typer.Argument(metavar="SANDBOX", help="The source's id.")],
    mode: Mode = forkpoint.BranchMode.AUTO,
    layout: Layout = forkpoint.Layout.AUTO,
    durability: Durability = forkpoint.Durability.DISK,
    snapshot_id: Annotated[
        str | None, typer.Option("--snapshot", metavar="ID", help="The snapshot's id to be.")
    ] = None,
    branch_id: Annotated[
        str | None, typer.Option("--branch", metavar="ID", help="The branch's id to be.")
    ] = None,
    max_pause: MaxPause = None,
    label: Labels = None,
    allow_drive_copy: AllowDriveCopy = False,
    wait: Annotated[
        bool, typer.Option("--wait/--no-wait", help="Follow it to its end, or let it go.")
    ] = True,
    timeout: Timeout = None,
    address: Address = None,
    json: Json = False,
) -> None:
    """Branch a sandbox, and follow that until the snapshot is ready.

    Examples:

    - `forkpoint branch start agent-7`
    - `forkpoint branch start agent-7 --mode diff --max-pause 50ms --snapshot before-upgrade`
    """

    async def work() -> BranchUpdate:
        async with forkpoint.connect(address) as fp:
            source = await fp.sandboxes.get(sandbox_id)
            branching = source.branch(
                mode=mode,
                layout=layout,
                durability=durability,
                snapshot_id=snapshot_id,
                branch_id=branch_id,
                max_pause=max_pause,
                labels=pairs(label),
                allow_drive_copy=allow_drive_copy,
                timeout=timeout,
            )
            if not wait:
                return await branching.started()
            return await follow(branching, json=json)

    show(run(work, json=json), json=json)


@app.command()
def watch(
    branch_id: BranchId, timeout: Timeout = None, address: Address = None, json: Json = False
) -> None:
    """Follow a branch from where it stands to its end. With --json: an object a line.

    Example: `forkpoint branch watch br-1`
    """

    async def work() -> BranchUpdate:
        async with forkpoint.connect(address) as fp:
            branching = fp.branches.watch(branch_id, timeout=timeout)
            return await follow(branching, json=json, lines=json)

    last = run(work, json=json)
    if not json:
        show(last, json=False)


@app.command("list")
def list_(
    source: Annotated[
        str | None, typer.Option(metavar="SANDBOX", help="Only those of this sandbox.")
    ] = None,
    stage: Annotated[
        list[forkpoint.BranchStage] | None,
        typer.Option(case_sensitive=False, help="Only those in this stage; repeatable."),
    ] = None,
    address: Address = None,
    json: Json = False,
) -> None:
    """List branches, oldest first.

    Example: `forkpoint branch list --source agent-7 --stage failed`
    """

    async def work() -> list[BranchUpdate]:
        async with forkpoint.connect(address) as fp:
            return await collect(
                fp.branches.list(source=source, stages=stage or (), page_size=1000)
            )

    found = run(work, json=json)
    if json:
        output.print_json(found)
        return
    if not found:
        output.say("no branches")
        return
    output.table(
        ["BRANCH", "OF", "STAGE", "MODE", "PAUSE", "DIRTIED", "TOOK", "AGE", "SNAPSHOT"],
        [
            [
                each.id,
                each.sandbox_id,
                each.stage.value,
                each.mode.value if each.mode.value != "UNSPECIFIED" else "-",
                output.span(each.pause.total) if each.pause else "-",
                output.size(each.pause.dirty_bytes) if each.pause else "-",
                output.span(each.duration),
                output.age(each.create_time),
                each.snapshot_id if each.snapshot else "-",
            ]
            for each in found
        ],
        right=["PAUSE", "DIRTIED", "TOOK", "AGE"],
    )


@app.command()
def cancel(branch_id: BranchId, address: Address = None, json: Json = False) -> None:
    """Stop a branch before its pause window. After that, delete its snapshot instead.

    Example: `forkpoint branch cancel br-1`
    """

    async def work() -> BranchUpdate:
        async with forkpoint.connect(address) as fp:
            return await fp.branches.cancel(branch_id)

    found = run(work, json=json)
    if json:
        output.print_json(found)
    else:
        output.out.print(f"{found.id} {found.stage.value}")


async def follow(
    branching: forkpoint.Branching, *, json: bool, lines: bool = False
) -> BranchUpdate:
    """Shows a branch until its end, and returns that; raises why it failed."""
    try:
        with BranchDisplay(output.err, quiet=json) as display:
            async for update in branching:
                display.update(update)
                if lines:
                    output.print_json(update, line=True)
    except asyncio.CancelledError:
        if branching.id is not None:
            output.say(f"the branch goes on: forkpoint branch watch {branching.id} (or cancel)")
        raise
    return await branching.started()


def show(found: BranchUpdate, *, json: bool) -> None:
    """A branch's end."""
    if json:
        output.print_json(found)
        return
    snapshot = found.snapshot
    stage = found.stage.value
    if found.duration is not None:
        stage += f" after {output.span(found.duration)}"
    mode = found.mode.value if found.mode.value != "UNSPECIFIED" else None
    if mode and found.mode_reason:
        mode += f" ({found.mode_reason})"
    shown: list[tuple[str, str | None]] = [
        ("branch", found.id),
        ("of", found.sandbox_id),
        ("stage", stage),
        ("mode", mode),
    ]
    if found.pause is not None:
        shown += pause_facts(found.pause)
    if snapshot is not None:
        shown += [
            ("snapshot", snapshot.id),
            (kept_where(snapshot), output.size(snapshot.disk_bytes)),
        ]
    output.facts(shown)


def kept_where(snapshot: SnapshotView) -> str:
    """Where its bytes are."""
    in_memory = snapshot.durability is forkpoint.Durability.MEMORY
    return "in memory" if in_memory else "on disk"
