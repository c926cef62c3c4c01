"""Children: what they hold, what they share, and loads that end the process."""

import struct
from pathlib import Path

import pytest

from tests.integration.vmm_contract.conftest import Vmms
from tests.integration.vmm_contract.vm import Reply, Vm, data_pages, mem, region

LOAD = "Load snapshot error: Failed to restore from snapshot: "
STATE = f"{LOAD}Failed to get snapshot state from file: "


def test_a_child_goes_on_exactly_where_its_source_was(vmms: Vmms) -> None:
    source = vmms.booted()
    source.ask("d4")
    source.ask("p7,2")
    source.snapshot("Diff", "a")
    child = vmms.child(source.folder, "a")
    assert child.state == "Running"
    assert child.ask("t") == "T 2 3"
    assert child.ask("v4") == "V 4 1 2 2 0"
    assert child.ask("r8") == "R 8 2"
    assert source.ask("t") == "T 2 3", "and so does the source"


def test_source_and_children_do_not_see_each_others_writes(vmms: Vmms) -> None:
    source = vmms.booted()
    source.ask("d4")
    memory = source.snapshot("Full", "a")
    content = memory.read_bytes()
    children = [vmms.child(source.folder, "a") for _ in range(3)]
    for n, child in enumerate(children):
        for _ in range(n + 1):
            child.ask(f"d{n + 1}")
    source.ask("d1")
    told = [vm.ask_numbers("v4") for vm in (source, *children)]
    assert told == [[4, 1, 2, 1, 0], [4, 1, 2, 1, 0], [4, 1, 3, 1, 0], [4, 1, 4, 1, 0]]
    assert memory.read_bytes() == content, "the file is mapped privately"


def test_a_half_typed_command_is_finished_in_the_child(vmms: Vmms) -> None:
    source = vmms.booted()
    source.ask("t")
    source.type("p12,")
    # The guest has taken what was typed once it idles again: two snapshots without a difference.
    for n in range(100):
        if len(data_pages(source.snapshot("Diff", f"settle{n}"))) == 0 and n > 2:
            break
    source.snapshot("Full", "a")
    child = vmms.child(source.folder, "a")
    assert child.ask("3") == "P 12 3 1"


def test_a_writer_goes_on_in_the_child(vmms: Vmms) -> None:
    source = vmms.booted()
    source.ask("f16")
    source.snapshot("Full", "a")
    source.type("x")
    assert source.line().startswith("S ")
    child = vmms.child(source.folder, "a")
    assert child.silent(), "it writes and says nothing"
    child.type("x")
    assert child.line().startswith("S ")
    lowest, highest, changes, misplaced = child.ask_numbers("v16")[1:]
    assert highest - lowest <= 1
    assert changes <= 1
    assert misplaced == 0


def test_the_first_diff_of_a_child_has_only_what_it_wrote(vmms: Vmms) -> None:
    source = vmms.booted()
    source.ask("d10")
    source.snapshot("Diff", "a")
    child = vmms.child(source.folder, "a")
    child.ask("p100,2")
    diff = data_pages(child.snapshot("Diff", "b"))
    assert diff & region(0, 16384) == region(100, 2)
    assert len(diff) <= 64


def test_tracking_is_not_kept_in_a_snapshot(vmms: Vmms) -> None:
    source = vmms.booted()
    source.snapshot("Diff", "a")
    child = vmms.new()
    assert child.load(source.folder, "a", enable_diff_snapshots=None).status == 204
    assert child.get("/machine-config")["track_dirty_pages"] is False
    tracked = vmms.child(source.folder, "a")
    assert tracked.get("/machine-config")["track_dirty_pages"] is True


def test_the_configuration_comes_with_the_snapshot(vmms: Vmms) -> None:
    source = vmms.new()
    (source.folder / "disk").write_bytes(bytes(1 << 20))
    drive = {"drive_id": "d", "path_on_host": "disk", "is_root_device": False}
    source.do("PUT", "/drives/d", drive | {"is_read_only": True})
    source.boot(vmms.kernel, 192)
    source.snapshot("Diff", "a")

    child = vmms.new()
    (child.folder / "disk").write_bytes(bytes(1 << 20))
    assert child.load(source.folder, "a").status == 204
    assert child.get("/machine-config")["mem_size_mib"] == 192
    assert child.ask("t") == "T 0 1"

    without = vmms.new()
    fault = without.load(source.folder, "a").fault
    assert fault.startswith(LOAD), "a drive's file is looked for where the process stands"
    assert "No such file or directory (os error 2)" in fault
    assert without.exit_code() == 1


def test_a_child_can_be_loaded_paused(vmms: Vmms) -> None:
    source = vmms.booted()
    source.ask("d1")
    source.snapshot("Diff", "a")
    child = vmms.new()
    assert child.load(source.folder, "a", resume_vm=None).status == 204
    assert child.state == "Paused"
    child.type("t\n")
    assert child.silent(0.1)
    child.resume()
    assert child.line() == "T 1 2"


def test_mem_file_path_still_works(vmms: Vmms) -> None:
    source = vmms.booted()
    source.snapshot("Diff", "a")
    child = vmms.new()
    path = str(source.folder / mem("a"))
    assert child.load(source.folder, "a", mem_backend=None, mem_file_path=path).status == 204
    assert child.ask("t") == "T 0 1"
    both = vmms.new()
    fault = both.load(source.folder, "a", mem_file_path=path).fault
    assert fault.endswith(
        "too many fields: either `mem_backend` or `mem_file_path` exclusively is required."
    )


