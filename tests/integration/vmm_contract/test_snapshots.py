"""Creating snapshots: which pages are in them, in which files, and what a failure leaves behind."""

import os
import shutil
from pathlib import Path

import pytest

from forkpointd.witness import Stamp, page_offset_in_memory_file
from tests.integration.vmm_contract.conftest import Vmms
from tests.integration.vmm_contract.vm import PAGE, Vm, data_pages, lay_over, mem, region

MIB = 1 << 20
MEMORY_MIB = 128
OWN_PAGES = 64
"""How many pages besides those it was told to write a guest may dirty: stack and variables."""


def stamp(memory: Path, page: int, memory_mib: int = MEMORY_MIB) -> Stamp:
    with memory.open("rb") as opened:
        opened.seek(page_offset_in_memory_file(page, memory_mib * MIB))
        return Stamp.of(opened.read(16))


def whole(vm: Vm) -> bytes:
    """All of a paused machine's memory."""
    reply = vm.create("Full", "whole")
    assert reply.status == 204, reply
    return (vm.folder / mem("whole")).read_bytes()


def test_the_first_diff_of_a_booted_machine_is_all_of_its_memory(vmms: Vmms) -> None:
    """Over an empty sparse file: what is not in it was never touched."""
    vm = vmms.booted()
    vm.ask("d3")
    vm.pause()
    assert vm.create("Diff", "a").status == 204
    diff = vm.folder / mem("a")
    assert diff.stat().st_size == MEMORY_MIB * MIB
    assert region(0, 3 * 256) <= data_pages(diff)
    assert len(data_pages(diff)) < 3 * 256 + 1024, "and little else"
    assert diff.read_bytes() == whole(vm)


def test_a_diff_has_the_pages_written_since_the_last_snapshot_and_no_others(vmms: Vmms) -> None:
    vm = vmms.booted()
    vm.ask("d10")
    for kind in ("Full", "Diff"):
        vm.snapshot(kind, f"base-{kind}")
        vm.ask("p7,1")
        vm.ask("p1000,3")
        vm.ask("p5000,1")
        diff = vm.snapshot("Diff", f"after-{kind}")
        told = region(7, 1) | region(1000, 3) | region(5000, 1)
        assert told <= data_pages(diff)
        assert data_pages(diff) & region(0, 16384) == told, "exact by page"
        assert len(data_pages(diff) - told) <= OWN_PAGES


def test_an_idle_machine_has_next_to_nothing_in_its_diff(vmms: Vmms) -> None:
    vm = vmms.booted()
    vm.snapshot("Diff", "a")
    idle = vm.snapshot("Diff", "b")
    assert len(data_pages(idle)) <= OWN_PAGES


def test_a_page_of_zeros_is_data_not_a_hole(vmms: Vmms) -> None:
    vm = vmms.booted()
    vm.ask("d1")
    vm.snapshot("Diff", "a")
    assert vm.ask("z3,2") == "Z 3 2 1"
    diff = vm.snapshot("Diff", "b")
    assert data_pages(diff) & region(0, 256) == region(3, 2)
    assert diff.read_bytes()[(16384 + 3) * PAGE :][: 2 * PAGE] == bytes(2 * PAGE)


def test_diffs_laid_over_each_other_are_the_memory(vmms: Vmms) -> None:
    vm = vmms.booted()
    base = vm.folder / "base"
    vm.ask("d20")
    shutil.copyfile(vm.snapshot("Diff", "d0"), base)
    for n, commands in enumerate((["p0,100", "z50,9"], ["d5"], ["p4000,700", "d2"]), start=1):
        for command in commands:
            vm.ask(command)
        vm.pause()
        assert vm.create("Diff", f"d{n}").status == 204
        lay_over(base, vm.folder / mem(f"d{n}"))
        assert base.read_bytes() == whole(vm)
        vm.resume()


