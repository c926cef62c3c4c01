"""The registry when its process is killed, and when its disk is full: what was acknowledged is
there, what was not is whole or not there, and nothing is given out twice."""

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from forkpointd.model import BranchStage, DirtyBase
from forkpointd.registry import Registry

WRITER = '''
"""Writes without end, says on stdout what it hands over (`try`) and what was acknowledged (`done`).
"""
import asyncio, sys
from dataclasses import replace
from pathlib import Path
from forkpointd.model import BranchStage, DirtyBase
from forkpointd.registry import Registry
from tests.unit.registry_making import at, branch, sandbox, snapshot

def say(*words):
    sys.stdout.write(" ".join(map(str, words)) + "\\n")
    sys.stdout.flush()

async def one(registry, name):
    source = sandbox(f"sb-{name}")
    work = branch(name, sandbox_id=source.sandbox_id, snapshot_id=f"snap-{name}")
    say("try", name)
    await registry.insert_sandboxes([source])
    await registry.insert_branch(work)
    say("admitted", name)
    await registry.put_branch(
        replace(work, stage=BranchStage.READY, sequence=2, end_time=at(1)),
        sandbox=replace(source, dirty_base=DirtyBase.of(work.snapshot_id)),
        snapshot=snapshot(work.snapshot_id, branch_id=name),
    )
    say("serial", await registry.next_serial())
    say("ready", name)

async def main(path, prefix):
    registry = await Registry.open(Path(path))
    number = 0
    while True:
        await asyncio.gather(*(one(registry, f"{prefix}-{number + n}") for n in range(8)))
        number += 8

asyncio.run(main(sys.argv[1], sys.argv[2]))
'''

ROOT = Path(__file__).parents[2]


def write_and_kill(script: Path, database: Path, prefix: str, lines: int) -> list[list[str]]:
    """Runs the writer, kills it after so many lines; returns all that it said before it died."""
    environment = os.environ | {"PYTHONPATH": f"{ROOT / 'server'}:{ROOT}"}
    with subprocess.Popen(
        [sys.executable, script, database, prefix],
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
    ) as process:
        assert process.stdout is not None
        said = [process.stdout.readline() for _ in range(lines)]
        process.kill()
        said += process.stdout.readlines()
    assert process.returncode == -signal.SIGKILL, said
    return [line.split() for line in said if line.endswith("\n")]


async def test_a_killed_server_has_lost_nothing_that_it_acknowledged(tmp_path: Path) -> None:
    script, database = tmp_path / "writer.py", tmp_path / "forkpoint.db"
    write(script)
    said: list[list[str]] = []
    for round_, lines in enumerate([1, 30, 101, 307]):
        said += write_and_kill(script, database, f"b{round_}", lines)
        registry = await Registry.open(database)
        await check(registry, said)
        serials = [int(words[1]) for words in said if words[0] == "serial"]
        fresh = await registry.next_serial()
        assert fresh > max(serials, default=0)
        assert len(set(serials)) == len(serials)
        said.append(["serial", str(fresh)])
        assert await registry.read(lambda c: c.execute("PRAGMA integrity_check").fetchall()) == [
            ("ok",)
        ]
        await registry.close()


def write(script: Path) -> None:
    script.write_text(WRITER)


async def check(registry: Registry, said: list[list[str]]) -> None:
    """The stored state is one that the writer's words allow."""
    tried, admitted, ready = (
        {words[1] for words in said if words[0] == word} for word in ("try", "admitted", "ready")
    )
    page = await registry.list_branches(page_size=100_000)
    stored = {row.branch_id: row for row in page.items}
    assert admitted <= stored.keys() <= tried
    assert {n for n, row in stored.items() if row.stage is BranchStage.READY} >= ready
    snapshots = {
        row.snapshot_id for row in (await registry.list_snapshots(page_size=100_000)).items
    }
    for name, row in stored.items():
        source = await registry.get_sandbox(f"sb-{name}")
        assert source is not None
        # Stage, snapshot and base were one commit: all of them, or none.
        is_ready = row.stage is BranchStage.READY
        assert (row.snapshot_id in snapshots) is is_ready
        expected = DirtyBase.of(row.snapshot_id) if is_ready else DirtyBase.empty()
        assert source.dirty_base == expected
        assert (row.sequence == 2) is is_ready


# --- a full disk ---

FULL_DISK = '''
"""In a mount namespace of its own: fills a tiny file system through the registry."""
import asyncio, subprocess, sys
from pathlib import Path
from forkpointd.model import ForkpointError, Reason
from forkpointd.registry import Registry
from tests.unit.registry_making import sandbox

async def main(folder):
    registry = await Registry.open(folder / "forkpoint.db")
    acknowledged = set()
    refused = 0
    for number in range(10_000):
        names = [f"sb-{number}-{n}" for n in range(4)]
        outcomes = await asyncio.gather(
            *(registry.insert_sandboxes([sandbox(n, labels={"a": "x" * 500})]) for n in names),
            return_exceptions=True,
        )
        acknowledged |= {n for n, o in zip(names, outcomes) if o is None}
        for outcome in outcomes:
            if outcome is not None:
                assert isinstance(outcome, ForkpointError), repr(outcome)
                assert outcome.reason is Reason.NO_DISK_SPACE, outcome
                refused += 1
        if refused > 20:
            break
    assert refused > 20 and len(acknowledged) > 20, (refused, len(acknowledged))
    assert {row.sandbox_id for row in await registry.all_sandboxes()} == acknowledged
    # The source is named so that mount doesn't repeat options, such as uid=, that an ordinary
    # user's namespace refuses.
    subprocess.run(["mount", "-o", "remount,size=8m", "none", folder], check=True)
    await registry.insert_sandboxes([sandbox("sb-after")])
    acknowledged.add("sb-after")
    await registry.close()
    registry = await Registry.open(folder / "forkpoint.db")
    assert {row.sandbox_id for row in await registry.all_sandboxes()} == acknowledged
    await registry.close()
    print("held", len(acknowledged))

asyncio.run(main(Path(sys.argv[1])))
'''


def test_on_a_full_disk_writes_are_refused_until_there_is_room_and_none_is_lost(
    tmp_path: Path,
) -> None:
    unshare = shutil.which("unshare")
    if unshare is None:
        pytest.skip("no unshare(1): can't mount a tiny file system")
    namespace = [unshare, "--mount"]
    if os.geteuid():
        namespace += ["--user", "--map-root-user"]
    if subprocess.run([*namespace, "true"], capture_output=True, check=False).returncode:
        pytest.skip("this host gives no mount namespace: can't mount a tiny file system")
    script, folder = tmp_path / "full.py", tmp_path / "tiny"
    script.write_text(FULL_DISK)
    folder.mkdir()
    done = subprocess.run(
        [
            *namespace,
            "sh",
            "-c",
            'mount -t tmpfs -o size=400k none "$1" && exec "$2" "$3" "$1"',
            "sh",
            folder,
            sys.executable,
            script,
        ],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"PYTHONPATH": f"{ROOT / 'server'}:{ROOT}"},
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("held ")
    assert not list(folder.iterdir()), "the mount was the namespace's own"
