"""`forkpoint demo`."""

from __future__ import annotations

import asyncio
import signal
from typing import Annotated

import typer

from forkpoint.cli import exits, output
from forkpoint.cli.common import Json, fail


def demo(
    children: Annotated[
        int, typer.Option("--children", "-n", min=1, max=1000, help="How many copies.")
    ] = 10,
    memory: Annotated[
        str | None,
        typer.Option(
            metavar="SIZE", help="Memory of the source: 256 MiB or more. Default: at most 4G."
        ),
    ] = None,
    vmm: Annotated[
        str | None, typer.Option(help="firecracker or simulator; default: what this machine can.")
    ] = None,
    json: Json = False,
) -> None:
    """See it all: a running microVM is branched five times, and ten copies are started.

    It starts a server of its own in a temporary folder, proves page by page what it claims, prints
    one table, and leaves nothing behind, not after Ctrl-C either. Exit code 1: a claim did not
    hold.

    Example: `forkpoint demo --memory 1G`
    """
    if not json:
        output.out.print("[bold]forkpoint demo[/bold]: a server of its own is being started ...")
    from forkpoint.cli.sandbox import memory_mib
    from forkpoint.demo import Options, Outcome, perform
    from forkpoint.demo.guest import Unexpected
    from forkpoint.demo.machine import LEAST_MIB, TooSmall
    from forkpoint.demo.report import Narrator, as_json, print_outcome
    from forkpoint.demo.server import ServerFailed
    from forkpoint.errors import ForkpointError

    ended_by: list[signal.Signals] = []

    async def work() -> Outcome:
        size = None if memory is None else memory_mib(memory)
        if size is not None and size < LEAST_MIB:
            raise ValueError(f"the source needs {LEAST_MIB} MiB or more")
        options = Options(children=children, memory_mib=size, vmm=vmm)
        task = asyncio.current_task()
        assert task is not None
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            asyncio.get_running_loop().add_signal_handler(
                number, _interrupt, task, number, ended_by
            )
        with Narrator(output.out, silent=json) as narrator:
            return await perform(options, narrator)

    try:
        outcome = asyncio.run(work())
    except asyncio.CancelledError:
        output.say("cleaned up; nothing is left behind")
        raise typer.Exit(128 + ended_by[0] if ended_by else exits.INTERRUPTED) from None
    except (ForkpointError, ServerFailed, TooSmall, Unexpected, ValueError) as error:
        fail(error, json=json)
        raise typer.Exit(exits.code_of(error)) from None
    if json:
        output.print_json(as_json(outcome))
    else:
        print_outcome(outcome)
    if not outcome.held:
        raise typer.Exit(exits.FAILED)


def _interrupt(
    task: asyncio.Task[object], number: signal.Signals, ended_by: list[signal.Signals]
) -> None:
    """The first signal ends the demo, in order; the others are told to wait."""
    if not ended_by:
        task.cancel()
    ended_by.append(number)
    output.say("ending: sandboxes, server and folder are being removed ...")
