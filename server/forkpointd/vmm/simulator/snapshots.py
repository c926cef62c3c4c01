"""The files of a snapshot: writing them in Firecracker's order, loading them with its checks.

Order and words follow src/vmm/src/persist.rs and vstate/vm.rs of 1.12.1. What a caller stands on:

- vmstate is written and synced before the memory file is opened, so a memory path that can't be
  opened still leaves a vmstate behind;
- a memory file of exactly the memory's size is written in place, any other is emptied first;
- a Diff writes the dirty pages only. Where that fails the dirty log stays whole; once all pages are
  written it is cleared, and a sync that fails after that loses it.
"""

from __future__ import annotations

import os
from typing import Any

from . import vmstate
from .errors import Fault, io_debug, io_text
from .faults import Faults
from .memory import GuestMemory, limited

_WRITE = os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC


def write_vmstate(state: dict[str, Any], path: str, faults: Faults) -> None:
    """Writes and syncs vmstate. Raises Fault."""
    try:
        fd = os.open(path, _WRITE | os.O_TRUNC, 0o666)
    except OSError as error:
        raise _on("open", "snapshot", error) from error
    try:
        try:
            faults.reach("create.vmstate")
            content = memoryview(vmstate.encode(state))
            while content:
                content = content[os.write(fd, content) :]
        except OSError as error:
            raise Fault(
                "Create snapshot error: Cannot serialize the microVM state: An error occured with "
                f"serialization/deserialization: Io {{ inner: {io_debug(error)}, index: 0 }}"
            ) from error
        _sync(fd, "snapshot")
    finally:
        os.close(fd)


def write_memory(memory: GuestMemory, kind: str, path: str, faults: Faults) -> None:
    """Writes and syncs the memory file; `kind` is Full or Diff. Raises Fault."""
    existed = os.path.exists(path)
    try:
        faults.reach("create.open")
        fd = os.open(path, _WRITE, 0o666)
    except OSError as error:
        raise _on("open", "memory", error) from error
    try:
        if existed and os.fstat(fd).st_size != memory.size_bytes:
            _set_length(fd, 0, "truncate")
        _set_length(fd, memory.size_bytes, "set_length")
        _write_pages(memory, kind, fd, faults)
        memory.clear_dirty()
        try:
            faults.reach("create.sync")
        except OSError as error:
            raise _on("sync_all", "memory", error) from error
        _sync(fd, "memory")
    finally:
        os.close(fd)


def _write_pages(memory: GuestMemory, kind: str, fd: int, faults: Faults) -> None:
    runs = memory.dirty_runs() if kind == "Diff" else memory.everything()
    rule = faults.reach("create.memory")
    try:
        if rule is None:
            memory.dump(fd, runs)
            return
        memory.dump(fd, limited(runs, rule.after_pages))
        if rule.do == "error":
            raise rule.os_error()
    except OSError as error:
        raise Fault(
            "Create snapshot error: Cannot write memory file: Cannot dump memory: Guest memory "
            f"error: {io_text(error)}"
        ) from error


def _set_length(fd: int, length: int, step: str) -> None:
    try:
        os.ftruncate(fd, length)
    except OSError as error:
        raise _on(step, "memory", error) from error


def _sync(fd: int, which: str) -> None:
    try:
        os.fsync(fd)
    except OSError as error:
        raise _on("sync_all", which, error) from error


def _on(step: str, which: str, error: OSError) -> Fault:
    return Fault(
        f"Create snapshot error: Cannot perform {step} on the {which} backing file: "
        f"{io_text(error)}"
    )


def read_vmstate(path: str, faults: Faults) -> dict[str, Any]:
    """The state in a vmstate file. Raises Fault, without the load's own prefix."""
    try:
        faults.reach("load.vmstate")
        content = vmstate.read(path)
    except OSError as error:
        raise Fault(
            "Failed to get snapshot state from file: Failed to open snapshot file: "
            f"{io_text(error)}"
        ) from error
    try:
        return vmstate.decode(content)
    except vmstate.VmstateError as error:
        raise Fault(
            f"Failed to get snapshot state from file: Failed to load snapshot state from file: "
            f"{error}"
        ) from error


def map_memory(
    backend: dict[str, Any], size_bytes: int, *, tracked: bool, faults: Faults
) -> GuestMemory:
    """The memory file, mapped privately. Raises Fault, without the load's own prefix."""
    if backend["backend_type"] != "File":
        raise Fault("The simulator loads memory from a file only, not by userfaultfd.")
    prefix = "Failed to load guest memory: Error creating guest memory from file:"
    try:
        faults.reach("load.memory")
        return GuestMemory.of_file(backend["backend_path"], size_bytes, tracked=tracked)
    except OSError as error:
        raise Fault(f"{prefix} Failed to load guest memory: {io_text(error)}") from error
    except ValueError as error:
        raise Fault(
            f"{prefix} Failed to restore guest memory: Cannot create mmap region: The specified "
            "file offset and length is greater then file length"
        ) from error
