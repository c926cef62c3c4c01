"""The server's log: lines on standard error, for a person or a journal."""

from __future__ import annotations

import logging
import sys


def configure_logging(level: str) -> None:
    """Sends all logs of this process to standard error from `level` (a name) on."""
    logging.basicConfig(
        level=level.upper(),
        format="%(asctime)s %(levelname)s %(name)s: %(message)s",
        stream=sys.stderr,
    )
