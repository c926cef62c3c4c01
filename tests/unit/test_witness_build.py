"""How the witness guest is built, cached and refused, and how its answers are read."""

import importlib.util
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from forkpointd import witness
from forkpointd.witness import build
from forkpointd.witness.build import Compiler, WitnessBuildError


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache; the path of the folder that is to hold the guest."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "forkpoint"


@pytest.fixture
def commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The only folder on PATH, besides those of the shell's own tools."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", str(folder))
    return folder


@pytest.fixture
def no_ziglang(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)


def script(path: Path, body: str) -> None:
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)


def one_compiler() -> Compiler:
    compilers = build.available_compilers()
    if not compilers:
        pytest.skip("no C compiler here, and no ziglang")
    return compilers[-1]


def every_compiler() -> list[object]:
    found = {c.name: c for c in build.available_compilers()}
    return [
        pytest.param(
            found.get(name),
            id=name,
            marks=pytest.mark.skipif(name not in found, reason=f"{name} is not installed"),
        )
        for name in ("cc", "gcc", "ziglang")
    ]


@pytest.mark.parametrize("compiler", every_compiler())
def test_each_compiler_builds_it_without_a_warning(compiler: Compiler, tmp_path: Path) -> None:
    out = tmp_path / "witness.elf"
    build.compile_witness(compiler, out, ("-Wall", "-Wextra", "-Werror"))
    assert out.read_bytes()[:4] == b"\x7fELF"


