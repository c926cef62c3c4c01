"""The commands, put together."""

from __future__ import annotations

from typing import Annotated

import typer

from forkpoint._version import __version__
from forkpoint.cli import (
    branch,
    console,
    demo,
    doctor,
    exits,
    fork,
    sandbox,
    server,
    snapshot,
    tree,
)
from forkpoint.cli.common import Address, Json
from forkpoint.cli.hints import TopGroup

HELP = f"""
Branch a running microVM in milliseconds, and start copies of that very moment.

A **sandbox** is one microVM. A **snapshot** is an immutable image from which sandboxes start.
A **branch** makes a snapshot of a sandbox while it runs: the sandbox stands still for
milliseconds only. A **fork** starts any number of sandboxes (children) from one snapshot.

Examples:

- `forkpoint doctor` tells what this machine can do
- `forkpoint demo` shows it all, with a server of its own
- `forkpoint sandbox create agent-7 --kernel ./vmlinux --memory 512`
- `forkpoint branch start agent-7` makes a snapshot
- `forkpoint fork agent-7 -n 10 --ttl 10m` starts ten copies
- `forkpoint tree` shows who was branched from whom

{exits.HELP}
"""

app = typer.Typer(
    name="forkpoint",
    cls=TopGroup,
    help=HELP,
    no_args_is_help=True,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.add_typer(sandbox.app, name="sandbox")
app.add_typer(branch.app, name="branch")
app.add_typer(snapshot.app, name="snapshot")
app.add_typer(server.app, name="server")
app.command("fork")(fork.fork)
app.command("tree")(tree.tree)
app.command("doctor")(doctor.doctor)
app.command("demo")(demo.demo)
app.command("version")(server.version)
sandbox.app.command("console")(console.console)
# What a hand types that is used to docker or kubectl.
for room in (sandbox, branch, snapshot):
    room.app.command("ls", hidden=True)(room.list_)
for owner in (sandbox, snapshot):
    owner.app.command("delete", hidden=True)(owner.rm)


def _say_version(wanted: bool) -> None:
    if wanted:
        server.version(None, json=False)
        raise typer.Exit(exits.OK)


@app.callback()
def root(
    version: Annotated[
        bool,
        typer.Option(
            "--version", is_eager=True, callback=_say_version, help="Print both versions."
        ),
    ] = False,
) -> None:
    """Options of all commands."""


__all__ = ["Address", "Json", "__version__", "app"]
