"""`forkpoint snapshot`."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Annotated

import typer

import forkpoint
from forkpoint import durations
from forkpoint.cli import output
from forkpoint.cli.archives import archive_from, archive_to
from forkpoint.cli.common import Address, Json, Labels, collect, pairs, run
from forkpoint.cli.deletions import Deletions, delete_each, say_deleted
from forkpoint.cli.progress import CopyDisplay
from forkpoint.cli.pruning import prunable
from forkpoint.views import Progress, SnapshotView, VerifyUpdate

app = typer.Typer(
    help="""Images from which sandboxes start.

A *snapshot* is a sandbox's memory and devices at one moment; it never changes. `forkpoint branch
start` makes one of a running sandbox, `forkpoint fork` starts sandboxes from it.

Example: `forkpoint snapshot list --source agent-7`
""",
    no_args_is_help=True,
    rich_markup_mode="markdown",
)

SnapshotId = Annotated[str, typer.Argument(metavar="SNAPSHOT", help="The snapshot's id.")]


@app.command("list")
def list_(
    source: Annotated[
        str | None, typer.Option(metavar="SANDBOX", help="Only those branched from this sandbox.")
    ] = None,
    label: Labels = None,
    address: Address = None,
    json: Json = False,
) -> None:
    """List snapshots, oldest first.

    Example: `forkpoint snapshot list -l team=search`
    """

    async def work() -> list[forkpoint.Snapshot]:
        async with forkpoint.connect(address) as fp:
            found = fp.snapshots.list(labels=pairs(label), source=source, page_size=1000)
            return await collect(found)

    found = run(work, json=json)
    if json:
        output.print_json(found)
        return
    if not found:
        output.say("no snapshots")
        return
    output.table(
        [
            "SNAPSHOT",
            "OF",
            "MODE",
            "LAYOUT",
            "KEPT",
            "MEMORY",
            "DIRTIED",
            "SIZE",
            "EXCLUSIVE",
            "AGE",
            "LABELS",
        ],
        [
            [
                each.id,
                each.source_sandbox_id or "-",
                each.mode.value,
                each.layout.value,
                kept(each),
                output.size(each.memory_mib * 2**20),
                output.size(each.dirty_bytes),
                output.size(each.disk_bytes),
                _size(each.exclusive_bytes) or "-",
                output.age(each.create_time),
                output.labels(each.labels),
            ]
            for each in found
        ],
        right=["MEMORY", "DIRTIED", "SIZE", "EXCLUSIVE", "AGE"],
    )


@app.command()
def get(snapshot_id: SnapshotId, address: Address = None, json: Json = False) -> None:
    """Show one snapshot.

    Example: `forkpoint snapshot get snap-1 --json`
    """

    async def work() -> SnapshotView:
        async with forkpoint.connect(address) as fp:
            return await fp.snapshots.get(snapshot_id)

    show(run(work, json=json), json=json)


@app.command()
def update(
    snapshot_id: SnapshotId,
    label: Labels = None,
    no_labels: Annotated[bool, typer.Option("--no-labels", help="Remove all labels.")] = False,
    address: Address = None,
    json: Json = False,
) -> None:
    """Replace all labels of a snapshot.

    Example: `forkpoint snapshot update snap-1 -l release=7`
    """

    async def work() -> SnapshotView:
        if bool(label) == no_labels:
            raise ValueError("give either --label or --no-labels")
        async with forkpoint.connect(address) as fp:
            return await fp.snapshots.update(snapshot_id, labels=pairs(label))

    show(run(work, json=json), json=json)


@app.command()
def flatten(
    snapshot_id: SnapshotId,
    timeout: Annotated[
        str | None,
        typer.Option(metavar="SPAN", help="Stop following after this long. The work goes on."),
    ] = None,
    address: Address = None,
    json: Json = False,
) -> None:
    """Make a layered snapshot one file, so that sandboxes start from it at once.

    What starts from it first does the same. Ctrl-C stops the watching, not the work.

    Example: `forkpoint snapshot flatten snap-1`
    """

    async def work() -> SnapshotView:
        async with forkpoint.connect(address) as fp:
            last = None
            with CopyDisplay(output.err, "flatten", quiet=json) as display:
                async for update in fp.snapshots.flatten(snapshot_id, timeout=timeout):
                    display.update(update.progress)
                    last = update.snapshot
            assert last is not None, "it has at least one state"
            return last

    show(run(work, json=json), json=json)


@app.command()
def verify(
    snapshot_ids: Annotated[list[str], typer.Argument(metavar="SNAPSHOT...", help="Their ids.")],
    timeout: Annotated[
        str | None, typer.Option(metavar="SPAN", help="Give up after this long, for each.")
    ] = None,
    address: Address = None,
    json: Json = False,
) -> None:
    """Read snapshots and compare them with their checksums.

    A layered one is read with all that it stands on. The first damaged one ends the command with
    its first bad range.

    Example: `forkpoint snapshot verify snap-1`
    """

    async def work() -> list[VerifyUpdate]:
        good = []
        async with forkpoint.connect(address) as fp:
            for snapshot_id in snapshot_ids:
                with CopyDisplay(output.err, snapshot_id, quiet=json) as display:
                    async for update in fp.snapshots.verify(snapshot_id, timeout=timeout):
                        display.update(update.progress)
                        if update.verified:
                            good.append(update)
                            if not json:
                                size = output.size(update.progress.total_bytes)
                                output.say(f"{snapshot_id}: as it was ({size} read)")
        return good

    good = run(work, json=json)
    if json:
        output.print_json(
            [
                {
                    "snapshot_id": each.snapshot_id,
                    "verified": each.verified,
                    "read_bytes": each.progress.total_bytes,
                }
                for each in good
            ]
        )


@app.command()
def export(
    snapshot_id: SnapshotId,
    file: Annotated[
        str,
        typer.Option(
            "--output", "-o", metavar="FILE", help="Where to; - for standard output, the default."
        ),
    ] = "-",
    layout: Annotated[
        str,
        typer.Option(metavar="flat|kept", help="One image, or layers as the server keeps them."),
    ] = "flat",
    level: Annotated[
        int | None, typer.Option(metavar="N", help="1 (fast) to 12 (small). Default: 3.")
    ] = None,
    address: Address = None,
    json: Json = False,
) -> None:
    """Write a snapshot to a file, from which `forkpoint snapshot import` makes it again.

    The file appears when it is whole. Drives are not in it: only read-only ones may be there.

    Example: `forkpoint snapshot export snap-1 -o snap-1.forkpoint`
    """

    async def work() -> int:
        with archive_to(file) as target, CopyDisplay(output.err, "export", quiet=json) as display:
            async with forkpoint.connect(address) as fp:
                return await fp.snapshots.export_to(
                    target,
                    snapshot_id,
                    layout=layout.upper(),
                    level=level,
                    on_progress=display.update,
                )

    written = run(work, json=json)
    if file == "-":
        return
    if json:
        output.print_json({"snapshot_id": snapshot_id, "file": file, "bytes": written})
    else:
        output.say(f"{file}: {output.size(written)}")


@app.command("import")
def import_(
    file: Annotated[str, typer.Argument(metavar="FILE", help="The archive; - for standard input.")],
    snapshot_id: Annotated[
        str | None,
        typer.Option("--id", metavar="ID", help="The id to give it. Default: the one it had."),
    ] = None,
    label: Labels = None,
    address: Address = None,
    json: Json = False,
) -> None:
    """Make a snapshot of a file that `forkpoint snapshot export` wrote.

    It is refused, whole, where the server can't load it or the file was cut or altered. Import
    only what comes from somebody you trust.

    Example: `forkpoint snapshot import snap-1.forkpoint --id from-lab`
    """

    async def work() -> SnapshotView:
        with archive_from(file) as (source, size_bytes):
            async with forkpoint.connect(address) as fp:
                with CopyDisplay(output.err, "import", quiet=json) as display:
                    return await fp.snapshots.import_from(
                        source,
                        snapshot_id=snapshot_id,
                        labels=pairs(label),
                        on_progress=lambda sent: display.update(Progress(sent, size_bytes)),
                    )

    show(run(work, json=json), json=json)


@app.command()
def rm(
    snapshot_ids: Annotated[list[str], typer.Argument(metavar="SNAPSHOT...", help="Their ids.")],
    force: Annotated[
        bool, typer.Option("--force", "-f", help="Be silent about those that are gone already.")
    ] = False,
    address: Address = None,
    json: Json = False,
) -> None:
    """Delete snapshots. Nothing that was made from them breaks.

    Example: `forkpoint snapshot rm snap-1 snap-2`
    """

    async def work() -> Deletions:
        async with forkpoint.connect(address) as fp:
            return await delete_each(fp.snapshots.delete, snapshot_ids, force=force)

    say_deleted(run(work, json=json), json=json)


@app.command()
def prune(
    keep_last: Annotated[
        int | None, typer.Option(min=0, metavar="N", help="Keep the newest N of each source.")
    ] = None,
    older_than: Annotated[
        str | None, typer.Option(metavar="SPAN", help="Delete only what is older, such as 7d.")
    ] = None,
    source: Annotated[
        str | None, typer.Option(metavar="SANDBOX", help="Only those branched from this sandbox.")
    ] = None,
    label: Labels = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what would be deleted, and delete nothing.")
    ] = False,
    address: Address = None,
    json: Json = False,
) -> None:
    """Delete old snapshots. Nothing that was made from them breaks.

    With both rules a snapshot goes only if both let it go.

    Example: `forkpoint snapshot prune --keep-last 3 --older-than 7d --dry-run`
    """

    async def work() -> tuple[list[forkpoint.Snapshot], Deletions]:
        age = None if older_than is None else durations.parse(older_than)
        prunable([], keep_last=keep_last, older_than=age, now=datetime.now(UTC))
        async with forkpoint.connect(address) as fp:
            every = fp.snapshots.list(labels=pairs(label), source=source, page_size=1000)
            going = prunable(
                await collect(every), keep_last=keep_last, older_than=age, now=datetime.now(UTC)
            )
            if dry_run:
                return going, Deletions()
            ids = [each.id for each in going]
            return going, await delete_each(fp.snapshots.delete, ids, force=True)

    going, deletions = run(work, json=json)
    if not going and not json:
        output.say("nothing to delete")
    elif not dry_run:
        say_deleted(deletions, json=json)
    elif json:
        output.print_json({"would_delete": [each.id for each in going]})
    else:
        for each in going:
            held = f"{output.size(each.disk_bytes)}, {output.age(each.create_time)} old"
            output.out.print(f"would delete {each.id} ({held})")
        held = output.size(sum(each.disk_bytes for each in going))
        count = "1 snapshot" if len(going) == 1 else f"{len(going)} snapshots"
        output.say(f"{count}, {held}; what something stands on keeps its room")


def _size(count: int | None) -> str | None:
    return None if count is None else output.size(count)


def kept(found: SnapshotView) -> str:
    """Where its files are, if they are."""
    lost = found.state is forkpoint.SnapshotState.LOST
    return forkpoint.SnapshotState.LOST.value if lost else found.durability.value


def show(found: SnapshotView, *, json: bool) -> None:
    """One snapshot."""
    if json:
        output.print_json(found)
        return
    output.facts(
        [
            ("snapshot", found.id),
            ("of", found.source_sandbox_id),
            ("branch", found.branch_id),
            ("mode", found.mode.value),
            ("diff against", found.parent_snapshot_id),
            ("layout", found.layout.value),
            ("kept", kept(found)),
            ("memory", output.size(found.memory_mib * 2**20)),
            ("vcpus", str(found.vcpus)),
            ("dirtied", output.size(found.dirty_bytes)),
            ("size", output.size(found.disk_bytes)),
            ("exclusive", _size(found.exclusive_bytes)),
            ("shared", _size(found.shared_bytes)),
            ("drives", ", ".join(f"{each.drive_id}={each.path}" for each in found.drives)),
            ("labels", output.labels(found.labels) if found.labels else None),
            ("age", output.age(found.create_time)),
            ("VMM", str(found.vmm) if found.vmm else None),
        ]
    )
