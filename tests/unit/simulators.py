"""Simulator processes for tests, with a kernel image made on the spot."""

import struct
from pathlib import Path

from forkpointd.vmm import simulator_binary
from tests.integration.vmm_contract.vm import Vm

_HEADER = struct.Struct("<16sHHIQQQIHHHHHH")
_PROGRAM = struct.Struct("<IIQQQQQQ")
KERNEL_ADDRESS = 16 << 20


def make_kernel(path: Path, content: bytes = b"nothing that runs", address: int = 0) -> Path:
    """A 64-bit ELF file with one segment: all that the simulator wants of a kernel."""
    ident = b"\x7fELF" + bytes([2, 1, 1]) + bytes(9)
    programs_at, content_at = _HEADER.size, _HEADER.size + _PROGRAM.size
    at = address or KERNEL_ADDRESS
    header = _HEADER.pack(
        ident, 2, 62, 1, at, programs_at, 0, 0, _HEADER.size, _PROGRAM.size, 1, 0, 0, 0
    )
    program = _PROGRAM.pack(1, 7, content_at, at, at, len(content), len(content), 4096)
    path.write_bytes(header + program + content)
    return path


class Simulators:
    """Makes simulators, and ends them."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.kernel = make_kernel(root / "kernel")
        self._made: list[Vm] = []

    def new(self, *options: str) -> Vm:
        vm = Vm(simulator_binary(), self.root / f"vm{len(self._made)}", "simulated", *options)
        self._made.append(vm)
        return vm

    def booted(self, memory_mib: int = 80) -> Vm:
        """A guest that is ready, with metrics."""
        vm = self.new()
        (vm.folder / "metrics").touch()
        vm.do("PUT", "/metrics", {"metrics_path": "metrics"})
        vm.boot(self.kernel, memory_mib)
        return vm

    def close(self) -> None:
        for vm in self._made:
            vm.close()
