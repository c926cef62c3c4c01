"""What the simulator says it is, and which Firecracker it follows."""

from __future__ import annotations

from typing import Final

FOLLOWS: Final = "1.12.1"
"""The Firecracker release whose behaviour and texts are simulated."""

APP_NAME: Final = "Firecracker simulator"
VMM_VERSION: Final = f"{FOLLOWS}-simulator"
"""`vmm_version` of GET / and `firecracker_version` of GET /version."""

VERSION_LINE: Final = f"Firecracker-simulator v{FOLLOWS}"
"""First line that `--version` prints."""

SNAPSHOT_VERSION: Final = "6.0.0"
"""Data format version in a vmstate file: Firecracker 1.12's number, under a magic of our own."""
