"""Sandboxes for tests of the driver: a VMM with its console at hand, by verbs."""

import asyncio
import os
import signal
import time
from collections.abc import Callable
from concurrent.futures import Executor
from pathlib import Path

from forkpointd.model import MIB, Boot, Machine
from forkpointd.vmm import Binary, Vmm, WindowOutcome, boot_requests, load_requests
from forkpointd.witness import page_offset_in_memory_file

DEADLINE_SECONDS = 60.0
POLL_SECONDS = 0.002


def kvm_refusal() -> str:
    """Why /dev/kvm can't be used here; empty where it can."""
    try:
        os.close(os.open("/dev/kvm", os.O_RDWR | os.O_CLOEXEC))
    except OSError as error:
        return f"/dev/kvm can't be used ({error.strerror})"
    return ""


def is_gone(pid: int) -> bool:
    """Whether there is no such process, not even a zombie."""
    return not Path(f"/proc/{pid}").exists()


async def wait_for(holds: Callable[[], bool], what: str = "") -> None:
    """Waits for a state that nothing announces."""
    deadline = time.monotonic() + DEADLINE_SECONDS
    while not holds():
        assert time.monotonic() < deadline, f"it never came to be: {what or holds}"
        await asyncio.sleep(POLL_SECONDS)


async def stand_still(pid: int) -> None:
    """SIGSTOP, and waits until each thread has stopped: the signal alone only asks for it."""
    os.kill(pid, signal.SIGSTOP)

    def stopped() -> bool:
        states = [
            (task / "stat").read_text(encoding="ascii").rpartition(") ")[2][0]
            for task in Path(f"/proc/{pid}/task").iterdir()
        ]
        return set(states) == {"T"}

    await wait_for(stopped, f"process {pid} stands still")


class Guest:
    """A sandbox in a test: its VMM, and the witness guest behind its console."""

    def __init__(self, vmm: Vmm, seen: int = 0) -> None:
        self.vmm = vmm
        self._seen = seen
        """Bytes of the console that were read."""

    @property
    def folder(self) -> Path:
        return self.vmm.folder

    @property
    def pid(self) -> int:
        return self.vmm.record.pid

    async def line(self) -> str:
        """The next line of the console."""
        deadline = time.monotonic() + DEADLINE_SECONDS
        while True:
            output = (self.folder / "console.out").read_bytes()[self._seen :]
            text, newline, _ = output.partition(b"\n")
            if newline:
                self._seen += len(text) + 1
                return text.decode().strip()
            assert time.monotonic() < deadline, f"no line on the console, only {output!r}"
            await asyncio.sleep(POLL_SECONDS)

    def send(self, command: str) -> None:
        """Types a line (without its end)."""
        fd = os.open(self.folder / "console.in", os.O_WRONLY | os.O_NONBLOCK)
        try:
            os.write(fd, command.encode() + b"\n")
        finally:
            os.close(fd)

    async def ask(self, command: str) -> list[str]:
        """Sends a command and returns the words of its answer."""
        self.send(command)
        return (await self.line()).split()

    async def ready(self) -> None:
        """Waits until the guest has booted."""
        while await self.line() != "READY":
            pass

    async def generation(self) -> int:
        """The guest's generation: also the proof that it runs."""
        return int((await self.ask("t"))[1])

    async def window(
        self,
        name: str,
        *,
        full: bool = False,
        was_paused: bool = False,
        memory_name: str | None = None,
    ) -> WindowOutcome:
        """Branches into `name`.vmstate and `name`.memory in the sandbox's folder."""
        window = await self.vmm.prepare_window(
            full=full,
            vmstate_name=f"{name}.vmstate",
            memory_name=memory_name or f"{name}.memory",
            was_paused=was_paused,
        )
        return await self.vmm.run_window(window, deadline_seconds=DEADLINE_SECONDS)


class Bench:
    """Makes guests on one VMM, and ends them."""

    def __init__(self, binary: Binary, kernel: Path, root: Path, executor: Executor) -> None:
        self.binary = binary
        self.kernel = kernel
        self.root = root
        self.executor = executor
        self._vmms: list[Vmm] = []

    def folder(self, sandbox_id: str) -> Path:
        return self.root / sandbox_id

    async def boot(self, sandbox_id: str = "source", memory_mib: int = 128) -> Guest:
        """A guest that is ready."""
        boot = Boot(Machine(1, memory_mib), self.kernel, boot_args="console=ttyS0")
        folder = self.folder(sandbox_id)
        vmm = await Vmm.start(
            self.binary,
            folder,
            sandbox_id,
            boot_requests(boot),
            self.executor,
            prepare=lambda: folder.mkdir(mode=0o700),
        )
        guest = self.keep(Guest(vmm))
        await guest.ready()
        return guest

    async def load(self, sandbox_id: str, vmstate: Path, memory: Path) -> Guest:
        """A guest that goes on where a snapshot was taken."""
        folder = self.folder(sandbox_id)
        vmm = await Vmm.start(
            self.binary,
            folder,
            sandbox_id,
            load_requests(vmstate, memory, resume=True),
            self.executor,
            prepare=lambda: folder.mkdir(mode=0o700),
        )
        return self.keep(Guest(vmm))

    def keep(self, guest: Guest) -> Guest:
        """Ends this guest with the others."""
        self._vmms.append(guest.vmm)
        return guest

    async def close(self) -> None:
        for vmm in self._vmms:
            if not vmm.exited.done():
                await vmm.kill()


def data_pages(memory: Path) -> set[int]:
    """The pages of a diff that are data, by number."""
    pages: set[int] = set()
    fd = os.open(memory, os.O_RDONLY)
    try:
        end, offset = os.fstat(fd).st_size, 0
        while offset < end:
            try:
                start = os.lseek(fd, offset, os.SEEK_DATA)
            except OSError:  # ENXIO: nothing but a hole up to the end
                break
            offset = os.lseek(fd, start, os.SEEK_HOLE)
            pages.update(range(start // 4096, -(-offset // 4096)))
    finally:
        os.close(fd)
    return pages


def guest_pages(memory_mib: int, machine_mib: int) -> set[int]:
    """The pages of a memory file that hold the guest's first `memory_mib` MiB of pages."""
    count = memory_mib * MIB // 4096
    return {page_offset_in_memory_file(n, machine_mib * MIB) // 4096 for n in range(count)}
