"""`rm`: several at once, each of which may fail by itself."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field

import typer

from forkpoint.cli import exits, output
from forkpoint.cli.common import fail
from forkpoint.errors import ForkpointError, NotFound


@dataclass(frozen=True, slots=True)
class Deletions:
    """What became of each."""

    deleted: list[str] = field(default_factory=list)
    failures: list[ForkpointError] = field(default_factory=list)


async def delete_each(
    delete: Callable[[str], Awaitable[None]], ids: Sequence[str], *, force: bool
) -> Deletions:
    """Deletes one after the other. `force` is silent about those that are gone already."""
    found = Deletions()
    for each in ids:
        try:
            await delete(each)
            found.deleted.append(each)
        except NotFound as error:
            if not force:
                found.failures.append(error)
        except ForkpointError as error:
            found.failures.append(error)
    return found


def say_deleted(found: Deletions, *, json: bool) -> None:
    """What was deleted, and what could not be; then the exit code is the first failure's."""
    if json:
        output.print_json({"deleted": found.deleted})
    else:
        for name in found.deleted:
            output.out.print(f"deleted {name}")
    for failure in found.failures:
        fail(failure, json=json)
    if found.failures:
        raise typer.Exit(exits.code_of(found.failures[0]))
