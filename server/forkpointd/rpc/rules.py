"""What single values of requests must look like: ids, labels, spans, counts, paths.

A rule is a function of a value and the server's limits that returns what is wrong with it, together
with what would be right, or None. It never touches the disk (`image_paths.py` does).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from google.protobuf.duration_pb2 import Duration
from google.protobuf.field_mask_pb2 import FieldMask

from forkpointd.model import FORK_ID_PATTERN, ID_PATTERN
from forkpointd.rpc.scalars import NANOS_PER_SECOND

MAX_LABELS = 64
MAX_LABEL_KEY_CHARACTERS = 63
MAX_LABEL_VALUE_CHARACTERS = 255
MAX_PAGE_SIZE = 1_000
MAX_PAGE_TOKEN_CHARACTERS = 512
MIN_MEMORY_MIB = 16
MAX_VCPUS = 32
MAX_DRIVES = 16
MAX_BOOT_ARGS_BYTES = 2_048
MAX_PATH_BYTES = 4_095
"""PATH_MAX without its NUL."""
MAX_ARCHIVE_LEVEL = 12
MAX_CONSOLE_INPUT_BYTES = 32 * 1024

_UUID4 = re.compile(r"[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}", re.I)
_DRIVE_ID = re.compile(r"[a-z][a-z0-9_]{0,31}")
_BOOT_ARGS = re.compile(r"[ -~]*")
_MAX_SECONDS = 315_576_000_000
"""Of a google.protobuf.Duration."""


@dataclass(frozen=True, slots=True)
class Limits:
    """Bounds that depend on the host and its settings."""

    max_fork_count: int
    max_memory_mib: int
    """What the host has in all."""


Rule = Callable[[Any, Limits], str | None]
"""What is wrong with a value, or None."""


def anything(_value: object, _limits: Limits) -> None:
    """No bounds but those of its type."""


def shown(value: str) -> str:
    """A client's own words in a message, kept short."""
    return repr(value if len(value) <= 80 else f"{value[:77]}...")


def matching(pattern: re.Pattern[str], what: str) -> Rule:
    """A text that is `what`, as a pattern for all of it says."""

    def rule(value: str, _limits: Limits) -> str | None:
        if pattern.fullmatch(value):
            return None
        return f"{shown(value)} is not {what}"

    return rule


identifier = matching(ID_PATTERN, f"an id: {ID_PATTERN.pattern}")
fork_identifier = matching(FORK_ID_PATTERN, f"an id of a fork: {FORK_ID_PATTERN.pattern}")
drive_identifier = matching(_DRIVE_ID, f"the name of a drive: {_DRIVE_ID.pattern}")
request_identifier = matching(_UUID4, "a UUID4, such as 7c1f8a52-61f3-4f0e-9b0a-3f1f6d0c2a11")


def labels(value: Mapping[str, str], _limits: Limits) -> str | None:
    """Free text pairs of the owner."""
    if len(value) > MAX_LABELS:
        return f"has {len(value)} labels; at most {MAX_LABELS} are kept"
    for key, words in sorted(value.items()):
        if not 1 <= len(key) <= MAX_LABEL_KEY_CHARACTERS:
            return f"key {shown(key)} must have 1 to {MAX_LABEL_KEY_CHARACTERS} characters"
        if len(words) > MAX_LABEL_VALUE_CHARACTERS:
            return (
                f"the value of {shown(key)} has {len(words)} characters; "
                f"at most {MAX_LABEL_VALUE_CHARACTERS} are kept"
            )
    return None


def span(low_seconds: float, high_seconds: float, words: str) -> Rule:
    """A Duration within bounds, which `words` names."""
    low, high = round(low_seconds * NANOS_PER_SECOND), round(high_seconds * NANOS_PER_SECOND)

    def rule(value: Duration, _limits: Limits) -> str | None:
        same_sign = value.seconds * value.nanos >= 0
        in_range = abs(value.seconds) <= _MAX_SECONDS and abs(value.nanos) < NANOS_PER_SECOND
        if not (same_sign and in_range):
            return (
                f"{value.seconds} s and {value.nanos} ns are no google.protobuf.Duration: "
                "nanos must be below 1,000,000,000 and have the sign of seconds"
            )
        if low <= value.seconds * NANOS_PER_SECOND + value.nanos <= high:
            return None
        return f"{value.ToJsonString()} is out of bounds: {words}"

    return rule


