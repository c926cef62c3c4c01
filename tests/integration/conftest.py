"""What integration tests share: the VMMs that they run on, the guest, and sandboxes by verbs.

Every test that takes `binary` runs once on each Firecracker (FORKPOINT_TEST_FIRECRACKERS, separated
by colons; without it the one that the server would run) and once on the simulator. Where /dev/kvm
can't be used Firecracker's runs are skipped, with the reason.
"""

import os
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from forkpointd.model import VmmKind
from forkpointd.vmm import Binary, inspect_binary, simulator_binary
from forkpointd.vmm.fetch import FirecrackerUnavailableError, find_firecracker
from forkpointd.witness.build import cached_witness
from tests.integration.vmms import Bench, kvm_refusal

SIMULATOR = "simulator"


def firecracker_paths() -> list[str]:
    """The Firecrackers under test, or one name that stands for none."""
    wished = os.environ.get("FORKPOINT_TEST_FIRECRACKERS", "")
    if wished:
        return [path for path in wished.split(":") if path]
    try:
        found = find_firecracker()
    except FirecrackerUnavailableError:
        found = None
    return [str(found)] if found is not None else ["no-firecracker"]


def vmm_params() -> list[object]:
    paths = firecracker_paths()
    names = [f"firecracker-{n}" if len(paths) > 1 else "firecracker" for n in range(len(paths))]
    firecrackers = [pytest.param(path, id=name) for path, name in zip(paths, names, strict=True)]
    return [*firecrackers, pytest.param(SIMULATOR, id=SIMULATOR)]


_known: dict[str, Binary] = {}


def binary_for(param: str) -> Binary:
    """The VMM behind a parameter; skips the test where it can't be run here."""
    if param != SIMULATOR and (refusal := kvm_refusal()):
        pytest.skip(f"no Firecracker here: {refusal}")
    if param == "no-firecracker":
        pytest.skip("no Firecracker is found: `make firecracker`, or set FORKPOINT_FIRECRACKER")
    if param not in _known:
        _known[param] = simulator_binary() if param == SIMULATOR else inspect_binary(Path(param))
    return _known[param]


@pytest.fixture(params=vmm_params())
def binary(request: pytest.FixtureRequest) -> Binary:
    """Each VMM under test in turn."""
    return binary_for(request.param)


@pytest.fixture(params=vmm_params()[:-1])
def firecracker(request: pytest.FixtureRequest) -> Binary:
    """Each real Firecracker under test in turn."""
    found = binary_for(request.param)
    assert found.kind is VmmKind.FIRECRACKER
    return found


@pytest.fixture(scope="session")
def witness_kernel() -> Path:
    """The witness guest as a kernel to boot."""
    return cached_witness()


@pytest.fixture
def executor() -> Iterator[ThreadPoolExecutor]:
    """Threads for what blocks."""
    with ThreadPoolExecutor(8, thread_name_prefix="test") as pool:
        yield pool


@pytest.fixture
async def bench(
    binary: Binary, witness_kernel: Path, tmp_path: Path, executor: ThreadPoolExecutor
) -> AsyncIterator[Bench]:
    """Sandboxes on one VMM, all ended after the test."""
    made = Bench(binary, witness_kernel, tmp_path, executor)
    try:
        yield made
    finally:
        await made.close()
