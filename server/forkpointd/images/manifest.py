"""The manifest: what a snapshot is, and the witness of the host it was taken on.

A snapshot's folder is moved and copied by people, so nothing in a manifest is believed: types,
missing keys and the sizes of the files it names are checked before Firecracker sees them, for a
failed load ends the process. `fits` compares it with a host.

The file is JSON, `format` 3 (1 had no layers, 2 no writable drives). A key that is not known is
refused as well: it would be a promise that this version can't keep.
"""

from __future__ import annotations

import base64
import binascii
import dataclasses
import json
import os
import re
import stat
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from enum import StrEnum
from pathlib import Path
from typing import Any, TypeVar

from forkpointd.images.errors import ImageError
from forkpointd.images.extents import Extents, decode_extents, encode_extents, total_bytes
from forkpointd.images.hostfacts import HostFacts
from forkpointd.model import (
    MIB,
    Branch,
    BranchMode,
    Drive,
    Layout,
    Machine,
    VmmKind,
    VmmVersion,
    now,
)

FORMAT = 3
_WITHOUT_WRITABLE_DRIVES = 2
_WITHOUT_LAYERS = 1

_FILE_OF_DRIVE = re.compile(r"[a-z][a-z0-9_]{0,31}")
"""What a drive may be called that has a file in the snapshot's folder: never a path."""

MAX_MANIFEST_BYTES = 64 * MIB
"""More is no manifest of ours: it isn't even read. A layer of a million scattered pages has 11."""

E = TypeVar("E", bound=StrEnum)


@dataclass(frozen=True, slots=True)
class DriveWitness:
    """A drive's file as it was when the snapshot was taken. Of a writable one this is its clone,
    which the snapshot's folder holds, and `path` is where the first sandbox got it from."""

    drive_id: str
    path: Path
    """Absolute, links resolved."""
    read_only: bool
    root_device: bool
    size_bytes: int
    mtime_ns: int
    inode: int
    """For people who look for the file; a copy with the same time and size is as good."""

    @classmethod
    def of(cls, drive: Drive, clone: Path | None = None) -> DriveWitness:
        """The witness of a drive as it is now, or of its clone. Raises OSError."""
        path = Path(os.path.realpath(drive.path))
        found = os.stat(path if clone is None else clone)
        return cls(
            drive.drive_id,
            path,
            drive.read_only,
            drive.root_device,
            found.st_size,
            found.st_mtime_ns,
            found.st_ino,
        )

    def changed(self) -> str | None:
        """Why the file is not the one that the guest knows; None where it is. Raises nothing for
        a file that is gone or can't be looked at: that is a reason too."""
        try:
            found = os.stat(self.path)
        except OSError as error:
            return f"{self.path} can't be found any more: {error.strerror}"
        if not (stat.S_ISREG(found.st_mode) or stat.S_ISBLK(found.st_mode)):
            return f"{self.path} is neither a file nor a block device any more"
        if found.st_size != self.size_bytes:
            return f"{self.path} has {found.st_size} bytes, not {self.size_bytes} as it had"
        if found.st_mtime_ns != self.mtime_ns and stat.S_ISREG(found.st_mode):
            return f"{self.path} was written to since (mtime_ns was {self.mtime_ns})"
        return None


@dataclass(frozen=True, slots=True)
class LayerWitness:
    """What a layer holds, and what it stands on."""

    parent_branch_id: str
    """Of the branch that made the parent: another snapshot may have its id by now."""
    extents: Extents
    """The pages in its memory file: the only truth, wherever that file was copied to."""


