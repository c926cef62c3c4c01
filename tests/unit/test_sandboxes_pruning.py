"""The server's prune policy chooses what `forkpoint snapshot prune` would."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from forkpoint.cli.pruning import prunable
from forkpointd.registry import Registry
from tests.unit.registry_making import snapshot

START = datetime(2026, 1, 1, tzinfo=UTC)

made = st.lists(
    st.tuples(st.sampled_from("abc"), st.integers(0, 20), st.booleans()), min_size=1, max_size=12
)


@given(made, st.none() | st.integers(0, 4), st.none() | st.integers(0, 20))
@settings(max_examples=40, deadline=None)
def test_the_policy_and_the_command_agree(
    tmp_path_factory: Any, rows: list[tuple[str, int, bool]], keep: int | None, age: int | None
) -> None:
    at = START + timedelta(days=20, hours=1)
    folder: Path = tmp_path_factory.mktemp("registry")

    async def chosen() -> list[str]:
        registry = await Registry.open(folder / "registry.sqlite")
        try:
            for number, (source, day, deleted) in enumerate(rows):
                await registry.insert_snapshot(
                    replace(
                        snapshot(f"snap-{number:02}"),
                        source_sandbox_id=source,
                        create_time=START + timedelta(days=day, seconds=number),
                        deleted=deleted,
                    )
                )
            limit = None if age is None else at - timedelta(days=age)
            return await registry.prunable_snapshots(keep, limit)
        finally:
            await registry.close()

    shown: list[Any] = [
        SimpleNamespace(
            id=f"snap-{number:02}",
            source_sandbox_id=source,
            create_time=START + timedelta(days=day, seconds=number),
        )
        for number, (source, day, deleted) in enumerate(rows)
        if not deleted
    ]
    if keep is None and age is None:
        return
    older_than = None if age is None else timedelta(days=age)
    expected = prunable(shown, keep_last=keep, older_than=older_than, now=at)
    assert asyncio.run(chosen()) == [each.id for each in expected]
