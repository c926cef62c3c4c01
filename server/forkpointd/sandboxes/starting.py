"""Starting a sandbox's process: its folder, its links, and the requests that boot or load it.

A failed load ends Firecracker's process, so everything that can be refused is refused before it
(`check_loadable`): a host that doesn't fit, a damaged image, a drive that is not the one that the
snapshot was taken with (docs/design/promises.md, 7). Of each writable drive a sandbox gets a file
of its own, a clone, so that no two ever write to the same (5).
"""

from __future__ import annotations

import asyncio
import logging
import os
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import Executor
from pathlib import Path

from forkpointd.images import (
    HostFacts,
    ImageError,
    Manifest,
    Mismatch,
    NoReflink,
    SnapshotStore,
    StoredSnapshot,
    check_fits,
    clone_whole,
)
from forkpointd.model import (
    Boot,
    FieldViolation,
    ForkpointError,
    Machine,
    Reason,
    Sandbox,
)
from forkpointd.sandboxes.folders import Folders
from forkpointd.sandboxes.snapshots import image_damaged
from forkpointd.vmm import (
    ApiRequest,
    Binary,
    OomOrder,
    Vmm,
    boot_requests,
    drive_path,
    load_requests,
)

log = logging.getLogger(__name__)

ShouldStop = Callable[[], bool]

DEFAULT_BOOT_ARGS = "console=ttyS0 reboot=k panic=1"

ELF_MAGIC = b"\x7fELF"
ELF_HEADER_BYTES = 64
BZIMAGE_MAGIC = b"HdrS"
BZIMAGE_MAGIC_AT = 0x202
"""Linux's Documentation/arch/x86/boot.rst, "The Real-Mode Kernel Header"."""


class Starter:
    """Starts processes for sandboxes whose rows are in the registry already."""

    def __init__(
        self,
        *,
        folders: Folders,
        store: SnapshotStore,
        binary: Binary,
        host: HostFacts,
        strict_host: bool,
        calls: Executor,
        reflink: bool,
        hold_still: Callable[[ShouldStop], None],
        oom_order: OomOrder | None = None,
    ) -> None:
        """`reflink`: sandboxes' and snapshots' folders share blocks. `hold_still`: blocks a copy
        while a pause window is open. Without `oom_order` the out-of-memory killer takes whom it
        likes."""
        self.binary = binary
        self.oom_order = oom_order
        self.reflink = reflink
        self._hold_still = hold_still
        self._folders = folders
        self._store = store
        self._host = host
        self._strict_host = strict_host
        self._calls = calls

    async def boot(self, row: Sandbox, boot: Boot, *, allow_drive_copy: bool) -> Vmm:
        """Boots a kernel. If this fails the process is gone; the folder is the caller's."""
        files = {drive.drive_id: drive.path for drive in row.machine.writable_drives}
        return await self._start(row, boot_requests(boot), files, allow_drive_copy)

    async def check_kernel(self, kernel: Path) -> None:
        """Refuses, as INVALID_FIELD, a file that can't be a kernel: before there is a sandbox."""
        await asyncio.get_running_loop().run_in_executor(self._calls, check_kernel, kernel)

    async def load(self, row: Sandbox, stored: StoredSnapshot, *, allow_drive_copy: bool) -> Vmm:
        """Starts from a snapshot that `check_loadable` passed. If this fails the process is gone;
        the folder is the caller's."""
        files = {
            drive.drive_id: stored.drive_path(drive.drive_id)
            for drive in stored.manifest.writable_drives
        }
        requests = load_requests(stored.vmstate_path, stored.memory_path, resume=True)
        return await self._start(row, requests, files, allow_drive_copy)

    def check_cloning(self, machine: Machine, *, allow_copy: bool) -> None:
        """Refuses, as WRITABLE_DRIVE, a machine whose writable drives can't be cloned here."""
        if not self.reflink and not allow_copy:
            for drive in machine.writable_drives:
                raise _no_clone(drive.drive_id)

    async def check_loadable(self, snapshot_id: str) -> StoredSnapshot:
        """The files of a snapshot that this host can load, or HOST_MISMATCH, IMAGE_DAMAGED or
        DRIVE_CHANGED, which say what differs."""
        return await asyncio.get_running_loop().run_in_executor(
            self._calls, self._check_loadable, snapshot_id
        )

    def _check_loadable(self, snapshot_id: str) -> StoredSnapshot:
        try:
            stored = self._store.open(snapshot_id)
        except (ImageError, OSError) as error:
            raise image_damaged(snapshot_id, error) from error
        self.check_fits(stored.manifest, snapshot_id)
        for drive in stored.manifest.drives:
            if drive.read_only and (reason := drive.changed()):
                raise ForkpointError(
                    Reason.DRIVE_CHANGED,
                    f"drive {drive.drive_id} of snapshot {snapshot_id}: {reason}. A guest whose "
                    "disk changes under it is corrupt: put the file back as it was",
                    metadata={"snapshot_id": snapshot_id, "drive_id": drive.drive_id},
                )
        return stored

    def check_fits(self, manifest: Manifest, snapshot_id: str) -> None:
        """Refuses, as HOST_MISMATCH, what this host can't load; warns of other differences."""
        mismatches = check_fits(manifest, self._host, strict=self._strict_host)
        refusals = [mismatch for mismatch in mismatches if mismatch.refuses]
        if refusals:
            raise _host_mismatch(snapshot_id, refusals)
        for mismatch in mismatches:
            log.warning(
                "snapshot %s was taken with another %s: %s, here it is %s",
                snapshot_id,
                mismatch.field,
                mismatch.snapshot_value,
                mismatch.host_value,
            )

    async def _start(
        self,
        row: Sandbox,
        requests: tuple[ApiRequest, ...],
        drive_files: Mapping[str, Path],
        allow_drive_copy: bool,
    ) -> Vmm:
        """`drive_files`: what writable drives are clones of."""
        folder = self._folders.of(row.sandbox_id)
        stop = threading.Event()

        def prepare() -> None:
            self._folders.make(row.sandbox_id, row.machine.drives)
            for drive_id, source in drive_files.items():
                self._clone_drive(drive_id, source, folder, allow_drive_copy, stop.is_set)

        starting = asyncio.ensure_future(
            Vmm.start(
                self.binary,
                folder,
                row.sandbox_id,
                requests,
                executor=self._calls,
                prepare=prepare,
                oom_score_adj=self._oom_score_adj(row),
            )
        )
        try:
            return await asyncio.shield(starting)
        except asyncio.CancelledError:
            stop.set()  # a copy ends at its next chunk
            starting.cancel()
            await asyncio.wait([starting])
            if not starting.cancelled() and starting.exception() is None:
                await starting.result().kill()
            raise

    def _clone_drive(
        self, drive_id: str, source: Path, folder: Path, allow_copy: bool, should_stop: ShouldStop
    ) -> None:
        """Gives a sandbox its own file of a writable drive. Blocks. Raises WRITABLE_DRIVE,
        Stopped, OSError."""
        target = drive_path(folder, drive_id)
        try:
            clone_whole(
                source,
                target,
                allow_copy=allow_copy,
                should_stop=should_stop,
                gate=lambda: self._hold_still(should_stop),
            )
        except NoReflink as error:
            raise _no_clone(drive_id) from error
        target.chmod(0o600)

    def _oom_score_adj(self, row: Sandbox) -> int | None:
        """What was booted is a source from the start: nothing else has its state."""
        if self.oom_order is None:
            return None
        return self.oom_order.child if row.boot is None else self.oom_order.source


