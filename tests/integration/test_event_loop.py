"""The event loop never waits for a disk: no blocking file call runs on its thread.

The server runs inside this test's own loop. While it boots, branches, forks, restarts its
sandboxes' bookkeeping and deletes, every file call of the interpreter is watched: those with audit
events by an audit hook, the others by a wrapper around the function.
"""

from __future__ import annotations

import asyncio
import fcntl
import os
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from forkpointd.config import Settings
from forkpointd.daemon import Daemon
from forkpointd.vmm import Binary
from tests.integration.serving import DIFF, FULL, House

AUDITED = {
    "open",
    "os.listdir",
    "os.scandir",
    "os.rename",
    "os.remove",
    "os.rmdir",
    "os.mkdir",
    "os.link",
    "os.symlink",
    "os.truncate",
    "os.chmod",
    "sqlite3.connect",
    "subprocess.Popen",
}
WRAPPED = (
    "fsync",
    "fdatasync",
    "pread",
    "pwrite",
    "preadv",
    "copy_file_range",
    "sendfile",
    "stat",
    "statvfs",
    "lseek",
    "ftruncate",
    "posix_fallocate",
)


class Watch:
    """Collects blocking file calls of one thread."""

    def __init__(self) -> None:
        self.thread = threading.get_ident()
        self.active = False
        self.calls = 0
        self.elsewhere = 0
        self.offences: list[str] = []

    def note(self, what: str) -> None:
        if not self.active:
            return
        self.calls += 1
        if threading.get_ident() != self.thread:
            self.elsewhere += 1
            return
        frame = sys._getframe(1)  # not `traceback`: that reads source files
        while frame is not None:
            file = frame.f_code.co_filename
            if "/forkpointd/" in file:
                name = frame.f_code.co_qualname
                self.offences.append(f"{what} at {file}:{frame.f_lineno} {name}")
                return
            frame = frame.f_back  # type: ignore[assignment]


_watch: Watch | None = None


def _hook(event: str, arguments: tuple[Any, ...]) -> None:
    if _watch is not None and event in AUDITED:
        _watch.note(f"{event} {arguments[:1]}")


sys.addaudithook(_hook)


@contextmanager
def watching(monkeypatch: pytest.MonkeyPatch) -> Iterator[Watch]:
    global _watch
    watch = _watch = Watch()

    def wrap(module: Any, name: str) -> None:
        real: Callable[..., Any] = getattr(module, name)

        def wrapper(*arguments: Any, **named: Any) -> Any:
            watch.note(name)
            return real(*arguments, **named)

        monkeypatch.setattr(module, name, wrapper)

    for name in WRAPPED:
        wrap(os, name)
    wrap(fcntl, "ioctl")
    try:
        yield watch
    finally:
        _watch = None
        monkeypatch.undo()


async def test_no_blocking_file_call_runs_on_the_loop(
    binary: Binary, witness_kernel: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    house = House(tmp_path, binary, witness_kernel)
    for name, value in house.environment().items():
        if name.startswith("FORKPOINT_"):
            monkeypatch.setenv(name, value)
    settings = Settings.load(
        None,
        data_dir=house.data_dir,
        listen=f"unix:{house.socket}",
        image_roots=(house.images,),
    )
    daemon = Daemon(settings, lambda _: None)
    serving = asyncio.create_task(daemon.run())
    try:
        await house.connect()
        with watching(monkeypatch) as watch:
            watch.active = True
            source = await house.boot("src")
            await source.dirty(16)
            await house.ready("src", mode=FULL, snapshot_id="full")
            await source.dirty(16)
            branch = await house.ready("src", mode=DIFF)
            await house.fork(branch.snapshot_id, 3, fork_id="kids")
            await house.delete_snapshot("full")
            for sandbox_id in ("kids-0", "kids-1", "kids-2", "src"):
                await house.delete(sandbox_id)
            watch.active = False
        assert watch.elsewhere > 100, f"only {watch.calls} file calls were seen: is it watching?"
        assert watch.offences == []
    finally:
        await house.disconnect()
        daemon.stop()
        await serving
        await house.close()
