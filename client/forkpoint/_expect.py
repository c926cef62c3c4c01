"""Waiting for what a console says: the search itself, which needs no connection."""

from __future__ import annotations

import re
import time
from datetime import timedelta

from forkpoint.errors import DeadlineExceeded

Pattern = bytes | re.Pattern[bytes]
"""Bytes to be found as they are, or a compiled regular expression over bytes."""


class Searched:
    """Output that is searched as it comes in."""

    def __init__(self, pattern: Pattern) -> None:
        plain = isinstance(pattern, bytes)
        self._wanted = re.compile(re.escape(pattern)) if isinstance(pattern, bytes) else pattern
        # Only plain bytes tell how much of the old output can't be part of a later match.
        self._overlap = len(pattern) - 1 if isinstance(pattern, bytes) else None
        if plain and not pattern:
            raise ValueError("an empty pattern is always there")
        self.said = b""
        """All the output so far."""

    def add(self, data: bytes) -> bytes | None:
        """More output; all of it up to the pattern's end, once that was said."""
        start = 0 if self._overlap is None else max(0, len(self.said) - self._overlap)
        self.said += data
        found = self._wanted.search(self.said, start)
        return None if found is None else self.said[: found.end()]


class Stopwatch:
    """Counts a span of time down."""

    def __init__(self, span: timedelta) -> None:
        self._until = time.monotonic() + span.total_seconds()

    def left(self) -> float:
        """Seconds that are left; 0.0 when it is over."""
        return max(0.0, self._until - time.monotonic())


def not_said(pattern: Pattern, said: bytes, span: timedelta) -> DeadlineExceeded:
    """The error for a console that did not say it."""
    wanted = pattern if isinstance(pattern, bytes) else pattern.pattern
    tail = said[-200:]
    return DeadlineExceeded(
        f"the console did not say {wanted!r} within {span.total_seconds():g} s;"
        + (f" it ended with {tail!r}" if tail else " it said nothing")
    )
