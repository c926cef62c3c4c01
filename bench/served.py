"""forkpoint as its users have it: a forkpointd of its own in a process of its own, over gRPC on a
Unix socket. Nothing of the server is imported here but its witness guest's kernel, by path."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Self

import grpc

from bench.scratch import Scratch, end_processes
from forkpoint.v1 import (
    branch_pb2,
    fork_pb2,
    sandbox_service_pb2,
    sandbox_service_pb2_grpc,
    server_service_pb2,
    server_service_pb2_grpc,
    snapshot_pb2,
    snapshot_service_pb2,
    snapshot_service_pb2_grpc,
)

START_SECONDS = 30.0
STOP_SECONDS = 30.0
CALL_SECONDS = 120.0
POLL_SECONDS = 0.01


class ServedError(Exception):
    """forkpoint did not do what the bench asked of it."""


def open_channel(socket: Path) -> grpc.Channel:
    """A channel to the server that listens there."""
    return grpc.insecure_channel(f"unix:{socket}", [("grpc.max_reconnect_backoff_ms", 100)])


class Calls:
    """Calls to a forkpointd, each to its end."""

    def __init__(self, channel: grpc.Channel) -> None:
        self.sandboxes = sandbox_service_pb2_grpc.SandboxServiceStub(channel)
        self.snapshots = snapshot_service_pb2_grpc.SnapshotServiceStub(channel)
        self._info = server_service_pb2_grpc.ServerServiceStub(channel)

    def info(self) -> server_service_pb2.GetServerInfoResponse:
        """What the server tells about itself."""
        return self._info.GetServerInfo(
            server_service_pb2.GetServerInfoRequest(), timeout=CALL_SECONDS
        )

    # --- sandboxes ---

    def boot_kernel(self, sandbox_id: str, kernel: Path, memory_mib: int) -> None:
        """Boots a witness and waits until it says so."""
        boot = sandbox_service_pb2.BootSource(kernel_image=str(kernel), memory_mib=memory_mib)
        request = sandbox_service_pb2.CreateSandboxRequest(sandbox_id=sandbox_id, boot=boot)
        self.sandboxes.CreateSandbox(request, timeout=CALL_SECONDS)
        if (line := self._line(sandbox_id, 0)) != "READY":
            raise ServedError(f"the guest said {line!r} instead of READY")

    def ask(self, sandbox_id: str, command: str) -> str:
        """One command to a guest, and its answer."""
        request = sandbox_service_pb2.WriteConsoleRequest(
            sandbox_id=sandbox_id, data=f"{command}\n".encode()
        )
        written = self.sandboxes.WriteConsole(request, timeout=CALL_SECONDS)
        return self._line(sandbox_id, written.offset)

    def _line(self, sandbox_id: str, offset: int) -> str:
        request = sandbox_service_pb2.ReadConsoleRequest(
            sandbox_id=sandbox_id, from_offset=offset, follow=True
        )
        text = b""
        stream = self.sandboxes.ReadConsole(request, timeout=CALL_SECONDS)
        for response in stream:
            text += response.data
            if b"\n" in text:
                break
        stream.cancel()
        return text.partition(b"\n")[0].decode("ascii").strip()

    def get(self, sandbox_id: str) -> None:
        """The shortest call there is."""
        request = sandbox_service_pb2.GetSandboxRequest(sandbox_id=sandbox_id)
        self.sandboxes.GetSandbox(request, timeout=CALL_SECONDS)

    def delete(self, sandbox_ids: Iterable[str]) -> None:
        """Deletes sandboxes, all at once."""
        calls = [
            self.sandboxes.DeleteSandbox.future(
                sandbox_service_pb2.DeleteSandboxRequest(sandbox_id=sandbox_id),
                timeout=CALL_SECONDS,
            )
            for sandbox_id in sandbox_ids
        ]
        for call in calls:
            call.result()

    # --- branches and forks ---

    def branch(
        self,
        sandbox_id: str,
        *,
        full: bool = False,
        layout: snapshot_pb2.Layout.ValueType = snapshot_pb2.LAYOUT_FLAT,
        children: int = 0,
        seen: Callable[[branch_pb2.Branch], None] | None = None,
    ) -> branch_pb2.Branch:
        """Branches a sandbox and follows the branch to its end, which must be READY, with all its
        children running. FLAT unless another layout is asked for: what is measured beside a copy
        is a copy, and AUTO makes none of a large base. `seen` gets each message as it comes."""
        mode = snapshot_pb2.BRANCH_MODE_FULL if full else snapshot_pb2.BRANCH_MODE_DIFF
        request = sandbox_service_pb2.BranchSandboxRequest(
            sandbox_id=sandbox_id,
            mode=mode,
            layout=layout,
            fork=fork_pb2.ForkSpec(count=children) if children else None,
        )
        branch = branch_pb2.Branch()
        for response in self.sandboxes.BranchSandbox(request, timeout=CALL_SECONDS):
            branch = response.branch
            if seen is not None:
                seen(branch)
        if branch.stage != branch_pb2.BRANCH_STAGE_READY:
            stage = branch_pb2.BranchStage.Name(branch.stage)
            raise ServedError(f"the branch ended {stage}: {branch.error.message}")
        if children:
            _all_run(branch.fork, children)
        return branch

    def flatten(self, snapshot_id: str) -> snapshot_service_pb2.FlattenSnapshotResponse:
        """Makes a snapshot FLAT; returns the last message."""
        request = snapshot_service_pb2.FlattenSnapshotRequest(snapshot_id=snapshot_id)
        last = snapshot_service_pb2.FlattenSnapshotResponse()
        for response in self.snapshots.FlattenSnapshot(request, timeout=CALL_SECONDS):
            last = response
        if last.snapshot.layout != snapshot_pb2.LAYOUT_FLAT:
            raise ServedError(f"snapshot {snapshot_id} is not FLAT after its flatten")
        return last

    def snapshot(self, snapshot_id: str) -> snapshot_pb2.Snapshot:
        """A snapshot as it is now."""
        request = snapshot_service_pb2.GetSnapshotRequest(snapshot_id=snapshot_id)
        return self.snapshots.GetSnapshot(request, timeout=CALL_SECONDS).snapshot

    def delete_snapshot(self, snapshot_id: str) -> None:
        """Deletes a snapshot."""
        request = snapshot_service_pb2.DeleteSnapshotRequest(snapshot_id=snapshot_id)
        self.snapshots.DeleteSnapshot(request, timeout=CALL_SECONDS)

    def fork(self, snapshot_id: str, count: int) -> fork_pb2.Fork:
        """Forks a snapshot and follows the fork to its end, at which all children must run."""
        request = sandbox_service_pb2.ForkSandboxesRequest(
            snapshot_id=snapshot_id, fork=fork_pb2.ForkSpec(count=count)
        )
        fork = fork_pb2.Fork()
        for response in self.sandboxes.ForkSandboxes(request, timeout=CALL_SECONDS):
            fork = response.fork
        _all_run(fork, count)
        return fork


def _all_run(fork: fork_pb2.Fork, count: int) -> None:
    if fork.ready_count != count:
        errors = {child.error.message for child in fork.children if child.error.message}
        raise ServedError(f"{fork.ready_count} of {count} children run: {sorted(errors)}")


class Served(Calls):
    """A forkpointd on a fresh data folder, and calls to it."""

    def __init__(
        self,
        scratch: Scratch,
        firecracker: Path,
        kernel: Path,
        settings: Mapping[str, str] | None = None,
    ) -> None:
        """Takes the name `server` in the scratch's folders. `settings`: of the server, by the names
        of their variables."""
        self._settings = dict(settings or {})
        self._firecracker = firecracker
        self._root = scratch.disk / "server"
        self._kernel = self._root / "images" / "witness.elf"
        self._kernel.parent.mkdir(parents=True)
        shutil.copyfile(kernel, self._kernel)
        self._staging = scratch.memory / "server"
        self._staging.mkdir()
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            stack.callback(self._remove)
            self._start()
            stack.callback(self._stop)
            channel = stack.enter_context(open_channel(self.socket))
            try:
                grpc.channel_ready_future(channel).result(timeout=START_SECONDS)
            except grpc.FutureTimeoutError as error:
                raise ServedError(f"forkpointd does not answer: {self.last_words()}") from error
            Calls.__init__(self, channel)
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._stack.close()

    # --- the process ---

    @property
    def socket(self) -> Path:
        """Where it listens."""
        return self._root / "s" / "forkpoint.sock"

    @property
    def data(self) -> Path:
        """The folder that all it keeps is in."""
        return self._root / "data"

    def files_of(self, snapshot_id: str) -> Path:
        """The folder of a snapshot (docs/design/layers.md): `memory`, or `layer`."""
        return self.data / "snapshots" / snapshot_id

    @property
    def _log(self) -> Path:
        return self._root / "server.log"

    @property
    def pid(self) -> int:
        """The server's."""
        return self._process.pid

    def _start(self) -> None:
        environment = {k: v for k, v in os.environ.items() if not k.startswith("FORKPOINT_")}
        environment |= {"FORKPOINT_FIRECRACKER": str(self._firecracker), **self._settings}
        command = [sys.executable, "-m", "forkpointd", "serve", "--vmm", "firecracker"]
        command += ["--data-dir", str(self.data), "--listen", f"unix:{self.socket}"]
        command += ["--image-root", str(self._kernel.parent)]
        command += ["--staging-dir", str(self._staging)]
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                command,
                env=environment,
                cwd=self._root,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                process_group=0,  # a Ctrl-C is for the bench
            )
        deadline = time.monotonic() + START_SECONDS
        while not self.socket.exists():
            if self._process.poll() is not None:
                raise ServedError(f"forkpointd did not start: {self.last_words()}")
            if time.monotonic() > deadline:
                self._stop()
                raise ServedError(f"forkpointd does not serve: {self.last_words()}")
            time.sleep(POLL_SECONDS)

    def _stop(self) -> None:
        """Sandboxes outlive their server: they are ended after it."""
        self._process.send_signal(signal.SIGTERM)
        try:
            self._process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _remove(self) -> None:
        end_processes(self._root)
        shutil.rmtree(self._root, ignore_errors=True)
        shutil.rmtree(self._staging, ignore_errors=True)

    def last_words(self) -> str:
        """The end of the server's log, in one line."""
        return " | ".join(self._log.read_text(errors="replace").splitlines()[-5:])

    def resident_bytes(self) -> int:
        """VmRSS of the server's process."""
        for line in Path(f"/proc/{self.pid}/status").read_text(encoding="ascii").splitlines():
            if line.startswith("VmRSS:"):
                return int(line.split()[1]) * 1024
        raise ServedError("the server has ended")

    def boot(self, sandbox_id: str, memory_mib: int) -> None:
        """Boots the witness and waits until it says so."""
        self.boot_kernel(sandbox_id, self._kernel, memory_mib)


def entered(branch: branch_pb2.Branch, stage: branch_pb2.BranchStage.ValueType) -> float:
    """When a branch entered a stage, in seconds since the epoch by the server's wall clock."""
    for entry in branch.stages:
        if entry.stage == stage:
            return entry.enter_time.ToNanoseconds() / 1e9
    raise ServedError(f"the branch never entered {branch_pb2.BranchStage.Name(stage)}")