ttl = span(1, 365 * 86_400, "1 s to 365 days; leave it out for no limit")
max_pause = span(0.001, 3_600, "1 ms to 1 h; leave it out for no limit")


def at_most(high: int) -> Rule:
    """A number up to a bound."""

    def rule(value: int, _limits: Limits) -> str | None:
        return None if value <= high else f"{value} is too large: at most {high}"

    return rule


def fork_count(value: int, limits: Limits) -> str | None:
    """How many children."""
    if 1 <= value <= limits.max_fork_count:
        return None
    return f"{value} is out of bounds: 1 to {limits.max_fork_count}"


def memory_mib(value: int, limits: Limits) -> str | None:
    """Guest memory."""
    if MIN_MEMORY_MIB <= value <= limits.max_memory_mib:
        return None
    return (
        f"{value} MiB is out of bounds: {MIN_MEMORY_MIB} to {limits.max_memory_mib}, "
        "which is all that this host has"
    )


def path(value: str, _limits: Limits) -> str | None:
    """A name of a file on the server's host; whether it is there is not asked here."""
    return malformed_path(value)


def malformed_path(value: str) -> str | None:
    """Why a text can't name a file on the server's host; None where it can."""
    if "\0" in value:
        return f"{shown(value)} has a NUL in it"
    if not value.startswith("/"):
        return f"{shown(value)} is not absolute: give the whole path on the server's host"
    if len(value.encode()) > MAX_PATH_BYTES:
        return f"has {len(value.encode())} bytes; a path has at most {MAX_PATH_BYTES}"
    return None


def boot_args(value: str, _limits: Limits) -> str | None:
    """A kernel's command line, as Firecracker takes it."""
    if len(value.encode()) > MAX_BOOT_ARGS_BYTES:
        return f"has {len(value.encode())} bytes; at most {MAX_BOOT_ARGS_BYTES} are taken"
    if not _BOOT_ARGS.fullmatch(value):
        return "has a character that is no printable ASCII; a kernel command line is one line of it"
    return None


def drive_list(value: list[Any], _limits: Limits) -> str | None:
    """Drives beside each other; each one is looked at by itself."""
    if len(value) > MAX_DRIVES:
        return f"has {len(value)} drives; at most {MAX_DRIVES} are taken"
    ids = [drive.drive_id for drive in value]
    twice = sorted({each for each in ids if ids.count(each) > 1})
    if twice:
        return f"more than one drive is called {', '.join(map(shown, twice))}: names are unique"
    if sum(drive.root_device for drive in value) > 1:
        return "more than one drive is root_device: the guest boots from one"
    return None


def update_mask(*names: str) -> Rule:
    """Fields that may be changed."""

    def rule(value: FieldMask, _limits: Limits) -> str | None:
        if not value.paths:
            return f"names no field: name one or more of {', '.join(names)}"
        wrong = [name for name in dict.fromkeys(value.paths) if name not in names]
        if wrong:
            return f"{', '.join(map(shown, wrong[:8]))} can't be changed: only {', '.join(names)}"
        return None

    return rule


def console_input(value: bytes, _limits: Limits) -> str | None:
    """Bytes for a guest."""
    if len(value) <= MAX_CONSOLE_INPUT_BYTES:
        return None
    return f"has {len(value)} bytes; send at most {MAX_CONSOLE_INPUT_BYTES} in a message"


def page_token(value: str, _limits: Limits) -> str | None:
    """Whether it is ours is asked in `pages.py`."""
    if len(value) <= MAX_PAGE_TOKEN_CHARACTERS:
        return None
    return f"has {len(value)} characters: it is no next_page_token of this server"
