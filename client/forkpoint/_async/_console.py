"""Serial consoles: read and write them, wait for what a guest says, or attach."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from types import TracebackType

import grpc

from forkpoint import _status, durations
from forkpoint._async._calls import Calls, gone
from forkpoint._async._mailbox import Mailbox
from forkpoint._expect import Pattern, Searched, Stopwatch, not_said
from forkpoint._orders import console_attach, console_read
from forkpoint._seam import aio as seam
from forkpoint.errors import ConnectionLost, DeadlineExceeded
from forkpoint.v1 import sandbox_service_pb2 as messages

_PIECE_BYTES = 32 * 1024
"""What one message to a console may hold."""

_WAITING_MESSAGES = 64


class Console:
    """A sandbox's serial console: bytes, at offsets that count from the sandbox's first byte."""

    def __init__(self, calls: Calls, sandbox_id: str) -> None:
        self._calls = calls
        self._sandbox_id = sandbox_id

    def __repr__(self) -> str:
        return f"<Console of {self._sandbox_id}>"

    async def write(self, data: bytes | str) -> int:
        """Hands bytes to the guest, as if typed.

        Returns the offset at which the console ended then: read from there to see the answer.

        Raises:
            ConsoleBusy: someone is attached as the writer.
            ConsoleFull: the guest does not read.
        """
        raw = data.encode() if isinstance(data, str) else data
        offset: int | None = None
        for start in range(0, max(len(raw), 1), _PIECE_BYTES):
            response = await self._calls.unary(
                self._calls.sandboxes.WriteConsole,
                messages.WriteConsoleRequest(
                    sandbox_id=self._sandbox_id, data=raw[start : start + _PIECE_BYTES]
                ),
                repeatable=False,
            )
            offset = response.offset if offset is None else offset
        return offset or 0

    async def read(self, *, from_offset: int | None = None, tail_bytes: int | None = None) -> bytes:
        """What the guest has said so far: all there is, from an offset, or the end of it."""
        said = bytearray()
        output = self.follow(from_offset=from_offset, tail_bytes=tail_bytes, end=True)
        async with aclosing(output):
            async for _, data in output:
                said += data
        return bytes(said)

    async def follow(
        self,
        *,
        from_offset: int | None = None,
        tail_bytes: int | None = None,
        end: bool = False,
        timeout: durations.Duration | None = None,
    ) -> AsyncGenerator[tuple[int, bytes], None]:
        """What the guest says, as (offset, bytes), until the sandbox ends.

        Finds its place again after a lost connection.

        Args:
            from_offset: start here; neither this nor tail_bytes: at the oldest byte there is.
            tail_bytes: start this many bytes before the end.
            end: stop at the present end instead of waiting for more.
            timeout: raise `DeadlineExceeded` after this long.
        """
        self._calls.check_open()
        seconds = None if timeout is None else durations.parse(timeout).total_seconds()
        patience = self._calls.patience()
        while True:
            call = self._calls.sandboxes.ReadConsole(
                console_read(self._sandbox_id, from_offset, tail_bytes, not end),
                timeout=seconds,
            )
            try:
                async for response in call:
                    self._calls.reached()
                    patience = self._calls.patience()
                    from_offset, tail_bytes = response.offset + len(response.data), None
                    if response.data:
                        yield response.offset, response.data
                return
            except grpc.RpcError as raw:
                error = _status.from_call(raw)
                if not (gone(error) and await patience.wait()):
                    raise await self._calls.explain(error, seconds) from raw
            finally:
                call.cancel()

    async def expect(
        self,
        pattern: Pattern,
        *,
        from_offset: int | None = None,
        timeout: durations.Duration = 10,
    ) -> bytes:
        """Waits until the guest says `pattern`, and returns all it said up to and including that.

        Args:
            pattern: bytes to be found as they are, or a compiled regular expression.
            from_offset: look from here; None: at all there is, and what comes.
            timeout: `DeadlineExceeded` after this long, with what the guest said instead.
        """
        searched = Searched(pattern)
        try:
            output = self.follow(from_offset=from_offset, timeout=timeout)
            async with aclosing(output):
                async for _, data in output:
                    found = searched.add(data)
                    if found is not None:
                        return found
        except DeadlineExceeded:
            raise not_said(pattern, searched.said, durations.parse(timeout)) from None
        raise ConnectionLost(
            f"{self._sandbox_id} ended before its console said {pattern!r}: {searched.said!r}"
        )

    async def ask(
        self, line: bytes | str, *, until: Pattern = b"\n", timeout: durations.Duration = 10
    ) -> bytes:
        """Writes a line and waits for the answer; returns it up to and including `until`.

        A newline is added where the line has none.
        """
        raw = line.encode() if isinstance(line, str) else line
        offset = await self.write(raw if raw.endswith(b"\n") else raw + b"\n")
        return await self.expect(until, from_offset=offset, timeout=timeout)

    def attach(
        self,
        *,
        from_offset: int | None = None,
        tail_bytes: int | None = None,
        read_only: bool = False,
    ) -> Attachment:
        """Connects to the console: `async with sandbox.console.attach() as console: ...`.

        Many may read, one may write: unless `read_only` you are the writer until the block ends,
        and `ConsoleBusy` is raised while someone else is.

        Args:
            from_offset: start the output here; neither this nor tail_bytes: only what comes.
            tail_bytes: start this many bytes before the end.
            read_only: only read.
        """
        first = console_attach(self._sandbox_id, from_offset, tail_bytes, read_only)
        return Attachment(self._calls, first)


class Attachment:
    """A connection to a console, both ways. Made by `Console.attach`; used as a block.

    A lost connection ends it with `ConnectionLost`: what was typed can't be typed twice.
    """

    def __init__(self, calls: Calls, first: messages.ConsoleAttach) -> None:
        self._calls = calls
        self._first = first
        self._inbox: Mailbox[messages.AttachConsoleResponse] = Mailbox(_WAITING_MESSAGES)
        self._outbox: Mailbox[messages.AttachConsoleRequest] = Mailbox(_WAITING_MESSAGES)
        self._call: seam.Stream[messages.AttachConsoleResponse] | None = None
        self._worker: seam.Worker | None = None
        self._unread = b""
        self._offset = 0
        self._input_ended = False

    def __repr__(self) -> str:
        return f"<Attachment to the console of {self._first.sandbox_id} at {self._offset}>"

    @property
    def offset(self) -> int:
        """Offset of the next byte that `read` returns."""
        return self._offset

    async def __aenter__(self) -> Attachment:
        self._calls.check_open()
        await self._outbox.put(messages.AttachConsoleRequest(attach=self._first))
        self._call = self._calls.sandboxes.AttachConsole(self._outbox.__aiter__())
        self._worker = seam.spawn(self._receive, f"console of {self._first.sandbox_id}")
        try:
            attached = await self._inbox.get()
            if attached is None:
                raise ConnectionLost("the server ended the console before it was attached")
        except BaseException:
            await self._leave()
            raise
        self._offset, self._unread = attached.offset, attached.data
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self._leave()

    async def _leave(self) -> None:
        await self._outbox.close()
        await self._inbox.close()
        if self._call is not None:
            self._call.cancel()
        if self._worker is not None:
            await seam.join(self._worker)

    async def _receive(self) -> None:
        """Takes what the server sends until the call ends; runs beside the caller."""
        assert self._call is not None
        error: Exception | None = None
        try:
            async for response in self._call:
                self._calls.reached()
                if not await self._inbox.put(response):
                    break
        except seam.CallEnded:
            pass  # by `_leave`
        except grpc.RpcError as raw:
            error = await self._calls.explain(_status.from_call(raw))
        finally:
            await self._inbox.close(error)
            await self._outbox.close()

    async def write(self, data: bytes | str) -> None:
        """Hands bytes to the guest, as if typed. They wait while the guest does not read."""
        if self._input_ended:
            raise ValueError("you ended the input of this console")
        raw = data.encode() if isinstance(data, str) else data
        for start in range(0, len(raw), _PIECE_BYTES):
            piece = messages.AttachConsoleRequest(input=raw[start : start + _PIECE_BYTES])
            if not await self._outbox.put(piece):
                while await self._inbox.get() is not None:
                    pass  # the error that ended the call, if there was one, comes last
                raise ConnectionLost("the console is closed for input")

    async def end_input(self) -> None:
        """Says that no more input comes. Output goes on."""
        self._input_ended = True
        await self._outbox.close()

    async def read(self, *, timeout: durations.Duration | None = None) -> bytes:
        """What the guest says next; b"" when the sandbox has ended.

        Raises `DeadlineExceeded` when it says nothing for `timeout`; nothing is lost by that.
        """
        if self._unread:
            data, self._unread = self._unread, b""
        else:
            seconds = None if timeout is None else durations.parse(timeout).total_seconds()
            try:
                response = await self._inbox.get(seconds)
            except TimeoutError:
                raise DeadlineExceeded(f"the guest said nothing for {seconds:g} s") from None
            if response is None:
                return b""
            data = response.data
            self._offset = response.offset
        self._offset += len(data)
        return data

    async def __aiter__(self) -> AsyncIterator[bytes]:
        while data := await self.read():
            yield data

    async def expect(self, pattern: Pattern, *, timeout: durations.Duration = 10) -> bytes:
        """Waits until the guest says `pattern`, and returns all it said up to and including that.

        What it said after that is left for the next `read`.
        """
        searched = Searched(pattern)
        span = durations.parse(timeout)
        clock = Stopwatch(span)
        while True:
            try:
                data = await self.read(timeout=clock.left())
            except DeadlineExceeded:
                self._put_back(searched.said)
                raise not_said(pattern, searched.said, span) from None
            if not data:
                raise ConnectionLost(
                    f"{self._first.sandbox_id} ended before its console said {pattern!r}:"
                    f" {searched.said!r}"
                )
            found = searched.add(data)
            if found is not None:
                self._put_back(searched.said[len(found) :])
                return found

    def _put_back(self, data: bytes) -> None:
        self._unread = data + self._unread
        self._offset -= len(data)

    async def ask(
        self, line: bytes | str, *, until: Pattern = b"\n", timeout: durations.Duration = 10
    ) -> bytes:
        """Writes a line and waits for the answer; returns it up to and including `until`."""
        raw = line.encode() if isinstance(line, str) else line
        await self.write(raw if raw.endswith(b"\n") else raw + b"\n")
        return await self.expect(until, timeout=timeout)
