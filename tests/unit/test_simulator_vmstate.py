"""The simulator's vmstate file: what is changed in it is noticed, what is not ours is refused."""

import struct

import pytest

from forkpointd.vmm.simulator import vmstate
from forkpointd.vmm.simulator.vmstate import VmstateError, crc64, decode, encode

STATE = {"memory_bytes": 1 << 30, "drives": []}


def test_what_is_encoded_is_decoded() -> None:
    assert STATE.items() <= decode(encode(STATE)).items()


def test_the_checksum_is_firecrackers() -> None:
    """CRC-64/Jones; the check value is Redis' (crc64.c), from which Firecracker's crate comes."""
    assert crc64(b"123456789") == 0xE9C6D914C4B8D9CA


def test_every_changed_byte_is_noticed() -> None:
    content = encode(STATE)
    for at in range(len(content)):
        changed = bytearray(content)
        changed[at] ^= 0x10
        with pytest.raises(VmstateError, match="CRC64 validation failed: "):
            decode(bytes(changed))


def test_every_truncation_is_noticed() -> None:
    content = encode(STATE)
    for length in range(len(content)):
        with pytest.raises(VmstateError):
            decode(content[:length])


def sealed(body: bytes) -> bytes:
    return body + struct.pack("<Q", crc64(body))


def test_firecrackers_own_file_is_refused() -> None:
    body = struct.pack("<QQ", 0x0710_1984_8664_0000, 5) + b"6.0.0" + bytes(100)
    with pytest.raises(VmstateError, match="Magic value does not match arch: 508"):
        decode(sealed(body))


def test_another_format_is_refused() -> None:
    body = encode(STATE)[:-8].replace(b"6.0.0", b"6.1.0", 1)
    with pytest.raises(VmstateError, match=r"Invalid data version: 6\.1\.0"):
        decode(sealed(body))


def test_a_file_of_another_simulator_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patched:
        patched.setattr(vmstate, "VMM_VERSION", "1.11.0-simulator")
        content = encode(STATE)
    with pytest.raises(VmstateError, match=r"written by 1\.11\.0-simulator"):
        decode(content)
