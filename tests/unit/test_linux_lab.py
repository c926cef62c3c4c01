"""The parts of the lab of `make test-linux` that can be wrong without a machine being booted."""

from __future__ import annotations

import gzip
import hashlib
import lzma
import os
import struct
import subprocess
from pathlib import Path

import pytest

from tests.linux import debian, machine, plan
from tests.linux.debian import Kernel, UnavailableError

ELF = b"\x7fELF" + bytes(range(256)) * 8
PACKAGE = b"a package"


def all_writes() -> list[plan.Write]:
    writes: list[plan.Write] = [plan.BOOK, *plan.AFTERWARDS]
    for chapter in plan.CHAPTERS:
        writes += chapter.writes
        for number in plan.CHILDREN:
            writes += plan.child_writes(chapter.snapshot, number)
    return writes


@pytest.mark.parametrize("write", [plan.Whole("f", 11), plan.Pages("f", 40, 30, 300)], ids=repr)
def test_a_command_of_the_plan_does_to_a_file_what_is_expected_of_it(
    tmp_path: Path, write: plan.Write
) -> None:
    before = plan.Whole("f", 5).apply(None, plan.seed())
    (tmp_path / "f").write_bytes(before)
    (tmp_path / "seed").write_bytes(plan.seed())
    command = write.shell().replace(plan.SEED_PATH, str(tmp_path / "seed"))
    subprocess.run(["sh", "-c", command], cwd=tmp_path, check=True)
    assert (tmp_path / "f").read_bytes() == write.apply(before, plan.seed())


def test_no_two_writes_of_the_plan_leave_the_same_bytes() -> None:
    before, seed = bytes(len(plan.seed())), plan.seed()
    left = [hashlib.sha256(write.apply(before, seed)).digest() for write in all_writes()]
    assert len(set(left)) == len(left)


def test_no_page_of_the_plan_is_there_twice() -> None:
    seed = plan.seed()
    pages = []
    for write in all_writes():
        if isinstance(write, plan.Whole):
            content = write.apply(None, seed)
            pages += [content[at : at + 4096] for at in range(0, len(seed), 4096)]
    assert len(set(pages)) == len(pages)


def boot_image(folder: Path, payload: bytes) -> Path:
    """A bzImage with one sector of set-up and nothing else before its payload."""
    head = bytearray(2 * 512)
    head[0x1F1] = 1
    struct.pack_into("<II", head, 0x248, 0, len(payload))
    image = folder / "vmlinuz"
    image.write_bytes(bytes(head) + payload + b"what follows the payload")
    return image


def test_the_kernel_comes_out_of_its_boot_image(tmp_path: Path) -> None:
    payload = lzma.compress(ELF) + struct.pack("<I", len(ELF))
    debian.extract_vmlinux(boot_image(tmp_path, payload), tmp_path / "vmlinux")
    assert (tmp_path / "vmlinux").read_bytes() == ELF


@pytest.mark.parametrize(
    ("payload", "words"),
    [
        (gzip.compress(ELF), "packed in a way that is not known"),
        (lzma.compress(b"no kernel"), "no ELF file"),
    ],
)
def test_what_is_no_kernel_is_refused(tmp_path: Path, payload: bytes, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        debian.extract_vmlinux(boot_image(tmp_path, payload), tmp_path / "vmlinux")
    assert not (tmp_path / "vmlinux").exists()


def module(folder: Path, name: str, *depends: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    info = f"\0license=GPL\0depends={','.join(depends)}\0name={name}\0"
    (folder / f"{name}.ko").write_bytes(b"\x7fELF" + info.encode())


def test_modules_are_loaded_after_those_that_they_need(tmp_path: Path) -> None:
    tree = tmp_path / "modules"
    module(tree / "a", "virtio-blk", "virtio_ring", "virtio")
    module(tree / "b", "virtio_ring", "virtio")
    module(tree / "b", "virtio", "built_in")
    (tree / "modules.builtin").write_text("kernel/fs/built-in.ko\n")
    kernel = Kernel("6.1", tmp_path / "vmlinuz", tree)
    order = debian.copy_modules(kernel, ["virtio_blk", "built_in"], tmp_path / "out")
    assert order == ["virtio.ko", "virtio_ring.ko", "virtio_blk.ko"]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == sorted(order)


class Apt:
    """Programs that stand for apt: they know one package, and say what they were asked for."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.bin = folder / "bin"
        self.bin.mkdir()
        self.asked = folder / "asked"
        self.digest = hashlib.sha256(PACKAGE).hexdigest()
        self.serves(PACKAGE)
        self.knows(f"Package: busybox-static\nSHA256: {self.digest}")
        self.program("dpkg-deb", 'mkdir -p "$3/bin"; cp "$2" "$3/bin/busybox"')
        monkeypatch.setenv("PATH", f"{self.bin}:{os.environ['PATH']}")
        monkeypatch.setenv("XDG_CACHE_HOME", str(folder / "cache"))

    def program(self, name: str, body: str) -> None:
        (self.bin / name).write_text(f"#!/bin/sh\n{body}\n")
        (self.bin / name).chmod(0o755)

    def knows(self, record: str) -> None:
        self.program("apt-cache", f"cat <<'end'\n{record}\nend")

    def serves(self, package: bytes) -> None:
        self.program(
            "apt-get", f"echo got >>{self.asked}; printf %s '{package.decode()}' >it_1_amd64.deb"
        )

    @property
    def downloads(self) -> int:
        return len(self.asked.read_text().splitlines()) if self.asked.exists() else 0


@pytest.fixture
def apt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Apt:
    return Apt(tmp_path, monkeypatch)


def test_a_package_is_downloaded_once(tmp_path: Path, apt: Apt) -> None:
    for name in ("once", "twice"):
        assert debian.unpacked_busybox(tmp_path / name).read_bytes() == PACKAGE
    assert apt.downloads == 1


def test_a_package_that_was_damaged_in_the_cache_is_downloaded_again(
    tmp_path: Path, apt: Apt
) -> None:
    debian.unpacked_busybox(tmp_path / "once")
    (debian.cache_folder() / f"{apt.digest}.deb").write_bytes(b"damaged")
    assert debian.unpacked_busybox(tmp_path / "twice").read_bytes() == PACKAGE
    assert apt.downloads == 2


def test_a_package_that_is_not_what_apt_s_lists_say_is_refused(tmp_path: Path, apt: Apt) -> None:
    apt.serves(b"another")
    with pytest.raises(UnavailableError, match=f"apt's lists say {apt.digest}"):
        debian.unpacked_busybox(tmp_path / "here")
    assert list(debian.cache_folder().iterdir()) == []


def test_a_download_that_fails_says_why_and_what_to_do(tmp_path: Path, apt: Apt) -> None:
    apt.program("apt-get", "echo 'E: 404 Not Found' >&2; exit 100")
    with pytest.raises(UnavailableError, match=r"E: 404 Not Found; `apt-get update`"):
        debian.unpacked_busybox(tmp_path / "here")


def test_a_package_that_apt_does_not_know_is_missing_with_what_to_do(
    tmp_path: Path, apt: Apt
) -> None:
    apt.knows("")
    with pytest.raises(UnavailableError, match=r"no package busybox-static here; `apt-get update`"):
        debian.unpacked_busybox(tmp_path / "here")


def test_programs_that_are_missing_are_named_with_their_packages(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(machine, "path_of", lambda program: None)
    with pytest.raises(UnavailableError, match="apt-get install qemu-system-x86 e2fsprogs"):
        machine.find_programs()
