"""Snapshot folders on disk: made out of sight, seen whole or not at all, gone at once.

    ROOT/<snapshot_id>/memory         as large as the guest's memory, holes are zeros
                      /layer          in its place where the snapshot is LAYERED: as large, and its
                                      manifest says what it holds
                      /vmstate
                      /drive-<drive_id> a writable drive as it was in the window
                      /manifest.json
                      /checksums      of the files above, some time after they were made
    ROOT/.draft-<branch_id>/          a snapshot that is being made
    ROOT/.copy-<snapshot_id>/         one that is being brought here from memory
    ROOT/.trash-<snapshot_id>-<n>/    one that is being removed

A folder under its own name is complete and durable: the files are synced, then their folder, then
it is renamed, then ROOT is synced (step 9). No id begins with a dot, so the four never meet.
Whether a complete folder *is* a snapshot is said by the registry alone; `sweep` removes the others
after a crash. Folders are private to this user, files of a finished snapshot read-only.

There may be a second root, on tmpfs, for snapshots of which no more is asked than that they survive
this process; all is the same there, and syncing costs nothing. `write_back` brings one to the disk.
From then on the disk's folder is the one that is used, and the other goes when nobody reads it.

Synchronous; safe to use from several threads.
"""

from __future__ import annotations

import dataclasses
import os
import stat
import threading
from collections.abc import Callable, Collection, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from forkpointd.images.errors import ImageError
from forkpointd.images.fs import Fs
from forkpointd.images.layers import Layer
from forkpointd.images.manifest import MAX_MANIFEST_BYTES, LayerWitness, Manifest
from forkpointd.images.staging import allocated_bytes
from forkpointd.model import ID_PATTERN, MIB, Durability, Layout

MEMORY_NAME = "memory"
LAYER_NAME = "layer"
VMSTATE_NAME = "vmstate"
MANIFEST_NAME = "manifest.json"
CHECKSUMS_NAME = "checksums"

MAX_CHECKSUMS_BYTES = 64 * MIB
"""More are no checksums of ours: a terabyte of memory has 45 MiB."""

DRIVE_PREFIX = "drive-"

_PART = ".part"
"""Ends the name of a file that will take another's place."""

_DRAFT = ".draft-"
_COPY = ".copy-"
_TRASH = ".trash-"


@dataclass(frozen=True, slots=True)
class Draft:
    """The folder of a snapshot that is being made."""

    branch_id: str
    folder: Path

    @property
    def memory_path(self) -> Path:
        """Where the memory goes, if it is whole."""
        return self.folder / MEMORY_NAME

    @property
    def layer_path(self) -> Path:
        """Where the pages of a layer go."""
        return self.folder / LAYER_NAME

    @property
    def vmstate_path(self) -> Path:
        """Where the vmstate goes."""
        return self.folder / VMSTATE_NAME

    def drive_path(self, drive_id: str) -> Path:
        """Where the clone of a writable drive goes."""
        return self.folder / (DRIVE_PREFIX + drive_id)

    @property
    def manifest_path(self) -> Path:
        """Where `finalise` writes the manifest."""
        return self.folder / MANIFEST_NAME


@dataclass(frozen=True, slots=True)
class StoredSnapshot:
    """The files of a finished snapshot, whose sizes were checked."""

    folder: Path
    manifest: Manifest

    @property
    def memory_path(self) -> Path:
        """The memory, never to be written to: children map it. Of a layer: its pages only."""
        return self.folder / (MEMORY_NAME if self.manifest.layer is None else LAYER_NAME)

    @property
    def vmstate_path(self) -> Path:
        """The state of CPUs and devices."""
        return self.folder / VMSTATE_NAME

    def drive_path(self, drive_id: str) -> Path:
        """A writable drive, of which each child gets a clone."""
        return self.folder / (DRIVE_PREFIX + drive_id)


@dataclass(frozen=True, slots=True)
class Chain:
    """What a snapshot's memory is made of."""

    image: StoredSnapshot
    """FLAT."""
    layers: tuple[StoredSnapshot, ...]
    """On top of it, oldest first; the last is the snapshot itself, if it is one."""

    @property
    def depth(self) -> int:
        """How many layers it has."""
        return len(self.layers)

    def parts(self) -> tuple[Layer, ...]:
        """The layers as `copy_chain` takes them."""
        return tuple(
            Layer(stored.memory_path, stored.manifest.layer.extents)
            for stored in self.layers
            if stored.manifest.layer is not None
        )