@dataclass(frozen=True, slots=True)
class Manifest:
    """Everything about a snapshot that must be known to start from it."""

    snapshot_id: str
    create_time: datetime
    source_sandbox_id: str
    branch_id: str
    parent_snapshot_id: str | None
    """What a DIFF stood on; None for the empty image and for FULL."""
    mode: BranchMode
    """FULL or DIFF."""
    layout: Layout
    memory_bytes: int
    """Size of the guest's memory, and so of its file."""
    vcpus: int
    vmm: VmmVersion
    snapshot_version: str
    architecture: str
    cpu_vendor: str
    cpu_model: str
    cpu_features: frozenset[str]
    kernel_release: str
    page_bytes: int
    vmstate_bytes: int = 0
    """Size of the vmstate file; `SnapshotStore.finalise` fills it in."""
    drives: tuple[DriveWitness, ...] = ()
    has_network: bool = False
    """Reserved: a snapshot with network interfaces."""
    has_vsock: bool = False
    """Reserved: a snapshot with a vsock device."""
    layer: LayerWitness | None = None
    """None for FLAT."""
    boot: Mapping[str, str] = field(default_factory=dict)
    """How the first ancestor was booted, where that is known: for people."""

    @classmethod
    def describe(
        cls,
        *,
        branch: Branch,
        machine: Machine,
        vmm: VmmVersion,
        host: HostFacts,
        layer: LayerWitness | None = None,
        clone_of: Callable[[str], Path] | None = None,
        boot: Mapping[str, str] | None = None,
    ) -> Manifest:
        """The manifest of the snapshot that `branch` made, now and on this host. `vmm` is what
        ran the source, which may be older than what the host starts today; `clone_of` tells the
        clones of its writable drives. Raises OSError where a drive is gone."""
        assert branch.mode is not None, "a branch that has a snapshot has a mode"
        return cls(
            snapshot_id=branch.snapshot_id,
            create_time=now(),
            source_sandbox_id=branch.sandbox_id,
            branch_id=branch.branch_id,
            parent_snapshot_id=branch.base_snapshot_id,
            mode=branch.mode,
            layout=branch.layout,
            memory_bytes=machine.memory_bytes,
            vcpus=machine.vcpus,
            vmm=vmm,
            snapshot_version=host.snapshot_version,
            architecture=host.architecture,
            cpu_vendor=host.cpu_vendor,
            cpu_model=host.cpu_model,
            cpu_features=host.cpu_features,
            kernel_release=host.kernel_release,
            page_bytes=host.page_bytes,
            drives=tuple(
                DriveWitness.of(
                    drive,
                    None if drive.read_only or clone_of is None else clone_of(drive.drive_id),
                )
                for drive in machine.drives
            ),
            layer=layer,
            boot=dict(boot or {}),
        )

    @property
    def writable_drives(self) -> tuple[DriveWitness, ...]:
        """Those of which the snapshot's folder holds a clone."""
        return tuple(drive for drive in self.drives if not drive.read_only)

    def to_json(self) -> str:
        """The manifest as its file has it: sorted, for people to compare."""
        content = {"format": FORMAT, **_plain(dataclasses.replace(self, layer=None))}
        if self.layer is not None:
            content["layer"] = _plain_layer(self.layer, self.memory_bytes)
        return json.dumps(content, indent=1, sort_keys=True) + "\n"

    @classmethod
    def from_json(cls, text: str | bytes) -> Manifest:
        """Raises ImageError for anything that `to_json` of this format would not have written."""
        try:
            content = json.loads(text)
        except ValueError as error:  # of undecodable bytes too
            raise ImageError(f"the manifest is not JSON: {error}") from error
        if not isinstance(content, dict):
            raise ImageError("the manifest is not a JSON object")
        version = content.pop("format", None)
        known = (FORMAT, _WITHOUT_WRITABLE_DRIVES, _WITHOUT_LAYERS)
        if version not in known or isinstance(version, bool):
            raise ImageError(
                f"manifest format {version!r} is not known: this version knows {FORMAT}"
            )
        if version == _WITHOUT_LAYERS:
            content.setdefault("layer", None)
        reader = _Reader(content, "")
        memory_bytes = reader.count("memory_bytes", at_least=1)
        manifest = cls(
            snapshot_id=reader.text("snapshot_id"),
            create_time=reader.instant("create_time"),
            source_sandbox_id=reader.text("source_sandbox_id"),
            branch_id=reader.text("branch_id"),
            parent_snapshot_id=reader.optional_text("parent_snapshot_id"),
            mode=reader.one_of("mode", BranchMode),
            layout=reader.one_of("layout", Layout),
            memory_bytes=memory_bytes,
            vcpus=reader.count("vcpus", at_least=1),
            vmm=_read_vmm(reader.inner("vmm")),
            snapshot_version=reader.text("snapshot_version"),
            architecture=reader.text("architecture"),
            cpu_vendor=reader.text("cpu_vendor"),
            cpu_model=reader.text("cpu_model"),
            cpu_features=frozenset(reader.texts("cpu_features")),
            kernel_release=reader.text("kernel_release"),
            page_bytes=reader.count("page_bytes", at_least=1),
            vmstate_bytes=reader.count("vmstate_bytes", at_least=1),
            drives=tuple(_read_drive(inner) for inner in reader.inners("drives")),
            has_network=reader.flag("has_network"),
            has_vsock=reader.flag("has_vsock"),
            layer=_read_layer(reader.optional_inner("layer"), memory_bytes),
            boot=reader.text_map("boot"),
        )
        reader.finish()
        _check_layer(manifest)
        _check_drives(manifest, version)
        return manifest


