"""`forkpointd` that is killed (SIGKILL, as `kill -9` does), held or failed at one named step of
its own work.

    python killing_server.py MODULE:NAME:before|after[:N] serve ...
    python killing_server.py MODULE:NAME:hold=FILE serve ...       waits there until FILE is gone
    python killing_server.py MODULE:NAME:fail=ERRNO serve ...      raises OSError, every time

`MODULE:NAME` is a function or method of the server (`Class.method`); the Nth call of it (the first
unless told) ends the process right before it begins or right after it has returned. With `A>B` step
A only arms step B; several steps are separated by commas. Nothing in the server knows about this.
"""

from __future__ import annotations

import asyncio
import functools
import importlib
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any


def die() -> None:
    """What `kill -9` does."""
    os.kill(os.getpid(), signal.SIGKILL)
    signal.pause()


def hold(real: Any, file: Path) -> Any:
    """The step, held at its beginning as long as FILE is there. FILE.reached says it is held."""

    def blocked() -> bool:
        if not file.exists():
            return False
        file.with_suffix(".reached").touch()
        return True

    @functools.wraps(real)
    async def async_wrapper(*arguments: Any, **named: Any) -> Any:
        while blocked():
            await asyncio.sleep(0.005)
        return await real(*arguments, **named)

    @functools.wraps(real)
    def wrapper(*arguments: Any, **named: Any) -> Any:
        while blocked():
            time.sleep(0.005)
        return real(*arguments, **named)

    return async_wrapper if asyncio.iscoroutinefunction(real) else wrapper


def fail(number: int) -> Any:
    """A step that fails as the kernel would."""

    def wrapper(*_: Any, **__: Any) -> Any:
        raise OSError(number, os.strerror(number))

    return wrapper


def arm(point: str) -> None:
    """Patches the step named by `point`."""
    point, _, then = point.partition(">")
    module_name, name, when, *rest = point.split(":")
    left = [int(rest[0]) if rest else 1]
    owner: Any = importlib.import_module(module_name)
    *path, attribute = name.split(".")
    for part in path:
        owner = getattr(owner, part)
    real = getattr(owner, attribute)
    kind, _, value = when.partition("=")
    if kind in ("hold", "fail"):
        setattr(owner, attribute, hold(real, Path(value)) if kind == "hold" else fail(int(value)))
        return

    def act() -> None:
        if then:
            arm(then)
        else:
            die()

    def due() -> bool:
        left[0] -= 1
        return left[0] == 0

    if asyncio.iscoroutinefunction(real):

        @functools.wraps(real)
        async def wrapper(*arguments: Any, **named: Any) -> Any:
            now = due()
            if now and when == "before":
                act()
            result = await real(*arguments, **named)
            if now and when == "after":
                act()
            return result

    else:

        @functools.wraps(real)
        def wrapper(*arguments: Any, **named: Any) -> Any:
            now = due()
            if now and when == "before":
                act()
            result = real(*arguments, **named)
            if now and when == "after":
                act()
            return result

    setattr(owner, attribute, wrapper)


if __name__ == "__main__":
    for each in sys.argv[1].split(","):
        arm(each)
    from forkpointd.__main__ import main

    sys.exit(main(sys.argv[2:]))
