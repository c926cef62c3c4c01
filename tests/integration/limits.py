"""A memory control group for processes that are to have little memory."""

from __future__ import annotations

import errno
import uuid
from pathlib import Path

import pytest

from forkpointd.vmm import memory_cgroup
from tests.integration.refusals import until


class Limit:
    """A memory control group below ours, for processes that are to have little."""

    def __init__(self, limit_bytes: int) -> None:
        own = memory_cgroup()
        if own is None:
            pytest.skip("this host shows no memory control group")
        self.folder = own.folder / f"forkpoint-test-{uuid.uuid4().hex[:8]}"
        try:
            self.folder.mkdir()
        except OSError as error:
            pytest.skip(f"no control group can be made here: {error.strerror}")
        name = "memory.max" if own.version == 2 else "memory.limit_in_bytes"
        try:
            (self.folder / name).write_text(str(limit_bytes))
        except OSError as error:
            self.folder.rmdir()
            pytest.skip(f"the memory of a control group can't be limited here: {error.strerror}")

    @property
    def processes(self) -> Path:
        """A pid that is written there moves its process into the group."""
        return self.folder / "cgroup.procs"

    def take(self, pid: int) -> None:
        """Moves a process into it: what it touches from now on is counted here."""
        self.processes.write_text(str(pid))

    async def remove(self) -> None:
        """Removes it, once it is empty."""

        async def gone() -> bool:
            try:
                self.folder.rmdir()
            except OSError as error:
                assert error.errno == errno.EBUSY, error
                return False
            return True

        await until(gone)
