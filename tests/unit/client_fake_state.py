"""The fake server's state, its switches, and what all its calls share."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import grpc
from google.protobuf.message import Message
from google.protobuf.timestamp_pb2 import Timestamp
from google.rpc import code_pb2, error_details_pb2, status_pb2
from grpc_status import rpc_status

from forkpoint.v1 import (
    branch_pb2,
    fork_pb2,
    sandbox_pb2,
    snapshot_pb2,
)

M = TypeVar("M", bound=Message)

Context = grpc.ServicerContext

WAIT_SECONDS = 20.0
"""Longer than any test should wait for anything."""

FULL_RUN = ("QUEUED", "PRECOPYING", "PAUSED+RESUMED", "MERGING", "FINALIZING", "READY")


def status_of(
    code: int, reason: str, message: str, *details: Message, **metadata: str
) -> status_pb2.Status:
    """A rich status as the server makes it."""
    status = status_pb2.Status(code=code, message=message)
    info = error_details_pb2.ErrorInfo(reason=reason, domain="forkpoint", metadata=metadata)
    for detail in (info, *details):
        status.details.add().Pack(detail)
    return status


def refuse(context: Context, status: status_pb2.Status) -> NoReturn:
    """Ends a call with a rich status."""
    context.abort_with_status(rpc_status.to_status(status))


def now() -> Timestamp:
    moment = Timestamp()
    moment.GetCurrentTime()
    return moment


def copy(message: M) -> M:
    copied = type(message)()
    copied.CopyFrom(message)
    return copied


class FakeState:
    """What the server knows, and what makes it misbehave."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.address = f"unix:{path}"
        self.changed = threading.Condition()
        self.sandboxes: dict[str, sandbox_pb2.Sandbox] = {}
        self.snapshots: dict[str, snapshot_pb2.Snapshot] = {}
        self.flattens_to_break = 0
        self.exports_to_break = 0
        self.branches: dict[str, branch_pb2.Branch] = {}
        self.forks: dict[str, fork_pb2.Fork] = {}
        self.consoles: dict[str, bytearray] = {}
        self.writers: set[str] = set()
        self.calls: list[tuple[str, Any]] = []
        self.remembered: dict[str, str] = {}
        self.version = "0.1.0"
        self.page_size = 2
        # Switches.
        self.run: tuple[str, ...] = FULL_RUN
        """The stages of the next branches."""
        self.hold_before: str | None = None
        """Branches wait before this stage (or before FORKING's child "child-<n>")."""
        self.cut_after: list[int | None] = []
        """For each next stream: after how many messages its connection breaks; None: never."""
        self.silent_before_first = False
        """Whether streams that are started now never say anything."""
        self.end_early = False
        """Whether a cut stream ends with OK instead of breaking."""
        self.failing_children: set[int] = set()
        self.vanishing: set[str] = set()
        """Children that are gone as soon as they have run."""
        self.branch_error: status_pb2.Status | None = None
        self.refusal: status_pb2.Status | None = None
        """What the next BranchSandbox or ForkSandboxes is refused with."""
        self.unavailable_calls = 0
        """So many next unary calls find nobody."""
        self.answer: Callable[[bytes], bytes] = lambda line: b"you said " + line
        self._names = itertools.count(1)
        self._sequence = itertools.count(100)

    def hold(self, stage: str | None) -> None:
        """Lets held branches go on to before another stage."""
        with self.changed:
            self.hold_before = stage
            self.changed.notify_all()

    def release(self) -> None:
        """Lets held branches go on."""
        self.hold(None)

    def wait_for(self, condition: Callable[[], bool]) -> None:
        """Waits until the state is such; AssertionError when it never is."""
        with self.changed:
            assert self.changed.wait_for(condition, WAIT_SECONDS), "the state never came"

    def called(self, method: str) -> list[Any]:
        """The requests of one method so far."""
        return [request for name, request in self.calls if name == method]

    def _note(self, method: str, request: Any, context: Context | None = None) -> None:
        with self.changed:
            self.calls.append((method, request))
            self.changed.notify_all()
        if context is not None and self.unavailable_calls > 0:
            self.unavailable_calls -= 1
            context.abort(grpc.StatusCode.UNAVAILABLE, "nobody here")

    def _find(self, kind: str, table: dict[str, M], key: str, context: Context) -> M:
        if key not in table:
            reason = f"{kind.upper()}_NOT_FOUND"
            refuse(context, status_of(code_pb2.NOT_FOUND, reason, f"there is no {kind} {key!r}"))
        return table[key]

    def add_sandbox(self, sandbox_id: str | None = None, **fields: Any) -> sandbox_pb2.Sandbox:
        """A sandbox that runs."""
        sandbox_id = sandbox_id or f"sandbox-{next(self._names)}"
        made = sandbox_pb2.Sandbox(
            sandbox_id=sandbox_id,
            state=sandbox_pb2.SANDBOX_STATE_RUNNING,
            wished_state=sandbox_pb2.WISHED_STATE_RUNNING,
            create_time=now(),
            start_time=now(),
            vcpus=1,
            vmm=sandbox_pb2.Vmm(kind=sandbox_pb2.VMM_KIND_SIMULATOR, version="1.12.1"),
            dirty_base=sandbox_pb2.DirtyBase(state=sandbox_pb2.DIRTY_BASE_STATE_VALID),
        )
        made.memory_mib = 128
        for name, value in fields.items():
            if isinstance(value, dict):
                getattr(made, name).update(value)
            else:
                setattr(made, name, value)
        with self.changed:
            self.sandboxes[sandbox_id] = made
            self.consoles[sandbox_id] = bytearray(b"READY\n")
            self.changed.notify_all()
        return made

    def _touch(self, message: Any) -> None:
        """Notes a change of a branch or a fork."""
        with self.changed:
            message.sequence = next(self._sequence)
            self.changed.notify_all()

    def _hold(self, name: str) -> None:
        with self.changed:
            self.changed.wait_for(lambda: self.hold_before != name, WAIT_SECONDS)

    def _admit(self, request: Any, context: Context) -> None:
        if self.refusal is not None:
            refusal, self.refusal = self.refusal, None
            refuse(context, refusal)

    def _stream(
        self,
        resource: Any,
        after: int,
        response: Any,
        field: str,
        context: Context,
    ) -> Iterator[Any]:
        """The state now and after each change, its end last; breaks when told to."""
        context.add_callback(self._wake)
        cut = self.cut_after.pop(0) if self.cut_after else None
        if self.silent_before_first:
            with self.changed:
                self.changed.wait_for(lambda: not context.is_active(), WAIT_SECONDS)
            return
        over = (
            (
                branch_pb2.BRANCH_STAGE_READY,
                branch_pb2.BRANCH_STAGE_FAILED,
                branch_pb2.BRANCH_STAGE_CANCELLED,
            )
            if field == "branch"
            else (fork_pb2.FORK_STAGE_READY, fork_pb2.FORK_STAGE_FAILED)
        )
        sent = 0
        while True:
            if sent == cut:
                if not self.end_early:
                    context.abort(grpc.StatusCode.UNAVAILABLE, "the connection broke")
                return
            with self.changed:
                self._await_change(resource, after, context)
                if not context.is_active():
                    return
                if resource.sequence <= after:
                    return
                state = copy(resource)
            after = state.sequence
            yield response(**{field: state})
            sent += 1
            if state.stage in over:
                return

    def _await_change(self, resource: Any, after: int, context: Context) -> None:
        self.changed.wait_for(
            lambda: resource.sequence > after or not context.is_active(), WAIT_SECONDS
        )

    def _wake(self) -> None:
        with self.changed:
            self.changed.notify_all()