def _check_layer(manifest: Manifest) -> None:
    """A layer stands on a parent, and nothing else is one."""
    if (manifest.layout is Layout.LAYERED) != (manifest.layer is not None):
        raise ImageError(f"manifest: layout is {manifest.layout}, which layer does not fit")
    parent = manifest.parent_snapshot_id
    if manifest.layer is not None and parent in (None, manifest.snapshot_id):
        raise ImageError(f"manifest: a layer can't stand on {parent}")


def _check_drives(manifest: Manifest, version: int) -> None:
    """Each has a name of its own, and those with a file one that is no path."""
    ids = [drive.drive_id for drive in manifest.drives]
    if len(set(ids)) != len(ids):
        raise ImageError(f"manifest: drives have the same drive_id twice: {', '.join(sorted(ids))}")
    for drive in manifest.writable_drives:
        if version != FORMAT:
            raise ImageError(f"manifest: format {version} has no writable drive ({drive.drive_id})")
        if not _FILE_OF_DRIVE.fullmatch(drive.drive_id):
            raise ImageError(f"manifest: {drive.drive_id!r} can't name a writable drive")


# --- JSON --------------------------------------------------------------------------------------


def _plain(value: Any) -> Any:
    """A value as JSON has it."""
    if dataclasses.is_dataclass(value):
        return {item.name: _plain(getattr(value, item.name)) for item in dataclasses.fields(value)}
    if isinstance(value, datetime):
        return value.isoformat()
    if isinstance(value, frozenset):
        return sorted(value)
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, Mapping):
        return dict(value)
    return value


def _plain_layer(layer: LayerWitness, memory_bytes: int) -> dict[str, Any]:
    packed = zlib.compress(encode_extents(layer.extents, memory_bytes), 1)
    return {
        "parent_branch_id": layer.parent_branch_id,
        "data_bytes": total_bytes(layer.extents),
        "extents": base64.b64encode(packed).decode(),
    }


def _read_layer(reader: _Reader | None, memory_bytes: int) -> LayerWitness | None:
    if reader is None:
        return None
    parent_branch_id = reader.text("parent_branch_id")
    data_bytes = reader.count("data_bytes")
    unpacking = zlib.decompressobj()
    try:
        packed = base64.b64decode(reader.text("extents"), validate=True)
        content = unpacking.decompress(packed, MAX_MANIFEST_BYTES)
    except (binascii.Error, zlib.error) as error:
        raise ImageError(f"manifest: layer.extents can't be unpacked: {error}") from error
    if not unpacking.eof or unpacking.unused_data:
        raise ImageError("manifest: layer.extents are cut, or too many, or something follows them")
    stored = decode_extents(content)
    if stored.memory_bytes != memory_bytes:
        raise ImageError(
            f"manifest: layer.extents are of a memory of {stored.memory_bytes} bytes, "
            f"not {memory_bytes}"
        )
    if total_bytes(stored.extents) != data_bytes:
        raise ImageError(
            f"manifest: layer.extents have {total_bytes(stored.extents)} bytes, not {data_bytes}"
        )
    reader.finish()
    return LayerWitness(parent_branch_id, stored.extents)