def test_a_writer_that_never_stops_is_caught_at_one_moment(vmms: Vmms) -> None:
    """Round-robin: in a consistent image a generation changes at one place at most."""
    vm = vmms.booted()
    base = vm.folder / "base"
    shutil.copyfile(vm.snapshot("Diff", "d0"), base)
    assert vm.ask("f32") == "F 32"
    newest = 0
    for n in range(1, 6):
        diff = vm.snapshot("Diff", f"d{n}")
        lay_over(base, diff)
        stamps = [stamp(base, page) for page in range(32 * 256)]
        misplaced = [n for n, s in enumerate(stamps) if s.generation and s.index != n]
        generations = [s.generation for s in stamps]
        changes = [i for i in range(1, len(stamps)) if generations[i] != generations[i - 1]]
        assert len(changes) <= 1
        assert len(misplaced) <= 1, "a page's generation is written first, its index then"
        assert generations[0] - generations[-1] in (0, 1)
        newest = generations[0]
    vm.type("x")
    assert int(vm.line().split()[1]) >= newest, "and it went on"


def test_a_memory_file_of_the_right_size_is_written_in_place(vmms: Vmms) -> None:
    vm = vmms.booted()
    vm.snapshot("Diff", "a")
    vm.ask("p5,1")
    file = vm.folder / mem("b")
    file.write_bytes(b"\xaa" * (MEMORY_MIB * MIB))
    inode = file.stat().st_ino
    vm.snapshot("Diff", "b")
    assert file.stat().st_ino == inode
    assert stamp(file, 5) == Stamp(1, 5)
    with file.open("rb") as opened:
        opened.seek((16384 + 6) * PAGE)
        assert opened.read(PAGE) == b"\xaa" * PAGE


@pytest.mark.parametrize("size", [0, PAGE, MEMORY_MIB * MIB - 1, MEMORY_MIB * MIB + PAGE])
def test_a_memory_file_of_another_size_is_emptied_first(vmms: Vmms, size: int) -> None:
    vm = vmms.booted()
    vm.snapshot("Diff", "a")
    vm.ask("p5,1")
    file = vm.folder / mem("b")
    file.write_bytes(b"\xaa" * size)
    vm.snapshot("Diff", "b")
    assert file.stat().st_size == MEMORY_MIB * MIB
    assert data_pages(file) & region(0, 16384) == region(5, 1)


def test_full_is_the_default_and_writes_every_byte(vmms: Vmms) -> None:
    vm = vmms.booted()
    vm.pause()
    body = {"snapshot_path": "a.vmstate", "mem_file_path": mem("a")}
    vm.do("PUT", "/snapshot/create", body)
    assert (vm.folder / mem("a")).stat().st_blocks * 512 >= MEMORY_MIB * MIB


def test_a_snapshot_needs_a_paused_machine(vmms: Vmms) -> None:
    vm = vmms.booted()
    for kind in ("Diff", "Full"):
        assert vm.create(kind, "a").fault == (
            "Create snapshot error: Cannot save the microVM state: Operation not allowed: "
            "save/restore unavailable while running"
        )
    assert not (vm.folder / "a.vmstate").exists()


def test_a_diff_needs_tracking(vmms: Vmms) -> None:
    """Newer ones allow it and write all resident pages: of no use as a diff, but complete."""
    vm = vmms.booted(tracked=False)
    vm.ask("d1")
    vm.pause()
    reply = vm.create("Diff", "a")
    if vmms.version < (1, 13):
        assert reply.fault == (
            "The requested operation is not supported: Diff snapshots are not allowed on uVMs "
            "with dirty page tracking disabled."
        )
        assert not (vm.folder / "a.vmstate").exists()
    else:
        assert reply.status == 204
        assert (vm.folder / mem("a")).read_bytes() == whole(vm)
    assert vm.create("Full", "b").status == 204


OPEN = "Create snapshot error: Cannot perform open on the "
MISSING = "No such file or directory (os error 2)"
A_FOLDER = "Is a directory (os error 21)"


