"""`forkpoint sandbox`."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated

import typer

import forkpoint
from forkpoint.cli import output
from forkpoint.cli.common import Address, AllowDriveCopy, Json, Labels, Ttl, collect, pairs, run
from forkpoint.cli.deletions import Deletions, delete_each, say_deleted
from forkpoint.views import Drive, SandboxView

app = typer.Typer(
    help="""MicroVMs: create them, look at them, pause them, talk to their consoles.

A *sandbox* is one microVM: a Firecracker process, its folder, its console. It comes from a kernel
or from a snapshot, and outlives the server.

Example: `forkpoint sandbox create agent-7 --kernel ./vmlinux --memory 512`
""",
    no_args_is_help=True,
    rich_markup_mode="markdown",
)

SandboxId = Annotated[str, typer.Argument(metavar="SANDBOX", help="The sandbox's id.")]
OnExpiry = Annotated[
    forkpoint.ExpiryAction,
    typer.Option(case_sensitive=False, help="What happens when its time is over."),
]

_MEMORY = re.compile(r"(\d+(?:\.\d+)?)\s*(m|mb|mib|g|gb|gib|)", re.IGNORECASE)


def memory_mib(text: str) -> int:
    """MiB of "512", "512M" or "4GiB"."""
    found = _MEMORY.fullmatch(text.strip())
    if found is None:
        raise ValueError(f"{text!r} is no amount of memory: write 512 (MiB), 512M or 4G")
    amount = float(found[1]) * (1024 if found[2].lower().startswith("g") else 1)
    if amount != int(amount):
        raise ValueError(f"{text!r} is not a whole number of MiB")
    return int(amount)


def drive(text: str) -> Drive:
    """A drive of NAME=PATH, with :root and :rw behind it in any order."""
    name, equals, path = text.partition("=")
    flags = set()
    while path.endswith((":root", ":rw")):
        path, _, flag = path.rpartition(":")
        flags.add(flag)
    if not (name and equals and path):
        raise ValueError(f"a drive is written NAME=PATH, NAME=PATH:root or NAME=PATH:rw: {text!r}")
    return Drive(
        name,
        str(Path(path).absolute()),
        read_only="rw" not in flags,
        root_device="root" in flags,
    )


@app.command()
def create(
    sandbox_id: Annotated[
        str | None, typer.Argument(metavar="[SANDBOX]", help="Its id; default: chosen for you.")
    ] = None,
    kernel: Annotated[
        Path | None, typer.Option(help="An uncompressed kernel in the server's image roots.")
    ] = None,
    memory: Annotated[
        str | None, typer.Option(metavar="SIZE", help="Guest memory: 512 (MiB), 512M, 4G.")
    ] = None,
    vcpus: Annotated[int, typer.Option(min=0, max=32, help="Virtual CPUs; 0: 1.")] = 0,
    initrd: Annotated[Path | None, typer.Option(help="An initrd in the image roots.")] = None,
    boot_args: Annotated[str | None, typer.Option(help="The kernel's command line.")] = None,
    drives: Annotated[
        list[str] | None,
        typer.Option(
            "--drive",
            metavar="NAME=PATH[:root][:rw]",
            help="A drive, read-only unless :rw is behind it; repeatable.",
        ),
    ] = None,
    snapshot: Annotated[
        str | None, typer.Option(help="Start from this snapshot instead of a kernel.")
    ] = None,
    label: Labels = None,
    ttl: Ttl = None,
    on_expiry: OnExpiry = forkpoint.ExpiryAction.DELETE,
    allow_drive_copy: AllowDriveCopy = False,
    address: Address = None,
    json: Json = False,
) -> None:
    """Create a sandbox by booting a kernel, or from a snapshot.

    Examples:

    - `forkpoint sandbox create agent-7 --kernel ./vmlinux --memory 512`
    - `forkpoint sandbox create --snapshot snap-1 --ttl 10m`
    """

    async def work() -> SandboxView:
        async with forkpoint.connect(address) as fp:
            return await fp.sandboxes.create(
                sandbox_id,
                kernel=kernel,
                memory_mib=None if memory is None else memory_mib(memory),
                vcpus=vcpus,
                initrd=initrd,
                boot_args=boot_args,
                drives=[drive(text) for text in drives or ()],
                snapshot=snapshot,
                labels=pairs(label),
                ttl=ttl,
                on_expiry=on_expiry,
                allow_drive_copy=allow_drive_copy,
            )

    show(run(work, json=json), json=json)


@app.command("list")
def list_(
    label: Labels = None,
    state: Annotated[
        list[forkpoint.SandboxState] | None,
        typer.Option(case_sensitive=False, help="Only those in this state; repeatable."),
    ] = None,
    address: Address = None,
    json: Json = False,
) -> None:
    """List sandboxes, oldest first.

    Example: `forkpoint sandbox list --state running -l team=search`
    """

    async def work() -> list[forkpoint.Sandbox]:
        async with forkpoint.connect(address) as fp:
            found = fp.sandboxes.list(labels=pairs(label), states=state or (), page_size=1000)
            return await collect(found)

    found = run(work, json=json)
    if json:
        output.print_json(found)
        return
    if not found:
        output.say("no sandboxes")
        return
    output.table(
        ["SANDBOX", "STATE", "FROM", "MEMORY", "NEXT DIFF", "AGE", "EXPIRES", "LABELS"],
        [
            [
                each.id,
                each.state.value,
                each.snapshot_id or "boot",
                output.size(each.memory_mib * 2**20),
                each.dirty_base.state.value.lower(),
                output.age(each.create_time),
                output.until(each.expire_time),
                output.labels(each.labels),
            ]
            for each in found
        ],
        right=["MEMORY", "AGE"],
    )


@app.command()
def get(sandbox_id: SandboxId, address: Address = None, json: Json = False) -> None:
    """Show one sandbox.

    Example: `forkpoint sandbox get agent-7 --json`
    """

    async def work() -> SandboxView:
        async with forkpoint.connect(address) as fp:
            return await fp.sandboxes.get(sandbox_id)

    show(run(work, json=json), json=json)


@app.command()
def update(
    sandbox_id: SandboxId,
    label: Labels = None,
    no_labels: Annotated[bool, typer.Option("--no-labels", help="Remove all labels.")] = False,
    ttl: Ttl = None,
    no_ttl: Annotated[bool, typer.Option("--no-ttl", help="Let it live until deleted.")] = False,
    on_expiry: Annotated[
        forkpoint.ExpiryAction | None,
        typer.Option(case_sensitive=False, help="What happens when its time is over."),
    ] = None,
    address: Address = None,
    json: Json = False,
) -> None:
    """Change labels (all of them at once), the time to live from now, or what happens then.

    Example: `forkpoint sandbox update agent-7 --ttl 1h -l team=search`
    """

    async def work() -> SandboxView:
        if (label and no_labels) or (ttl is not None and no_ttl):
            raise ValueError("an option and its --no- form can't both be given")
        async with forkpoint.connect(address) as fp:
            return await fp.sandboxes.update(
                sandbox_id,
                labels=pairs(label) if label or no_labels else forkpoint.UNCHANGED,
                ttl=ttl if ttl is not None or no_ttl else forkpoint.UNCHANGED,
                on_expiry=forkpoint.UNCHANGED if on_expiry is None else on_expiry,
            )

    show(run(work, json=json), json=json)


@app.command()
def pause(sandbox_id: SandboxId, address: Address = None, json: Json = False) -> None:
    """Make a sandbox stand still. It doesn't expire while it does.

    Example: `forkpoint sandbox pause agent-7`
    """

    async def work() -> SandboxView:
        async with forkpoint.connect(address) as fp:
            return await fp.sandboxes.pause(sandbox_id)

    say_state(run(work, json=json), json=json)


@app.command()
def resume(sandbox_id: SandboxId, address: Address = None, json: Json = False) -> None:
    """Let a paused sandbox run.

    Example: `forkpoint sandbox resume agent-7`
    """

    async def work() -> SandboxView:
        async with forkpoint.connect(address) as fp:
            return await fp.sandboxes.resume(sandbox_id)

    say_state(run(work, json=json), json=json)


@app.command()
def rm(
    sandbox_ids: Annotated[list[str], typer.Argument(metavar="SANDBOX...", help="Their ids.")],
    force: Annotated[
        bool, typer.Option("--force", "-f", help="Be silent about those that are gone already.")
    ] = False,
    address: Address = None,
    json: Json = False,
) -> None:
    """End sandboxes and remove their folders. Their snapshots and children stay.

    Example: `forkpoint sandbox rm agent-7 agent-8`
    """

    async def work() -> Deletions:
        async with forkpoint.connect(address) as fp:
            return await delete_each(fp.sandboxes.delete, sandbox_ids, force=force)

    say_deleted(run(work, json=json), json=json)


def say_state(found: SandboxView, *, json: bool) -> None:
    """A sandbox's new state in a line."""
    if json:
        output.print_json(found)
    else:
        output.out.print(f"{found.id} {found.state.value}")


