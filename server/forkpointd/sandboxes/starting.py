"""Starting a sandbox's process: its folder, its links, and the requests that boot or load it.

A failed load ends Firecracker's process, so everything that can be refused is refused before it
(`check_loadable`): a host that doesn't fit, a damaged image, a drive that is not the one that the
snapshot was taken with (docs/design/promises.md, 7).
"""

from __future__ import annotations

import asyncio
import logging
import os
from concurrent.futures import Executor
from pathlib import Path

from forkpointd.images import (
    HostFacts,
    ImageError,
    Manifest,
    Mismatch,
    SnapshotStore,
    StoredSnapshot,
    check_fits,
)
from forkpointd.model import (
    Boot,
    Drive,
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
    load_requests,
)

log = logging.getLogger(__name__)

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
        oom_order: OomOrder | None = None,
    ) -> None:
        """Without `oom_order` the out-of-memory killer takes whom it likes."""
        self.binary = binary
        self.oom_order = oom_order
        self._folders = folders
        self._store = store
        self._host = host
        self._strict_host = strict_host
        self._calls = calls

    async def boot(self, row: Sandbox, boot: Boot) -> Vmm:
        """Boots a kernel. If this fails the process is gone; the folder is the caller's."""
        return await self._start(row, boot_requests(boot))

    async def check_kernel(self, kernel: Path) -> None:
        """Refuses, as INVALID_FIELD, a file that can't be a kernel: before there is a sandbox."""
        await asyncio.get_running_loop().run_in_executor(self._calls, check_kernel, kernel)

    async def load(self, row: Sandbox, stored: StoredSnapshot) -> Vmm:
        """Starts from a snapshot that `check_loadable` passed. If this fails the process is gone;
        the folder is the caller's."""
        return await self._start(
            row, load_requests(stored.vmstate_path, stored.memory_path, resume=True)
        )

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
            if reason := drive.changed():
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

    async def _start(self, row: Sandbox, requests: tuple[ApiRequest, ...]) -> Vmm:
        return await Vmm.start(
            self.binary,
            self._folders.of(row.sandbox_id),
            row.sandbox_id,
            requests,
            executor=self._calls,
            prepare=lambda: self._folders.make(row.sandbox_id, row.machine.drives),
            oom_score_adj=self._oom_score_adj(row),
        )

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


def check_drives(drives: tuple[Drive, ...]) -> None:
    """Refuses writable drives: two children would write to the same file."""
    for drive in drives:
        if not drive.read_only:
            raise ForkpointError(
                Reason.WRITABLE_DRIVE,
                f"drive {drive.drive_id} is writable, which is refused for now: children of one "
                "snapshot would share the file. Set read_only",
                metadata={"drive_id": drive.drive_id},
            )


def check_drives_are_there(machine: Machine) -> None:
    """Refuses a snapshot of a machine one of whose drives has gone: no child could start from it.
    Blocks."""
    for drive in machine.drives:
        if not drive.path.exists():
            raise ForkpointError(
                Reason.DRIVE_CHANGED,
                f"drive {drive.drive_id}: {drive.path} can't be found any more: put the file back "
                "as it was",
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
