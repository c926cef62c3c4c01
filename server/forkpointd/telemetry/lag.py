"""How long the event loop was kept waiting: the worst of each interval, in the log.

A ticker asks to be woken every few milliseconds and looks how late it is. What it can't be woken
for is what no client is served for either: a blocking call on the loop's thread, or another thread
that holds the interpreter.
"""

from __future__ import annotations

import asyncio
import logging

TICK_SECONDS = 0.005

log = logging.getLogger(__name__)


async def watch_loop_lag(report_seconds: float) -> None:
    """Logs, every `report_seconds`, the worst lag since the last report. Runs for good."""
    loop = asyncio.get_running_loop()
    while True:
        until, worst = loop.time() + report_seconds, 0.0
        while (before := loop.time()) < until:
            await asyncio.sleep(TICK_SECONDS)
            worst = max(worst, loop.time() - before - TICK_SECONDS)
        log.info("loop lag: worst %.1f ms in %.0f s", 1000 * worst, report_seconds)
