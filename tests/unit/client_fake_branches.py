"""The fake server's branches and forks: resources with a life of their own, in threads."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

from google.protobuf.duration_pb2 import Duration
from google.rpc import code_pb2

from forkpoint.v1 import (
    branch_pb2,
    fork_pb2,
    snapshot_pb2,
)
from forkpoint.v1 import sandbox_service_pb2 as s
from tests.unit.client_fake_state import (
    Context,
    FakeState,
    copy,
    now,
    refuse,
    status_of,
)


class BranchCalls(FakeState):
    """Branches and forks."""

    def _enter(self, branch: branch_pb2.Branch, stage: str) -> None:
        with self.changed:
            branch.stage = branch_pb2.BranchStage.Value(f"BRANCH_STAGE_{stage}")
            branch.stages.add(stage=branch.stage, enter_time=now())
            if stage == "PRECOPYING":
                branch.mode = branch.requested_mode or snapshot_pb2.BRANCH_MODE_DIFF
                branch.precopy.total_bytes = 1000
            elif stage == "RESUMED":
                branch.precopy.done_bytes = 1000
                window = branch.pause_window
                window.start_time.CopyFrom(now())
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
                    create_time=now(),
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
                branch.end_time.CopyFrom(now())
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

    def BranchSandbox(  # noqa: N802
        self, request: s.BranchSandboxRequest, context: Context
    ) -> Iterator[s.BranchSandboxResponse]:
        self._note("BranchSandbox", copy(request))
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
                create_time=now(),
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
        self._note("ForkSandboxes", copy(request))
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
