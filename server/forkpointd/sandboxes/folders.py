"""Sandboxes' folders: made for one, and kept for the next when it is gone.

A folder's links and log files are the same for every sandbox, so a sandbox that goes leaves its
folder, emptied, as a spare: a fork of a hundred children then makes three new inodes a child and
not nine. On an ext4 without a journal, which looks at recently deleted inodes at every creation,
that was half of the time of a fork that followed a delete (bench/README.md). The console is never
reused: whoever still reads the old one must not see the next sandbox's output.

Everything here blocks: call it in a thread.
"""

from __future__ import annotations

import os
import shutil
import threading
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from forkpointd.model import Drive, StagingKind
from forkpointd.sandboxes.datadir import STAGING_LINKS, DataDir
from forkpointd.vmm import EMPTIED_NAMES, link_drives

MAX_SPARES = 256


class Folders:
    """The folders below one data folder's `sandboxes/`."""

    def __init__(self, data: DataDir) -> None:
        self._data = data
        self._lock = threading.Lock()
        self._spares: list[Path] = []
        self._spares_made = 0

    @property
    def root(self) -> Path:
        """All of them, spares not included."""
        return self._data.sandboxes

    def of(self, sandbox_id: str) -> Path:
        """Where a sandbox's folder is."""
        return self._data.sandbox(sandbox_id)

    def make(self, sandbox_id: str, drives: Iterable[Drive]) -> None:
        """The folder of a sandbox that is about to start. Raises OSError."""
        folder = self.of(sandbox_id)
        if folder.exists():
            shutil.rmtree(folder)
        if not self._take_spare(folder):
            folder.mkdir(mode=0o700)
        self.link_staging(folder)
        link_drives(folder, drives)

    def remove(self, sandbox_id: str) -> None:
        """Takes all of a sandbox's folder away; nothing of it can be found again. Idempotent.
        Raises OSError."""
        folder = self.of(sandbox_id)
        if not folder.exists():
            return
        for entry in os.scandir(folder):
            if entry.name in EMPTIED_NAMES:
                os.truncate(entry.path, 0)
            elif entry.is_dir(follow_symlinks=False):
                shutil.rmtree(entry.path)
            elif entry.name not in STAGING_LINKS.values():
                os.unlink(entry.path)
        with self._lock:
            keep = len(self._spares) < MAX_SPARES
            self._spares_made += keep
            spare = self._spare_root / str(self._spares_made)
            if keep:
                self._spare_root.mkdir(mode=0o700, exist_ok=True)
                folder.rename(spare)
                self._spares.append(spare)
        if not keep:
            shutil.rmtree(folder)

    def _take_spare(self, folder: Path) -> bool:
        """Makes a spare this folder; False where there is none."""
        while True:
            with self._lock:
                if not self._spares:
                    return False
                spare = self._spares.pop()
            with suppress(FileNotFoundError):  # somebody tidied up
                spare.rename(folder)
                return True

    def forget_spares(self) -> None:
        """Removes the spares of a former server: before this one has any."""
        if self._spare_root.exists():
            shutil.rmtree(self._spare_root)

    def link_staging(self, folder: Path) -> None:
        """Points a sandbox's links at this server's staging folders, wherever a former server had
        its own."""
        for kind in StagingKind:
            link, target = folder / STAGING_LINKS[kind], self._data.staging(kind)
            if not link.is_symlink() or link.readlink() != target:
                link.unlink(missing_ok=True)
                link.symlink_to(target)

    @property
    def _spare_root(self) -> Path:
        return self._data.spare_folders
