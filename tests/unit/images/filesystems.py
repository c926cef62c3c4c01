"""Real file systems, made for a test, and calls that fail on demand."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from forkpointd.images import syscalls

Mount = Callable[..., Path]


@contextmanager
def mounted(folder: Path, kind: str, options: str, mkfs: list[str], mib: int) -> Iterator[Path]:
    if os.geteuid() != 0:
        pytest.skip(f"only root can mount {kind}")
    point = folder / "mnt"
    point.mkdir()
    command = ["mount", "-t", kind]
    if kind == "tmpfs":
        command += ["-o", options or "size=64m", "tmpfs", str(point)]
    else:
        maker = shutil.which(f"mkfs.{kind}", path=os.environ.get("PATH", "") + ":/usr/sbin:/sbin")
        if maker is None:
            pytest.skip(f"there is no mkfs.{kind} on this machine")
        image = folder / "image"
        with image.open("wb") as file:
            file.truncate(mib << 20)
        _run_or_skip([maker, *mkfs, str(image)])
        command += ["-o", ",".join(["loop", options] if options else ["loop"])]
        command += [str(image), str(point)]
    _run_or_skip(command)
    try:
        yield point
    finally:
        subprocess.run(["umount", str(point)], check=True, capture_output=True)


def _run_or_skip(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        why = done.stderr.strip().partition("\n")[0]
        pytest.skip(f"{' '.join(command[:3])} doesn't work here: {why}")


class Failing:
    """Lets the Nth of all calls to some functions of `syscalls` fail, and counts them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._patch = monkeypatch
        self.calls = 0
        self.fail_at: int | None = None
        self.errno = 0

    def watch(self, *names: str) -> None:
        """Counts the calls of these."""
        for name in names:
            self._patch.setattr(syscalls, name, self._counting(getattr(syscalls, name)))

    def at(self, call: int | None, number: int) -> None:
        """From now on the `call`th call, counted from 1, raises OSError `number`."""
        self.calls, self.fail_at, self.errno = 0, call, number

    def _counting(self, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            self.calls += 1
            if self.calls == self.fail_at:
                raise OSError(self.errno, os.strerror(self.errno))
            return real(*arguments)

        return call
