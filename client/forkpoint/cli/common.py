"""What the commands share: their options, and how a command is run and fails."""

from __future__ import annotations

import asyncio
import json
import sys
import warnings
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import Annotated, Any, TypeVar

import typer
from rich.markup import escape

from forkpoint.cli import exits, output
from forkpoint.errors import ForkpointError, VersionMismatchWarning

T = TypeVar("T")

Address = Annotated[
    str | None,
    typer.Option(
        "--address",
        "-a",
        envvar="FORKPOINT_ADDRESS",
        metavar="ADDRESS",
        help="The server: unix:/path, a path, or host:port. Default: this user's own socket.",
    ),
]
Json = Annotated[
    bool, typer.Option("--json", help="Print JSON instead of text; errors too, on standard error.")
]
Labels = Annotated[
    list[str] | None,
    typer.Option("--label", "-l", metavar="KEY=VALUE", help="A label; may be repeated."),
]
AllowDriveCopy = Annotated[
    bool,
    typer.Option(
        "--allow-drive-copy",
        help="Copy writable drives where the server's file system can't clone them (slow).",
    ),
]
Ttl = Annotated[
    str | None,
    typer.Option(metavar="SPAN", help="Time to live, such as 90s, 10m or 1h30m. Default: no end."),
]


def pairs(given: list[str] | None) -> dict[str, str]:
    """KEY=VALUE options as a mapping."""
    found: dict[str, str] = {}
    for text in given or ():
        key, equals, value = text.partition("=")
        if not (key and equals):
            raise ValueError(f"a label is written KEY=VALUE, not {text!r}")
        found[key] = value
    return found


def run(work: Callable[[], Coroutine[Any, Any, T]], *, json: bool) -> T:
    """Runs a command's work; what fails is said once and becomes the exit code."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("always", VersionMismatchWarning)
            warnings.showwarning = _show_warning
            return asyncio.run(work())
    except KeyboardInterrupt:
        raise typer.Exit(exits.INTERRUPTED) from None
    except (ForkpointError, ValueError, BaseExceptionGroup) as error:
        fail(error, json=json)
        raise typer.Exit(exits.code_of(error)) from None


def _show_warning(message: Warning | str, *_: object, **__: object) -> None:
    output.err.print(f"[yellow]warning:[/yellow] {message}")


def fail(error: BaseException, *, json: bool) -> None:
    """Says what failed, on standard error."""
    failures: list[BaseException] = (
        list(error.exceptions) if isinstance(error, BaseExceptionGroup) else [error]
    )
    if json:
        _fail_json(failures)
        return
    for failure in failures:
        output.err.print(f"[bold red]error:[/bold red] {escape(str(failure))}")
        if isinstance(failure, ForkpointError):
            if failure.retry_after is not None:
                output.err.print(f"try again in {output.span(failure.retry_after)}")
            if failure.reason == "INTERNAL" and "incident" in failure.metadata:
                output.err.print(f"incident {failure.metadata['incident']} in the server's log")


def _fail_json(failures: list[BaseException]) -> None:
    """The same for programs."""
    shown = [
        output.error_data(failure)
        if isinstance(failure, ForkpointError)
        else {"code": "INVALID_ARGUMENT", "reason": None, "message": str(failure)}
        for failure in failures
    ]
    said = {"error": shown[0]} if len(shown) == 1 else {"errors": shown}
    sys.stderr.write(json.dumps(said, ensure_ascii=False) + "\n")


async def collect(items: AsyncIterator[T]) -> list[T]:
    """All of an async iterator."""
    return [item async for item in items]