def check_kernel(kernel: Path) -> None:
    """Refuses a file that Firecracker on x86-64 can't boot: it takes ELF only. Blocks."""
    if os.uname().machine != "x86_64":
        return
    try:
        with kernel.open("rb") as opened:
            head = opened.read(BZIMAGE_MAGIC_AT + len(BZIMAGE_MAGIC))
    except OSError as error:
        raise _no_kernel(kernel, f"can't be read: {error.strerror}") from error
    if head[BZIMAGE_MAGIC_AT:] == BZIMAGE_MAGIC:
        raise _no_kernel(kernel, "is a compressed kernel (bzImage)")
    if len(head) < ELF_HEADER_BYTES or not head.startswith(ELF_MAGIC):
        raise _no_kernel(kernel, "is no ELF file")


def _no_kernel(kernel: Path, why: str) -> ForkpointError:
    words = f"{kernel} {why}: name an uncompressed kernel (vmlinux, an ELF file)"
    return ForkpointError(
        Reason.INVALID_FIELD,
        f"boot.kernel_image: {words}",
        fields=(FieldViolation("boot.kernel_image", words),),
    )


def _no_clone(drive_id: str) -> ForkpointError:
    return ForkpointError(
        Reason.WRITABLE_DRIVE,
        f"drive {drive_id} is writable, so every sandbox and snapshot has a clone of it, and this "
        "file system can't clone (no reflink between the files). Put the server's data folder and "
        "the drive's image on one XFS or btrfs, or set allow_drive_copy and wait for copies",
        metadata={"drive_id": drive_id},
    )


def check_drives_are_there(machine: Machine, folder: Path) -> None:
    """Refuses a snapshot of a machine, whose sandbox has this folder, one of whose drives has gone:
    no child could start from it. Blocks."""
    for drive in machine.drives:
        path = drive.path if drive.read_only else drive_path(folder, drive.drive_id)
        if not path.exists():
            raise ForkpointError(
                Reason.DRIVE_CHANGED,
                f"drive {drive.drive_id}: {path} can't be found any more: put the file back as it "
                "was",
                metadata={"drive_id": drive.drive_id},
            )


def host_memory_bytes() -> int:
    """All memory of this host."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def check_memory(machine: Machine) -> None:
    """Refuses a guest that is larger than this host's memory."""
    host_bytes = host_memory_bytes()
    if machine.memory_bytes > host_bytes:
        raise ForkpointError(
            Reason.NO_MEMORY,
            f"{machine.memory_mib} MiB are more than this host's {host_bytes // 2**20} MiB: ask "
            "for less",
            metadata={"memory_mib": str(machine.memory_mib), "host_mib": str(host_bytes // 2**20)},
        )


def _host_mismatch(snapshot_id: str, refusals: list[Mismatch]) -> ForkpointError:
    fields = tuple(
        FieldViolation(
            mismatch.field, f"snapshot: {mismatch.snapshot_value}, host: {mismatch.host_value}"
        )
        for mismatch in refusals
    )
    told = "; ".join(f"{field.field} ({field.description})" for field in fields)
    return ForkpointError(
        Reason.HOST_MISMATCH,
        f"snapshot {snapshot_id} doesn't fit this host: {told}. Load it on a host like the one it "
        "was taken on",
        metadata={"snapshot_id": snapshot_id},
        fields=fields,
    )
