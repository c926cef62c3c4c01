"""The locks say what pyproject.toml promises, and the commands are quick when nothing changed."""

import os
import re
import subprocess
import tomllib
from importlib.metadata import version
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LOCKS = ("dev", "build", "client")
GRPC_FAMILY = {
    "grpcio",
    "grpcio-channelz",
    "grpcio-health-checking",
    "grpcio-reflection",
    "grpcio-status",
    "grpcio-tools",
}


def locked(name: str) -> dict[str, set[str]]:
    """Each package's versions; more than one where they differ by Python."""
    versions: dict[str, set[str]] = {}
    for line in (ROOT / f"requirements/{name}.txt").read_text().splitlines():
        if match := re.match(r"([a-z0-9.-]+)==(\S+)", line):
            versions.setdefault(match[1], set()).add(match[2])
    return versions


@pytest.mark.parametrize("name", LOCKS)
def test_a_lock_has_a_hash_for_each_package_and_names_no_host(name: str) -> None:
    text = (ROOT / f"requirements/{name}.txt").read_text()
    entries = re.findall(r"^[a-z0-9.-]+==[^\n]*(?:\n +--hash=[^\n]*)*", text, re.MULTILINE)
    assert len(entries) >= 10
    assert [entry for entry in entries if "--hash=sha256:" not in entry] == []
    assert not re.search(r"https?:|--index|--find-links|--trusted", text)


def test_all_of_grpc_is_one_version_in_the_lock_and_in_the_environment() -> None:
    packages = locked("dev")
    assert set().union(*(packages[name] for name in GRPC_FAMILY)) == {"1.85.0"}
    assert {version(name) for name in GRPC_FAMILY} == {"1.85.0"}


@pytest.mark.parametrize("name", ["build", "client"])
def test_no_package_has_another_version_in_a_smaller_lock(name: str) -> None:
    everything = locked("dev")
    assert {k: v for k, v in locked(name).items() if not v <= everything.get(k, v)} == {}


def test_the_client_s_lock_has_no_library_of_the_server() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"][
        "optional-dependencies"
    ]
    # typer itself may bring pydantic.
    server = {re.split(r"[<>=~]", line)[0] for line in extras["server"]} - {"pydantic"}
    assert server.isdisjoint(locked("client"))


def test_the_build_system_s_versions_are_those_of_the_build_s_lock() -> None:
    pyproject = tomllib.loads((ROOT / "pyproject.toml").read_text())
    group = set(pyproject["dependency-groups"]["build"])
    assert set(pyproject["build-system"]["requires"]) <= group


def make(*targets: str) -> str:
    """What make prints, run as from a shell and not as a part of `make test`."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("MAKE")}
    command = ["make", "--no-print-directory", *targets]
    return subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True
    ).stdout


def test_make_env_and_make_stubs_have_nothing_to_do_the_second_time() -> None:
    make("env", "stubs")
    assert make("env", "stubs") == ""


@pytest.mark.parametrize("broken", ["#!/bin/sh\nexit 1\n", None])
def test_without_a_new_enough_python_make_env_says_what_to_install(
    tmp_path: Path, broken: str | None
) -> None:
    (tmp_path / "tools").mkdir()
    (tmp_path / "tools/env").write_bytes((ROOT / "tools/env").read_bytes())
    python = tmp_path / "python"
    if broken is not None:
        python.write_text(broken)
        python.chmod(0o755)
    done = subprocess.run(
        ["bash", str(tmp_path / "tools/env"), "--python"],
        env={"PATH": "/usr/bin:/bin", "PYTHON": str(python)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert "needs Python 3.11 or newer" in done.stderr
    assert "apt install python3 python3-venv" in done.stderr


def test_make_help_names_every_target() -> None:
    makefile = (ROOT / "Makefile").read_text()
    phony = set(re.findall(r"^\.PHONY: (.*)$", makefile, re.MULTILINE)[0].split())
    listed = {line.split()[1] for line in make("help").splitlines()}
    assert listed == phony - {"firecracker-if-kvm"}
