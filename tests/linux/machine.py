"""The nested lab: a machine in which real Firecracker boots real Linux, on any host.

QEMU emulates a processor with virtualisation (TCG, nested SVM), so no /dev/kvm is needed. In it the
outer machine runs: Debian's kernel, the server, the story (story.py). In its Firecracker the same
kernel runs as the guest under test. Slow, so for what is right and not for how long it takes.

Nothing here needs root: file systems are made in files.
"""

from __future__ import annotations

import gzip
import json
import shutil
import subprocess
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from forkpointd.vmm.fetch import FirecrackerUnavailableError, find_firecracker
from tests.linux import debian, outer, plan

HERE = Path(__file__).parent
QEMU = "qemu-system-x86_64"
PROGRAMS = {
    QEMU: "qemu-system-x86",
    "mke2fs": "e2fsprogs",
    "e2fsck": "e2fsprogs",
    "mkfs.xfs": "xfsprogs",
    "cpio": "cpio",
    "ldd": "libc-bin",
}
"""By the package of Debian that has it."""

OUTER_MODULES = ("virtio_pci", "virtio_blk", "ext4", "xfs", "kvm_amd")
INNER_MODULES = ("virtio_mmio", "virtio_blk", "ext4")

OUTER_MEMORY_MIB = 3072
ROOT_MIB = 1024
DATA_MIB = 8192
BOOK_MIB = 8
DISK_MIB = 48

STORY_SECONDS = 1200
"""Six times what it takes on two cores."""


@dataclass
class Told:
    """What the story told, and how the machine ended."""

    records: list[dict[str, Any]]
    console: str
    """Of the outer machine."""
    ended: str

    def all(self, what: str) -> list[dict[str, Any]]:
        """All records of a kind."""
        return [record for record in self.records if record["what"] == what]


def path_of(program: str) -> str | None:
    """Also where an ordinary user's PATH doesn't look."""
    places = ("/usr/local/sbin", "/usr/sbin", "/sbin")
    return shutil.which(program) or shutil.which(program, path=":".join(places))


def find_programs() -> dict[str, str]:
    """Where all PROGRAMS are. Raises debian.UnavailableError."""
    found = {program: path_of(program) for program in PROGRAMS}
    missing = list(dict.fromkeys(PROGRAMS[name] for name, path in found.items() if path is None))
    if missing:
        raise debian.UnavailableError(
            f"not installed: {', '.join(missing)} (as root: apt-get install {' '.join(missing)})"
        )
    return {program: path for program, path in found.items() if path is not None}


