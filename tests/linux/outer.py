"""The outer machine's files: the interpreter that runs the tests, the server, what both need.

They are copied from this machine into a folder that becomes a root file system, each program and
each shared library to the path it has here. So the outer machine runs exactly the locked packages
that all other tests run on, whatever Python and whatever Linux they were made for.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterable
from importlib.metadata import Distribution, distribution
from pathlib import Path

from packaging.requirements import Requirement

REPOSITORY = Path(__file__).resolve().parents[2]
PACKAGES = Path("/lab/packages")
"""In the outer machine: what is imported beside Python's own modules."""

_NOT_NEEDED = shutil.ignore_patterns(
    "test", "tests", "idlelib", "tkinter", "turtledemo", "ensurepip", "lib2to3", "pydoc_data",
    "site-packages", "dist-packages", "config-3*", "*.a", "*.whl",
)  # fmt: skip


def build_root(root: Path, busybox: Path, e2fsck: Path) -> None:
    """Fills `root` with all that the story needs but its images."""
    for folder in ("bin", "sbin", "proc", "sys", "dev", "tmp", "run", "data", "etc", "root"):
        (root / folder).mkdir(parents=True)
    (root / "etc/passwd").write_text("root:x:0:0:root:/root:/bin/sh\n")
    (root / "etc/group").write_text("root:x:0:\n")
    install_busybox(busybox, root)
    python = _copy_interpreter(root)
    packages = _inside(root, PACKAGES)
    for part in _closure("forkpoint", {"server"}):
        _copy_distribution(part, packages)
    for source in ("server/forkpointd", "client/forkpoint"):
        _copy_tree(REPOSITORY / source, packages / Path(source).name)
    (packages / "tests/linux").mkdir(parents=True)
    for name in ("plan.py", "story.py"):
        shutil.copy2(REPOSITORY / "tests/linux" / name, packages / "tests/linux")
    shutil.copy2(e2fsck, root / "lab/e2fsck")
    _copy_libraries(root, [python, root / "lab/e2fsck", *root.rglob("*.so"), *root.rglob("*.so.*")])
    _compile(root)
    shutil.copyfile(REPOSITORY / "tests/linux/init/outer", root / "lab/init")
    (root / "lab/init").chmod(0o755)
    (root / "lab/story.env").write_text(
        f"PYTHON={_interpreter()}\nexport PYTHONPATH={PACKAGES} PYTHONDONTWRITEBYTECODE=1\n"
    )


def install_busybox(busybox: Path, root: Path) -> None:
    """busybox and its names."""
    shutil.copy2(busybox, root / "bin/busybox")
    listed = subprocess.run([busybox, "--list"], capture_output=True, text=True, check=True)
    for name in listed.stdout.split():
        if name != "busybox":
            (root / "bin" / name).symlink_to("busybox")


def _inside(root: Path, path: Path | str) -> Path:
    """Where a path of the outer machine is while its root is being made."""
    return root / str(path).lstrip("/")


def _interpreter() -> Path:
    """The program itself, behind the links of virtual environments."""
    return Path(os.path.realpath(sys.executable))


def _copy_interpreter(root: Path) -> Path:
    target = _inside(root, _interpreter())
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy2(_interpreter(), target)
    # Debian's has them in /usr/lib, its own prefix; others below the prefix of the interpreter.
    for library in {sysconfig.get_path("stdlib"), sysconfig.get_path("platstdlib")}:
        _copy_tree(Path(library), _inside(root, library))
    return target


def _copy_tree(source: Path, target: Path) -> None:
    shutil.copytree(source, target, ignore=_NOT_NEEDED, symlinks=True, dirs_exist_ok=True)


def _closure(name: str, extras: set[str]) -> list[Distribution]:
    """A distribution and all that it requires, as they are installed here."""
    found: dict[str, Distribution] = {}

    def take(name: str, extras: set[str]) -> None:
        key = re.sub(r"[-_.]+", "-", name).lower()
        if key in found and not extras:
            return
        found[key] = distribution(name)
        for line in found[key].requires or []:
            wanted = Requirement(line)
            environments: list[dict[str, str]] = [{"extra": extra} for extra in extras or {""}]
            if wanted.marker is None or any(wanted.marker.evaluate(each) for each in environments):
                take(wanted.name, wanted.extras)

    take(name, extras)
    return list(found.values())


def _copy_distribution(part: Distribution, packages: Path) -> None:
    for file in part.files or []:
        # Programs are outside of the folder; links into a source tree mean nothing elsewhere.
        if ".." in file.parts or "__pycache__" in file.parts or file.suffix == ".pth":
            continue
        target = packages / file
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(str(file.locate()), target)


def _copy_libraries(root: Path, programs: Iterable[Path]) -> None:
    """The shared libraries of these, to the paths where this machine's loader finds them.

    What is not found here (a module of Python that nobody uses) is not there either.
    """
    done = subprocess.run(["ldd", *programs], capture_output=True, text=True, check=False)
    paths = re.findall(r"^\s*(?:\S+ => )?(/\S+) \(0x", done.stdout, re.MULTILINE)
    for path in sorted(set(paths)):
        target = _inside(root, path)
        if not path.startswith(str(root)) and not target.exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target)
            target.chmod(0o755)
    if Path("/etc/ld.so.cache").exists():
        shutil.copyfile("/etc/ld.so.cache", root / "etc/ld.so.cache")


def _compile(root: Path) -> None:
    """Byte code, without looking at times again: the outer machine would take minutes for it."""
    command = [sys.executable, "-m", "compileall", "-q", "-j", "0", "--invalidation-mode"]
    subprocess.run([*command, "unchecked-hash", "-s", root, "-p", "/", root], check=True)
