"""A server for the client's tests: the contract's services over plain dictionaries.

It keeps the contract's promises (whole messages with a sequence, request_ids, pages, rich errors)
and breaks on demand: a stream that is cut, a branch that fails, a child that does not start. It
runs on grpc's threads, so that async and sync clients are tested against the same thing.
"""

from __future__ import annotations

import itertools
import os
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn, TypeVar
from urllib.parse import quote

import grpc
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import Message
from google.protobuf.timestamp_pb2 import Timestamp
from google.rpc import code_pb2, error_details_pb2, status_pb2
from grpc_status import rpc_status

from forkpoint.v1 import (
    branch_pb2,
    fork_pb2,
    sandbox_pb2,
    sandbox_service_pb2_grpc,
    server_service_pb2_grpc,
    snapshot_pb2,
    snapshot_service_pb2_grpc,
)
from forkpoint.v1 import sandbox_service_pb2 as s
from forkpoint.v1 import server_service_pb2 as v
from forkpoint.v1 import snapshot_service_pb2 as p

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


def _now() -> Timestamp:
    moment = Timestamp()
    moment.GetCurrentTime()
    return moment


def _copy(message: M) -> M:
    copied = type(message)()
    copied.CopyFrom(message)
    return copied


class Fake(
    sandbox_service_pb2_grpc.SandboxServiceServicer,
    snapshot_service_pb2_grpc.SnapshotServiceServicer,
    server_service_pb2_grpc.ServerServiceServicer,
):
    """The server's state, its services, and the switches that make it misbehave."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.address = f"unix:{path}"
        self.changed = threading.Condition()
        self.sandboxes: dict[str, sandbox_pb2.Sandbox] = {}
        self.snapshots: dict[str, snapshot_pb2.Snapshot] = {}
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
        self._server: grpc.Server | None = None

    # --- life --------------------------------------------------------------------------------

    def start(self) -> None:
        """Listens; again after `stop`, with the same state."""
        self._server = grpc.server(ThreadPoolExecutor(32, "fake"))
        sandbox_service_pb2_grpc.add_SandboxServiceServicer_to_server(self, self._server)
        snapshot_service_pb2_grpc.add_SnapshotServiceServicer_to_server(self, self._server)
        server_service_pb2_grpc.add_ServerServiceServicer_to_server(self, self._server)
        # A path may be longer than a socket's: bind through the folder.
        folder = os.open(self.path.parent, os.O_PATH)
        try:
            self._server.add_insecure_port(f"unix:/proc/self/fd/{folder}/{quote(self.path.name)}")
        finally:
            os.close(folder)
        self._server.start()

    def stop(self) -> None:
        """Stops listening and breaks all connections."""
        if self._server is not None:
            self._server.stop(None).wait(WAIT_SECONDS)
            self._server = None

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

    # --- sandboxes ---------------------------------------------------------------------------

    def add_sandbox(self, sandbox_id: str | None = None, **fields: Any) -> sandbox_pb2.Sandbox:
        """A sandbox that runs."""
        sandbox_id = sandbox_id or f"sandbox-{next(self._names)}"
        made = sandbox_pb2.Sandbox(
            sandbox_id=sandbox_id,
            state=sandbox_pb2.SANDBOX_STATE_RUNNING,
            wished_state=sandbox_pb2.WISHED_STATE_RUNNING,
            create_time=_now(),
            start_time=_now(),
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

    def CreateSandbox(  # noqa: N802
        self, request: s.CreateSandboxRequest, context: Context
    ) -> s.CreateSandboxResponse:
        self._note("CreateSandbox", _copy(request))
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
        self._note("UpdateSandbox", _copy(request), context)
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

    # --- branches ----------------------------------------------------------------------------

    def _touch(self, message: Any) -> None:
        """Notes a change of a branch or a fork."""
        with self.changed:
            message.sequence = next(self._sequence)
            self.changed.notify_all()

    def _hold(self, name: str) -> None:
        with self.changed:
            self.changed.wait_for(lambda: self.hold_before != name, WAIT_SECONDS)

    def _enter(self, branch: branch_pb2.Branch, stage: str) -> None:
        with self.changed:
            branch.stage = branch_pb2.BranchStage.Value(f"BRANCH_STAGE_{stage}")
            branch.stages.add(stage=branch.stage, enter_time=_now())
            if stage == "PRECOPYING":
                branch.mode = branch.requested_mode or snapshot_pb2.BRANCH_MODE_DIFF
                branch.precopy.total_bytes = 1000
            elif stage == "RESUMED":
                branch.precopy.done_bytes = 1000
                window = branch.pause_window
                window.start_time.CopyFrom(_now())
                for name, micros in (
                    ("total", 4200),
                    ("pause", 100),
                    ("snapshot", 3800),
                    ("resume", 100),
                    ("vmm_total", 4000),
                ):
                    getattr(window, name).CopyFrom(Duration(nanos=micros * 1000))
                window.dirty_bytes = 4096 * 25
                window.staging = branch_pb2.STAGING_KIND_TMPFS
            elif stage == "MERGING":
                branch.merge.total_bytes = branch.merge.done_bytes = 4096 * 25
            if stage in ("READY", "FORKING") and branch.snapshot_id not in self.snapshots:
                self.snapshots[branch.snapshot_id] = snapshot_pb2.Snapshot(
                    snapshot_id=branch.snapshot_id,
                    create_time=_now(),
                    source_sandbox_id=branch.sandbox_id,
                    branch_id=branch.branch_id,
                    mode=branch.mode,
                    memory_mib=128,
                    vcpus=1,
                    disk_bytes=4096 * 30,
                    dirty_bytes=4096 * 25,
                )
                branch.snapshot.CopyFrom(self.snapshots[branch.snapshot_id])
            if stage in ("READY", "FAILED", "CANCELLED"):
                branch.end_time.CopyFrom(_now())
                if stage != "READY" and branch.HasField("fork"):
                    self._end_fork(branch.fork, "FAILED")
            self._touch(branch)

    def _live(self, branch: branch_pb2.Branch) -> None:
        """The life of a branch, in a thread of its own."""
        for step in self.run:
            self._hold(step)
            if step == "READY" and branch.HasField("fork"):
                self._enter(branch, "FORKING")
                self._start_children(branch.fork, branch)
            for stage in step.split("+"):
                with self.changed:
                    if branch.stage == branch_pb2.BRANCH_STAGE_CANCELLED:
                        return
                if stage == "FAILED":
                    assert self.branch_error is not None
                    branch.error.CopyFrom(self.branch_error)
                self._enter(branch, stage)

    def _admit(self, request: Any, context: Context) -> None:
        if self.refusal is not None:
            refusal, self.refusal = self.refusal, None
            refuse(context, refusal)

    def BranchSandbox(  # noqa: N802
        self, request: s.BranchSandboxRequest, context: Context
    ) -> Iterator[s.BranchSandboxResponse]:
        self._note("BranchSandbox", _copy(request))
        known = self.remembered.get(request.request_id)
        if known is None:
            self._admit(request, context)
            self._find("sandbox", self.sandboxes, request.sandbox_id, context)
            number = next(self._names)
            branch = branch_pb2.Branch(
                branch_id=request.branch_id or f"branch-{number}",
                sandbox_id=request.sandbox_id,
                snapshot_id=request.snapshot_id or f"snapshot-{number}",
                requested_mode=request.mode,
                create_time=_now(),
                stage=branch_pb2.BRANCH_STAGE_QUEUED,
            )
            if request.HasField("fork"):
                self._make_fork(branch.fork, request.fork, branch.snapshot_id, branch.branch_id)
                self.forks[branch.fork.fork_id] = branch.fork
            self._touch(branch)
            self.branches[branch.branch_id] = branch
            known = self.remembered[request.request_id] = branch.branch_id
            threading.Thread(target=self._live, args=(branch,), daemon=True).start()
        yield from self._stream(self.branches[known], 0, s.BranchSandboxResponse, "branch", context)

    def WatchBranch(  # noqa: N802
        self, request: s.WatchBranchRequest, context: Context
    ) -> Iterator[s.WatchBranchResponse]:
        self._note("WatchBranch", request)
        branch = self._find("branch", self.branches, request.branch_id, context)
        yield from self._stream(
            branch, request.after_sequence, s.WatchBranchResponse, "branch", context
        )

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
                state = _copy(resource)
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

    def GetBranch(  # noqa: N802
        self, request: s.GetBranchRequest, context: Context
    ) -> s.GetBranchResponse:
        self._note("GetBranch", request, context)
        branch = self._find("branch", self.branches, request.branch_id, context)
        return s.GetBranchResponse(branch=branch)

    def ListBranches(  # noqa: N802
        self, request: s.ListBranchesRequest, context: Context
    ) -> s.ListBranchesResponse:
        self._note("ListBranches", request, context)
        found = [
            each
            for each in self.branches.values()
            if request.sandbox_id in ("", each.sandbox_id)
            and (not request.stages or each.stage in request.stages)
        ]
        return s.ListBranchesResponse(branches=found)

    def CancelBranch(  # noqa: N802
        self, request: s.CancelBranchRequest, context: Context
    ) -> s.CancelBranchResponse:
        self._note("CancelBranch", request, context)
        branch = self._find("branch", self.branches, request.branch_id, context)
        with self.changed:
            if branch.stage > branch_pb2.BRANCH_STAGE_PRECOPYING:
                refuse(
                    context,
                    status_of(
                        code_pb2.FAILED_PRECONDITION, "BRANCH_NOT_CANCELLABLE", "it is too late"
                    ),
                )
            branch.error.CopyFrom(
                status_of(code_pb2.CANCELLED, "BRANCH_CANCELLED", "a client cancelled it")
            )
            self._enter(branch, "CANCELLED")
        return s.CancelBranchResponse(branch=branch)

    # --- forks -------------------------------------------------------------------------------

    def _make_fork(self, fork: Any, spec: Any, snapshot_id: str, branch_id: str) -> None:
        fork.fork_id = spec.fork_id or f"fork-{next(self._names)}"
        fork.snapshot_id = snapshot_id
        fork.branch_id = branch_id
        fork.stage = fork_pb2.FORK_STAGE_QUEUED
        fork.count = spec.count
        fork.on_failure = spec.on_failure or fork_pb2.FAILURE_ACTION_KEEP
        for index in range(spec.count):
            fork.children.add(
                sandbox_id=f"{fork.fork_id}-{index}", state=fork_pb2.FORK_CHILD_STATE_PENDING
            )
        self._touch(fork)

    def _end_fork(self, fork: fork_pb2.Fork, stage: str) -> None:
        fork.stage = fork_pb2.ForkStage.Value(f"FORK_STAGE_{stage}")
        self._touch(fork)

    def _start_children(self, fork: fork_pb2.Fork, owner: Any) -> None:
        with self.changed:
            fork.stage = fork_pb2.FORK_STAGE_STARTING
        for index, child in enumerate(fork.children):
            self._hold(f"child-{index}")
            with self.changed:
                if index in self.failing_children:
                    child.state = fork_pb2.FORK_CHILD_STATE_FAILED
                    child.error.CopyFrom(
                        status_of(code_pb2.INTERNAL, "VMM_FAILED", f"child {index} broke")
                    )
                    fork.failed_count += 1
                else:
                    source = self.snapshots[fork.snapshot_id].source_sandbox_id
                    self.add_sandbox(
                        child.sandbox_id,
                        snapshot_id=fork.snapshot_id,
                        fork_id=fork.fork_id,
                        source_sandbox_id=source,
                    )
                    if child.sandbox_id in self.vanishing:
                        del self.sandboxes[child.sandbox_id]
                    child.state = fork_pb2.FORK_CHILD_STATE_READY
                    child.start_duration.CopyFrom(Duration(nanos=2_500_000))
                    fork.ready_count += 1
                self._touch(fork)
                if owner is not fork:
                    self._touch(owner)
        if fork.failed_count and fork.on_failure == fork_pb2.FAILURE_ACTION_DELETE_ALL:
            fork.error.CopyFrom(status_of(code_pb2.ABORTED, "CHILDREN_FAILED", "one child broke"))
            self._end_fork(fork, "FAILED")
        else:
            self._end_fork(fork, "READY")

    def ForkSandboxes(  # noqa: N802
        self, request: s.ForkSandboxesRequest, context: Context
    ) -> Iterator[s.ForkSandboxesResponse]:
        self._note("ForkSandboxes", _copy(request))
        known = self.remembered.get(request.request_id)
        if known is None:
            self._admit(request, context)
            self._find("snapshot", self.snapshots, request.snapshot_id, context)
            fork = fork_pb2.Fork()
            self._make_fork(fork, request.fork, request.snapshot_id, "")
            self.forks[fork.fork_id] = fork
            known = self.remembered[request.request_id] = fork.fork_id
            threading.Thread(target=self._start_children, args=(fork, fork), daemon=True).start()
        yield from self._stream(self.forks[known], 0, s.ForkSandboxesResponse, "fork", context)

    def WatchFork(  # noqa: N802
        self, request: s.WatchForkRequest, context: Context
    ) -> Iterator[s.WatchForkResponse]:
        self._note("WatchFork", request)
        fork = self._find("fork", self.forks, request.fork_id, context)
        yield from self._stream(fork, request.after_sequence, s.WatchForkResponse, "fork", context)

    def GetFork(  # noqa: N802
        self, request: s.GetForkRequest, context: Context
    ) -> s.GetForkResponse:
        self._note("GetFork", request, context)
        return s.GetForkResponse(fork=self._find("fork", self.forks, request.fork_id, context))

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

    # --- snapshots and the server ------------------------------------------------------------

    def GetSnapshot(  # noqa: N802
        self, request: p.GetSnapshotRequest, context: Context
    ) -> p.GetSnapshotResponse:
        self._note("GetSnapshot", request, context)
        found = self._find("snapshot", self.snapshots, request.snapshot_id, context)
        return p.GetSnapshotResponse(snapshot=found)

    def ListSnapshots(  # noqa: N802
        self, request: p.ListSnapshotsRequest, context: Context
    ) -> p.ListSnapshotsResponse:
        self._note("ListSnapshots", request, context)
        found = [
            each
            for each in self.snapshots.values()
            if request.source_sandbox_id in ("", each.source_sandbox_id)
            and all(each.labels.get(k) == value for k, value in request.labels.items())
        ]
        return p.ListSnapshotsResponse(snapshots=found)

    def UpdateSnapshot(  # noqa: N802
        self, request: p.UpdateSnapshotRequest, context: Context
    ) -> p.UpdateSnapshotResponse:
        self._note("UpdateSnapshot", request, context)
        found = self._find("snapshot", self.snapshots, request.snapshot_id, context)
        found.ClearField("labels")
        found.labels.update(request.labels)
        return p.UpdateSnapshotResponse(snapshot=found)

    def DeleteSnapshot(  # noqa: N802
        self, request: p.DeleteSnapshotRequest, context: Context
    ) -> p.DeleteSnapshotResponse:
        self._note("DeleteSnapshot", request, context)
        self._find("snapshot", self.snapshots, request.snapshot_id, context)
        del self.snapshots[request.snapshot_id]
        return p.DeleteSnapshotResponse()

    def GetServerInfo(  # noqa: N802
        self, request: v.GetServerInfoRequest, context: Context
    ) -> v.GetServerInfoResponse:
        self._note("GetServerInfo", request, context)
        return v.GetServerInfoResponse(
            version=self.version,
            vmm=sandbox_pb2.Vmm(kind=sandbox_pb2.VMM_KIND_SIMULATOR, version="1.12.1"),
            checks=[
                v.HostCheck(
                    name="reflink",
                    outcome=v.HOST_CHECK_OUTCOME_WARNING,
                    detail="ext4 shares no blocks",
                    remedy="use XFS",
                )
            ],
            start_time=_now(),
            image_roots=["/images"],
            data_dir="/data",
            max_fork_count=1000,
            max_queued_branches=16,
            staging=branch_pb2.STAGING_KIND_TMPFS,
            image_free_bytes=2**33,
            staging_free_bytes=2**32,
        )


def fresh_address(folder: Path) -> Path:
    """A socket's path that nobody uses."""
    return folder / f"{uuid.uuid4().hex[:8]}.sock"


def monotonic() -> float:
    """The clock that tests measure bounds with."""
    return time.monotonic()