class SnapshotStore:
    """The snapshots' folders, on the disk and in memory."""

    def __init__(
        self, root: Path, *, memory_root: Path | None = None, fs: Fs | None = None
    ) -> None:
        """Both roots must exist. `fs` is for tests that let its calls fail."""
        self.root = root
        self.memory_root = memory_root
        self._roots = (root,) if memory_root is None else (root, memory_root)
        self._fs = fs or Fs()
        self._lock = threading.Lock()
        self._at_work: set[Path] = set()
        """Folders that this process makes: `sweep` leaves them alone."""

    # --- making ---

    def draft(self, branch_id: str, durability: Durability = Durability.DISK) -> Draft:
        """A new, empty, private folder. Raises ImageError if there is one, OSError (ENOSPC)."""
        draft = self._draft_in(self._root_for(durability), branch_id)
        try:
            self._fs.mkdir(draft.folder)
        except FileExistsError as error:
            raise ImageError(f"branch {branch_id} has a draft already: {draft.folder}") from error
        self._begin(draft.folder)
        return draft

    def reopen_draft(self, branch_id: str, snapshot_id: str) -> Draft | None:
        """The draft that a former server left, writable, without its manifest; None if there is
        none. A folder that was renamed to its `snapshot_id` already, but never became READY, is
        renamed back if it is this branch's. Raises OSError.
        """
        drafts = [self._draft_in(root, branch_id) for root in self._roots]
        found = [draft for draft in drafts if draft.folder.is_dir()]
        if found:
            draft = found[0]
        else:
            finished = self._folder_of(snapshot_id)
            if not self._is_made_by(finished, branch_id):
                return None
            draft = self._draft_in(finished.parent, branch_id)
            self._fs.rename(finished, draft.folder)
            self._fs.fsync_folder(finished.parent)
        self._begin(draft.folder)
        self._fs.unlink(draft.manifest_path)
        for path in (draft.memory_path, draft.layer_path, draft.vmstate_path):
            if path.exists():
                self._fs.chmod(path, 0o600)
        return draft

    def discard(self, draft: Draft) -> None:
        """Removes a draft and what is in it. Idempotent. Raises OSError."""
        self._remove_folder(draft.folder)
        self._end(draft.folder)

    def finalise(self, draft: Draft, manifest: Manifest) -> Path:
        """Makes a draft with its memory and vmstate a snapshot, durably; returns its folder.

        The manifest gets the vmstate's size. If this fails (ImageError, OSError with the path)
        there is no snapshot of that id, and the draft is there, to be discarded or tried again.
        """
        taken = self._folder_of(manifest.snapshot_id)
        if os.path.lexists(taken):
            raise ImageError(f"snapshot {manifest.snapshot_id} is there already: {taken}")
        folder = draft.folder.with_name(manifest.snapshot_id)
        memory_path = draft.memory_path if manifest.layer is None else draft.layer_path
        memory_bytes = _size_of(memory_path)
        if memory_bytes != manifest.memory_bytes:
            raise ImageError(f"{memory_path} has {memory_bytes} bytes, not {manifest.memory_bytes}")
        manifest = dataclasses.replace(manifest, vmstate_bytes=_size_of(draft.vmstate_path))
        if not manifest.vmstate_bytes:
            raise ImageError(f"{draft.vmstate_path} is empty")
        fs = self._fs
        fs.unlink(draft.manifest_path)
        fs.write_new(draft.manifest_path, manifest.to_json().encode())
        drives = [draft.drive_path(drive.drive_id) for drive in manifest.writable_drives]
        for path in (memory_path, draft.vmstate_path, *drives, draft.manifest_path):
            self._seal(path)
        fs.fsync_folder(draft.folder)
        self._begin(folder)
        fs.rename(draft.folder, folder)
        try:
            fs.fsync_folder(folder.parent)
        except OSError:
            fs.rename(folder, draft.folder)
            raise
        self._end(draft.folder)
        return folder

    # --- from memory to the disk ---

    def write_back(
        self, snapshot_id: str, copy: Callable[[StoredSnapshot, Path, Path], object]
    ) -> StoredSnapshot:
        """Brings a snapshot that is in memory to the disk, durably: `copy(snapshot, file, target)`
        makes a new file of one of its files. Until that is done it is the one in memory; from then
        on it is the one on the disk, and that in memory stays for those who read it:
        `remove_from_memory` when nobody does. One that is on the disk is left so.

        Not to be called twice at once for one snapshot. Raises ImageError, OSError, and what `copy`
        raises; then nothing of it is on the disk.
        """
        stored = self.open(snapshot_id)
        if stored.folder.parent == self.root:
            self._fs.fsync_folder(self.root)  # whoever renamed it may have been ended before
            return stored
        folder, part = self.root / snapshot_id, self.root / (_COPY + snapshot_id)
        self._begin(part)
        self._begin(folder)
        try:
            self._remove_folder(part)
            self._fs.mkdir(part)
            for name in sorted(os.listdir(stored.folder)):
                copy(stored, stored.folder / name, part / name)
                self._seal(part / name)
            self._fs.fsync_folder(part)
            self._fs.rename(part, folder)
            try:
                self._fs.fsync_folder(self.root)
            except OSError:
                self._fs.rename(folder, part)
                raise
        except BaseException:
            self._remove_folder(part)
            raise
        finally:
            self._end(part)
            self._end(folder)
        return StoredSnapshot(folder, stored.manifest)

    def sync(self) -> None:
        """Makes the names of what was written back durable. Raises OSError."""
        self._fs.fsync_folder(self.root)

    def is_in_memory(self, snapshot_id: str) -> bool:
        """Whether its files are in memory only. Of one that isn't there: no."""
        folder = self._folder_of(snapshot_id)
        return folder.parent == self.memory_root and os.path.lexists(folder)

    def left_in_memory(self) -> tuple[str, ...]:
        """Which snapshots are on the disk and in memory still. Raises OSError."""
        if self.memory_root is None:
            return ()
        return tuple(
            name
            for name in os.listdir(self.memory_root)
            if ID_PATTERN.fullmatch(name) and os.path.lexists(self.root / name)
        )

    def memory_copy(self, snapshot_id: str) -> Path | None:
        """What children that were started before the write-back have mapped; None where there is
        no such file. Raises OSError."""
        if self.memory_root is None:
            return None
        path = self.memory_root / _checked(snapshot_id) / MEMORY_NAME
        return path if os.path.lexists(path) else None

    def remove_from_memory(self, snapshot_id: str) -> None:
        """Removes the files in memory of a snapshot that is on the disk. Idempotent; one that is
        in memory only is left alone. Raises OSError; try again then."""
        if self.memory_root is not None and os.path.lexists(self.root / _checked(snapshot_id)):
            self._delete_from(self.memory_root, snapshot_id)

    # --- using ---

    def open(self, snapshot_id: str) -> StoredSnapshot:
        """A finished snapshot. Raises ImageError if it isn't there, or its files are not what its
        manifest says; OSError if they can't be looked at."""
        folder = self._folder_of(snapshot_id)
        try:
            manifest = _read_manifest(folder / MANIFEST_NAME)
            stored = StoredSnapshot(folder, manifest)
            if manifest.snapshot_id != snapshot_id:
                raise ImageError(f"{folder} holds snapshot {manifest.snapshot_id}")
            for path, size_bytes in (
                (stored.memory_path, manifest.memory_bytes),
                (stored.vmstate_path, manifest.vmstate_bytes),
                *(
                    (stored.drive_path(drive.drive_id), drive.size_bytes)
                    for drive in manifest.writable_drives
                ),
            ):
                actual = _size_of(path)
                if actual != size_bytes:
                    raise ImageError(
                        f"{path} has {actual} bytes, not {size_bytes} as its manifest says"
                    )
        except FileNotFoundError as error:
            raise ImageError(f"{error.filename} is not there") from error
        except NotADirectoryError as error:
            raise ImageError(f"{folder} is not a folder") from error
        return stored

    def chain(self, snapshot_id: str) -> Chain:
        """A finished snapshot with all that it stands on, each of which is looked at. Raises
        ImageError where one is gone, is another than the layer was taken over, has another size of
        memory, or stands on itself; OSError."""
        layers: list[StoredSnapshot] = []
        seen = {snapshot_id}
        stored = self.open(snapshot_id)
        while (layer := stored.manifest.layer) is not None:
            layers.append(stored)
            parent_id = stored.manifest.parent_snapshot_id
            assert parent_id is not None, "a manifest of a layer names its parent"
            if parent_id in seen:
                raise ImageError(f"snapshot {parent_id} stands on itself")
            seen.add(parent_id)
            try:
                parent = self.open(parent_id)
            except ImageError as error:
                raise ImageError(
                    f"snapshot {stored.manifest.snapshot_id} stands on {parent_id}: {error}"
                ) from error
            check_parent(parent.manifest, stored.manifest, layer)
            stored = parent
        return Chain(stored, tuple(reversed(layers)))

    def check_there(self, snapshot_ids: Sequence[str]) -> None:
        """Whether the files of a chain, the newest first, are there: the newest is opened, of the
        others it is looked for a manifest and a memory of its size, for a thousand of them in
        milliseconds. `chain` looks at all that is in them. Raises ImageError for the first that
        lacks one, OSError."""
        if not snapshot_ids:
            return
        memory_bytes = self.open(snapshot_ids[0]).manifest.memory_bytes
        for snapshot_id in snapshot_ids[1:]:
            folder = self._folder_of(snapshot_id)
            if _size_if_there(folder / MANIFEST_NAME) is None:
                raise ImageError(f"{folder / MANIFEST_NAME} is not there")
            if not any(
                _size_if_there(folder / name) == memory_bytes for name in (MEMORY_NAME, LAYER_NAME)
            ):
                raise ImageError(f"{folder} has no memory of {memory_bytes} bytes")

    # --- flattening ---

    def flatten(self, snapshot_id: str, make: Callable[[Path], object]) -> StoredSnapshot:
        """Makes a LAYERED snapshot FLAT, durably: `make(path)` writes its whole memory to a new
        file. Until its new manifest is there it is the layer that it was, and that layer's file
        stays for those who read it: `remove_layer` when nobody does. A FLAT one is left so.

        Not to be called twice at once for one snapshot. Raises ImageError, OSError, and what `make`
        raises.
        """
        stored = self.open(snapshot_id)
        if stored.manifest.layer is None:
            self._fs.fsync_folder(stored.folder)  # whoever made it so may have been ended before
            return stored
        memory = stored.folder / MEMORY_NAME
        self._replace(memory, make)
        flat = dataclasses.replace(stored.manifest, layout=Layout.FLAT, layer=None)
        content = flat.to_json().encode()
        try:
            self._replace(
                stored.folder / MANIFEST_NAME, lambda path: self._fs.write_new(path, content)
            )
        except BaseException:
            # The room of a whole image; but not once the manifest says that it is needed.
            if self.open(snapshot_id).manifest.layer is not None:
                memory.unlink(missing_ok=True)
            raise
        return StoredSnapshot(stored.folder, flat)

    def remove_layer(self, snapshot_id: str) -> None:
        """Removes the pages of a layer that was flattened, once that is durable. Idempotent; one
        that is no such snapshot is left alone. Raises OSError."""
        folder = self._folder_of(snapshot_id)
        if self._is_flattened(folder):
            self._fs.fsync_folder(folder)
            self._fs.unlink(folder / LAYER_NAME)
            self._fs.fsync_folder(folder)

    def flattened_layers(self) -> tuple[str, ...]:
        """Of which FLAT snapshots a crash left the layer. Raises OSError."""
        return tuple(
            name
            for name in self._names(self.root)
            if ID_PATTERN.fullmatch(name) and self._is_flattened(self.root / name)
        )

    def _is_flattened(self, folder: Path) -> bool:
        """Whether a FLAT snapshot still has the layer that it was. What is damaged is not."""
        if not os.path.lexists(folder / LAYER_NAME):
            return False
        try:
            return _read_manifest(folder / MANIFEST_NAME).layer is None
        except (ImageError, OSError):
            return False

    def _replace(self, path: Path, make: Callable[[Path], object]) -> None:
        """Puts a new file in another's place, durably."""
        part = path.with_name(path.name + _PART)
        self._fs.unlink(part)
        try:
            make(part)
            self._seal(part)
            self._fs.rename(part, path)
        except BaseException:
            part.unlink(missing_ok=True)
            raise
        self._fs.fsync_folder(path.parent)

    def _seal(self, path: Path) -> None:
        """Nobody writes to it from now on, and what is in it is on the disk."""
        self._fs.chmod(path, 0o400)
        self._fs.fsync_file(path)

    # --- checksums ---

    def write_checksums(self, stored: StoredSnapshot, content: bytes) -> None:
        """Puts the checksums of a snapshot beside its files, durably. Raises OSError."""
        path = stored.folder / CHECKSUMS_NAME
        self._replace(path, lambda part: self._fs.write_new(part, content))

    def read_checksums(self, stored: StoredSnapshot) -> bytes:
        """Raises ImageError where there are none, or too many, OSError."""
        path = stored.folder / CHECKSUMS_NAME
        size_bytes = _size_if_there(path)
        if size_bytes is None:
            raise ImageError(f"{path} is not there")
        if size_bytes > MAX_CHECKSUMS_BYTES:
            raise ImageError(f"{path} has {size_bytes} bytes: these are no checksums")
        return path.read_bytes()

    # --- removing ---

    def delete(self, snapshot_id: str) -> bool:
        """Removes a snapshot's files; False if there were none. From the first step on it isn't
        visible; what a crash leaves is `sweep`'s. Raises OSError; try again then."""
        _checked(snapshot_id)
        removed = False
        for root in reversed(self._roots):  # in memory first: else it would be seen there again
            removed |= self._delete_from(root, snapshot_id)
        return removed

    def _delete_from(self, root: Path, snapshot_id: str) -> bool:
        folder = root / snapshot_id
        with self._lock:
            trash = self._free_trash_name(root, snapshot_id)
            try:
                self._fs.rename(folder, trash)
            except FileNotFoundError:
                return False
        self._end(folder)
        self._remove_folder(trash)
        return True

    def remove_drafts(self, keep: Collection[str]) -> int:
        """Removes the drafts of all branches but those in `keep`, and but those that this process
        works on; returns how many. Raises OSError."""
        kept = {_DRAFT + branch_id for branch_id in keep}
        return self._remove_all(
            root / name
            for root in self._roots
            for name in self._names(root)
            if name.startswith(_DRAFT) and name not in kept
        )

    def leftovers(self, known_ids: Collection[str]) -> tuple[Path, ...]:
        """Folders that are no snapshots: trash, drafts, and complete ones whose ids are not in
        `known_ids`; without those that this process works on. Foreign names are not touched."""
        return tuple(
            root / name
            for root in self._roots
            for name in self._names(root)
            if name.startswith((_TRASH, _DRAFT, _COPY))
            or (ID_PATTERN.fullmatch(name) and name not in known_ids)
        )

    def remove_leftover(self, path: Path) -> None:
        """Removes one of the leftovers. Raises OSError."""
        self._remove_all([path])

    def sweep(self, known_ids: Collection[str]) -> int:
        """Removes the leftovers; returns how many. Raises OSError."""
        return self._remove_all(self.leftovers(known_ids))

    # --- looking ---

    def used_bytes(self, snapshot_id: str) -> int:
        """Room that a snapshot takes up; blocks shared by reflink count for each owner."""
        return data_bytes_of(self._folder_of(snapshot_id))

    def all_bytes(self) -> int:
        """Room that everything in ROOT takes up, what is being made or removed included; blocks
        shared by reflink count for each owner. Raises OSError."""
        return _bytes_in(self.root)

    def memory_bytes(self) -> int:
        """The same of what is in memory."""
        return 0 if self.memory_root is None else _bytes_in(self.memory_root)

    def folder_count(self) -> int:
        """How many names there are in both roots."""
        return sum(len(os.listdir(root)) for root in self._roots)

    def draft_name(self, branch_id: str) -> str:
        """The name of a branch's draft in its root."""
        return self._draft_in(self.root, branch_id).folder.name

    def odd_files(self, stored: StoredSnapshot) -> tuple[Path, ...]:
        """What lies in a snapshot's folder and is no part of it: a flatten that was broken off
        leaves such files. Raises OSError."""
        own = {MANIFEST_NAME, VMSTATE_NAME, CHECKSUMS_NAME, stored.memory_path.name}
        own |= {stored.drive_path(each.drive_id).name for each in stored.manifest.writable_drives}
        names = sorted(name for name in os.listdir(stored.folder) if name not in own)
        return tuple(stored.folder / name for name in names)

    # --- inside ---

    def _folder_of(self, snapshot_id: str) -> Path:
        """The disk's, if it is there, else the one in memory, if that is there."""
        folder = self.root / _checked(snapshot_id)
        if self.memory_root is not None and not os.path.lexists(folder):
            in_memory = self.memory_root / snapshot_id
            # Looked at in this order: meanwhile it may be written back, and removed there.
            if os.path.lexists(in_memory) and not os.path.lexists(folder):
                return in_memory
        return folder

    def _root_for(self, durability: Durability) -> Path:
        if durability is Durability.DISK:
            return self.root
        if self.memory_root is None:
            raise ImageError("there is no folder for images in memory")
        return self.memory_root

    def _draft_in(self, root: Path, branch_id: str) -> Draft:
        return Draft(branch_id, root / (_DRAFT + _checked(branch_id)))

    def _begin(self, folder: Path) -> None:
        with self._lock:
            self._at_work.add(folder)

    def _end(self, folder: Path) -> None:
        with self._lock:
            self._at_work.discard(folder)

    def _names(self, root: Path) -> list[str]:
        with self._lock:
            return sorted(name for name in os.listdir(root) if root / name not in self._at_work)

    def _is_made_by(self, folder: Path, branch_id: str) -> bool:
        try:
            return _read_manifest(folder / MANIFEST_NAME).branch_id == branch_id
        except (ImageError, FileNotFoundError, NotADirectoryError):
            return False

    def _free_trash_name(self, root: Path, snapshot_id: str) -> Path:
        number = 0
        while os.path.lexists(path := root / f"{_TRASH}{snapshot_id}-{number}"):
            number += 1
        return path

    def _remove_all(self, folders: Iterable[Path]) -> int:
        count = 0
        for folder in folders:
            if ID_PATTERN.fullmatch(folder.name):
                self._delete_from(folder.parent, folder.name)
            else:
                self._remove_folder(folder)
            count += 1
        return count

    def _remove_folder(self, folder: Path) -> None:
        """Unlinks a flat folder (or what somebody put in its place), then makes its end durable."""
        try:
            is_folder = stat.S_ISDIR(os.lstat(folder).st_mode)
        except FileNotFoundError:
            return
        if not is_folder:  # nor a link to one, whose files are not ours
            self._fs.unlink(folder)
            self._fs.fsync_folder(folder.parent)
            return
        names = os.listdir(folder)
        for name in names:
            self._fs.unlink(folder / name)
        self._fs.rmdir(folder)
        self._fs.fsync_folder(folder.parent)


