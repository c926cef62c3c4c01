"""The contracts on imports bite: each wrong import, put into a copy of the tree, is named."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

WRONG = {
    "server/forkpointd/sandboxes/wrong.py": "import forkpointd.branching",
    "server/forkpointd/vmm/wrong.py": "import forkpointd.images",
    "server/forkpointd/registry/wrong.py": "import forkpointd.sandboxes",
    "server/forkpointd/images/wrong.py": "from google.protobuf import message",
    "server/forkpointd/branching/wrong.py": "import grpc.aio",
    "server/forkpointd/telemetry/wrong.py": "from forkpoint.v1 import branch_pb2",
    "server/forkpointd/model.py": "import forkpointd.telemetry",
    "client/forkpoint/wrong.py": "import forkpointd.model",
    "client/forkpoint/wrong_library.py": "import pydantic_settings",
}


def lint(folder: Path) -> subprocess.CompletedProcess[str]:
    """Run the linter with the packages of `folder` instead of the installed ones."""
    return subprocess.run(
        [Path(sys.executable).parent / "lint-imports", "--no-cache", "--no-logo"],
        cwd=folder,
        env={"PYTHONPATH": f"{folder}/server:{folder}/client"},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    for base in ("server", "client"):
        shutil.copytree(ROOT / base, tmp_path / base, ignore=shutil.ignore_patterns("__pycache__"))
    return tmp_path


def test_the_tree_keeps_every_contract_and_each_wrong_import_breaks_one(copy: Path) -> None:
    assert lint(copy).returncode == 0, lint(copy).stdout
    for name, line in WRONG.items():
        with (copy / name).open("a") as file:
            file.write(f"\n{line}\n")
    done = lint(copy)
    assert done.returncode == 1
    named = {
        part.strip(" -").partition(" ")[0] for part in done.stdout.splitlines() if "->" in part
    }
    wrong = {n.partition("/")[2].removesuffix(".py").replace("/", ".") for n in WRONG}
    assert wrong <= named
