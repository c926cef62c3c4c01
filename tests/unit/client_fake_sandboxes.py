"""The fake server's sandboxes and consoles."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import suppress

import grpc
from google.rpc import code_pb2

from forkpoint.v1 import (
    sandbox_pb2,
)
from forkpoint.v1 import sandbox_service_pb2 as s
from tests.unit.client_fake_state import (
    WAIT_SECONDS,
    Context,
    FakeState,
    copy,
    refuse,
    status_of,
)


class SandboxCalls(FakeState):
    """The calls of one sandbox: create to resume, and its console."""

    def CreateSandbox(  # noqa: N802
        self, request: s.CreateSandboxRequest, context: Context
    ) -> s.CreateSandboxResponse:
        self._note("CreateSandbox", copy(request))
        known = self.remembered.get(request.request_id)
        if known is None:
            if request.sandbox_id in self.sandboxes:
                refuse(context, status_of(code_pb2.ALREADY_EXISTS, "ID_TAKEN", "it is taken"))
            made = self.add_sandbox(
                request.sandbox_id or None,
                labels=dict(request.labels),
                memory_mib=request.boot.memory_mib or 128,
                snapshot_id=request.snapshot_id,
            )
            if request.HasField("ttl"):
                made.ttl.CopyFrom(request.ttl)
            known = self.remembered[request.request_id] = made.sandbox_id
        if self.unavailable_calls > 0:  # the answer gets lost, the work was done
            self.unavailable_calls -= 1
            context.abort(grpc.StatusCode.UNAVAILABLE, "nobody here")
        return s.CreateSandboxResponse(sandbox=self.sandboxes[known])

    def GetSandbox(  # noqa: N802
        self, request: s.GetSandboxRequest, context: Context
    ) -> s.GetSandboxResponse:
        self._note("GetSandbox", request, context)
        found = self._find("sandbox", self.sandboxes, request.sandbox_id, context)
        return s.GetSandboxResponse(sandbox=found)

    def ListSandboxes(  # noqa: N802
        self, request: s.ListSandboxesRequest, context: Context
    ) -> s.ListSandboxesResponse:
        self._note("ListSandboxes", request, context)
        matching = [
            each
            for each in self.sandboxes.values()
            if all(each.labels.get(k) == value for k, value in request.labels.items())
            and (not request.states or each.state in request.states)
        ]
        start = int(request.page_token or 0)
        end = start + self.page_size
        token = str(end) if end < len(matching) else ""
        return s.ListSandboxesResponse(sandboxes=matching[start:end], next_page_token=token)

    def UpdateSandbox(  # noqa: N802
        self, request: s.UpdateSandboxRequest, context: Context
    ) -> s.UpdateSandboxResponse:
        self._note("UpdateSandbox", copy(request), context)
        found = self._find("sandbox", self.sandboxes, request.sandbox_id, context)
        for path in request.update_mask.paths:
            if path == "labels":
                found.ClearField("labels")
                found.labels.update(request.labels)
            elif path == "ttl":
                found.ClearField("ttl")
                if request.HasField("ttl"):
                    found.ttl.CopyFrom(request.ttl)
            else:
                found.on_expiry = request.on_expiry
        return s.UpdateSandboxResponse(sandbox=found)

    def DeleteSandbox(  # noqa: N802
        self, request: s.DeleteSandboxRequest, context: Context
    ) -> s.DeleteSandboxResponse:
        self._note("DeleteSandbox", request, context)
        self._find("sandbox", self.sandboxes, request.sandbox_id, context)
        with self.changed:
            del self.sandboxes[request.sandbox_id]
            del self.consoles[request.sandbox_id]
            self.changed.notify_all()
        return s.DeleteSandboxResponse()

    def _set_state(
        self,
        request: s.PauseSandboxRequest | s.ResumeSandboxRequest,
        context: Context,
        state: sandbox_pb2.SandboxState.ValueType,
        wished: sandbox_pb2.WishedState.ValueType,
    ) -> sandbox_pb2.Sandbox:
        found = self._find("sandbox", self.sandboxes, request.sandbox_id, context)
        found.state, found.wished_state = state, wished
        return found

    def PauseSandbox(  # noqa: N802
        self, request: s.PauseSandboxRequest, context: Context
    ) -> s.PauseSandboxResponse:
        self._note("PauseSandbox", request, context)
        state, wished = sandbox_pb2.SANDBOX_STATE_PAUSED, sandbox_pb2.WISHED_STATE_PAUSED
        return s.PauseSandboxResponse(sandbox=self._set_state(request, context, state, wished))

    def ResumeSandbox(  # noqa: N802
        self, request: s.ResumeSandboxRequest, context: Context
    ) -> s.ResumeSandboxResponse:
        self._note("ResumeSandbox", request, context)
        state, wished = sandbox_pb2.SANDBOX_STATE_RUNNING, sandbox_pb2.WISHED_STATE_RUNNING
        return s.ResumeSandboxResponse(sandbox=self._set_state(request, context, state, wished))

    # --- consoles ----------------------------------------------------------------------------

    def say(self, sandbox_id: str, data: bytes) -> None:
        """The guest writes."""
        with self.changed:
            self.consoles[sandbox_id] += data
            self.changed.notify_all()

    def _type(self, sandbox_id: str, data: bytes) -> int:
        with self.changed:
            offset = len(self.consoles[sandbox_id])
            for line in data.splitlines(keepends=True):
                self.consoles[sandbox_id] += self.answer(line)
            self.changed.notify_all()
            return offset

    def _output(
        self, sandbox_id: str, offset: int, follow: bool, context: Context
    ) -> Iterator[tuple[int, bytes]]:
        context.add_callback(self._wake)
        while True:
            with self.changed:
                if follow:
                    self._await_output(sandbox_id, offset, context)
                data = bytes(self.consoles.get(sandbox_id, b"")[offset:])
            if not data or not context.is_active():
                return
            yield offset, data
            offset += len(data)
            if not follow:
                return

    def _await_output(self, sandbox_id: str, offset: int, context: Context) -> None:
        self.changed.wait_for(
            lambda: (
                not context.is_active()
                or sandbox_id not in self.consoles
                or len(self.consoles[sandbox_id]) > offset
            ),
            WAIT_SECONDS,
        )

    def _start_of(self, request: s.ReadConsoleRequest | s.ConsoleAttach) -> int:
        end = len(self.consoles[request.sandbox_id])
        if request.HasField("tail_bytes"):
            return max(0, end - request.tail_bytes)
        if request.HasField("from_offset"):
            return request.from_offset
        return 0 if isinstance(request, s.ReadConsoleRequest) else end

    def ReadConsole(  # noqa: N802
        self, request: s.ReadConsoleRequest, context: Context
    ) -> Iterator[s.ReadConsoleResponse]:
        self._note("ReadConsole", request)
        self._find("sandbox", self.sandboxes, request.sandbox_id, context)
        cut = self.cut_after.pop(0) if self.cut_after else None
        output = self._output(request.sandbox_id, self._start_of(request), request.follow, context)
        for sent, (offset, data) in enumerate(output):
            if sent == cut:
                context.abort(grpc.StatusCode.UNAVAILABLE, "the connection broke")
            yield s.ReadConsoleResponse(offset=offset, data=data)

    def WriteConsole(  # noqa: N802
        self, request: s.WriteConsoleRequest, context: Context
    ) -> s.WriteConsoleResponse:
        self._note("WriteConsole", request, context)
        self._find("sandbox", self.sandboxes, request.sandbox_id, context)
        if request.sandbox_id in self.writers:
            refuse(
                context,
                status_of(code_pb2.FAILED_PRECONDITION, "CONSOLE_BUSY", "someone is attached"),
            )
        offset = self._type(request.sandbox_id, request.data)
        return s.WriteConsoleResponse(accepted_bytes=len(request.data), offset=offset)

    def AttachConsole(  # noqa: N802
        self, requests: Iterator[s.AttachConsoleRequest], context: Context
    ) -> Iterator[s.AttachConsoleResponse]:
        attach = next(requests).attach
        self._note("AttachConsole", attach)
        name = attach.sandbox_id
        self._find("sandbox", self.sandboxes, name, context)
        if not attach.read_only:
            with self.changed:
                if name in self.writers:
                    refuse(
                        context,
                        status_of(code_pb2.FAILED_PRECONDITION, "CONSOLE_BUSY", "not you"),
                    )
                self.writers.add(name)
        start = self._start_of(attach)

        def take_input() -> None:
            with suppress(grpc.RpcError):  # raised when the client leaves
                for request in requests:
                    self._note("input", request.input)
                    self._type(name, request.input)

        def leave() -> None:
            with self.changed:
                self.writers.discard(name)
                self.changed.notify_all()

        context.add_callback(leave)
        threading.Thread(target=take_input, daemon=True).start()
        yield s.AttachConsoleResponse(offset=start)
        for offset, data in self._output(name, start, True, context):
            yield s.AttachConsoleResponse(offset=offset, data=data)
