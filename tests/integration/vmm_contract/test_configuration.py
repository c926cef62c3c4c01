"""Before the start: what is accepted, and in which words the rest is refused."""

import pytest

from tests.integration.vmm_contract.conftest import Vmms
from tests.integration.vmm_contract.refusals import REFUSED, drive, machine


def test_what_is_refused_before_the_start_and_in_which_words(vmms: Vmms) -> None:
    vm = vmms.new()
    (vm.folder / "disk").write_bytes(bytes(1 << 20))
    told = {
        (method, path, str(body)): vm.api(method, path, body).fault
        for method, path, body, _ in REFUSED
    }
    assert told == {(method, path, str(body)): text for method, path, body, text in REFUSED}
    assert vm.state == "Not started", "nothing of it did any harm"


def test_a_new_vmm_tells_what_it_is(vmms: Vmms) -> None:
    vm = vmms.new()
    told = vm.get("/")
    assert told["id"] == "vm0"
    assert told["state"] == "Not started"
    assert told["vmm_version"] == vmms.binary.version
    assert vm.get("/version") == {"firecracker_version": told["vmm_version"]}
    assert ("simulator" in told["app_name"]) is vmms.simulated
    assert ("simulator" in told["vmm_version"]) is vmms.simulated
    assert vm.get("/machine-config") == {
        "vcpu_count": 1,
        "mem_size_mib": 128,
        "smt": False,
        "track_dirty_pages": False,
        "huge_pages": "None",
    }


def test_a_configuration_is_kept_as_it_was_given(vmms: Vmms) -> None:
    vm = vmms.new()
    for name in ("root", "data"):
        (vm.folder / name).write_bytes(bytes(4096))
    vm.do("PUT", "/boot-source", {"kernel_image_path": "/etc/passwd", "boot_args": "ünï"})
    vm.do("PUT", "/machine-config", machine(vcpu_count=2, smt=True, track_dirty_pages=True))
    vm.do("PATCH", "/machine-config", {"mem_size_mib": 256})
    vm.do("PUT", "/drives/data", drive(drive_id="data", path_on_host="data"))
    root = drive(drive_id="root", path_on_host="root", is_root_device=True, is_read_only=True)
    vm.do("PUT", "/drives/root", root)
    vm.do("PUT", "/drives/data", drive(drive_id="data", path_on_host="data", io_engine="Sync"))
    second = vm.api("PUT", "/drives/x", root | {"drive_id": "x"})
    assert second.fault == "Drive config error: A root block device already exists!"

    config = vm.get("/vm/config")
    assert config["boot-source"] == {
        "kernel_image_path": "/etc/passwd",
        "initrd_path": None,
        "boot_args": "ünï",
    }
    assert config["machine-config"] == vm.get("/machine-config")
    assert config["machine-config"]["mem_size_mib"] == 256
    assert config["machine-config"]["vcpu_count"] == 2
    assert [d["drive_id"] for d in config["drives"]] == ["root", "data"], "the root comes first"
    assert config["drives"][0] == {
        "drive_id": "root",
        "partuuid": None,
        "is_root_device": True,
        "cache_type": "Unsafe",
        "is_read_only": True,
        "path_on_host": "root",
        "rate_limiter": None,
        "io_engine": "Sync",
        "socket": None,
    }


def test_metrics_go_to_one_file(vmms: Vmms) -> None:
    vm = vmms.new()
    (vm.folder / "metrics").touch()
    vm.do("PUT", "/metrics", {"metrics_path": "metrics"})
    again = vm.api("PUT", "/metrics", {"metrics_path": "metrics"})
    assert again.fault == (
        "Metrics error: Cannot initialize the metrics system due to bad user input: "
        "Reinitialization of metrics not allowed."
    )


def test_a_metrics_file_that_is_not_there(vmms: Vmms) -> None:
    """1.12 wants it to exist, newer ones make it."""
    vm = vmms.new()
    reply = vm.api("PUT", "/metrics", {"metrics_path": "new"})
    if vmms.version < (1, 13):
        assert reply.fault.endswith("bad user input: No such file or directory (os error 2)")
    else:
        assert reply.status == 204


@pytest.mark.parametrize(
    ("kernel", "memory_mib", "told"),
    [
        (None, 128, "Cannot start microvm without kernel configuration."),
        ("/etc/passwd", 128, "Kernel Loader: Invalid Elf magic number"),
        ("/dev/null", 128, "Kernel Loader: Unable to read elf header"),
        ("/tmp", 128, "Kernel Loader: Unable to read elf header"),
        ("witness", 1, "Kernel Loader: Unable to read kernel image"),
        ("witness", 10**9, "Cannot create mmap region: "),
    ],
)
def test_a_machine_that_cannot_start(
    vmms: Vmms, kernel: str | None, memory_mib: int, told: str
) -> None:
    vm = vmms.new()
    if kernel is not None:
        path = str(vmms.kernel) if kernel == "witness" else kernel
        vm.do("PUT", "/boot-source", {"kernel_image_path": path})
    vm.do("PUT", "/machine-config", machine(mem_size_mib=memory_mib))
    fault = vm.api("PUT", "/actions", {"action_type": "InstanceStart"}).fault
    assert fault.startswith("Start microvm error: ")
    assert told in fault
    assert vm.state == "Not started"
