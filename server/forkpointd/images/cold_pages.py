"""Free memory that is slow to write to, because the host has taken it back.

A virtual machine whose balloon device reports free pages gives them to its host. The next write to
each has to wait until the host finds it a new one: 128 MiB into such pages took 250 to 400 ms, into
others 25 (measured in a guest of KVM). A pause window that gets them for its staging file is ten
times as long. So they are had and given back just before: what the kernel frees last it gives out
first.
"""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

from forkpointd.images import syscalls
from forkpointd.images.moving import Gate, ShouldStop, Steps
from forkpointd.model import MIB

BALLOONS = Path("/sys/bus/virtio/drivers/virtio_balloon")
_REPORTS_FREE_PAGES = 5
"""VIRTIO_BALLOON_F_REPORTING: the Virtio specification 1.2, section 5.5.3."""

WARM_BYTES = 32 * MIB
"""Between two looks whether a window is open."""


def free_pages_are_cold(balloons: Path = BALLOONS) -> bool:
    """Whether this machine's host takes free memory away. Blocks."""
    for features in balloons.glob("*/features"):  # the bits in their order, as text
        if features.read_text()[_REPORTS_FREE_PAGES : _REPORTS_FREE_PAGES + 1] == "1":
            return True
    return False


def warm(count: int, *, should_stop: ShouldStop, gate: Gate) -> None:
    """Touches as many bytes of free memory, and frees them again: the pages that are taken next can
    be written to at once. Blocks: 25 ms for 128 MiB that are warm already, ten times that for
    others. What the kernel doesn't give is left out. Raises Stopped."""
    steps = Steps(lambda _: None, should_stop, gate, WARM_BYTES)
    with ExitStack() as held:
        for start in range(0, count, WARM_BYTES):
            steps.before_chunk()
            held.enter_context(syscalls.touched_memory(min(WARM_BYTES, count - start)))
