"""The wheel, as a stranger gets it: built from the archive, installed into an empty environment."""

import os
import subprocess
import sys
import zipfile
from collections.abc import Sequence
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CLIENT_LOCK = ROOT / "requirements/client.txt"

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


def run(command: Sequence[str | Path], cwd: Path) -> str:
    """Standard output of a command that must succeed, free of this environment's settings."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "MAKE"))}
    done = subprocess.run(
        command, cwd=cwd, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, f"{command}: {done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dist")
    run([ROOT / "tools/dist", folder], ROOT)
    (built,) = folder.glob("forkpoint-*-py3-none-any.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bin folder of an environment with the wheel and the client's locked packages alone.

    The packages are kept as wheels in build/, so that a second run needs no network.
    """
    kept = ROOT / "build/client-wheels"
    lock_of_kept = kept / "client.txt"
    if not lock_of_kept.is_file() or lock_of_kept.read_bytes() != CLIENT_LOCK.read_bytes():
        download = [sys.executable, "-m", "pip", "download", "--quiet", "--require-hashes"]
        download += ["--only-binary=:all:", "--no-deps", f"--dest={kept}", "-r", str(CLIENT_LOCK)]
        run(download, ROOT)
        lock_of_kept.write_bytes(CLIENT_LOCK.read_bytes())
    folder = tmp_path_factory.mktemp("empty")
    run([sys.executable, "-m", "venv", folder / "venv"], folder)
    install: list[str | Path] = [folder / "venv/bin/python", "-m", "pip", "install", "--quiet"]
    install += ["--no-index"]
    run([*install, "--no-deps", "--find-links", kept, "-r", CLIENT_LOCK], folder)
    # With its dependencies checked: what the wheel asks for has to be what the lock brought.
    run([*install, wheel], folder)
    return folder / "venv/bin"


def test_the_wheel_has_every_file_of_both_packages_and_nothing_else(wheel: Path) -> None:
    wanted = {
        str(file.relative_to(ROOT / base))
        for base in ("server", "client")
        for file in (ROOT / base).rglob("*")
        if file.is_file() and "__pycache__" not in file.parts and file.name != ".stamp"
    }
    with zipfile.ZipFile(wheel) as opened:
        present = {name for name in opened.namelist() if ".dist-info/" not in name}
    assert present == wanted
    assert "forkpoint/v1/sandbox_service_pb2_grpc.pyi" in present
    assert {name.rpartition("/")[2] for name in present} >= {"witness.c", "witness.ld", "py.typed"}


def test_the_command_line_works_without_the_server_s_libraries(installed: Path) -> None:
    assert "snapshot" in run([installed / "forkpoint", "--help"], installed)


def test_the_client_is_imported_without_the_server_s_libraries(installed: Path) -> None:
    script = """
import importlib.util, pkgutil
import forkpoint, forkpoint.v1
for module in pkgutil.iter_modules(forkpoint.v1.__path__, "forkpoint.v1."):
    importlib.import_module(module.name)
assert callable(forkpoint.connect)
names = ("asyncinotify", "grpc_health", "grpc_reflection", "pydantic_settings")
print([name for name in names if importlib.util.find_spec(name)])
"""
    assert run([installed / "python", "-c", script], installed) == "[]\n"


def test_the_installed_packages_fit_together(installed: Path) -> None:
    assert run([installed / "python", "-m", "pip", "check"], installed).startswith("No broken")