def test_it_is_built_once(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiler = one_compiler()
    monkeypatch.setattr(build, "available_compilers", lambda: [compiler])
    first = build.cached_witness()
    assert first == cache / f"witness-{build.source_hash()}.elf"
    before = first.stat()
    monkeypatch.setattr(build, "available_compilers", list)
    assert build.cached_witness() == first
    after = first.stat()
    assert (before.st_ino, before.st_mtime_ns) == (after.st_ino, after.st_mtime_ns)
    assert [p.name for p in cache.iterdir()] == [first.name]


def test_another_source_is_another_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = build.source_hash()
    changed = tmp_path / "witness.c"
    changed.write_text(build.SOURCE.read_text() + "\n")
    monkeypatch.setattr(build, "SOURCE", changed)
    assert build.source_hash() != before
    monkeypatch.undo()
    monkeypatch.setattr(build, "FLAGS", (*build.FLAGS, "-O3"))
    assert build.source_hash() != before


def test_compilers_that_fail_are_passed_over(cache: Path, commands: Path) -> None:
    if "ziglang" not in [c.name for c in build.available_compilers()]:
        pytest.skip("ziglang is not installed")
    script(commands / "cc", "echo 'cc: unrecognised option -m64' >&2; exit 1")
    script(commands / "gcc", "exit 0")  # says it went well, and made nothing
    assert build.cached_witness().read_bytes()[:4] == b"\x7fELF"


@pytest.mark.usefixtures("no_ziglang")
def test_when_all_fail_each_is_heard_and_nothing_is_left(cache: Path, commands: Path) -> None:
    script(commands / "cc", "echo 'no such thing as -m64' >&2; exit 1")
    script(commands / "gcc", 'while [ "$1" != -o ]; do shift; done; echo text > "$2"')
    with pytest.raises(WitnessBuildError) as raised:
        build.cached_witness()
    message = str(raised.value)
    assert "cc: no such thing as -m64" in message
    assert "gcc: what it made is no 64-bit ELF file" in message
    assert "pip install ziglang" in message
    assert list(cache.iterdir()) == []


@pytest.mark.usefixtures("no_ziglang")
def test_without_a_compiler_it_says_what_to_install(cache: Path, commands: Path) -> None:
    with pytest.raises(WitnessBuildError, match=r"install gcc or clang, or `pip install ziglang`"):
        build.cached_witness()
    assert not cache.exists()


def test_an_executable_linked_without_the_script_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    empty = tmp_path / "other.ld"
    empty.write_text(
        "ENTRY(_start) SECTIONS { . = 0x7000000; .text : { *(.text*) } /DISCARD/ : { *(.note*) } }"
    )
    monkeypatch.setattr(build, "LINKER_SCRIPT", empty)
    with pytest.raises(WitnessBuildError, match=r"no x86-64 kernel linked by other\.ld"):
        build.compile_witness(one_compiler(), tmp_path / "out.elf")


def test_a_cache_that_cannot_be_written_is_named(cache: Path) -> None:
    compiler = one_compiler()
    cache.parent.mkdir()
    cache.write_text("a file where the folder should be")
    with pytest.raises(WitnessBuildError, match="cannot keep the witness guest in") as raised:
        build.cached_witness()
    assert str(cache) in str(raised.value)
    assert compiler.name  # it was not for want of one


def test_build_witness_puts_it_where_asked(cache: Path, tmp_path: Path) -> None:
    one_compiler()
    out = tmp_path / "guest.elf"
    out.write_text("what was there before")
    assert build.build_witness(out) == out
    assert out.read_bytes() == build.cached_witness().read_bytes()
    with pytest.raises(WitnessBuildError, match="cannot write the witness guest to"):
        build.build_witness(tmp_path / "missing" / "guest.elf")


def test_the_module_prints_the_path(cache: Path) -> None:
    one_compiler()
    command = [sys.executable, "-m", "forkpointd.witness"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert Path(done.stdout.strip()) == cache / f"witness-{build.source_hash()}.elf"
    shutil.rmtree(cache)
    cache.write_text("in the way")
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("witness: cannot keep")
    assert "Traceback" not in done.stderr


def test_a_relative_cache_setting_is_no_setting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one_compiler()
    monkeypatch.setenv("XDG_CACHE_HOME", "cache")  # the XDG specification: ignore it
    monkeypatch.setenv("HOME", str(tmp_path))
    assert build.cached_witness().parent == tmp_path / ".cache" / "forkpoint"


# --- what the guest says -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "answer"),
    [
        ("T 4 17", witness.Status(4, 17)),
        ("D 100 5\n", witness.Dirtied(100, 5)),
        ("P 7 64 6", witness.Stamped(7, 64, 6)),
        ("Z 7 64 6", witness.Zeroed(7, 64, 6)),
        ("V 100 1 6 3 2", witness.Verified(100, 1, 6, 3, 2)),
        ("R 12 6", witness.Read(12, 6)),
        ("F 50", witness.FreeRunning(50)),
        ("S 9 500000", witness.Stopped(9, 500000)),
        ("W", witness.Watching()),
        ("G 300000 18446744073709551615", witness.Gap(300000, 2**64 - 1)),
        ("C 1", witness.Clock(1)),
        ("H", witness.Halted()),
    ],
)
def test_answers(line: str, answer: witness.Answer) -> None:
    assert witness.parse_answer(line) == answer


@pytest.mark.parametrize(
    "line",
    [
        *("", "\n", "READY", "? 120", "? range", "! exception", "TT 1 2", "t 1 2", "H 1", "W W"),
        *("T 4", "T 4 5 6", "T 4 x", "T -1 5", "T \u0664 5"),
        *("V 1 2 3 4", "V 1 2 3 4 5 6", "V 1 2 3 4 5 6 7 8 9"),
    ],
)
def test_all_else_is_no_answer(line: str) -> None:
    with pytest.raises(witness.WitnessError, match="not an answer"):
        witness.parse_answer(line)


def test_a_page_has_one_place_in_the_file() -> None:
    memory = 128 << 20
    assert witness.page_offset_in_memory_file(0, memory) == 64 << 20
    assert witness.page_offset_in_memory_file(16383, memory) == memory - 4096
    for index, bytes_ in ((-1, memory), (16384, memory), (0, 64 << 20), (0, 0)):
        with pytest.raises(ValueError, match=f"has no page {index}"):
            witness.page_offset_in_memory_file(index, bytes_)


def test_a_stamp_is_two_little_endian_words() -> None:
    page = b"\x02" + bytes(7) + b"\x00\x01" + bytes(6) + bytes(4080)
    assert witness.Stamp.of(page) == witness.Stamp(generation=2, index=256)
    assert witness.Stamp.of(memoryview(page)) == witness.Stamp(generation=2, index=256)
