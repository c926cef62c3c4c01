"""Spans of time as people write them: `"10m"`, `"1h30m"`, `"500ms"`, 90, `timedelta(...)`."""

from __future__ import annotations

import re
from datetime import timedelta

Duration = timedelta | float | int | str
"""A `timedelta`, seconds as a number, or text such as "10m"."""

_UNITS_SECONDS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0, "w": 604800.0}
_PART = re.compile(r"(\d+(?:\.\d+)?)(ms|s|m|h|d|w)")


def parse(value: Duration) -> timedelta:
    """A span of time; ValueError where it can't be read or is negative."""
    if isinstance(value, timedelta):
        span = value
    elif isinstance(value, str):
        span = _parse_text(value)
    else:
        span = timedelta(seconds=value)
    if span < timedelta(0):
        raise ValueError(f"a span of time can't be negative: {value!r}")
    return span


def _parse_text(text: str) -> timedelta:
    compact = text.replace(" ", "").lower()
    try:
        return timedelta(seconds=float(compact))
    except ValueError:
        pass
    parts = _PART.findall(compact)
    if not parts or "".join(number + unit for number, unit in parts) != compact:
        raise ValueError(f"{text!r} is no span of time: write 90, '500ms', '10m' or '1h30m'")
    return timedelta(seconds=sum(float(number) * _UNITS_SECONDS[unit] for number, unit in parts))


def show(span: timedelta) -> str:
    """A span for people: three digits and the unit that fits."""
    seconds = span.total_seconds()
    if seconds < 0.001:
        return f"{seconds * 1e6:.0f} µs"
    if seconds < 1:
        return f"{seconds * 1000:.3g} ms"
    if seconds < 60:
        return f"{seconds:.3g} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    parts = [(days, "d"), (hours, "h"), (minutes, "m"), (rest, "s")]
    return "".join(f"{count}{unit}" for count, unit in parts if count)
