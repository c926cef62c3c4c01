"""A real forkpointd in a process of its own, and the calls that tests make to it.

`House` owns a data folder and starts, kills and restarts servers on it; `Guest` is a sandbox whose
witness is spoken to through the server's console calls. Everything goes over gRPC on the Unix
socket, as a user's calls do.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from forkpoint.v1 import (
    branch_pb2,
    fork_pb2,
    sandbox_pb2,
    sandbox_service_pb2,
    sandbox_service_pb2_grpc,
    server_service_pb2_grpc,
    snapshot_pb2,
    snapshot_service_pb2,
    snapshot_service_pb2_grpc,
)
from forkpointd.model import VmmKind
from forkpointd.vmm import Binary

START_SECONDS = 30.0
READY_STAGE = branch_pb2.BRANCH_STAGE_READY
FULL = snapshot_pb2.BRANCH_MODE_FULL
DIFF = snapshot_pb2.BRANCH_MODE_DIFF
AUTO = snapshot_pb2.BRANCH_MODE_AUTO


class House:
    """A data folder and the server that works on it."""

    def __init__(self, root: Path, binary: Binary, kernel: Path, **settings: object) -> None:
        self.root = root
        self.binary = binary
        self.images = root / "images"
        self.images.mkdir(parents=True)
        self.kernel = self.images / "witness.elf"
        shutil.copyfile(kernel, self.kernel)
        self.data_dir = root / "data"
        self.socket = root / "s" / "forkpoint.sock"
        self.settings = settings
        self.process: subprocess.Popen[bytes] | None = None
        self._channel: grpc.aio.Channel | None = None

    # --- the server ---

    def environment(self) -> dict[str, str]:
        """The server's settings, as environment variables."""
        real = self.binary.kind is VmmKind.FIRECRACKER
        environment = {k: v for k, v in os.environ.items() if not k.startswith("FORKPOINT_")}
        environment["FORKPOINT_VMM"] = "firecracker" if real else "simulator"
        if real:
            environment["FORKPOINT_FIRECRACKER"] = str(self.binary.path)
        for name, value in self.settings.items():
            environment[f"FORKPOINT_{name.upper()}"] = str(value)
        return environment

    def command(self) -> list[str]:
        """What starts the server."""
        return [
            sys.executable,
            "-m",
            "forkpointd",
            "serve",
            "--data-dir",
            str(self.data_dir),
            "--listen",
            f"unix:{self.socket}",
            "--image-root",
            str(self.images),
        ]

    async def start(self) -> None:
        """Starts a server and waits until it serves."""
        log = (self.root / "server.log").open("ab")
        self.process = subprocess.Popen(
            self.command(), env=self.environment(), stdout=log, stderr=log
        )
        log.close()
        await self.connect()

    async def connect(self) -> None:
        """Waits until a server serves, and connects to it. A folder may be deep: the socket is
        reached through a descriptor of it."""
        async with asyncio.timeout(START_SECONDS):
            while not self.socket.exists():
                if self.process is not None and self.process.poll() is not None:
                    raise AssertionError(f"the server did not start:\n{self.log}")
                await asyncio.sleep(0.02)
        self._folder_fd = os.open(self.socket.parent, os.O_PATH)
        target = f"unix:/proc/self/fd/{self._folder_fd}/{self.socket.name}"
        self._channel = grpc.aio.insecure_channel(
            target,
            options=[
                ("grpc.initial_reconnect_backoff_ms", 50),
                # Else a channel to a restarted server shares the dead one's connection.
                ("grpc.use_local_subchannel_pool", 1),
            ],
        )
        self.sandboxes = sandbox_service_pb2_grpc.SandboxServiceStub(self._channel)
        self.snapshots = snapshot_service_pb2_grpc.SnapshotServiceStub(self._channel)
        self.server = server_service_pb2_grpc.ServerServiceStub(self._channel)
        async with asyncio.timeout(START_SECONDS):
            await self._channel.channel_ready()

    @property
    def log(self) -> str:
        """All that servers here have said."""
        return (self.root / "server.log").read_text(errors="replace")

    async def kill(self) -> None:
        """kill -9: sandboxes run on."""
        assert self.process is not None
        self.process.send_signal(signal.SIGKILL)
        await self._leave()

    async def stop(self) -> int:
        """SIGTERM: drains; returns the exit code."""
        assert self.process is not None
        self.process.send_signal(signal.SIGTERM)
        return await self._leave()

    async def _leave(self) -> int:
        assert self.process is not None
        code = await asyncio.to_thread(self.process.wait, START_SECONDS)
        await self.disconnect()
        return code

    async def disconnect(self) -> None:
        """Closes the connection. Idempotent."""
        if self._channel is not None:
            await self._channel.close()
            os.close(self._folder_fd)
            self._channel = None

    async def restart(self) -> None:
        """kill -9, then a new server on the same folder."""
        await self.kill()
        await self.start()

    async def close(self) -> None:
        """Ends the server, every VMM in its folders and all files."""
        if self.process is not None and self.process.poll() is None:
            await self.kill()
        for pid in self.vmm_pids():
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        identity = self.data_dir / "id"
        if identity.exists():
            name = f"forkpoint-{identity.read_text().strip()}"
            for folder in (name, f"{name}.images"):
                shutil.rmtree(Path("/dev/shm") / folder, ignore_errors=True)

    def vmm_pids(self) -> list[int]:
        """Processes whose working folder is one of this house's sandboxes."""
        root = str((self.data_dir / "sandboxes").resolve())
        found = []
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit():
                with suppress(OSError):
                    if os.readlink(entry / "cwd").startswith(root):
                        found.append(int(entry.name))
        return found

    def half_made(self) -> list[str]:
        """What no finished work leaves: drafts, trash, staging files."""
        staging = [self.data_dir / "staging", *Path("/dev/shm").glob(f"forkpoint-{self.identity}")]
        images = [self.data_dir / "snapshots", *Path("/dev/shm").glob(self.memory_images.name)]
        found = [path for root in images for path in root.iterdir() if path.name[0] == "."]
        for folder in staging:
            found += list(folder.iterdir())
        return sorted(str(path) for path in found)

    @property
    def memory_images(self) -> Path:
        """Where images are kept in memory."""
        return Path(f"/dev/shm/forkpoint-{self.identity}.images")

    @property
    def identity(self) -> str:
        """The data folder's random name."""
        return (self.data_dir / "id").read_text().strip()

    # --- sandboxes ---

    async def boot(self, sandbox_id: str, memory_mib: int = 128, **fields: Any) -> Guest:
        """A booted witness that has said READY."""
        response = await self.sandboxes.CreateSandbox(
            sandbox_service_pb2.CreateSandboxRequest(
                sandbox_id=sandbox_id,
                boot=sandbox_service_pb2.BootSource(
                    kernel_image=str(self.kernel), memory_mib=memory_mib
                ),
                **fields,
            )
        )
        assert response.sandbox.state == sandbox_pb2.SANDBOX_STATE_RUNNING
        guest = Guest(self, sandbox_id)
        await guest.read_until(0, lambda text: "READY\n" in text)
        return guest

    async def get(self, sandbox_id: str) -> sandbox_pb2.Sandbox:
        """The sandbox as of now."""
        request = sandbox_service_pb2.GetSandboxRequest(sandbox_id=sandbox_id)
        return (await self.sandboxes.GetSandbox(request)).sandbox

    async def delete(self, sandbox_id: str) -> None:
        """Ends a sandbox."""
        request = sandbox_service_pb2.DeleteSandboxRequest(sandbox_id=sandbox_id)
        await self.sandboxes.DeleteSandbox(request)

    # --- branches ---

    async def follow(self, sandbox_id: str, **fields: Any) -> AsyncIterator[branch_pb2.Branch]:
        """A branch's messages to its end."""
        request = sandbox_service_pb2.BranchSandboxRequest(sandbox_id=sandbox_id, **fields)
        async for response in self.sandboxes.BranchSandbox(request):
            yield response.branch

    async def branch(self, sandbox_id: str, **fields: Any) -> branch_pb2.Branch:
        """A branch at its end, whatever that is."""
        last = None
        async for branch in self.follow(sandbox_id, **fields):
            last = branch
        assert last is not None
        return last

    async def ready(self, sandbox_id: str, **fields: Any) -> branch_pb2.Branch:
        """A branch that became READY."""
        branch = await self.branch(sandbox_id, **fields)
        assert branch.stage == READY_STAGE, f"{branch}\n{self.log}"
        return branch

    async def fork(self, snapshot_id: str, count: int = 1, **spec: Any) -> fork_pb2.Fork:
        """A fork at its end."""
        request = sandbox_service_pb2.ForkSandboxesRequest(
            snapshot_id=snapshot_id, fork=fork_pb2.ForkSpec(count=count, **spec)
        )
        last = None
        async for response in self.sandboxes.ForkSandboxes(request):
            last = response.fork
        assert last is not None
        return last

    async def child(self, snapshot_id: str) -> Guest:
        """One child of a snapshot."""
        fork = await self.fork(snapshot_id)
        assert fork.ready_count == 1, fork
        return Guest(self, fork.children[0].sandbox_id)

    async def delete_snapshot(self, snapshot_id: str) -> None:
        """Takes a snapshot out of the API."""
        request = snapshot_service_pb2.DeleteSnapshotRequest(snapshot_id=snapshot_id)
        await self.snapshots.DeleteSnapshot(request)

    def memory_file(self, snapshot_id: str) -> Path:
        """A snapshot's memory."""
        return self.data_dir / "snapshots" / snapshot_id / "memory"


