"""A running machine: pause, resume, what is too late for it, its metrics, its end."""

import json
import signal
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.integration.vmm_contract.conftest import Vmms
from tests.integration.vmm_contract.vm import Vm, encode, wait_for

STARTED = "The requested operation is not supported after starting the microVM."

TOO_LATE = [
    ("PUT", "/metrics", {"metrics_path": "metrics"}),
    ("PUT", "/logger", {}),
    ("PUT", "/boot-source", {"kernel_image_path": "/etc/passwd"}),
    ("PUT", "/machine-config", {"vcpu_count": 1, "mem_size_mib": 128}),
    ("PATCH", "/machine-config", {"mem_size_mib": 128}),
    ("PUT", "/actions", {"action_type": "InstanceStart"}),
    ("PUT", "/vsock", {"guest_cid": 3, "uds_path": "v.sock"}),
    ("PUT", "/entropy", {}),
    ("PUT", "/cpu-config", {}),
    (
        "PUT",
        "/snapshot/load",
        {"snapshot_path": "v", "mem_backend": {"backend_type": "File", "backend_path": "m"}},
    ),
]


def test_what_is_too_late_after_the_start(vmms: Vmms) -> None:
    vm = vmms.booted()
    told = {path: vm.api(method, path, body).fault for method, path, body in TOO_LATE}
    assert told == {path: STARTED for _, path, _ in TOO_LATE}
    assert vm.state == "Running"
    assert vm.ask("t") == "T 0 1"


def test_states_and_that_a_repeat_does_nothing(vmms: Vmms) -> None:
    vm = vmms.booted()
    assert vm.state == "Running"
    vm.resume()
    assert vm.state == "Running"
    for _ in range(2):
        vm.pause()
        assert vm.state == "Paused"
    for _ in range(2):
        vm.resume()
        assert vm.state == "Running"
    assert vm.ask("t") == "T 0 1"


def test_input_waits_while_it_is_paused(vmms: Vmms) -> None:
    vm = vmms.booted()
    vm.pause()
    vm.type("d1\n")
    assert vm.silent(0.1), "a paused guest says nothing"
    vm.resume()
    assert vm.line() == "D 1 1"


def test_an_idle_guest_costs_no_cpu_and_little_memory(vmms: Vmms) -> None:
    """4 GiB, of which a boot touches some MiB."""
    vm = vmms.booted(4096)
    status = Path(f"/proc/{vm.process.pid}/status").read_text()
    resident_kib = int(status.partition("VmRSS:")[2].split()[0])
    assert resident_kib < 64 * 1024
    ticks = vm.cpu_ticks()
    assert vm.silent(0.5)
    assert vm.cpu_ticks() - ticks <= 5, "of 50 ticks"


def latencies(vm: Vm) -> list[dict[str, int]]:
    """`latencies_us` of every line of its metrics."""
    lines = (vm.folder / "metrics").read_text().splitlines()
    return [json.loads(line)["latencies_us"] for line in lines]


def flushed(vm: Vm) -> dict[str, int]:
    before = len(latencies(vm))
    vm.do("PUT", "/actions", {"action_type": "FlushMetrics"})
    lines = latencies(vm)
    assert len(lines) == before + 1, "one line a flush"
    return lines[-1]


def with_metrics(vm: Vm) -> Vm:
    (vm.folder / "metrics").touch()
    vm.do("PUT", "/metrics", {"metrics_path": "metrics"})
    return vm


PARTS = ("pause_vm", "resume_vm", "diff_create_snapshot", "full_create_snapshot", "load_snapshot")


def test_latencies_are_the_last_ones_that_succeeded(vmms: Vmms) -> None:
    vm = with_metrics(vmms.new())
    vm.boot(vmms.kernel)
    wait_for(lambda: bool(latencies(vm)), "a line at the start, of its own accord")
    first = flushed(vm)
    assert [first[part] for part in PARTS] == [0] * len(PARTS)

    vm.snapshot("Diff", "a")
    second = flushed(vm)
    assert second["pause_vm"] > 0
    assert second["resume_vm"] > 0
    assert second["diff_create_snapshot"] > 0
    assert second["full_create_snapshot"] == second["load_snapshot"] == 0
    assert flushed(vm) == second, "a flush does not reset them"

    vm.pause()
    assert vm.create("Diff", "nowhere/b").status == 400
    third = flushed(vm)
    assert third["diff_create_snapshot"] == second["diff_create_snapshot"], "of no failed one"

    assert vm.create("Full", "c").status == 204
    last = flushed(vm)
    assert last["full_create_snapshot"] > 0
    assert last["diff_create_snapshot"] == second["diff_create_snapshot"]


