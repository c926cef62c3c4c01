"""What runs beside a window, in a process of its own so that it takes no turn of the one that
measures: `python -m bench.pause_window.load SPECIFICATION`.

The specification is a JSON object with `kind` and what that kind needs. The process says `ready`
when the first piece of its work is done, goes on until its input is closed, and ends with a JSON
object: the seconds in between, and what was done in them.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

# Before gRPC is imported: processes are spawned beside an open channel.
os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")

from bench.cp import cp_seconds
from bench.floor import FloorError
from bench.fork_floor import ForkFloor
from bench.machine import REPOSITORY
from bench.rounds import TRIAL_FAILURES, describe
from bench.served import Calls, open_channel

REWRITTEN_MIB = 16
"""By each of the sandboxes that are branched without stop, before each branch: what is merged."""
CALLERS = 4
END_SECONDS = 120.0

BYTES, CHILDREN, CALLS = "bytes", "children", "calls"

Work = Callable[[], int]
"""One piece of work; returns how much it was."""


class Workers:
    """Threads that repeat their work until they are told to stop."""

    def __init__(self, works: Sequence[Work]) -> None:
        self._stop = threading.Event()
        self._first = threading.Event()
        self._lock = threading.Lock()
        self._done = 0
        self.error = ""
        self._threads = [threading.Thread(target=self._run, args=(work,)) for work in works]

    def start(self) -> None:
        """Starts them all; returns when one has done a piece."""
        for thread in self._threads:
            thread.start()
        self._first.wait()

    def done(self) -> int:
        """How much all have done until now."""
        with self._lock:
            return self._done

    def stop(self) -> None:
        """Lets each finish what it is at."""
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def _run(self, work: Work) -> None:
        try:
            while not self._stop.is_set():
                amount = work()
                with self._lock:
                    self._done += amount
                self._first.set()
        except TRIAL_FAILURES as error:
            self.error = describe(error)
        finally:
            self._first.set()


def branching(calls: Calls, sandbox_id: str) -> Work:
    """Writes REWRITTEN_MIB and branches, over and over: a pre-copy of the image, and a merge."""

    def work() -> int:
        calls.ask(sandbox_id, f"d{REWRITTEN_MIB}")
        branch = calls.branch(sandbox_id)
        calls.delete_snapshot(branch.snapshot_id)  # its files stay, as the base of the next
        return branch.precopy.done_bytes + branch.merge.done_bytes

    return work


def copying(source: Path, folder: Path) -> Work:
    """cp and fsync."""
    folder.mkdir()
    size = source.stat().st_size

    def work() -> int:
        cp_seconds([source], folder)
        return size

    return work


def forking(calls: Calls, snapshot_id: str, count: int) -> Work:
    """Forks and deletes all children again."""

    def work() -> int:
        children = [child.sandbox_id for child in calls.fork(snapshot_id, count).children]
        calls.delete(children)
        return count

    return work


def forking_raw(floor: ForkFloor, count: int) -> Work:
    """The same by plain sockets."""

    def work() -> int:
        floor.fork(count)
        return count

    return work


def asking(calls: Calls, sandbox_id: str) -> Work:
    """The shortest call there is."""

    def work() -> int:
        calls.get(sandbox_id)
        return 1

    return work


def works_of(spec: Mapping[str, Any]) -> tuple[str, list[Work]]:
    """What is counted, and the work of each thread. Raises KeyError for an unknown kind."""
    if spec["kind"] == "cp":
        source, folder = Path(spec["source"]), Path(spec["folder"])
        return BYTES, [copying(source, folder / str(n)) for n in range(spec["count"])]
    if spec["kind"] == "raw-forks":
        floor = ForkFloor(Path(spec["firecracker"]), Path(spec["folder"]))
        floor.snapshot(Path(spec["kernel"]), spec["memory_mib"])
        return CHILDREN, [forking_raw(floor, spec["count"])]
    calls = Calls(open_channel(Path(spec["socket"])))
    if spec["kind"] == "branches":
        return BYTES, [branching(calls, sandbox_id) for sandbox_id in spec["sandbox_ids"]]
    if spec["kind"] == "forks":
        return CHILDREN, [forking(calls, spec["snapshot_id"], spec["count"])]
    if spec["kind"] == "calls":
        return CALLS, [asking(calls, spec["sandbox_id"]) for _ in range(CALLERS)]
    raise KeyError(spec["kind"])


def main(specification: str) -> int:
    """Runs a load until the input ends."""
    unit, works = works_of(json.loads(specification))
    workers = Workers(works)
    workers.start()
    start, before = time.monotonic(), workers.done()
    print("ready", flush=True)
    sys.stdin.buffer.read()
    seconds, done = time.monotonic() - start, workers.done() - before
    workers.stop()
    print(json.dumps({"seconds": seconds, unit: done, "error": workers.error}), flush=True)
    return 0


@contextmanager
def beside(spec: Mapping[str, Any], folder: Path) -> Iterator[dict[str, float]]:
    """Runs a load while the block runs; what is yielded is filled in at its end, by the names of
    the CSV's columns. `folder`: where its process works.

    Raises FloorError where the load failed.
    """
    process = subprocess.Popen(
        [sys.executable, "-m", "bench.pause_window.load", json.dumps(spec)],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        process_group=0,  # a Ctrl-C is for the bench
    )
    figures: dict[str, float] = {}
    try:
        assert process.stdout is not None
        if process.stdout.readline() != "ready\n":
            raise FloorError(f"the load {spec['kind']} did not start")
        yield figures
        said, _ = process.communicate(timeout=END_SECONDS)
        if process.returncode:
            raise FloorError(f"the load {spec['kind']} ended with {process.returncode}")
        done = json.loads(said)
        if done["error"]:
            raise FloorError(f"the load {spec['kind']} ended: {done['error']}")
        for unit in (BYTES, CHILDREN, CALLS):
            if unit in done:
                figures[f"load_{unit}_per_second"] = done[unit] / done["seconds"]
    except subprocess.TimeoutExpired as error:
        raise FloorError(f"the load {spec['kind']} did not end") from error
    finally:
        process.kill()
        process.communicate()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