def check_parent(parent: Manifest, child: Manifest, layer: LayerWitness) -> None:
    """Whether a layer was taken over this parent. Raises ImageError."""
    if parent.branch_id != layer.parent_branch_id:
        raise ImageError(
            f"snapshot {child.snapshot_id} stands on {parent.snapshot_id} of branch "
            f"{layer.parent_branch_id}, and that is of branch {parent.branch_id}"
        )
    if parent.memory_bytes != child.memory_bytes:
        raise ImageError(
            f"snapshot {child.snapshot_id} has {child.memory_bytes} bytes of memory, and "
            f"{parent.snapshot_id} under it {parent.memory_bytes}"
        )


def data_bytes_of(folder: Path) -> int:
    """Blocks that the files of a folder have, in bytes. Raises OSError."""
    return sum(allocated_bytes(folder / name) for name in os.listdir(folder))


def _bytes_in(root: Path) -> int:
    count = 0
    for name in os.listdir(root):
        with suppress(FileNotFoundError, NotADirectoryError):  # it went meanwhile
            count += data_bytes_of(root / name)
    return count


def _checked(any_id: str) -> str:
    if not ID_PATTERN.fullmatch(any_id):
        raise ImageError(f"{any_id!r} is no id: {ID_PATTERN.pattern}")
    return any_id


def _size_if_there(path: Path) -> int | None:
    try:
        return os.lstat(path).st_size
    except FileNotFoundError:
        return None


def _size_of(path: Path) -> int:
    found = os.lstat(path)
    if not stat.S_ISREG(found.st_mode):
        raise ImageError(f"{path} is not a regular file")
    return found.st_size


def _read_manifest(path: Path) -> Manifest:
    size_bytes = _size_of(path)
    if size_bytes > MAX_MANIFEST_BYTES:
        raise ImageError(f"{path} has {size_bytes} bytes: that is no manifest")
    try:
        return Manifest.from_json(path.read_bytes())
    except ImageError as error:
        raise ImageError(f"{path}: {error}") from error
