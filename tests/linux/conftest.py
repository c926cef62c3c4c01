"""The lab runs once for all tests here; each of them looks at a part of what it told."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

import pytest

from tests.linux.debian import UnavailableError
from tests.linux.machine import Machine, Told

KEPT = Path(__file__).resolve().parents[2] / "build/test-linux"
"""What was said in the last run; the disks are gone with the run."""


@pytest.fixture(scope="session")
def told() -> Told:
    """The whole story. Skips where the lab can't be built."""
    with tempfile.TemporaryDirectory(prefix="forkpoint-linux-") as folder:
        try:
            machine = Machine(Path(folder))
            machine.build()
        except UnavailableError as error:
            pytest.skip(f"no lab here: {error}")
        story = machine.run()
        shutil.rmtree(KEPT, ignore_errors=True)
        KEPT.mkdir(parents=True)
        for log in machine.logs:
            if log.exists():
                shutil.copyfile(log, KEPT / log.name)
    return story
