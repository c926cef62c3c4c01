"""Which VMM is run, and by which words it says that its dirty log is whole."""

import os
from pathlib import Path

import pytest

from forkpointd.model import ForkpointError, Reason, VmmKind
from forkpointd.vmm import (
    SUPPORTED_VERSIONS,
    inspect_binary,
    memory_write_failed,
    simulator_binary,
    snapshot_version,
)

CREATE = "Create snapshot error: "
DUMP = CREATE + "Cannot write memory file: Cannot dump memory: Guest memory error: "
PAGE = CREATE + "Cannot write memory file: Volatile memory error: "
NO_SPACE = "No space left on device (os error 28)"


def script(path: Path, text: str) -> Path:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


def test_a_firecracker_is_inspected(tmp_path: Path) -> None:
    real = script(tmp_path / "firecracker-v9", 'echo "Firecracker v9.8.7"')
    link = tmp_path / "firecracker"
    link.symlink_to(real)
    binary = inspect_binary(link)
    assert (binary.kind, binary.version) == (VmmKind.FIRECRACKER, "9.8.7")
    assert binary.argv == (str(real),)
    assert (binary.path, binary.inode) == (real, os.stat(real).st_ino)
    assert len(binary.sha256) == 64
    assert not binary.supported


@pytest.mark.parametrize(
    "text",
    ["echo 'GNU bash, version 5.2'", "exit 1", "echo 'Firecracker v1.12.1'; exit 1", ""],
)
def test_a_firecracker_that_is_not_firecracker_is_refused(tmp_path: Path, text: str) -> None:
    with pytest.raises(ForkpointError, match="FORKPOINT_FIRECRACKER") as caught:
        inspect_binary(script(tmp_path / "vmm", text))
    assert caught.value.reason is Reason.NO_VMM


def test_a_binary_that_does_not_answer_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("forkpointd.vmm.fetch.VERSION_SECONDS", 0.05)
    with pytest.raises(ForkpointError, match="timed out") as caught:
        inspect_binary(script(tmp_path / "vmm", "exec sleep 1000"))
    assert caught.value.reason is Reason.NO_VMM


def test_no_file_a_folder_and_no_permission_are_refused(tmp_path: Path) -> None:
    plain = tmp_path / "plain"
    plain.write_text("#!/bin/sh\necho Firecracker v1.12.1\n")
    for path in (tmp_path / "nothing", tmp_path, plain):
        with pytest.raises(ForkpointError) as caught:
            inspect_binary(path)
        assert caught.value.reason is Reason.NO_VMM


def test_the_simulator_says_that_it_is_one() -> None:
    binary = simulator_binary()
    assert binary.kind is VmmKind.SIMULATOR
    assert "simulator" in binary.version
    assert binary.supported
    assert os.stat(binary.argv[0]).st_ino == binary.inode
    assert snapshot_version(binary) == "6.0.0"


def test_a_snapshot_version_that_is_none_is_refused(tmp_path: Path) -> None:
    binary = inspect_binary(script(tmp_path / "vmm", 'echo "Firecracker v1.12.1"'))
    with pytest.raises(ForkpointError, match="snapshot version") as caught:
        snapshot_version(binary)
    assert caught.value.reason is Reason.NO_VMM


@pytest.mark.parametrize("version", SUPPORTED_VERSIONS)
def test_only_memory_that_could_not_be_written_leaves_the_dirty_log_whole(version: str) -> None:
    assert memory_write_failed(version, DUMP + NO_SPACE)
    assert memory_write_failed(version, PAGE + NO_SPACE) == (version == "1.16.1")
    for other in (
        "",
        NO_SPACE,
        DUMP,
        CREATE + "Cannot perform sync_all on the memory backing file: " + NO_SPACE,
        CREATE + "Cannot perform flush on the memory backing file: " + NO_SPACE,
        CREATE + "Cannot perform open on the memory backing file: " + NO_SPACE,
        CREATE + "Cannot serialize the microVM state: IO Error: " + NO_SPACE,
        "Another error: " + DUMP + NO_SPACE,
    ):
        assert not memory_write_failed(version, other), other


def test_an_untried_version_never_counts_as_whole() -> None:
    for version in ("1.12.0", "1.13.0", "2.0.0", ""):
        assert not memory_write_failed(version, DUMP + NO_SPACE)
