"""`forkpoint server` and `forkpoint version`."""

from __future__ import annotations

import asyncio
import warnings

import typer
from rich.markup import escape

import forkpoint
from forkpoint import _versions
from forkpoint._version import __version__
from forkpoint.cli import output
from forkpoint.cli.common import Address, Json, run
from forkpoint.errors import ForkpointError, VersionMismatchWarning
from forkpoint.views import ServerInfo

app = typer.Typer(
    help="""The server itself.

Example: `forkpoint server info`
""",
    no_args_is_help=True,
    rich_markup_mode="markdown",
)


@app.command()
def info(address: Address = None, json: Json = False) -> None:
    """Show which versions run, on which VMM, and what the server's host can do.

    Example: `forkpoint server info --json | jq .vmm`
    """

    async def work() -> ServerInfo:
        async with forkpoint.connect(address, hello=False) as fp:
            return await fp.server.info()

    found = run(work, json=json)
    if json:
        output.print_json(found)
        return
    vmm = "none: see the checks below" if found.vmm is None else str(found.vmm)
    if found.vmm is not None and found.vmm.kind is forkpoint.VmmKind.SIMULATOR:
        vmm += "  (no guest code runs: it needs /dev/kvm for that)"
    output.facts(
        [
            ("server", found.version),
            ("client", found.client_version),
            ("VMM", vmm + (f"  {found.vmm_path}" if found.vmm_path else "")),
            ("up for", output.age(found.start_time)),
            ("data folder", found.data_dir),
            ("image roots", ", ".join(found.image_roots) or "none: no kernel can be booted"),
            ("images", _images(found)),
            ("reflink", "yes" if found.reflink else "no: images are copied by their extents"),
            (
                "staging",
                f"{found.staging.value.lower()}, {output.size(found.staging_free_bytes)} free",
            ),
            ("memory", _memory_text(found)),
            (
                "limits",
                (
                    f"{found.max_fork_count} children a fork,"
                    f" {found.max_queued_branches} branches waiting a source"
                ),
            ),
        ]
    )
    if found.checks:
        from forkpoint.cli.doctor import show_checks

        output.out.print()
        show_checks(list(found.checks))


def _images(found: forkpoint.ServerInfo) -> str:
    said = f"{output.size(found.image_free_bytes)} free, {output.size(found.image_used_bytes)} used"
    if found.images_quota_bytes:
        said += f" of a quota of {output.size(found.images_quota_bytes)}"
    if found.images_low_water_bytes:
        said += f"; {output.size(found.images_low_water_bytes)} of the disk stay free"
    return said


def _memory_text(found: ServerInfo) -> str | None:
    use = found.memory
    if use is None:
        return None
    return (
        f"{output.size(use.used_bytes)} of the budget of {output.size(use.budget_bytes)} counted: "
        f"{output.size(use.sandbox_bytes)} in sandboxes, {output.size(use.headroom_bytes)} "
        f"headroom, {output.size(use.staging_bytes)} staged"
    )


def version(address: Address = None, json: Json = False) -> None:
    """Print the versions of the client and, where it can be reached, of the server.

    Example: `forkpoint version --json`
    """

    async def work() -> ServerInfo:
        async with forkpoint.connect(address, hello=False, timeout=5) as fp:
            return await fp.server.info()

    found: ServerInfo | None = None
    missing: ForkpointError | None = None
    try:
        with warnings.catch_warnings(action="ignore", category=VersionMismatchWarning):
            found = asyncio.run(work())  # a mismatch is said below
    except ForkpointError as error:
        missing = error
    if json:
        output.print_json({"client": __version__, "server": found.version if found else None})
        return
    output.out.print(f"forkpoint  {__version__}")
    if found is not None:
        output.out.print(f"server     {found.version}  ({address or 'default socket'})")
        said = _versions.differs(found)
        if said is not None:
            output.err.print(f"[yellow]warning:[/yellow] {said}")
    elif missing is not None:
        output.out.print(f"server     {escape(missing.message.splitlines()[0])}")
