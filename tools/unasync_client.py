"""Makes the sync client, client/forkpoint/_sync, of the async one, client/forkpoint/_async.

The client is written once. Taking `async` and `await` away makes most of the twin; what differs
is behind `forkpoint._seam`, whose two modules have the same names. Two marks in the async files
say the rest:

    # <async only> ... # </async only>    lines that the twin doesn't have
    some code  # sync: other code         a line that reads otherwise in the twin

    python tools/unasync_client.py           write what is missing or stale
    python tools/unasync_client.py --check   exit 1, naming the files, when the twin is stale
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SOURCE = Path("client/forkpoint/_async")
TARGET = Path("client/forkpoint/_sync")

HEADER = "# Made of {source} by tools/unasync_client.py: never edit.\n"

_SUBSTITUTIONS = [
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"async for (\w+) in source\.branch\(", r"for \1 in source.branching("),
        (r"_seam import aio as seam", "_seam import blocking as seam"),
        (r"\bAsyncGenerator\[(.+), None\]", r"Generator[\1, None, None]"),
        (r"\bAsyncGenerator\b", "Generator"),
        (r"\baclosing\b", "closing"),
        (r"from grpc\.aio import", "from grpc import"),
        (r"forkpoint\._async\b", "forkpoint._sync"),
        (r"forkpoint\.connect\(\)", "forkpoint.sync.connect()"),
        (r"\basync (def|with|for)\b", r"\1"),
        (r"\bawait ", ""),
        (r"\bAsyncIterator\b", "Iterator"),
        (r"\bStopAsyncIteration\b", "StopIteration"),
        (r"\bAwaitable\[(\w+)\]", r"\1"),
        (r"\bAwaitable, ", ""),
        (r"__(a)(enter|exit|iter|next)__", r"__\2__"),
    )
]
_ASYNC_ONLY = re.compile(r"^ *# <async only>\n.*?^ *# </async only>\n", re.MULTILINE | re.DOTALL)
_SYNC_LINE = re.compile(r"^( *).*  # sync: (.*)$", re.MULTILINE)


def convert(text: str, name: str) -> str:
    """The sync form of an async file's text, before it is formatted."""
    text = _ASYNC_ONLY.sub("", text)
    text = _SYNC_LINE.sub(r"\1\2", text)
    for pattern, replacement in _SUBSTITUTIONS:
        text = pattern.sub(replacement, text)
    return HEADER.format(source=f"{SOURCE}/{name}") + text


def wanted() -> dict[str, str]:
    """The twin's files by name, as they should be: without needless imports, formatted."""
    files = sorted((ROOT / SOURCE).glob("*.py"))
    if not files:
        raise SystemExit(f"no file in {ROOT / SOURCE}")
    twin = {f.name: convert(f.read_text("utf-8"), f.name) for f in files}
    twin["__init__.py"] = (
        HEADER.format(source=SOURCE) + '"""The sync client: the async one without waiting."""\n'
    )
    with tempfile.TemporaryDirectory(prefix="forkpoint-unasync-") as scratch:
        for name, text in twin.items():
            Path(scratch, name).write_text(text, "utf-8")
        for command in (["check", "--select", "F401,I", "--fix-only"], ["format"]):
            ruff = [sys.executable, "-m", "ruff", *command, "--quiet", "--no-cache"]
            settings = ["--config", str(ROOT / "pyproject.toml")]
            subprocess.run([*ruff, *settings, scratch], check=True)
        return {name: Path(scratch, name).read_text("utf-8") for name in twin}


def stale(twin: dict[str, str]) -> list[str]:
    """Names of the files that differ from what the async client says."""
    present = {f.name: f.read_text("utf-8") for f in (ROOT / TARGET).glob("*.py")}
    return sorted(n for n in twin.keys() | present.keys() if twin.get(n) != present.get(n))


def write() -> list[str]:
    """Brings the twin up to date; returns the files that were changed."""
    twin = wanted()
    names = stale(twin)
    (ROOT / TARGET).mkdir(exist_ok=True)
    for name in names:
        if name in twin:
            (ROOT / TARGET / name).write_text(twin[name], "utf-8")
        else:
            (ROOT / TARGET / name).unlink()
    return names


def main() -> int:
    """Run as a command; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--check", action="store_true", help="only look; exit 1 when stale")
    if parser.parse_args().check:
        names = stale(wanted())
        for name in names:
            print(f"{TARGET / name} is stale: run python tools/unasync_client.py", file=sys.stderr)
        return 1 if names else 0
    for name in write():
        print(f"wrote {TARGET / name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
