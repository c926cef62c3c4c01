"""`snapshot prune`: which snapshots go."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from datetime import UTC, datetime, timedelta
from typing import TypeVar

from forkpoint.views import SnapshotView

S = TypeVar("S", bound=SnapshotView)

_LONG_AGO = datetime.min.replace(tzinfo=UTC)


def prunable(
    found: Iterable[S], *, keep_last: int | None, older_than: timedelta | None, now: datetime
) -> list[S]:
    """Those that go, oldest first: of each source all but the newest `keep_last`, and of these only
    what is older than `older_than`. None: that rule keeps nothing.

    Raises ValueError where neither rule is given: that would be all of them.
    """
    if keep_last is None and older_than is None:
        raise ValueError("say what to keep: --keep-last N, --older-than SPAN, or both")
    by_source: defaultdict[str | None, list[S]] = defaultdict(list)
    for each in sorted(found, key=_made):
        by_source[each.source_sandbox_id].append(each)
    going = [
        each
        for of_source in by_source.values()
        for each in of_source[: len(of_source) - (keep_last or 0)]
        if len(of_source) > (keep_last or 0)
        if older_than is None or now - _made(each) > older_than
    ]
    return sorted(going, key=_made)


def _made(snapshot: SnapshotView) -> datetime:
    return snapshot.create_time or _LONG_AGO
