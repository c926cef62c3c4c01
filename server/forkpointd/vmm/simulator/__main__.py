"""Starts the simulator: `python -m forkpointd.vmm.simulator`, or this file as a script.

As a script (what `simulator_argv` gives, with -I -S) the package is imported by itself, as
`simulator`: the rooms above it, which import asyncio and more, are not needed and not loaded.
"""

from __future__ import annotations

import sys

if __name__ == "__main__":
    if __package__:
        from .process import main
    else:
        import os.path

        sys.path.append(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
        from simulator.process import main  # type: ignore[import-not-found,no-redef,unused-ignore]

    main(sys.argv[1:])
