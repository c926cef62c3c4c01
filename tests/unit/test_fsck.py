"""`forkpointd fsck`: each kind of damage is found, and mended where that loses nothing."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import pytest

from forkpointd.fsck import Check, Report, describe
from forkpointd.images import SnapshotStore, save_extents
from forkpointd.model import (
    BranchStage,
    DirtyBase,
    DirtyBaseState,
    Layout,
    UnmergedDiff,
)
from forkpointd.registry import Registry
from tests.unit.images.making import MEMORY_BYTES, filled, manifest
from tests.unit.images.test_images_layers import layered, put_layer
from tests.unit.registry_making import branch, sandbox, snapshot


class Home:
    """A data folder with a flat snapshot `snap-a` and the layers `snap-b` and `snap-c` on it."""

    def __init__(self, root: Path, registry: Registry) -> None:
        self.root = root
        self.registry = registry
        (root / "snapshots").mkdir()
        self.store = SnapshotStore(root / "snapshots")

    async def fill(self) -> None:
        flat = replace(manifest(), parent_snapshot_id=None, drives=())
        self.store.finalise(filled(self.store.draft("br-a")), flat)
        put_layer(self.store, layered())
        put_layer(
            self.store, layered("snap-c", "br-c", parent="snap-b", parent_branch="br-b", pages={5})
        )
        for name, layout, parent in (
            ("snap-a", Layout.FLAT, None),
            ("snap-b", Layout.LAYERED, "snap-a"),
            ("snap-c", Layout.LAYERED, "snap-b"),
        ):
            row = snapshot(name, layout=layout, parent_snapshot_id=parent)
            await self.registry.insert_snapshot(row)
        await self.registry.insert_sandboxes([sandbox("src", dirty_base=DirtyBase.of("snap-c"))])

    async def look(self, *, repair: bool = False) -> Report:
        """As by a process of its own: the store has made nothing yet."""
        return await Check(self.registry, SnapshotStore(self.store.root)).run(repair=repair)

    def file(self, snapshot_id: str, name: str) -> Path:
        return self.store.root / snapshot_id / name


@pytest.fixture
async def home(tmp_path: Path) -> AsyncIterator[Home]:
    registry = await Registry.open(tmp_path / "forkpoint.db")
    made = Home(tmp_path, registry)
    await made.fill()
    yield made
    await registry.close()


def problems(report: Report) -> dict[str, str]:
    return {each.subject: each.problem for each in report.findings}


async def test_a_data_folder_that_is_right(home: Home) -> None:
    report = await home.look()
    assert report.findings == []
    assert describe(report) == ["looked at 3 snapshots, 1 sandboxes and 3 folders: 0 findings"]


async def test_what_stands_on_a_lost_layer_is_lost_too(home: Home) -> None:
    home.file("snap-b", "layer").unlink()
    report = await home.look(repair=True)
    found = problems(report)
    assert list(found) == ["snapshot snap-b", "snapshot snap-c", "sandbox src"]
    assert "layer is not there" in found["snapshot snap-b"]
    assert "it stands on snap-b" in found["snapshot snap-c"]
    assert [each.subject for each in report.left] == ["snapshot snap-b", "snapshot snap-c"]
    src = await home.registry.get_sandbox("src")
    assert src is not None
    assert src.dirty_base.state is DirtyBaseState.INVALID
    assert "snap-b" in src.dirty_base.invalid_reason
    assert list(problems(await home.look())) == ["snapshot snap-b", "snapshot snap-c"]


async def test_a_snapshot_in_another_s_place_is_found(home: Home) -> None:
    home.store.delete("snap-a")
    other = replace(manifest("snap-a", "br-x"), parent_snapshot_id=None, drives=())
    home.store.finalise(filled(home.store.draft("br-x")), other)
    found = problems(await home.look())
    assert "of branch br-a, and that is of branch br-x" in found["snapshot snap-b"]
    assert "snapshot snap-a" not in found


async def test_a_circle_is_found(home: Home) -> None:
    shutil.rmtree(home.store.root / "snap-b")
    store = SnapshotStore(home.store.root)
    put_layer(store, layered(parent="snap-c", parent_branch="br-c"))
    found = problems(await home.look())
    assert "stands on itself" in found["snapshot snap-b"]
    assert "stands on itself" in found["snapshot snap-c"]


async def test_a_flatten_that_was_broken_off_is_ended(home: Home) -> None:
    def make(path: Path) -> None:
        path.write_bytes(bytes(MEMORY_BYTES))

    home.store.flatten("snap-b", make)  # and then the power went
    home.file("snap-c", "memory.part").write_bytes(b"half")
    report = await home.look(repair=True)
    assert sorted(each.subject for each in report.findings) == [
        "snapshot snap-b",
        "snapshot snap-b",
        "snapshot snap-c",
    ]
    assert report.left == []
    assert sorted(os.listdir(home.store.root / "snap-b")) == ["manifest.json", "memory", "vmstate"]
    assert (await home.look()).findings == []
    row = await home.registry.get_snapshot("snap-b")
    assert row is not None
    assert row.layout is Layout.FLAT


async def test_folders_that_no_row_knows_are_removed_and_no_others(home: Home) -> None:
    home.store.finalise(
        filled(home.store.draft("br-o")), replace(manifest("orphan", "br-o"), drives=())
    )
    home.store.draft("br-dead")
    home.store.draft("br-1")
    (home.store.root / "notes.txt").write_text("somebody's")
    at_work = branch("br-1", stage=BranchStage.MERGING)
    await home.registry.insert_branch(at_work)
    report = await home.look(repair=True)
    assert [Path(each.subject.split()[1]).name for each in report.findings] == [
        ".draft-br-dead",
        "orphan",
    ]
    assert sorted(os.listdir(home.store.root)) == [
        ".draft-br-1",
        "notes.txt",
        "snap-a",
        "snap-b",
        "snap-c",
    ]


async def test_a_kept_diff_that_is_gone_is_found(home: Home) -> None:
    diff = UnmergedDiff(home.root / "7.m", home.root / "7.x", 4096, "br-7")
    diff.memory_path.write_bytes(bytes(MEMORY_BYTES))
    save_extents(diff.extents_path, [], MEMORY_BYTES, sync=False)
    base = replace(DirtyBase.of("snap-a"), unmerged=(diff,))
    await home.registry.put_sandbox(sandbox("src", dirty_base=base))
    assert (await home.look()).findings == []
    diff.memory_path.unlink()
    assert "the kept diff of branch br-7" in problems(await home.look())["sandbox src"]


def run(*arguments: str, data_dir: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "forkpointd", "fsck", "--data-dir", str(data_dir), *arguments]
    staging = {**os.environ, "FORKPOINT_STAGING_DIR": str(data_dir)}
    return subprocess.run(command, capture_output=True, text=True, check=False, env=staging)


async def test_the_command_says_what_it_looked_at_and_mends_on_request(home: Home) -> None:
    await home.registry.close()
    good = run(data_dir=home.root)
    assert (good.returncode, good.stdout) == (
        0,
        "looked at 3 snapshots, 1 sandboxes and 3 folders: 0 findings\n",
    )
    (home.store.root / ".trash-snap-x-0").mkdir()
    bad = run(data_dir=home.root)
    assert bad.returncode == 1
    assert "--repair: it is removed" in bad.stdout
    mended = run("--repair", "--json", data_dir=home.root)
    assert mended.returncode == 0
    assert json.loads(mended.stdout)["findings"][0]["repair"] == "it is removed"
    assert run(data_dir=home.root).returncode == 0


def test_where_no_server_worked_nothing_is_made(tmp_path: Path) -> None:
    result = run(data_dir=tmp_path / "no-such")
    assert result.returncode == 73
    assert "no server has worked there" in result.stderr
    assert not (tmp_path / "no-such").exists()