class Guest:
    """A sandbox with a witness in it."""

    def __init__(self, house: House, sandbox_id: str) -> None:
        self.house = house
        self.id = sandbox_id

    async def ask(self, command: str) -> list[str]:
        """One command, and the words of its answer."""
        request = sandbox_service_pb2.WriteConsoleRequest(
            sandbox_id=self.id, data=f"{command}\n".encode()
        )
        written = await self.house.sandboxes.WriteConsole(request)
        text = await self.read_until(written.offset, lambda text: "\n" in text)
        return text.splitlines()[0].split()

    async def read_until(self, offset: int, enough: Callable[[str], bool]) -> str:
        """The console from an offset on, until there is enough of it."""
        text = ""
        request = sandbox_service_pb2.ReadConsoleRequest(
            sandbox_id=self.id, from_offset=offset, follow=True
        )
        call = self.house.sandboxes.ReadConsole(request)
        async with asyncio.timeout(START_SECONDS):
            async for response in call:
                text += response.data.decode(errors="replace")
                if enough(text):
                    break
        call.cancel()
        return text

    async def dirty(self, mib: int) -> int:
        """Stamps [0, mib) one generation on; returns that generation."""
        return int((await self.ask(f"d{mib}"))[2])

    async def verify(self, mib: int) -> tuple[int, int, int, int]:
        """Lowest and highest generation, changes and misplaced pages of [0, mib)."""
        words = await self.ask(f"v{mib}")
        assert words[0] == "V", words
        low, high, changes, misplaced = (int(word) for word in words[2:])
        return low, high, changes, misplaced

    async def generation(self) -> int:
        """The present generation."""
        return int((await self.ask("t"))[1])


def reason(error: grpc.aio.AioRpcError) -> str:
    """The reason in an error's ErrorInfo."""
    return error_info(error).reason


def error_info(error: grpc.aio.AioRpcError) -> error_details_pb2.ErrorInfo:
    """An error's ErrorInfo; fails where there is none."""
    call: Any = error  # an AioRpcError has what from_call asks of a Call
    status = rpc_status.from_call(call)
    assert status is not None, f"no details: {error}"
    info = error_details_pb2.ErrorInfo()
    for detail in status.details:
        if detail.Unpack(info):
            return info
    raise AssertionError(f"no ErrorInfo: {error}")


def stage_error(branch: branch_pb2.Branch) -> str:
    """The reason of a branch that failed."""
    info = error_details_pb2.ErrorInfo()
    assert branch.error.details[0].Unpack(info)
    return info.reason