def _read_vmm(reader: _Reader) -> VmmVersion:
    vmm = VmmVersion(reader.one_of("kind", VmmKind), reader.text("version"))
    reader.finish()
    return vmm


def _read_drive(reader: _Reader) -> DriveWitness:
    drive = DriveWitness(
        drive_id=reader.text("drive_id"),
        path=Path(reader.text("path")),
        read_only=reader.flag("read_only"),
        root_device=reader.flag("root_device"),
        size_bytes=reader.count("size_bytes"),
        mtime_ns=reader.number("mtime_ns"),
        inode=reader.count("inode"),
    )
    if not drive.path.is_absolute():
        raise ImageError(f"manifest: the path of drive {drive.drive_id} is not absolute")
    reader.finish()
    return drive


class _Reader:
    """Takes typed values out of a JSON object; what is wrong is an ImageError with its place."""

    def __init__(self, content: dict[str, Any], where: str) -> None:
        self._content = dict(content)
        self._where = where

    def finish(self) -> None:
        """Refuses what nobody took."""
        if self._content:
            names = ", ".join(sorted(self._where + name for name in self._content))
            raise ImageError(f"manifest: {names} is not known in format {FORMAT}")

    def text(self, name: str) -> str:
        value = self._take(name)
        if not isinstance(value, str):
            raise self._wrong(name, "a string")
        return value

    def optional_text(self, name: str) -> str | None:
        if self._content.get(name, "") is None:
            self._take(name)
            return None
        return self.text(name)

    def texts(self, name: str) -> list[str]:
        value = self._take(name)
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            raise self._wrong(name, "a list of strings")
        return value

    def text_map(self, name: str) -> dict[str, str]:
        value = self._take(name)
        if not isinstance(value, dict) or not all(isinstance(v, str) for v in value.values()):
            raise self._wrong(name, "an object of strings")
        return value

    def flag(self, name: str) -> bool:
        value = self._take(name)
        if not isinstance(value, bool):
            raise self._wrong(name, "true or false")
        return value

    def number(self, name: str) -> int:
        value = self._take(name)
        if not isinstance(value, int) or isinstance(value, bool):
            raise self._wrong(name, "an integer")
        return value

    def count(self, name: str, *, at_least: int = 0) -> int:
        value = self.number(name)
        if value < at_least:
            raise self._wrong(name, f"an integer from {at_least} on")
        return value

    def instant(self, name: str) -> datetime:
        try:
            value = datetime.fromisoformat(self.text(name))
        except ValueError as error:
            raise self._wrong(name, "an ISO 8601 instant") from error
        if value.tzinfo is None:
            raise self._wrong(name, "an instant with its offset from UTC")
        return value

    def one_of(self, name: str, kind: type[E]) -> E:
        try:
            return kind(self.text(name))
        except ValueError as error:
            raise self._wrong(name, f"one of {', '.join(kind)}") from error

    def inner(self, name: str) -> _Reader:
        value = self._take(name)
        if not isinstance(value, dict):
            raise self._wrong(name, "an object")
        return _Reader(value, f"{self._where}{name}.")

    def optional_inner(self, name: str) -> _Reader | None:
        if self._content.get(name, "") is None:
            self._take(name)
            return None
        return self.inner(name)

    def inners(self, name: str) -> list[_Reader]:
        value = self._take(name)
        if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
            raise self._wrong(name, "a list of objects")
        return [_Reader(item, f"{self._where}{name}.") for item in value]

    def _take(self, name: str) -> Any:
        try:
            return self._content.pop(name)
        except KeyError:
            raise ImageError(f"manifest: {self._where}{name} is missing") from None

    def _wrong(self, name: str, wanted: str) -> ImageError:
        return ImageError(f"manifest: {self._where}{name} is not {wanted}")
