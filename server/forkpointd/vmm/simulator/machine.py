"""The machine: what Firecracker's VMM thread does with a request.

Before the start it is configured; InstanceStart or a load makes it run, once. Which action is
allowed when, and with which words it is refused, follows src/vmm/src/rpc_interface.rs of 1.12.1.
"""

from __future__ import annotations

import enum
import os
import time
from typing import Any, Final

from . import kernel, snapshots
from .config import MachineConfig
from .errors import AFTER_START, BEFORE_START, FatalLoadFault, Fault, PanicError, io_text
from .faults import Faults
from .journal import Journal, Metrics
from .memory import GuestMemory
from .vcpu import Vcpu

_MIB: Final = 1 << 20


class State(enum.Enum):
    """As GET / names it."""

    NOT_STARTED = "Not started"
    RUNNING = "Running"
    PAUSED = "Paused"


class Machine:
    """One microVM. Methods raise Fault where Firecracker answers 400."""

    def __init__(self, journal: Journal, metrics: Metrics, faults: Faults) -> None:
        self.config = MachineConfig()
        self.state = State.NOT_STARTED
        self.journal = journal
        self.metrics = metrics
        self.faults = faults
        self._memory: GuestMemory | None = None
        self._vcpu: Vcpu | None = None

    @property
    def shutdown_event(self) -> int | None:
        """A descriptor that becomes readable when the guest crashed; None before the start."""
        return None if self._vcpu is None else self._vcpu.shutdown_event

    @property
    def shut_down(self) -> bool:
        """The guest crashed, and with it the machine is over."""
        return self._vcpu is not None and self._vcpu.shut_down

    def before_start(self) -> None:
        """Raises Fault for what is only possible before the start."""
        if self.state is not State.NOT_STARTED:
            raise Fault(AFTER_START)

    def started(self) -> tuple[Vcpu, GuestMemory]:
        """The running or paused machine; raises Fault for what is only possible after the start."""
        if self._vcpu is None or self._memory is None:
            raise Fault(BEFORE_START)
        return self._vcpu, self._memory

    # --- start -----------------------------------------------------------------------------------

    def start(self) -> None:
        """InstanceStart: loads the kernel image into fresh memory and boots the guest."""
        self.before_start()
        config = self.config
        if config.kernel is None:
            raise Fault("Start microvm error: Cannot start microvm without kernel configuration.")
        size_bytes = config.mem_size_mib * _MIB
        if size_bytes >= 1 << 64:
            raise PanicError("the memory size overflows")
        try:
            memory = GuestMemory.anonymous(size_bytes, tracked=config.track_dirty_pages)
        except OSError as error:
            raise Fault(
                "Start microvm error: Invalid Memory Configuration: Cannot create mmap region: "
                f"Out of memory (os error {error.errno})"
            ) from error
        try:
            kernel.load(memory, config.kernel, config.boot_args or "", config.vcpu_count)
        except kernel.KernelError as error:
            raise Fault(
                "Start microvm error: System configuration error: Cannot load kernel due to "
                "invalid memory configuration or invalid kernel image: Kernel Loader: failed to "
                f"load ELF kernel image: Kernel Loader: {error}"
            ) from error
        self._memory, self._vcpu = memory, Vcpu(memory)
        self._vcpu.boot()
        self.state = State.RUNNING
        self.metrics.write()

    # --- pause and resume ------------------------------------------------------------------------

    def pause(self) -> None:
        """Stops the guest; a paused one stays paused."""
        vcpu, _ = self.started()
        began = time.monotonic_ns()
        vcpu.pause()
        self.state = State.PAUSED
        self.metrics.took("vmm_pause_vm", began)

    def resume(self) -> None:
        """Lets the guest run; a running one runs on."""
        vcpu, _ = self.started()
        began = time.monotonic_ns()
        vcpu.resume()
        self.state = State.RUNNING
        self.metrics.took("vmm_resume_vm", began)

    def flush_metrics(self) -> None:
        """Appends a line of metrics."""
        self.started()
        try:
            self.metrics.write()
        except OSError as error:
            raise Fault(f"Internal VMM error: Failed to write metrics: {io_text(error)}") from error

    # --- snapshots -------------------------------------------------------------------------------

    def create_snapshot(self, kind: str, snapshot_path: str, mem_file_path: str) -> None:
        """PUT /snapshot/create; `kind` is Full or Diff."""
        vcpu, memory = self.started()
        if kind == "Diff" and not memory.tracked:
            raise Fault(
                "The requested operation is not supported: Diff snapshots are not allowed on uVMs "
                "with dirty page tracking disabled."
            )
        began = time.monotonic_ns()
        if self.state is not State.PAUSED:
            raise Fault(
                "Create snapshot error: Cannot save the microVM state: Operation not allowed: "
                "save/restore unavailable while running"
            )
        state = self.config.for_vmstate() | {"tsc": vcpu.tsc(), "memory_bytes": memory.size_bytes}
        snapshots.write_vmstate(state, snapshot_path, self.faults)
        snapshots.write_memory(memory, kind, mem_file_path, self.faults)
        self.metrics.took(f"vmm_{kind.lower()}_create_snapshot", began)

    def load_snapshot(
        self, snapshot_path: str, backend: dict[str, Any], *, tracked: bool, resume: bool
    ) -> None:
        """PUT /snapshot/load. Any failure from here on ends the process (FatalLoadFault)."""
        self.before_start()
        began = time.monotonic_ns()
        if self.config.touched:
            raise Fault(
                "Load snapshot error: Loading a microVM snapshot not allowed after configuring "
                "boot-specific resources."
            )
        try:
            state = snapshots.read_vmstate(snapshot_path, self.faults)
            memory = snapshots.map_memory(
                backend, state["memory_bytes"], tracked=tracked, faults=self.faults
            )
            self.config = MachineConfig.of_vmstate(state, tracked=tracked)
        except Fault as fault:
            raise FatalLoadFault(
                f"Load snapshot error: Failed to restore from snapshot: {fault}"
            ) from fault
        self._memory, self._vcpu = memory, Vcpu(memory, tsc_start=state["tsc"])
        self._vcpu.restore()
        self.state = State.PAUSED
        if resume:
            self._vcpu.resume()
            self.state = State.RUNNING
        self.metrics.took("vmm_load_snapshot", began)
        self.metrics.write()

    # --- drives ----------------------------------------------------------------------------------

    def patch_drive(self, drive_id: str, path: str | None) -> None:
        """PATCH /drives/{id}: another file behind the same drive."""
        self.started()
        drive = next((d for d in self.config.drives if d["drive_id"] == drive_id), None)
        if drive is None:
            raise Fault(
                "Drive config error: Unable to patch the block device: Device manager error: "
                "Failed to find the device on the bus. Please verify the request arguments."
            )
        if path is not None:
            try:
                os.close(os.open(path, os.O_RDONLY | os.O_CLOEXEC))
            except OSError as error:
                raise Fault(
                    "Drive config error: Unable to patch the block device: Virtio backend error: "
                    f"Error manipulating the backing file: {io_text(error)} {path} "
                    "Please verify the request arguments."
                ) from error
            drive["path_on_host"] = path
