"""Builds the witness guest with whatever C compiler there is, once, into the cache.

`cc` or `gcc` where they make x86-64 ELF files, else the compiler that PyPI's `ziglang` brings. The
result is kept as `$XDG_CACHE_HOME/forkpoint/witness-<hash>.elf`; the hash is of source and flags,
so a changed guest is another file and nobody ever loads a stale or half-written one.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import shutil
import struct
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

SOURCE: Final = Path(__file__).with_name("witness.c")
LINKER_SCRIPT: Final = Path(__file__).with_name("witness.ld")
COMPILE_TIMEOUT_S: Final = 120.0

# No SSE, since nothing saves or enables it; no red zone, since interrupts use the stack; nothing
# that a C library or a position-independent loader would have to bring.
FLAGS: Final = (
    *("-O2", "-g0", "-ffreestanding", "-nostdlib", "-fno-pic", "-fno-pie"),
    *("-mno-red-zone", "-mno-sse", "-mno-sse2", "-mno-mmx"),
    *("-fno-stack-protector", "-fno-asynchronous-unwind-tables", "-fcf-protection=none"),
    "-Wl,--build-id=none",
)
# Without -fno-sanitize=all its checks call handlers that a freestanding program does not have.
ZIG_FLAGS: Final = ("-target", "x86_64-freestanding-none", "-fno-sanitize=all")
CC_FLAGS: Final = ("-m64", "-no-pie")


class WitnessBuildError(Exception):
    """The guest could not be built; the message has what each compiler said."""


@dataclass(frozen=True, slots=True)
class Compiler:
    """A command that compiles and links C, with the flags that only it needs."""

    name: str
    command: tuple[str, ...]
    flags: tuple[str, ...]


def available_compilers() -> list[Compiler]:
    """The compilers of this machine, in the order in which they are tried."""
    found = [
        Compiler(name, (path,), CC_FLAGS) for name in ("cc", "gcc") if (path := shutil.which(name))
    ]
    if importlib.util.find_spec("ziglang") is not None:
        found.append(Compiler("ziglang", (sys.executable, "-m", "ziglang", "cc"), ZIG_FLAGS))
    return found


def compile_witness(compiler: Compiler, out: Path, extra: Sequence[str] = ()) -> None:
    """Compiles the guest to `out` by this compiler. Raises WitnessBuildError with its words."""
    out.unlink(missing_ok=True)
    command = [*compiler.command, *compiler.flags, *FLAGS, *extra]
    command += [f"-Wl,-T,{LINKER_SCRIPT}", "-o", str(out), str(SOURCE)]
    # ziglang keeps its caches under the home folder, which a service may not have.
    with tempfile.TemporaryDirectory(prefix="witness-build-") as scratch:
        environment = {
            **os.environ,
            "ZIG_GLOBAL_CACHE_DIR": scratch,
            "ZIG_LOCAL_CACHE_DIR": scratch,
        }
        try:
            done = subprocess.run(
                command,
                capture_output=True,
                text=True,
                errors="replace",
                timeout=COMPILE_TIMEOUT_S,
                env=environment,
                stdin=subprocess.DEVNULL,
                check=False,
            )
        except (OSError, subprocess.TimeoutExpired) as error:
            raise WitnessBuildError(f"{compiler.name}: {error}") from error
    if done.returncode != 0:
        said = "\n".join(done.stderr.strip().splitlines()[-10:]) or f"exit {done.returncode}"
        raise WitnessBuildError(f"{compiler.name}: {said}")
    _check_elf(out, compiler.name)


def _check_elf(path: Path, made_by: str) -> None:
    """A linker that ignores the script makes a file that Firecracker would refuse much later."""
    try:
        head = path.read_bytes()[:64]
    except FileNotFoundError as error:
        raise WitnessBuildError(f"{made_by}: it made no file, and said nothing") from error
    if len(head) < 64 or head[:6] != b"\x7fELF\x02\x01":
        raise WitnessBuildError(f"{made_by}: what it made is no 64-bit ELF file")
    kind, machine, _, entry = struct.unpack_from("<HHIQ", head, 16)
    executable, x86_64 = 2, 62
    if (kind, machine) != (executable, x86_64) or not 2 << 20 <= entry < 3 << 20:
        raise WitnessBuildError(
            f"{made_by}: what it made is no x86-64 kernel linked by {LINKER_SCRIPT.name} "
            f"(type {kind}, machine {machine}, entry {entry:#x})"
        )


def source_hash() -> str:
    """Names this guest: a hash of its source, its linker script and the flags."""
    digest = hashlib.sha256(SOURCE.read_bytes() + b"\0" + LINKER_SCRIPT.read_bytes())
    digest.update(repr((FLAGS, ZIG_FLAGS, CC_FLAGS)).encode())
    return digest.hexdigest()[:16]


def cached_witness() -> Path:
    """Path of the built guest in the cache; builds it first where it is missing.

    Raises WitnessBuildError where there is no able compiler or no writable cache.
    """
    base = os.environ.get("XDG_CACHE_HOME", "")
    cache = (Path(base) if os.path.isabs(base) else Path.home() / ".cache") / "forkpoint"
    target = cache / f"witness-{source_hash()}.elf"
    if target.is_file():
        return target
    compilers = available_compilers()
    if not compilers:
        raise WitnessBuildError(
            "the witness guest needs a C compiler: install gcc or clang, or `pip install ziglang`"
        )
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache, prefix=".witness-") as scratch:
            built = Path(scratch) / "witness.elf"
            _compile_by_first_able(compilers, built)
            built.chmod(0o644)
            built.replace(target)
    except OSError as error:
        raise WitnessBuildError(f"cannot keep the witness guest in {cache}: {error}") from error
    return target


def _compile_by_first_able(compilers: Sequence[Compiler], out: Path) -> None:
    failures = []
    for compiler in compilers:
        try:
            compile_witness(compiler, out)
        except WitnessBuildError as error:
            failures.append(str(error))
        else:
            return
    raise WitnessBuildError(
        "no compiler here can build the witness guest "
        "(`pip install ziglang` brings one that can):\n" + "\n".join(failures)
    )


def build_witness(out: Path) -> Path:
    """Puts the guest at `out`, whole or not at all, and returns `out`.

    Raises WitnessBuildError as `cached_witness` does, or where `out` can't be written.
    """
    cached = cached_witness()
    try:
        with tempfile.TemporaryDirectory(dir=out.parent, prefix=".witness-") as scratch:
            copy = Path(scratch) / "witness.elf"
            shutil.copyfile(cached, copy)
            copy.replace(out)
    except OSError as error:
        raise WitnessBuildError(f"cannot write the witness guest to {out}: {error}") from error
    return out
