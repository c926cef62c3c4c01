"""`forkpoint demo`, as a newcomer runs it: it proves what it claims and leaves nothing behind."""

import asyncio
import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from forkpointd.model import VmmKind
from forkpointd.vmm import Binary

WAIT_SECONDS = 120.0
SHARED_MEMORY = Path("/dev/shm")


class Demo:
    """One run of the demo, in a temporary folder of its own."""

    def __init__(self, folder: Path, binary: Binary, *arguments: str) -> None:
        self.folder = folder
        self._arguments = arguments
        real = binary.kind is VmmKind.FIRECRACKER
        self._vmm = "firecracker" if real else "simulator"
        self._environment = os.environ | {"TMPDIR": str(folder)}
        if real:
            self._environment["FORKPOINT_FIRECRACKER"] = str(binary.path)
        self.said = ""

    async def __aenter__(self) -> "Demo":
        self.process = await asyncio.create_subprocess_exec(
            sys.executable, "-c", "from forkpoint.cli import main; main()",
            "demo", "--memory", "256", "--vmm", self._vmm, *self._arguments,
            stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
            env=self._environment,
        )  # fmt: skip
        return self

    async def __aexit__(self, *_: object) -> None:
        if self.process.returncode is None:
            self.process.terminate()
            await self.process.communicate()

    async def says(self, wanted: Callable[[str], bool]) -> None:
        """Waits until its output is so."""
        assert self.process.stdout is not None
        async with asyncio.timeout(WAIT_SECONDS):
            while not wanted(self.said):
                piece = await self.process.stdout.read(4096)
                assert piece, f"it ended and said only:\n{self.said}"
                self.said += piece.decode()

    async def ends(self) -> int:
        """Waits for its end; its exit code."""
        async with asyncio.timeout(WAIT_SECONDS):
            out, err = await self.process.communicate()
        self.said += out.decode()
        self.errors = err.decode()
        assert self.process.returncode is not None
        return self.process.returncode


def leftovers(folder: Path, name: str | None) -> list[str]:
    """What a run left: files, processes that work in its folder, and its folder in memory."""
    found = [str(path) for path in folder.iterdir()]
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                cwd = os.readlink(entry / "cwd")
            except OSError:
                continue  # it has ended
            if cwd.startswith(str(folder)):
                found.append(f"process {entry.name} in {cwd}")
    if name is not None and (SHARED_MEMORY / name).exists():
        found.append(str(SHARED_MEMORY / name))
    return found


@pytest.mark.slow
async def test_the_demo_passes_twice_in_a_row(binary: Binary, tmp_path: Path) -> None:
    for _ in range(2):
        async with Demo(tmp_path, binary, "--json", "-n", "4") as demo:
            assert await demo.ends() == 0, demo.errors
        outcome = json.loads(demo.said)
        assert outcome["held"] is True
        assert len(outcome["claims"]) == 5
        assert [row["mode"] for row in outcome["branches"]] == ["FULL"] + ["DIFF"] * 4
        assert outcome["vmm"]["kind"] == binary.kind.value
        assert outcome["children"] == 4
        for row in outcome["branches"]:
            assert row["pause"]["total_seconds"] > 0
            assert row["guest_gap_seconds"] is not None
            assert row["pause"]["dirty_bytes"] >= row["written_bytes"]
        assert "not Linux" in outcome["guest"]
        assert leftovers(tmp_path, None) == []


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
async def test_the_demo_is_interrupted_in_its_middle(
    binary: Binary, tmp_path: Path, number: signal.Signals
) -> None:
    async with Demo(tmp_path, binary) as demo:
        await demo.says(lambda said: "branch 2 of 5" in said)
        (name,) = os.listdir(tmp_path)
        assert (SHARED_MEMORY / name).is_dir()
        demo.process.send_signal(number)
        assert await demo.ends() == 128 + number
    assert "nothing is left behind" in demo.errors
    assert leftovers(tmp_path, name) == []


@pytest.mark.slow
async def test_the_demo_says_what_it_ran_on_and_what_to_type_next(
    binary: Binary, tmp_path: Path
) -> None:
    async with Demo(tmp_path, binary, "-n", "2") as demo:
        await demo.says(lambda said: said.startswith("forkpoint demo"))
        assert await demo.ends() == 0, demo.errors
    real = binary.kind is VmmKind.FIRECRACKER
    assert ("on /dev/kvm, unmodified" if real else "the SIMULATOR") in demo.said
    assert "not Linux" in demo.said
    assert demo.said.count("\nDIFF ") == 4
    assert "All 5 claims held" in demo.said
    assert "forkpoint sandbox create agent-7" in demo.said


async def test_the_demo_says_when_the_machine_is_too_small(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from forkpoint.demo.machine import TooSmall, memory_mib

    meminfo = tmp_path / "meminfo"
    for available_mib, wanted in ((100_000, 4096), (8_000, 2048), (800, 256)):
        meminfo.write_text(f"MemAvailable:   {available_mib * 1024} kB\n")
        assert memory_mib(tmp_path, meminfo) == wanted
    meminfo.write_text("MemAvailable:   100000 kB\n")
    with pytest.raises(TooSmall, match="needs 768 MiB"):
        memory_mib(tmp_path, meminfo)
