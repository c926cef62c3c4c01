"""The store: a snapshot is seen whole and durable, or not at all, whatever fails when."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from forkpointd.images import ImageError, SnapshotStore, data_bytes_of
from forkpointd.images.fs import Fs
from tests.unit.images.making import MEMORY_BYTES, filled, manifest, stored

SNAPSHOT = replace(manifest(), drives=())
STEPS = (
    "mkdir",
    "write_new",
    "chmod",
    "fsync_file",
    "fsync_folder",
    "rename",
    "unlink",
    "rmdir",
)


class FsOnPaper(Fs):
    """Writes down each step; fails some of them before they do anything."""

    def __init__(self) -> None:
        self.steps: list[str] = []
        self.fail: Callable[[int, str], bool] = lambda number, step: False

    def start(self, fail: Callable[[int, str], bool] = lambda number, step: False) -> None:
        self.steps.clear()
        self.fail = fail

    def __getattribute__(self, name: str) -> Any:
        real = super().__getattribute__(name)
        if name not in STEPS:
            return real

        def step(path: Path, *rest: Any) -> Any:
            self.steps.append(
                " ".join([name, path.name, *(a.name for a in rest if isinstance(a, Path))])
            )
            if self.fail(len(self.steps), self.steps[-1]):
                raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))
            return real(path, *rest)

        return step


@pytest.fixture
def root(tmp_path: Path) -> Path:
    folder = tmp_path / "snapshots"
    folder.mkdir()
    return folder


@pytest.fixture
def fs() -> FsOnPaper:
    return FsOnPaper()


@pytest.fixture
def store(root: Path, fs: FsOnPaper) -> SnapshotStore:
    return SnapshotStore(root, fs=fs)


def visible(root: Path) -> list[str]:
    return sorted(name for name in os.listdir(root) if not name.startswith("."))


def mode_of(path: Path) -> int:
    return path.stat().st_mode & 0o777


# --- making ------------------------------------------------------------------------------------


def test_a_draft_is_private_empty_and_out_of_sight(root: Path, store: SnapshotStore) -> None:
    draft = store.draft("br-a")
    assert draft.folder == root / ".draft-br-a"
    assert mode_of(draft.folder) == 0o700
    assert os.listdir(draft.folder) == []
    assert visible(root) == []
    with pytest.raises(ImageError, match="has a draft already"):
        store.draft("br-a")


def test_files_then_folder_then_name_then_parent_are_made_durable(
    root: Path, store: SnapshotStore, fs: FsOnPaper
) -> None:
    draft = filled(store.draft("br-a"))
    fs.start()
    assert store.finalise(draft, SNAPSHOT) == root / "snap-a"
    assert fs.steps == [
        "unlink manifest.json",
        "write_new manifest.json",
        "chmod memory",
        "fsync_file memory",
        "chmod vmstate",
        "fsync_file vmstate",
        "chmod manifest.json",
        "fsync_file manifest.json",
        "fsync_folder .draft-br-a",
        "rename .draft-br-a snap-a",
        "fsync_folder snapshots",
    ]


def test_a_finished_snapshot_is_whole_read_only_and_can_be_opened(
    root: Path, store: SnapshotStore
) -> None:
    folder = stored(store)
    assert visible(root) == ["snap-a"]
    assert os.listdir(root) == ["snap-a"]
    opened = store.open("snap-a")
    assert opened.manifest == SNAPSHOT
    assert opened.memory_path.stat().st_size == MEMORY_BYTES
    assert opened.vmstate_path.read_bytes() == b"state"
    assert mode_of(folder) == 0o700
    for path in folder.iterdir():
        assert mode_of(path) == 0o400
    assert 4096 <= store.used_bytes("snap-a") == data_bytes_of(folder) < MEMORY_BYTES


def test_a_failure_at_any_step_leaves_no_snapshot_and_the_draft_can_be_finished_or_discarded(
    root: Path, store: SnapshotStore, fs: FsOnPaper
) -> None:
    for step in range(1, 12):
        draft = filled(store.draft("br-a"))
        fs.start(lambda number, _, step=step: number == step)  # type: ignore[misc]
        with pytest.raises(OSError, match="Input/output error"):
            store.finalise(draft, SNAPSHOT)
        assert len(fs.steps) in (step, step + 1)
        assert os.listdir(root) == [".draft-br-a"]
        with pytest.raises(ImageError):
            store.open("snap-a")
        fs.start()
        if step % 2:
            store.finalise(draft, SNAPSHOT)
            assert store.open("snap-a").manifest == SNAPSHOT
            assert store.delete("snap-a")
        else:
            store.discard(draft)
            store.discard(draft)
        assert os.listdir(root) == []
    fs.start()
    stored(store)
    assert len(fs.steps) == 1 + 11, "every step was tried"


def test_what_is_not_a_whole_snapshot_is_not_finished(root: Path, store: SnapshotStore) -> None:
    draft = store.draft("br-a")
    with pytest.raises(FileNotFoundError):
        store.finalise(draft, SNAPSHOT)
    filled(draft)
    with pytest.raises(ImageError, match=f"{MEMORY_BYTES} bytes, not 8192"):
        store.finalise(draft, replace(SNAPSHOT, memory_bytes=8192))
    draft.vmstate_path.write_bytes(b"")
    with pytest.raises(ImageError, match="is empty"):
        store.finalise(draft, SNAPSHOT)
    draft.vmstate_path.unlink()
    draft.vmstate_path.symlink_to("/etc/hostname")
    with pytest.raises(ImageError, match="not a regular file"):
        store.finalise(draft, SNAPSHOT)
    assert visible(root) == []


def test_a_snapshots_id_is_taken_once(root: Path, store: SnapshotStore) -> None:
    stored(store)
    other = filled(store.draft("br-b"), b"other")
    with pytest.raises(ImageError, match="there already"):
        store.finalise(other, replace(SNAPSHOT, branch_id="br-b"))
    assert store.open("snap-a").memory_path.read_bytes().startswith(b"memory")


@pytest.mark.parametrize(
    "wrong",
    ["", ".", "..", "../x", "a/b", "A", "1a", "-a", "a" * 64, "a\n", "a\0", ".draft-a", "ä"],
)
def test_an_id_is_never_a_path(root: Path, store: SnapshotStore, wrong: str) -> None:
    calls: list[Callable[[], object]] = [
        lambda: store.draft(wrong),
        lambda: store.open(wrong),
        lambda: store.delete(wrong),
        lambda: store.used_bytes(wrong),
        lambda: store.reopen_draft(wrong, "snap-a"),
        lambda: store.finalise(filled(store.draft("br-a")), replace(SNAPSHOT, snapshot_id=wrong)),
    ]
    for call in calls:
        with pytest.raises(ImageError, match="is no id"):
            call()


# --- using -------------------------------------------------------------------------------------


def spoil_size(folder: Path) -> None:
    (folder / "memory").chmod(0o600)
    os.truncate(folder / "memory", MEMORY_BYTES - 4096)


def spoil_vmstate(folder: Path) -> None:
    (folder / "vmstate").chmod(0o600)
    (folder / "vmstate").write_bytes(b"states")


def spoil_link(folder: Path) -> None:
    (folder / "memory").unlink()
    (folder / "memory").symlink_to("vmstate")


def spoil_id(folder: Path) -> None:
    (folder / "manifest.json").chmod(0o600)
    (folder / "manifest.json").write_text(replace(SNAPSHOT, snapshot_id="snap-b").to_json())


def spoil_manifest(folder: Path) -> None:
    (folder / "manifest.json").chmod(0o600)
    os.truncate(folder / "manifest.json", 100)


def spoil_with_much(folder: Path) -> None:
    (folder / "manifest.json").chmod(0o600)
    os.truncate(folder / "manifest.json", 1 << 40)


@pytest.mark.parametrize(
    ("spoil", "told"),
    [
        (spoil_size, "memory has"),
        (spoil_vmstate, "vmstate has 6 bytes, not 5"),
        (spoil_link, "not a regular file"),
        (spoil_id, "holds snapshot snap-b"),
        (spoil_manifest, "not JSON"),
        (spoil_with_much, "no manifest"),
        (lambda folder: (folder / "memory").unlink(), "memory is not there"),
        (lambda folder: (folder / "vmstate").unlink(), "vmstate is not there"),
        (lambda folder: (folder / "manifest.json").unlink(), "manifest.json is not there"),
        (shutil.rmtree, "is not there"),
    ],
)
def test_a_snapshot_whose_files_lie_is_not_opened(
    store: SnapshotStore, spoil: Callable[[Path], None], told: str
) -> None:
    spoil(stored(store))
    with pytest.raises(ImageError, match=told):
        store.open("snap-a")


def test_a_file_in_a_snapshots_place_is_not_opened(root: Path, store: SnapshotStore) -> None:
    (root / "snap-a").touch()
    with pytest.raises(ImageError, match="not a folder"):
        store.open("snap-a")


# --- removing ----------------------------------------------------------------------------------


def test_a_deleted_snapshot_is_out_of_sight_before_anything_is_unlinked(
    root: Path, store: SnapshotStore, fs: FsOnPaper
) -> None:
    stored(store)
    fs.start()
    assert store.delete("snap-a")
    assert fs.steps[0] == "rename snap-a .trash-snap-a-0"
    assert sorted(fs.steps[1:4]) == ["unlink manifest.json", "unlink memory", "unlink vmstate"]
    assert fs.steps[4:] == ["rmdir .trash-snap-a-0", "fsync_folder snapshots"]
    assert os.listdir(root) == []
    assert not store.delete("snap-a")


def test_a_delete_that_fails_in_the_middle_is_swept_later(
    root: Path, store: SnapshotStore, fs: FsOnPaper
) -> None:
    for step in range(1, 7):
        stored(store)
        fs.start(lambda number, _, step=step: number == step)  # type: ignore[misc]
        with pytest.raises(OSError, match="Input/output error"):
            store.delete("snap-a")
        fs.start()
        assert visible(root) == (["snap-a"] if step == 1 else [])
        if step == 1:
            store.delete("snap-a")
    assert os.listdir(root), "trash was left"
    assert SnapshotStore(root).sweep(()) >= 4
    assert os.listdir(root) == []


def test_an_id_deleted_twice_has_two_kinds_of_trash(
    root: Path, store: SnapshotStore, fs: FsOnPaper
) -> None:
    for _ in range(3):
        stored(store)
        fs.start(lambda _, step: step.startswith("unlink"))
        with pytest.raises(OSError, match="Input/output error"):
            store.delete("snap-a")
        fs.start()
    assert sorted(os.listdir(root)) == [f".trash-snap-a-{number}" for number in range(3)]


def test_a_crash_leaves_what_a_sweep_removes_and_nothing_else(root: Path) -> None:
    former = SnapshotStore(root)
    for name in ("known", "unknown"):
        stored(former, f"snap-{name}", f"br-{name}")
    filled(former.draft("br-lost"))
    (root / ".trash-snap-x-0").mkdir()
    (root / ".trash-snap-x-0" / "memory").touch()
    (root / "lost+found").mkdir()
    (root / "README").touch()

    store = SnapshotStore(root)
    at_work = store.draft("br-new")
    left = store.leftovers({"snap-known"})
    assert [path.name for path in left] == [
        ".draft-br-lost",
        ".trash-snap-x-0",
        "snap-unknown",
    ]
    assert store.sweep({"snap-known"}) == 3
    assert sorted(os.listdir(root)) == [".draft-br-new", "README", "lost+found", "snap-known"]
    assert store.open("snap-known").manifest.branch_id == "br-known"
    assert at_work.folder.is_dir()


def test_a_sweep_leaves_a_snapshot_that_was_finished_a_moment_ago(
    root: Path, store: SnapshotStore
) -> None:
    stored(store)
    assert store.sweep(known_ids=()) == 0
    assert visible(root) == ["snap-a"]
    assert SnapshotStore(root).sweep(known_ids=()) == 1


def test_drafts_nobody_goes_on_with_are_removed(root: Path) -> None:
    former = SnapshotStore(root)
    for branch_id in ("br-a", "br-b", "br-c"):
        filled(former.draft(branch_id))
    store = SnapshotStore(root)
    assert store.remove_drafts(keep=frozenset({"br-b"})) == 2
    assert os.listdir(root) == [".draft-br-b"]


# --- after a restart ---------------------------------------------------------------------------


def test_a_draft_is_gone_on_with_after_a_crash_before_any_step(
    root: Path, store: SnapshotStore, fs: FsOnPaper
) -> None:
    for step in range(1, 12):
        draft = filled(store.draft("br-a"))
        fs.start(lambda number, _, step=step: number >= step)  # type: ignore[misc]
        with pytest.raises(OSError, match="Input/output error"):
            store.finalise(draft, SNAPSHOT)
        fs.start()

        restarted = SnapshotStore(root)
        again = restarted.reopen_draft("br-a", "snap-a")
        assert again is not None
        assert visible(root) == []
        assert not again.manifest_path.exists()
        with again.memory_path.open("r+b") as file:  # the merge is done once more
            file.write(b"merged")
        assert mode_of(again.memory_path) == 0o600
        restarted.finalise(again, SNAPSHOT)
        assert restarted.open("snap-a").memory_path.read_bytes().startswith(b"merged")
        restarted.delete("snap-a")


def test_a_snapshot_that_never_became_ready_is_a_draft_again(root: Path) -> None:
    stored(SnapshotStore(root))
    store = SnapshotStore(root)
    draft = store.reopen_draft("br-a", "snap-a")
    assert draft is not None
    assert os.listdir(root) == [".draft-br-a"]
    store.finalise(draft, SNAPSHOT)
    assert visible(root) == ["snap-a"]


def test_another_branchs_snapshot_is_never_made_a_draft(root: Path) -> None:
    stored(SnapshotStore(root), "snap-a", "br-other")
    store = SnapshotStore(root)
    assert store.reopen_draft("br-a", "snap-a") is None
    assert store.reopen_draft("br-a", "snap-none") is None
    assert visible(root) == ["snap-a"]
