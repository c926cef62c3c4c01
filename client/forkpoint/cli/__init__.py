"""The command line `forkpoint`.

Plain text where the output is no terminal, `--json` on every command, and exit codes for scripts
(`forkpoint.cli.exits`). Heavy imports wait until a command runs, so that help is quick.
"""

from __future__ import annotations

import os
import sys


def main() -> None:
    """Runs the command line and ends the process."""
    # gRPC's core would write to standard error what every failed call says anyway. It looks at
    # this when it is loaded, which nothing above this line does.
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    try:
        from forkpoint.cli.app import app

        app()
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:
        # Who read the output has gone, as `head` does: nothing to say, and nobody to say it to.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
