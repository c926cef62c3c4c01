"""Machines for the contract suite: `vmms` makes them on the VMM under test."""

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from forkpointd.model import VmmKind
from forkpointd.vmm import Binary
from tests.integration.vmm_contract.vm import Vm


class Vmms:
    """Makes machines on one VMM, and ends them."""

    def __init__(self, binary: Binary, kernel: Path, root: Path) -> None:
        self.binary = binary
        self.kernel = kernel
        self.root = root
        self._made: list[Vm] = []

    @property
    def simulated(self) -> bool:
        return self.binary.kind is VmmKind.SIMULATOR

    @property
    def version(self) -> tuple[int, ...]:
        """The Firecracker release that it is, or follows."""
        return tuple(int(part) for part in self.binary.version.partition("-")[0].split("."))

    def new(self, *options: str) -> Vm:
        """A VMM with nothing configured."""
        name = f"vm{len(self._made)}"
        vm = Vm(self.binary, self.root / name, name, *options)
        self._made.append(vm)
        return vm

    def booted(self, memory_mib: int = 128, *, tracked: bool = True) -> Vm:
        """A witness guest that is ready."""
        vm = self.new()
        vm.boot(self.kernel, memory_mib, tracked=tracked)
        return vm

    def child(self, source: Path, name: str) -> Vm:
        """A machine loaded from a snapshot, tracked and running."""
        vm = self.new()
        reply = vm.load(source, name)
        assert reply.status == 204, reply
        return vm

    def close(self) -> None:
        for vm in self._made:
            vm.close()


@pytest.fixture
def vmms(binary: Binary, witness_kernel: Path, tmp_path: Path) -> Iterator[Vmms]:
    """Machines on each VMM under test in turn."""
    made = Vmms(binary, witness_kernel, tmp_path)
    try:
        yield made
    finally:
        made.close()


@pytest.fixture
def small_tmpfs(tmp_path: Path) -> Iterator[Path]:
    """A file system of 4 MiB, for root."""
    if os.geteuid() != 0:
        pytest.skip("a full file system is made by mounting one, which only root may")
    folder = tmp_path / "small"
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "contract-test", folder], check=True)
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", folder], check=True)
