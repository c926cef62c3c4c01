"""Sandboxes' folders: what the next sandbox gets has nothing of the one before."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from forkpointd.images.syscalls import filesystem_of
from forkpointd.model import Drive
from forkpointd.sandboxes import folders as folders_module
from forkpointd.sandboxes.datadir import open_data_dir, spread
from forkpointd.sandboxes.folders import Folders
from forkpointd.vmm import CONSOLE_INPUT_NAME, CONSOLE_OUTPUT_NAME, EMPTIED_NAMES


@pytest.fixture
def folders(tmp_path: Path) -> Folders:
    return Folders(open_data_dir(tmp_path / "data", tmp_path))


def lived_in(folders: Folders, sandbox_id: str, image: Path) -> Path:
    """A folder as a VMM leaves it."""
    folders.make(sandbox_id, (Drive("rootfs", image),))
    folder = folders.of(sandbox_id)
    for name in EMPTIED_NAMES:
        (folder / name).write_text("secret")
    os.mkfifo(folder / CONSOLE_INPUT_NAME)
    (folder / CONSOLE_OUTPUT_NAME).write_text("secret")
    (folder / "api.sock").touch()
    return folder


def test_a_spare_has_empty_logs_links_and_nothing_else(folders: Folders, tmp_path: Path) -> None:
    folder = lived_in(folders, "one", tmp_path / "image")
    inode = folder.stat().st_ino
    folders.remove("one")
    assert not folder.exists()
    folders.make("two", ())
    spare = folders.of("two")
    assert spare.stat().st_ino == inode
    assert {path.name for path in spare.iterdir()} == {"t", "d", *EMPTIED_NAMES}
    assert all((spare / name).read_bytes() == b"" for name in EMPTIED_NAMES)
    assert spare.stat().st_mode & 0o777 == 0o700


def test_there_are_not_more_spares_than_are_worth_keeping(
    folders: Folders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(folders_module, "MAX_SPARES", 2)
    for name in ("a", "b", "c"):
        lived_in(folders, name, tmp_path / "image")
    for name in ("a", "b", "c", "c"):
        folders.remove(name)
    spares = tmp_path / "data" / "spare"
    assert len(list(spares.iterdir())) == 2
    assert list(folders.root.iterdir()) == []
    folders.forget_spares()
    assert not spares.exists()


def test_leftovers_of_a_former_try_are_gone(folders: Folders, tmp_path: Path) -> None:
    lived_in(folders, "one", tmp_path / "image")
    folders.make("one", ())
    assert {path.name for path in folders.of("one").iterdir()} == {"t", "d"}


def test_new_folders_are_spread_over_the_disk_where_the_file_system_can(tmp_path: Path) -> None:
    sandboxes = open_data_dir(tmp_path / "data", tmp_path).sandboxes
    if not spread(sandboxes):
        assert filesystem_of(sandboxes) != "ext4"
        pytest.skip(f"{filesystem_of(sandboxes)} knows no such wish, and says so quietly")
    if shutil.which("lsattr") is None:
        pytest.skip("there is no lsattr here to look at the folder's flags")
    listed = subprocess.run(["lsattr", "-d", sandboxes], capture_output=True, text=True, check=True)
    assert "T" in listed.stdout.split()[0]