def test_latency_of_a_load(vmms: Vmms) -> None:
    source = vmms.booted()
    source.snapshot("Full", "a")
    child = with_metrics(vmms.new())
    assert child.load(source.folder, "a").status == 204
    wait_for(lambda: bool(latencies(child)), "a line at the start, of its own accord")
    assert flushed(child)["load_snapshot"] > 0


def test_a_stopped_vmm_runs_late_what_it_was_sent(vmms: Vmms) -> None:
    vm = vmms.booted()
    vm.stop()
    memory = vm.folder / "late.memory"
    body: dict[str, Any] = {"snapshot_type": "Diff", "snapshot_path": "late.vmstate"}
    vm.connection.send(
        encode("PATCH", "/vm", {"state": "Paused"})
        + encode("PUT", "/snapshot/create", body | {"mem_file_path": "late.memory"})
        + encode("PATCH", "/vm", {"state": "Resumed"})
    )
    assert not memory.exists()
    vm.go_on()
    assert [vm.connection.reply().status for _ in range(3)] == [204, 204, 204]
    assert memory.stat().st_size == 128 << 20
    assert vm.state == "Running"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_a_signal_ends_it(vmms: Vmms, number: signal.Signals) -> None:
    vm = vmms.booted()
    vm.process.send_signal(number)
    assert vm.exit_code() == -number
    assert (vm.folder / "api.sock").exists(), "its socket stays behind"


def test_a_hang_up_ends_it_with_a_code_of_its_own(vmms: Vmms) -> None:
    vm = vmms.booted()
    vm.process.send_signal(signal.SIGHUP)
    assert vm.exit_code() == 156


def test_it_runs_on_when_its_input_ends(vmms: Vmms) -> None:
    vm = vmms.booted()
    assert vm.process.stdin is not None
    vm.process.stdin.close()
    assert vm.state == "Running"
    vm.snapshot("Diff", "a")
    ticks = vm.cpu_ticks()
    assert vm.silent(0.3)
    assert vm.cpu_ticks() - ticks <= 5, "and does not spin on it"
    wait_for(lambda: vm.process.poll() is None, "alive")


@pytest.mark.parametrize(
    ("options", "code"),
    [
        (["--api-sock", "taken.sock"], 1),
        (["--api-sock", "no/such/folder.sock"], 1),
        (["--api-sock", "a" * 108], 1),
        (["--api-sock", "api.sock", "--bogus"], 153),
        (["extra"], 153),
        (["--id"], 153),
        (["--api-sock", "api.sock", "--level", "Bad"], 152),
        (["--api-sock", "api.sock", "--id", "a b"], -signal.SIGABRT),
        (["--api-sock", "api.sock", "--id", "a" * 65], -signal.SIGABRT),
    ],
)
def test_a_start_that_fails(vmms: Vmms, tmp_path: Path, options: list[str], code: int) -> None:
    (tmp_path / "taken.sock").touch()
    done = subprocess.run(
        [*vmms.binary.argv, *options],
        cwd=tmp_path,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == code
    assert done.stdout, "it says why"
    assert not (tmp_path / "api.sock").exists()


def test_it_tells_its_versions(vmms: Vmms) -> None:
    def first_line(option: str) -> str:
        done = subprocess.run(
            [*vmms.binary.argv, option], capture_output=True, text=True, timeout=60, check=True
        )
        return done.stdout.splitlines()[0]

    release = ".".join(map(str, vmms.version))
    name = "Firecracker-simulator" if vmms.simulated else "Firecracker"
    assert first_line("--version") == f"{name} v{release}"
    assert first_line("--snapshot-version").startswith("v")
