"""For all tests."""

from __future__ import annotations

import signal


def pytest_configure() -> None:
    """A shell starts what it runs in the background with Ctrl-C ignored, and a process hands that
    on to those it starts: there are tests that end such by SIGINT."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
