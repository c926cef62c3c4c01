"""The vmstate file: magic, format version, state as JSON, CRC-64.

The layout is Firecracker 1.12's (u64 magic, u64 length and text of the version, state, u64 CRC-64
of all before; src/vmm/src/snapshot/mod.rs), the magic is our own: Firecracker refuses our files and
we refuse Firecracker's, both by the magic. The version of the simulator that wrote it is in it too.
"""

from __future__ import annotations

import json
import struct
from typing import Any, Final

from .errors import io_text
from .versions import SNAPSHOT_VERSION, VMM_VERSION

MAGIC: Final = int.from_bytes(b"FPSIMVM1", "little")
_CRC_BYTES: Final = 8
_POLYNOMIAL: Final = 0x95AC9329AC4BC9B5  # CRC-64/Jones, reflected; as Firecracker's crc64 crate


def _make_table() -> list[int]:
    table = []
    for byte in range(256):
        crc = byte
        for _ in range(8):
            crc = (crc >> 1) ^ (_POLYNOMIAL if crc & 1 else 0)
        table.append(crc)
    return table


def crc64(data: bytes) -> int:
    """CRC-64/Jones of these bytes, starting from 0."""
    table, crc = _make_table(), 0
    for byte in data:
        crc = (crc >> 8) ^ table[(crc ^ byte) & 0xFF]
    return crc


class VmstateError(Exception):
    """A vmstate file that can't be used; the text is Firecracker's for the same trouble."""


def encode(state: dict[str, Any]) -> bytes:
    """A machine's state as the content of its vmstate file."""
    version = SNAPSHOT_VERSION.encode()
    payload = json.dumps({"written_by": VMM_VERSION, **state}).encode()
    body = struct.pack("<QQ", MAGIC, len(version)) + version + payload
    return body + struct.pack("<Q", crc64(body))


def decode(content: bytes) -> dict[str, Any]:
    """The state in the content of a vmstate file. Raises VmstateError."""
    if len(content) < _CRC_BYTES:
        raise VmstateError("Snapshot file is smaller than CRC length.")
    body, stored = content[:-_CRC_BYTES], struct.unpack("<Q", content[-_CRC_BYTES:])[0]
    computed = crc64(body)
    if computed != stored:
        raise VmstateError(f"CRC64 validation failed: {computed}")
    version, payload = _header(body)
    if version != SNAPSHOT_VERSION:
        raise VmstateError(f"Invalid data version: {version}")
    state: dict[str, Any] = json.loads(payload)
    if state["written_by"] != VMM_VERSION:
        raise VmstateError(f"Invalid data version: written by {state['written_by']}")
    return state


def _header(body: bytes) -> tuple[str, bytes]:
    """Format version and what follows it."""
    if len(body) < 16:
        raise VmstateError("An error occured with serialization/deserialization: UnexpectedEnd")
    magic, length = struct.unpack_from("<QQ", body)
    if magic != MAGIC:
        raise VmstateError(f"Magic value does not match arch: {magic}")
    return body[16 : 16 + length].decode("ascii", "replace"), body[16 + length :]


def describe(path: str) -> str:
    """The format version of a vmstate file, for `--describe-snapshot`. Raises VmstateError."""
    try:
        return _header(read(path))[0]
    except OSError as error:
        raise VmstateError(io_text(error)) from error


def read(path: str) -> bytes:
    """The whole file. Raises OSError."""
    with open(path, "rb") as file:
        return file.read()
