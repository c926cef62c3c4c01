"""`python -m forkpointd.witness`: builds the witness guest where needed and prints its path."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import forkpointd.witness
from forkpointd.witness.build import WitnessBuildError, build_witness, cached_witness


def main() -> int:
    """Prints the path on stdout; exits with 1 and the reason on stderr where it can't."""
    parser = argparse.ArgumentParser(
        prog="python -m forkpointd.witness",
        description="Build the witness guest and print its path.",
        epilog=forkpointd.witness.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("out", nargs="?", type=Path, help="put it there as well as in the cache")
    out: Path | None = parser.parse_args().out
    try:
        print(cached_witness() if out is None else build_witness(out))
    except WitnessBuildError as error:
        print(f"witness: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
