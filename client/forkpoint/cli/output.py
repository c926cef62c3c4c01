"""How things are shown: tables and text for people, one JSON object for programs."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime, timedelta
from enum import Enum
from typing import Any

from rich.console import Console
from rich.markup import escape, render

from forkpoint import durations
from forkpoint._version import __version__
from forkpoint.errors import ForkpointError

out = Console(highlight=False, soft_wrap=True)
"""Standard output."""
err = Console(stderr=True, highlight=False, soft_wrap=True)
"""Standard error: what is said beside the result."""


def as_data(value: Any) -> Any:
    """What JSON can hold: views become objects, spans seconds, instants ISO 8601."""
    if isinstance(value, ForkpointError):
        return error_data(value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        shown: dict[str, Any] = {}
        for field in dataclasses.fields(value):
            item = getattr(value, field.name)
            name = f"{field.name}_seconds" if "timedelta" in str(field.type) else field.name
            shown[name] = as_data(item)
        return shown
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, timedelta):
        return value.total_seconds()
    if isinstance(value, datetime):
        return value.astimezone(UTC).isoformat().replace("+00:00", "Z")
    if isinstance(value, Mapping):
        return {str(key): as_data(item) for key, item in value.items()}
    if isinstance(value, bytes):
        return value.decode("utf-8", "backslashreplace")
    if isinstance(value, (list, tuple, set, frozenset)):
        return [as_data(item) for item in value]
    return value


def error_data(error: ForkpointError) -> dict[str, Any]:
    """An error as data."""
    return {
        "code": error.code,
        "reason": error.reason,
        "message": error.message,
        "metadata": dict(error.metadata),
        "fields": [as_data(wrong) for wrong in error.fields],
        "retry_after_seconds": as_data(error.retry_after),
    }


def print_json(value: Any, *, line: bool = False) -> None:
    """One JSON value on standard output; `line`: without line breaks in it."""
    text = json.dumps(as_data(value), ensure_ascii=False, indent=None if line else 2)
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def size(count_bytes: int) -> str:
    """Bytes for people."""
    amount = float(count_bytes)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if amount < 1024:
            return f"{amount:.0f} {unit}" if unit == "B" else f"{amount:.3g} {unit}"
        amount /= 1024
    return f"{amount:.3g} TiB"


def span(value: timedelta | None) -> str:
    """A span of time for people."""
    return "-" if value is None else durations.show(value)


def age(since: datetime | None) -> str:
    """How long ago."""
    if since is None:
        return "-"
    seconds = max(0, round((datetime.now(UTC) - since).total_seconds()))
    for unit, length in (("d", 86400), ("h", 3600), ("m", 60)):
        if seconds >= 2 * length:
            return f"{seconds // length}{unit}"
    return f"{seconds}s"


def labels(pairs: Mapping[str, str]) -> str:
    """Labels in one cell."""
    return " ".join(f"{key}={value}" for key, value in sorted(pairs.items())) or "-"


def table(
    columns: Sequence[str], rows: Sequence[Sequence[str]], *, right: Sequence[str] = ()
) -> None:
    """A table; `right` names the columns of numbers.

    Cells are never folded or cut, so that an id can be copied whatever the terminal's width.
    """
    widths = [max(len(cell) for cell in column) for column in zip(columns, *rows, strict=True)]
    for number, row in enumerate((columns, *rows)):
        cells = [
            cell.rjust(width) if name in right else cell.ljust(width)
            for cell, width, name in zip(row, widths, columns, strict=True)
        ]
        line = escape("  ".join(cells).rstrip())
        out.print(f"[bold]{line}[/bold]" if number == 0 else line)


def facts(pairs: Sequence[tuple[str, str | None]]) -> None:
    """Names and values, one a line; those without a value are left out."""
    shown = [(name, value) for name, value in pairs if value]
    width = max((len(name) for name, _ in shown), default=0)
    for name, value in shown:
        out.print(f"[bold]{name.ljust(width)}[/bold]  {escape(value)}")


def say(message: str) -> None:
    """A line beside the result, on standard error."""
    err.print(escape(message))


def until(moment: datetime | None) -> str:
    """How long it is until then."""
    if moment is None:
        return "-"
    left = moment - datetime.now(UTC)
    return "now" if left <= timedelta(0) else f"in {durations.show(left)}"


def client_version() -> str:
    """This package's version."""
    return __version__


def plain(marked: str) -> str:
    """Text without rich's marks."""
    return render(marked).plain
