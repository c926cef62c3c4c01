"""`forkpoint sandbox console`: a guest's serial console, in a terminal or in a pipe."""

from __future__ import annotations

import asyncio
import os
import re
import sys
import termios
import threading
import tty
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Annotated

import typer

import forkpoint
from forkpoint import durations
from forkpoint.cli import output
from forkpoint.cli.common import Address, Json, run
from forkpoint.cli.sandbox import SandboxId
from forkpoint.errors import DeadlineExceeded

DETACH = b"\x1d"
"""Ctrl-]"""


def console(
    sandbox_id: SandboxId,
    read_only: Annotated[
        bool, typer.Option("--read-only", "-r", help="Only read: many may, one may write.")
    ] = False,
    tail: Annotated[
        int | None,
        typer.Option(metavar="BYTES", min=0, help="Show this much of what was said before."),
    ] = None,
    until: Annotated[
        str | None,
        typer.Option(metavar="REGEX", help="End once the guest says this; else fail on --timeout."),
    ] = None,
    quiet_after: Annotated[
        str,
        typer.Option(
            metavar="SPAN", help="Input from a pipe: end when the guest is silent for so long."
        ),
    ] = "1s",
    follow: Annotated[
        bool, typer.Option("--follow/--no-follow", help="Or print what there is, and end.")
    ] = True,
    line_feed: Annotated[
        bool,
        typer.Option(
            "--lf", help="Enter sends a line feed, as the witness guest wants; else a return."
        ),
    ] = False,
    timeout: Annotated[
        str | None, typer.Option(metavar="SPAN", help="With --until: how long to wait for it.")
    ] = None,
    address: Address = None,
    json: Json = False,
) -> None:
    """Connect to a sandbox's serial console. Ctrl-] detaches; the sandbox goes on.

    Examples:

    - `forkpoint sandbox console agent-7`
    - `forkpoint sandbox console agent-7 --no-follow` prints what was said
    - `echo uptime | forkpoint sandbox console agent-7`
    - `echo make | forkpoint sandbox console agent-7 --until 'exit code [0-9]+' --timeout 10m`
    - `forkpoint sandbox console agent-7 --read-only --json`
    """
    terminal = sys.stdin.isatty() and not json
    start = tail if tail is not None else (4096 if terminal or read_only else None)
    wanted = None if until is None else re.compile(until.encode())

    async def work() -> None:
        async with forkpoint.connect(address) as fp:
            sandbox = await fp.sandboxes.get(sandbox_id)
            if not follow:
                async for offset, data in sandbox.console.follow(tail_bytes=tail, end=True):
                    _write(data, offset, json=json)
                return
            attachment = sandbox.console.attach(tail_bytes=start, read_only=read_only)
            async with attachment as attached:
                session = _Session(attached, json=json)
                if read_only:
                    await session.show(wanted, timeout)
                elif terminal:
                    output.say(f"{sandbox_id}: Ctrl-] detaches")
                    await session.interact(line_feed=line_feed)
                else:
                    await session.pipe(wanted, timeout, durations.parse(quiet_after))

    run(work, json=json)


def _write(data: bytes, offset: int, *, json: bool) -> None:
    if json:
        output.print_json({"offset": offset, "text": data}, line=True)
        return
    sys.stdout.buffer.write(data)
    sys.stdout.buffer.flush()


class _Session:
    """One attachment and this process's input and output."""

    def __init__(self, attached: forkpoint.Attachment, *, json: bool) -> None:
        self._attached = attached
        self._json = json

    def _write(self, data: bytes) -> None:
        _write(data, self._attached.offset - len(data), json=self._json)

    async def show(
        self, wanted: re.Pattern[bytes] | None, timeout: durations.Duration | None
    ) -> None:
        """What the guest says, until it ends or says what is wanted."""
        if wanted is not None:
            span = "365d" if timeout is None else timeout
            self._write(await self._attached.expect(wanted, timeout=span))
            return
        async for data in self._attached:
            self._write(data)

    async def pipe(
        self,
        wanted: re.Pattern[bytes] | None,
        timeout: durations.Duration | None,
        quiet: durations.Duration,
    ) -> None:
        """Input from a pipe: to its end, then until the guest is silent or says what is wanted."""
        feeding = asyncio.create_task(self._feed())
        try:
            if wanted is not None:
                await self.show(wanted, timeout)
                return
            while True:
                try:
                    data = await self._attached.read(timeout=quiet)
                except DeadlineExceeded:
                    if feeding.done():
                        break
                    continue
                if not data:
                    break
                self._write(data)
        finally:
            feeding.cancel()
            with suppress(asyncio.CancelledError):
                await feeding

    async def _feed(self) -> None:
        """Standard input to the guest, to its end."""
        loop = asyncio.get_running_loop()
        pieces: asyncio.Queue[bytes] = asyncio.Queue()
        wanted = threading.Semaphore(4)

        def read() -> None:
            """Reads ahead of the guest, but not by much."""
            data = b"?"
            with suppress(RuntimeError):  # the loop is closed: nobody wants it any more
                while data:
                    wanted.acquire()
                    data = os.read(sys.stdin.fileno(), 32768)
                    loop.call_soon_threadsafe(pieces.put_nowait, data)

        # Not one of asyncio's threads: those are waited for at the end, and a pipe may be silent
        # for ever.
        threading.Thread(target=read, name="standard input", daemon=True).start()
        while data := await pieces.get():
            await self._attached.write(data)
            wanted.release()
        await self._attached.end_input()

    async def interact(self, *, line_feed: bool) -> None:
        """A terminal on both sides, until Ctrl-]."""
        typed: asyncio.Queue[bytes] = asyncio.Queue()
        loop = asyncio.get_running_loop()
        stdin = sys.stdin.fileno()
        with _raw(stdin):
            loop.add_reader(stdin, lambda: typed.put_nowait(os.read(stdin, 4096)))
            showing = asyncio.create_task(self.show(None, None))
            typing = asyncio.create_task(self._type(typed, line_feed))
            try:
                done, _ = await asyncio.wait({showing, typing}, return_when=asyncio.FIRST_COMPLETED)
            finally:
                loop.remove_reader(stdin)
                for task in (showing, typing):
                    task.cancel()
                await asyncio.gather(showing, typing, return_exceptions=True)
        sys.stdout.write("\n")
        for task in done:
            task.result()
        output.say("detached" if typing in done else "the sandbox ended")

    async def _type(self, typed: asyncio.Queue[bytes], line_feed: bool) -> None:
        """What is typed, until the detach key."""
        while data := await typed.get():
            before, key, _ = data.partition(DETACH)
            if line_feed:
                before = before.replace(b"\r", b"\n")
            if before:
                await self._attached.write(before)
            if key:
                return


@contextmanager
def _raw(descriptor: int) -> Iterator[None]:
    """The terminal without line editing and signals: each key goes to the guest.

    Output is still processed, so that a guest's bare line feed begins a new line.
    """
    before = termios.tcgetattr(descriptor)
    tty.setraw(descriptor)
    raw = termios.tcgetattr(descriptor)
    raw[1] = before[1]
    termios.tcsetattr(descriptor, termios.TCSADRAIN, raw)
    try:
        yield
    finally:
        termios.tcsetattr(descriptor, termios.TCSADRAIN, before)