@pytest.mark.parametrize(
    ("vmstate", "memory", "told", "vmstate_written"),
    [
        ("no/a.vmstate", "a.memory", f"{OPEN}snapshot backing file: {MISSING}", False),
        ("", "a.memory", f"{OPEN}snapshot backing file: {MISSING}", False),
        ("/tmp", "a.memory", f"{OPEN}snapshot backing file: {A_FOLDER}", False),
        ("a.vmstate", "no/a.memory", f"{OPEN}memory backing file: {MISSING}", True),
        ("a.vmstate", "/tmp", f"{OPEN}memory backing file: {A_FOLDER}", True),
    ],
)
def test_paths_that_cannot_be_opened(
    vmms: Vmms, vmstate: str, memory: str, told: str, vmstate_written: bool
) -> None:
    """vmstate comes first, and stays; no dirty page is lost by it."""
    vm = vmms.booted()
    vm.snapshot("Diff", "base")
    vm.ask("p9,1")
    vm.pause()
    body = {"snapshot_type": "Diff", "snapshot_path": vmstate, "mem_file_path": memory}
    assert vm.api("PUT", "/snapshot/create", body).fault == told
    assert (vm.folder / "a.vmstate").exists() is vmstate_written
    assert not (vm.folder / "a.memory").exists()
    assert vm.state == "Paused"
    assert vm.create("Diff", "after").status == 204
    assert region(9, 1) <= data_pages(vm.folder / mem("after"))


def no_room(vmms: Vmms) -> str:
    """How a Diff that finds no room is told; a Full's words are 1.12's in every version."""
    inner = "Cannot dump memory: Guest memory" if vmms.version < (1, 13) else "Volatile memory"
    text = f"{inner} error: No space left on device (os error 28)"
    return f"Create snapshot error: Cannot write memory file: {text}"


@pytest.mark.parametrize("kind", ["Diff", "Full"])
def test_no_room_for_the_memory_keeps_every_dirty_page(
    vmms: Vmms, small_tmpfs: Path, kind: str
) -> None:
    vm = vmms.booted()
    vm.snapshot("Diff", "base")
    vm.ask("d10")
    vm.ask("p9000,50")
    vm.pause()
    fault = vm.create(kind, "a", memory=str(small_tmpfs / "memory")).fault
    if kind == "Diff":
        assert fault == no_room(vmms)
    else:
        assert fault.startswith("Create snapshot error: Cannot write memory file: ")
        assert fault.endswith("No space left on device (os error 28)")
    assert data_pages(small_tmpfs / "memory"), "some was written"
    assert vm.state == "Paused"
    assert vm.create("Diff", "after").status == 204
    assert region(0, 10 * 256) | region(9000, 50) <= data_pages(vm.folder / mem("after"))


def test_no_room_for_vmstate(vmms: Vmms, small_tmpfs: Path) -> None:
    vm = vmms.booted()
    vm.snapshot("Diff", "base")
    vm.ask("p9,1")
    vm.pause()
    with (small_tmpfs / "fill").open("wb", buffering=0) as fill:
        while os.write(fill.fileno(), b"x" * MIB) == MIB:
            if os.statvfs(small_tmpfs).f_bfree == 0:
                break
    body = {"snapshot_type": "Diff", "snapshot_path": str(small_tmpfs / "vmstate")}
    fault = vm.api("PUT", "/snapshot/create", body | {"mem_file_path": mem("a")}).fault
    assert fault.startswith("Create snapshot error: Cannot serialize the microVM state: ")
    assert "No space left on device" in fault
    assert not (vm.folder / mem("a")).exists(), "the memory was not begun"
    assert vm.create("Diff", "after").status == 204
    assert region(9, 1) <= data_pages(vm.folder / mem("after"))


def test_two_regions_lie_back_to_back_in_the_file(vmms: Vmms) -> None:
    """4 GiB: from 3 or 3.25 GiB on the guest's memory goes on at 4 GiB, the file's does not."""
    vm = vmms.booted(4096)
    pages = (4096 - 64) * 256
    written = [0, (3072 - 64) * 256 - 1, (3072 - 64) * 256, (3328 - 64) * 256 - 1]
    written += [(3328 - 64) * 256, pages - 1]
    for page in written:
        vm.ask(f"p{page},1")
    assert vm.ask(f"p{pages},1") == "? range"
    diff = vm.snapshot("Diff", "a")
    assert diff.stat().st_size == 4096 * MIB
    assert data_pages(diff) >= set().union(*(region(page, 1) for page in written))
    for generation, page in enumerate(written, start=1):
        assert stamp(diff, page, 4096) == Stamp(generation, page)