def _cost_text(found: SandboxView) -> str | None:
    if found.memory is None:
        return None
    own, shared = (
        output.size(each) for each in (found.memory.private_bytes, found.memory.shared_bytes)
    )
    return f"{own} of its own, {shared} shared"


def show(found: SandboxView, *, json: bool) -> None:
    """One sandbox."""
    if json:
        output.print_json(found)
        return
    base = found.dirty_base
    base_text = base.state.value
    if base.invalid_reason:
        base_text += f": {base.invalid_reason}"
    elif base.snapshot_id:
        base_text += f" on {base.snapshot_id}"
    elif base.branch_id:
        base_text += f": waits for {base.branch_id}"
    elif base.state is forkpoint.DirtyBaseState.VALID:
        base_text += " on the empty image (freshly booted)"
    if base.unmerged_bytes:
        base_text += f", {output.size(base.unmerged_bytes)} not merged yet"
    origin = "booted"
    if found.snapshot_id:
        origin = f"snapshot {found.snapshot_id}"
        if found.source_sandbox_id:
            origin += f" of {found.source_sandbox_id}"
    state = found.state.value
    if found.wished_state.value not in ("UNSPECIFIED", state):
        state += f" (its owner wants it {found.wished_state.value})"
    alive = found.exit is None
    output.facts(
        [
            ("sandbox", found.id),
            ("state", state),
            ("from", origin),
            ("fork", found.fork_id),
            ("memory", output.size(found.memory_mib * 2**20)),
            ("  costs", _cost_text(found)),
            ("vcpus", str(found.vcpus)),
            ("drives", ", ".join(f"{each.drive_id}={each.path}" for each in found.drives)),
            ("labels", output.labels(found.labels) if found.labels else None),
            ("age", output.age(found.create_time)),
            (
                "expires",
                f"{output.until(found.expire_time)}, then {found.on_expiry.value.lower()}"
                if found.expire_time
                else None,
            ),
            ("next diff", base_text if alive else None),
            ("VMM", f"{found.vmm}" + (f", pid {found.pid}" if found.pid and alive else "")),
            ("ended", _exit_text(found)),
        ]
    )


def _exit_text(found: SandboxView) -> str | None:
    ended = found.exit
    if ended is None:
        return None
    if ended.signal:
        how = f"by signal {ended.signal}"
    elif ended.exit_code is not None:
        how = f"with exit code {ended.exit_code}"
    else:
        how = "nobody saw how"
    if ended.explanation:
        how = f"{how}: {ended.explanation}"
    words = f"; its last words:\n{ended.last_words.rstrip()}" if ended.last_words.strip() else ""
    return f"{output.age(ended.time)} ago, {how}{words}"
