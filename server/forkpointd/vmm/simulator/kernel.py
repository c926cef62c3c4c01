"""Loading a kernel image, as far as a simulator needs it.

The image's segments are put where Firecracker would put them, and the pages a boot touches below
1 MiB are written too, so a first snapshot has real content and an image that Firecracker would
refuse is refused here with the same words. Nothing of it is executed.
"""

from __future__ import annotations

import os
import struct
from typing import Final

from .memory import GuestMemory

_HIMEM: Final = 1 << 20  # where kernels begin
_ZERO_PAGE: Final = 0x7000
_COMMAND_LINE: Final = 0x20000
_MP_TABLE: Final = 0x9FC00
_ELF_HEADER: Final = struct.Struct("<16sHHIQQQIHHHHHH")
_PROGRAM_HEADER: Final = struct.Struct("<IIQQQQQQ")
_LOAD: Final = 1
_64_BIT_LITTLE: Final = bytes([2, 1])


class KernelError(Exception):
    """An image that can't be loaded; the text is linux-loader's."""


def load(memory: GuestMemory, fd: int, boot_args: str, vcpus: int) -> None:
    """Puts the image behind this descriptor into memory. Raises KernelError."""
    try:
        header = os.pread(fd, _ELF_HEADER.size, 0)
    except OSError as error:
        raise KernelError("Unable to read elf header") from error
    if len(header) < _ELF_HEADER.size:
        raise KernelError("Unable to read elf header")
    ident, *_, programs_at, _, _, _, size, count, _, _, _ = _ELF_HEADER.unpack(header)
    if ident[:4] != b"\x7fELF":
        raise KernelError("Invalid Elf magic number")
    if ident[4:6] != _64_BIT_LITTLE:
        raise KernelError("Invalid entry address")
    if size != _PROGRAM_HEADER.size:
        raise KernelError("Invalid program header size")
    for n in range(count):
        program = os.pread(fd, size, programs_at + n * size)
        if len(program) < size:
            raise KernelError("Unable to read program header")
        _load_segment(memory, fd, program)
    for offset, content in (
        (_ZERO_PAGE, b"simulated boot parameters"),
        (_COMMAND_LINE, boot_args.encode() + b"\0"),
        (_MP_TABLE, b"_MP_" + bytes([vcpus])),
    ):
        if offset + len(content) > memory.size_bytes:
            raise KernelError("Unable to read kernel image")
        memory.write(offset, content)


def _load_segment(memory: GuestMemory, fd: int, program: bytes) -> None:
    kind, _, offset, _, address, file_bytes, _, _ = _PROGRAM_HEADER.unpack(program)
    if kind != _LOAD or not file_bytes:
        return
    if address < _HIMEM or address + file_bytes > memory.size_bytes:
        raise KernelError("Unable to read kernel image")
    content = os.pread(fd, file_bytes, offset)
    if len(content) < file_bytes:
        raise KernelError("Unable to read kernel image")
    memory.write(address, content)