def test_a_configured_vmm_loads_nothing_and_lives_on(vmms: Vmms) -> None:
    source = vmms.booted()
    source.snapshot("Diff", "a")
    vm = vmms.new()
    vm.do("PUT", "/machine-config", {"vcpu_count": 1, "mem_size_mib": 128})
    assert vm.load(source.folder, "a").fault == (
        "Load snapshot error: Loading a microVM snapshot not allowed after configuring "
        "boot-specific resources."
    )
    assert vm.state == "Not started"
    vm.boot(vmms.kernel)


# --- loads that end the process ------------------------------------------------------------------


def ended(vm: Vm, reply: Reply) -> str:
    """The fault of a load after which the process ended, saying so."""
    assert vm.exit_code() == 1
    assert "BuildMicroVmError(Restore)" in vm.said()
    assert "Loading snapshot failed" in vm.said()
    return reply.fault


def snapshot(vmms: Vmms) -> Path:
    """The folder with a snapshot called `a`."""
    source = vmms.booted()
    source.snapshot("Diff", "a")
    return source.folder


def test_a_missing_vmstate_ends_it(vmms: Vmms) -> None:
    folder = snapshot(vmms)
    (folder / "a.vmstate").unlink()
    vm = vmms.new()
    assert ended(vm, vm.load(folder, "a")) == (
        f"{STATE}Failed to open snapshot file: No such file or directory (os error 2)"
    )


def test_a_missing_memory_file_ends_it(vmms: Vmms) -> None:
    folder = snapshot(vmms)
    (folder / mem("a")).unlink()
    vm = vmms.new()
    assert ended(vm, vm.load(folder, "a")) == (
        f"{LOAD}Failed to load guest memory: Error creating guest memory from file: Failed to load "
        "guest memory: No such file or directory (os error 2)"
    )


def test_a_short_memory_file_ends_it(vmms: Vmms) -> None:
    folder = snapshot(vmms)
    with (folder / mem("a")).open("r+b") as memory:
        memory.truncate(64 << 20)
    vm = vmms.new()
    fault = ended(vm, vm.load(folder, "a"))
    inner = (
        "Cannot create mmap region: The specified file offset and length is greater then file "
        "length"
        if vmms.version < (1, 13)
        else "Total sum of memory regions exceeds largest possible file offset"
    )
    assert fault == (
        f"{LOAD}Failed to load guest memory: Error creating guest memory from file: Failed to "
        f"restore guest memory: {inner}"
    )


@pytest.mark.parametrize("byte", [0, 8, 40, -20, -1])
def test_a_changed_vmstate_ends_it(vmms: Vmms, byte: int) -> None:
    """It has a checksum; the memory has none."""
    folder = snapshot(vmms)
    content = bytearray((folder / "a.vmstate").read_bytes())
    content[byte] ^= 1
    (folder / "a.vmstate").write_bytes(content)
    vm = vmms.new()
    fault = ended(vm, vm.load(folder, "a"))
    assert fault.startswith(f"{STATE}Failed to load snapshot state from file: ")
    if vmms.version < (1, 13):
        assert "CRC64 validation failed: " in fault


@pytest.mark.parametrize("length", [0, 3, 7])
def test_a_vmstate_that_breaks_off_ends_it(vmms: Vmms, length: int) -> None:
    folder = snapshot(vmms)
    content = (folder / "a.vmstate").read_bytes()
    (folder / "a.vmstate").write_bytes(content[:length])
    vm = vmms.new()
    fault = ended(vm, vm.load(folder, "a"))
    if vmms.version < (1, 13):
        assert fault == (
            f"{STATE}Failed to load snapshot state from file: Snapshot file is smaller than CRC "
            "length."
        )


def test_a_vmstate_of_another_version_is_refused(vmms: Vmms) -> None:
    """Made by hand, with a right checksum: a major number that nobody reads."""
    from forkpointd.vmm.simulator.vmstate import crc64

    folder = snapshot(vmms)
    content = (folder / "a.vmstate").read_bytes()
    if vmms.version >= (1, 13):
        pytest.skip("the file's layout is 1.12's")
    magic, length = struct.unpack_from("<QQ", content)
    state = content[16 + length : -8]
    changed = struct.pack("<QQ", magic, 6) + b"99.0.0" + state
    (folder / "a.vmstate").write_bytes(changed + struct.pack("<Q", crc64(changed)))
    vm = vmms.new()
    fault = ended(vm, vm.load(folder, "a"))
    assert fault == f"{STATE}Failed to load snapshot state from file: Invalid data version: 99.0.0"


def test_memory_without_the_guest_ends_a_child_at_its_first_interrupt(vmms: Vmms) -> None:
    """A load checks nothing of it: the guest runs into a triple fault.

    Nothing is asked of the API here: 1.12.1 and 1.16.1 may leave a request that meets the guest's
    end unanswered, and 1.12.1 then does not end either.
    """
    folder = snapshot(vmms)
    with (folder / mem("a")).open("r+b") as memory:
        memory.truncate(0)
        memory.truncate(128 << 20)
    vm = vmms.child(folder, "a")
    vm.type("t\n")
    code = vm.exit_code()
    assert code == 0 if vmms.version < (1, 13) else code in (0, 1)
