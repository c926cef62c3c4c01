"""Generates client/forkpoint/v1 from proto/forkpoint/v1: messages, gRPC stubs and their type hints.

The folder is generated whole, ignored by git, never edited, and carried by the wheel. Hints come
from mypy-protobuf: `FooStub` answers to a `grpc.Channel` and to a `grpc.aio.Channel`, each with its
own types. Other projects' messages (`google.rpc`, `google.protobuf`) are imported from their own
packages, so nothing called `google` or `proto` is ever written into this tree.

    python tools/stubs.py           write what is missing or stale
    python tools/stubs.py --check   exit 1, naming the files, when the tree is stale
"""

from __future__ import annotations

import argparse
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

PACKAGE = Path("forkpoint/v1")
STAMP = ".stamp"
INIT = '"""Generated from proto/forkpoint/v1 by tools/stubs.py: never edit, run `make stubs`."""\n'


class StubsError(Exception):
    """The stubs could not be generated; the message is for a person."""


def sources(root: Path) -> list[Path]:
    """The project's own .proto files, sorted."""
    found = sorted((root / "proto" / PACKAGE).glob("*.proto"))
    if not found:
        raise StubsError(f"no .proto file in {root / 'proto' / PACKAGE}")
    return found


def generate(root: Path, target: Path) -> None:
    """Write the package `forkpoint.v1` below the folder `target`, which exists."""
    # The plugins' scripts lie beside the interpreter, whose folder is on PATH only in an active
    # environment.
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
    plugins = []
    for name in ("protoc-gen-mypy", "protoc-gen-mypy_grpc"):
        plugin = shutil.which(name, path=path)
        if plugin is None:
            raise StubsError(f"{name} is missing: run `make env`")
        plugins.append(f"--plugin={name}={plugin}")
    command = [sys.executable, "-m", "grpc_tools.protoc", *plugins]
    command += [f"--proto_path={root / 'proto'}", f"--proto_path={root / 'third_party'}"]
    command += [f"--python_out={target}", f"--grpc_python_out={target}"]
    command += [f"--mypy_out=quiet:{target}", f"--mypy_grpc_out=quiet:{target}"]
    command += [str(source) for source in sources(root)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise StubsError(f"protoc refused the contract:\n{done.stderr.strip()}")
    package = target / PACKAGE
    for empty in [f for f in package.glob("*_pb2_grpc.py") if "\nclass " not in f.read_text()]:
        # A file of messages alone has no service: protoc writes an empty module all the same.
        empty.unlink()
        empty.with_suffix(".pyi").unlink()
    (package / "__init__.py").write_text(INIT, encoding="utf-8")


def stale(root: Path) -> list[str]:
    """Names of the files in client/forkpoint/v1 that differ from what the contract says."""
    with tempfile.TemporaryDirectory(prefix="forkpoint-stubs-") as scratch:
        generate(root, Path(scratch))
        wanted = _contents(Path(scratch) / PACKAGE)
    present = _contents(root / "client" / PACKAGE)
    return sorted(n for n in wanted.keys() | present.keys() if wanted.get(n) != present.get(n))


def write(root: Path) -> bool:
    """Bring client/forkpoint/v1 up to date; True where something was written.

    A file whose content stays the same is not touched, and each other one is replaced by a rename,
    so a process that imports meanwhile never sees half a file.
    """
    target = root / "client" / PACKAGE
    stamp = target / STAMP
    if stamp.is_file() and stamp.read_text(encoding="utf-8") == _digest(root):
        return False
    target.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".stubs-", dir=target.parent) as scratch:
        generate(root, Path(scratch))
        fresh = _contents(Path(scratch) / PACKAGE)
        present = _contents(target)
        for name in present.keys() - fresh.keys():
            (target / name).unlink()
        for name, content in fresh.items():
            if present.get(name) != content:
                os.replace(Path(scratch) / PACKAGE / name, target / name)
    stamp.write_text(_digest(root), encoding="utf-8")
    return True


def _contents(folder: Path) -> dict[str, bytes]:
    """The generated files of a folder by name; without the stamp and without subfolders."""
    if not folder.is_dir():
        return {}
    return {f.name: f.read_bytes() for f in folder.iterdir() if f.is_file() and f.name != STAMP}


def _digest(root: Path) -> str:
    """A hash of all that decides what is generated, and of what lies in the tree."""
    digest = hashlib.sha256()
    for package in ("grpcio-tools", "mypy-protobuf"):
        digest.update(f"{package} {version(package)}\n".encode())
    inputs = [*sources(root), *sorted((root / "third_party").rglob("*.proto")), Path(__file__)]
    for file in inputs:
        digest.update(file.name.encode() + b"\0" + hashlib.sha256(file.read_bytes()).digest())
    for name, content in sorted(_contents(root / "client" / PACKAGE).items()):
        digest.update(name.encode() + b"\0" + hashlib.sha256(content).digest())
    return digest.hexdigest()


def main() -> int:
    """Run as a command; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--check", action="store_true", help="only look; exit 1 when stale")
    arguments = parser.parse_args()
    root = Path(__file__).resolve().parent.parent
    try:
        if arguments.check:
            names = stale(root)
            if names:
                print(f"stale, run `make stubs`: {', '.join(names)}", file=sys.stderr)
            return 1 if names else 0
        if write(root):
            print("==> generated client/forkpoint/v1 from proto/forkpoint/v1", file=sys.stderr)
    except StubsError as error:
        print(f"make stubs: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