class Machine:
    """The lab in a folder of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.programs = find_programs()
        self.console = folder / "console.log"
        self.results = folder / "results.jsonl"
        self.qemu_log = folder / "qemu.log"
        self.logs = (self.console, self.results, self.qemu_log)

    def build(self) -> None:
        """Makes all disks and initrds. Raises debian.UnavailableError."""
        try:
            firecracker = find_firecracker()
        except FirecrackerUnavailableError as error:
            raise debian.UnavailableError(str(error)) from error
        if firecracker is None:
            raise debian.UnavailableError("there is no Firecracker here: `make firecracker`")
        kernel = debian.unpacked_kernel(self.folder / "kernel")
        busybox = debian.unpacked_busybox(self.folder / "busybox")
        self.kernel_image = kernel.image

        root = self.folder / "root"
        outer.build_root(root, busybox, Path(self.programs["e2fsck"]))
        shutil.copy2(firecracker, root / "lab/firecracker")
        images = root / "lab/images"
        images.mkdir()
        debian.extract_vmlinux(kernel.image, images / "vmlinux")
        seed = {plan.SEED_PATH: plan.seed()}
        self._initrd(images / "inner.img", "inner", busybox, kernel, INNER_MODULES, seed)
        self._book(images / "book.ext4")
        (root / "lab/writable-images").mkdir()
        (self.folder / "empty").mkdir()
        self._ext4(root / "lab/writable-images/disk.ext4", DISK_MIB, self.folder / "empty")
        self._initrd(self.folder / "early.img", "early", busybox, kernel, OUTER_MODULES, {})

        self._ext4(self.folder / "root.ext4", ROOT_MIB, root)
        data = self.folder / "data.xfs"
        _empty_file(data, DATA_MIB)
        _run(self.programs["mkfs.xfs"], "-q", data)
        shutil.rmtree(root)

    def _initrd(
        self,
        target: Path,
        init: str,
        busybox: Path,
        kernel: debian.Kernel,
        modules: Sequence[str],
        files: dict[str, bytes],
    ) -> None:
        tree = self.folder / f"{init}.tree"
        for name in ("bin", "proc", "sys", "dev"):
            (tree / name).mkdir(parents=True)
        shutil.copy2(busybox, tree / "bin/busybox")
        shutil.copyfile(HERE / "init" / init, tree / "init")
        (tree / "init").chmod(0o755)
        order = debian.copy_modules(kernel, modules, tree / "modules")
        (tree / "modules/order").write_text("".join(f"{name}\n" for name in order))
        for path, content in files.items():
            (tree / path.lstrip("/")).write_bytes(content)
        names = "".join(f"{path.relative_to(tree)}\n" for path in sorted(tree.rglob("*")))
        archive = subprocess.run(
            [self.programs["cpio"], "-o", "-H", "newc", "-R", "0:0", "--quiet"],
            cwd=tree,
            input=names.encode(),
            stdout=subprocess.PIPE,
            check=True,
        ).stdout
        target.write_bytes(gzip.compress(archive, 1))
        shutil.rmtree(tree)

    def _book(self, target: Path) -> None:
        """The read-only drive."""
        tree = self.folder / "book.tree"
        tree.mkdir()
        (tree / Path(plan.BOOK.path).name).write_bytes(plan.BOOK.apply(None, plan.seed()))
        self._ext4(target, BOOK_MIB, tree)

    def _ext4(self, target: Path, mib: int, content: Path) -> None:
        _empty_file(target, mib)
        _run(self.programs["mke2fs"], "-q", "-t", "ext4", "-E", "root_owner=0:0",
             "-d", content, target)  # fmt: skip

    def command(self) -> list[str]:
        """The machine: a processor with nested SVM, two disks, two serial lines, no network."""
        return [
            self.programs[QEMU],
            *("-nodefaults", "-no-user-config", "-no-reboot", "-display", "none"),
            *("-M", "q35,accel=tcg", "-cpu", "EPYC,+svm,check=off"),
            *("-smp", "1", "-m", str(OUTER_MEMORY_MIB)),
            *("-kernel", str(self.kernel_image), "-initrd", str(self.folder / "early.img")),
            *("-append", "console=ttyS0 quiet panic=1 mitigations=off"),
            *self._drive("root.ext4", "readonly=on"),
            *self._drive("data.xfs", "cache=unsafe"),
            *("-serial", f"file:{self.console}", "-serial", f"file:{self.results}"),
        ]

    def _drive(self, name: str, option: str) -> list[str]:
        return ["-drive", f"file={self.folder / name},if=virtio,format=raw,{option}"]

    def run(self) -> Told:
        """Runs the story to its end, or ends it after STORY_SECONDS."""
        with self.qemu_log.open("wb") as log:
            qemu = subprocess.Popen(
                self.command(), stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )
        try:
            with suppress(subprocess.TimeoutExpired):
                qemu.wait(STORY_SECONDS)
            code = qemu.poll()
        finally:
            qemu.kill()
            qemu.wait()
        ended = (
            f"still ran after {STORY_SECONDS} s"
            if code is None
            else f"ended with exit code {code}: {(self.folder / 'qemu.log').read_text()[-1000:]}"
        )
        return Told(
            records=self._records(),
            console=self.console.read_text(errors="replace") if self.console.exists() else "",
            ended=ended,
        )

    def _records(self) -> list[dict[str, Any]]:
        if not self.results.exists():
            return []
        lines = self.results.read_text(errors="replace").splitlines()
        records = []
        for line in lines:
            with suppress(ValueError):  # the last one, where the machine ended in it
                records.append(json.loads(line))
        return records


def _empty_file(path: Path, mib: int) -> None:
    with path.open("wb") as file:
        file.truncate(mib << 20)


def _run(*command: str | Path) -> None:
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
