"""Failures as Firecracker words them: the text becomes the `fault_message` of a 400."""

from __future__ import annotations

import os

BEFORE_START = "The requested operation is not supported before starting the microVM."
AFTER_START = "The requested operation is not supported after starting the microVM."


class Fault(Exception):
    """A request that is answered with 400 and this text; the machine goes on."""


class FatalLoadFault(Fault):
    """A load that failed: answered like a Fault, and then the process ends, as Firecracker does."""


class PanicError(Exception):
    """Where Firecracker's own thread panics (SIGABRT), leaving the request unanswered."""


def io_text(error: OSError) -> str:
    """An OSError as Rust's io::Error prints it."""
    number = error.errno or 0
    return f"{os.strerror(number)} (os error {number})"


_RUST_KINDS = {2: "NotFound", 13: "PermissionDenied", 28: "StorageFull"}


def io_debug(error: OSError) -> str:
    """An OSError as Rust's `{:?}` prints it inside a serialisation error."""
    number = error.errno or 0
    kind = _RUST_KINDS.get(number, "Uncategorized")
    return f'Os {{ code: {number}, kind: {kind}, message: "{os.strerror(number)}" }}'
