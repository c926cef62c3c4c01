"""The simulator as a process: what it says it is, what it loads, what it leaves."""

import fcntl
import subprocess
import sys
import termios
from collections.abc import Iterator
from pathlib import Path

import pytest

from forkpointd.vmm.simulator import simulator_argv
from forkpointd.vmm.simulator.kernel import KernelError, load
from forkpointd.vmm.simulator.memory import GuestMemory
from forkpointd.vmm.simulator.versions import SNAPSHOT_VERSION
from tests.integration.vmm_contract.vm import mem, wait_for
from tests.unit.simulators import KERNEL_ADDRESS, Simulators, make_kernel


@pytest.fixture
def simulators(tmp_path: Path) -> Iterator[Simulators]:
    made = Simulators(tmp_path)
    try:
        yield made
    finally:
        made.close()


def run(*argv: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(argv, capture_output=True, text=True, timeout=60, check=False)


@pytest.mark.parametrize(
    "argv", [simulator_argv(), [sys.executable, "-m", "forkpointd.vmm.simulator"]]
)
def test_it_says_that_it_is_a_simulator(argv: list[str]) -> None:
    done = run(*argv, "--version")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines()[0] == "Firecracker-simulator v1.12.1"
    assert "without a virtual machine" in run(*argv, "--help").stdout


def test_it_loads_nothing_but_itself_and_the_standard_library() -> None:
    """Of which it spares the slow parts: a hundred of them are started at once."""
    python, *rest = simulator_argv()
    loaded = run(python, "-X", "importtime", *rest, "--version").stderr
    names = {line.rpartition("|")[2].strip() for line in loaded.splitlines()}
    assert "simulator.machine" in names
    slow = {"asyncio", "dataclasses", "inspect", "pathlib", "logging", "http.client", "subprocess"}
    assert not names & slow
    ours = {name.partition(".")[0] for name in names if "." in name} - sys.stdlib_module_names
    assert ours - {"simulator"} == set()


def test_its_log_says_so_at_the_default_level(simulators: Simulators) -> None:
    vm = simulators.new("--level", "Info")
    vm.boot(simulators.kernel)
    log = (vm.folder / "log").read_text()
    assert "[simulated:main] Running Firecracker-simulator v1.12.1: a simulator" in log
    assert '[simulated:fc_api] The API server received a Put request on "/boot-source".' in log
    assert "[simulated:fc_api] The request was executed successfully. Status code: 204" in log


def test_it_tells_the_version_of_a_vmstate_file(simulators: Simulators) -> None:
    vm = simulators.booted()
    vm.snapshot("Diff", "a")
    argv = simulator_argv()
    done = run(*argv, "--describe-snapshot", str(vm.folder / "a.vmstate"))
    assert (done.returncode, done.stdout.splitlines()[0]) == (0, f"v{SNAPSHOT_VERSION}")
    assert run(*argv, "--snapshot-version").stdout.splitlines()[0] == f"v{SNAPSHOT_VERSION}"
    other = run(*argv, "--describe-snapshot", str(vm.folder / mem("a")))
    assert other.returncode == 1
    assert "Magic value does not match arch" in other.stdout


@pytest.mark.parametrize("device", ["network-interfaces/a", "vsock", "balloon", "entropy", "mmds"])
def test_devices_that_it_has_not_are_refused_saying_so(simulators: Simulators, device: str) -> None:
    vm = simulators.new()
    assert vm.api("PUT", f"/{device}", {}).fault.startswith("The simulator has no ")


def test_memory_by_userfaultfd_is_refused_saying_so(simulators: Simulators) -> None:
    vm = simulators.booted()
    vm.snapshot("Diff", "a")
    child = simulators.new()
    backend = {"backend_type": "Uffd", "backend_path": "uffd.sock"}
    assert "not by userfaultfd" in child.load(vm.folder, "a", mem_backend=backend).fault


def test_a_drive_can_be_moved_while_it_runs(simulators: Simulators) -> None:
    vm = simulators.new()
    for name in ("one", "two"):
        (vm.folder / name).write_bytes(bytes(4096))
    drive = {"drive_id": "d", "path_on_host": "one", "is_root_device": False}
    vm.do("PUT", "/drives/d", drive)
    vm.boot(simulators.kernel)
    vm.do("PATCH", "/drives/d", {"drive_id": "d", "path_on_host": "two"})
    assert vm.get("/vm/config")["drives"][0]["path_on_host"] == "two"
    gone = vm.api("PATCH", "/drives/d", {"drive_id": "d", "path_on_host": "three"}).fault
    assert "No such file or directory (os error 2) three" in gone


def test_the_kernel_image_is_in_memory_where_it_asked_to_be(simulators: Simulators) -> None:
    vm = simulators.booted()
    vm.pause()
    assert vm.create("Full", "a").status == 204
    with (vm.folder / mem("a")).open("rb") as memory:
        memory.seek(KERNEL_ADDRESS)
        assert memory.read(17) == b"nothing that runs"


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"address": 0x1000}, "Unable to read kernel image"),
        ({"address": 200 << 20}, "Unable to read kernel image"),
        ({"content": bytes(9 << 20), "address": 120 << 20}, "Unable to read kernel image"),
    ],
)
def test_an_image_that_does_not_fit(
    tmp_path: Path, change: dict[str, int | bytes], told: str
) -> None:
    memory = GuestMemory.anonymous(128 << 20, tracked=True)
    path = make_kernel(tmp_path / "kernel", **change)  # type: ignore[arg-type]
    with path.open("rb") as image, pytest.raises(KernelError, match=told):
        load(memory, image.fileno(), "", 1)


@pytest.mark.parametrize("length", range(0, 140, 7))
def test_an_image_that_breaks_off(tmp_path: Path, length: int) -> None:
    memory = GuestMemory.anonymous(128 << 20, tracked=True)
    path = make_kernel(tmp_path / "kernel", b"x" * 100)
    path.write_bytes(path.read_bytes()[:length])
    with path.open("rb") as image, pytest.raises(KernelError):
        load(memory, image.fileno(), "", 1)


def test_a_console_that_nobody_reads_stops_the_guest_until_somebody_does(
    simulators: Simulators,
) -> None:
    """As a full pipe stops Firecracker's vCPU: nothing that it says is lost."""
    vm = simulators.booted()
    assert vm.process.stdout is not None
    output = vm.process.stdout.fileno()
    room = fcntl.fcntl(output, fcntl.F_SETPIPE_SZ, 4096)
    expected = [f"T 0 {n}" for n in range(1, 2001)]
    assert sum(len(line) + 1 for line in expected) > room
    for _ in range(len(expected) // 100):
        vm.type("t\n" * 100)

    def waiting() -> int:
        return int.from_bytes(fcntl.ioctl(output, termios.FIONREAD, bytes(4)), sys.byteorder)

    longest = max(len(line) + 1 for line in expected)
    wait_for(lambda: waiting() > room - longest, "the pipe is full")
    assert [vm.line() for _ in expected] == expected
