"""The server's side of a window with drives: a guardian is started, told to begin, listened to.

The window's requests are the guardian's (`guardian.py`): it resumes the source if this server is
killed. The other way round this server resumes the source if the guardian is lost: it ends, or
gives no sign of life. Only where both are ended at once nobody is left to do it; then it is the
next start of the server that restores what the owner wishes.
"""

from __future__ import annotations

import json
import logging
import os
import select
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from forkpointd.model import now
from forkpointd.vmm.api import ApiConnection, ApiReply, VmmError, VmmGone
from forkpointd.vmm.binary import memory_write_failed
from forkpointd.vmm.window import (
    PAUSE_REQUEST,
    RESUME_REQUEST,
    DriveOutcome,
    WindowOutcome,
    create_request,
)

GUARDIAN = Path(__file__).with_name("guardian.py")
START_SECONDS = 20.0
"""From its start to its word that it is ready: an interpreter without packages, 30 ms."""
SILENT_SECONDS = 5.0
"""A guardian shows some sign of life every 0.25 s. One that was stopped, or hangs, doesn't."""
RESUME_TIMES = 3
END_SECONDS = 1.0
"""How long its end is waited for; one that hangs in the kernel is left to itself."""
RECEIVE_BYTES = 64 * 1024

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class DriveClone:
    """A drive's file, and the empty file that is to become its clone."""

    drive_id: str
    source_path: Path
    target_path: Path


@dataclass(frozen=True, slots=True)
class DriveClones:
    """What a window clones."""

    drives: tuple[DriveClone, ...]
    allow_copy: bool
    """Copy where there is no reflink."""
    clone_seconds: float
    """After which the source is resumed without them."""


class GuardedWindow:
    """A window with drives, ready to be run once. Close it if it is not."""

    def __init__(
        self,
        connection: ApiConnection,
        folder: Path,
        version: str,
        *,
        full: bool,
        vmstate_name: str,
        memory_name: str,
        was_paused: bool,
        clones: DriveClones,
    ) -> None:
        """Starts the guardian and waits until it is ready. `connection` is its own from then on,
        and closed here, whatever happens. Blocks. Raises VmmError where it does not start, OSError
        for a file that can't be opened."""
        self.was_paused = was_paused
        self._folder = folder
        self._version = version
        self._used = False
        self._unread = bytearray()
        create = create_request(full=full, vmstate_name=vmstate_name, memory_name=memory_name)
        with ExitStack() as held:
            held.callback(connection.close)
            drives = []
            for each in clones.drives:
                source = os.open(each.source_path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
                held.callback(os.close, source)
                target = os.open(each.target_path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
                held.callback(os.close, target)
                drives.append((each.drive_id, source, target))
            api = connection.fileno()
            specification = {
                "api": api,
                "pause": None if was_paused else PAUSE_REQUEST.encode().decode("latin-1"),
                "create": create.encode().decode("latin-1"),
                "resume": None if was_paused else RESUME_REQUEST.encode().decode("latin-1"),
                "drives": drives,
                "allow_copy": clones.allow_copy,
                "clone_seconds": clones.clone_seconds,
            }
            self._process = subprocess.Popen(
                [sys.executable, "-I", "-S", str(GUARDIAN), json.dumps(specification)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                bufsize=0,
                pass_fds=(api, *(fd for _, *pair in drives for fd in pair)),
                cwd="/",
                start_new_session=True,  # whoever ends the server's session does not end it
            )
        try:
            self._expect_ready()
        except BaseException:
            self._end(lost=True)
            raise

    @property
    def guardian_pid(self) -> int:
        """The guardian's process."""
        return self._process.pid

    def run(self) -> WindowOutcome:
        """Opens the window and waits for its end, as `Window.run` does."""
        if self._used:
            raise RuntimeError("a window runs once")
        self._used = True
        start_time, begin_ns = now(), time.monotonic_ns()
        story = _Story()
        assert self._process.stdin is not None
        try:
            with suppress(BrokenPipeError):
                self._process.stdin.write(b"g")
            for facts in self._reports(SILENT_SECONDS):
                story.add(facts)
                if story.ended:
                    break
        except (OSError, ValueError, KeyError) as error:
            log.error("the guardian of the window in %s is not understood: %r", self._folder, error)
        finally:
            self._end(lost=not story.ended)
        if not story.ended:
            log.error("the guardian of the window in %s was lost", self._folder)
            self._resume(story)
        end_ns = story.end_ns or time.monotonic_ns()
        create = story.replies.get("create")
        return WindowOutcome(
            start_time=start_time,
            total_us=(end_ns - (story.start_ns or begin_ns)) // 1000,
            create_reply=create,
            pause_reply=story.replies.get("pause"),
            resume_reply=story.replies.get("resume"),
            process_gone=story.gone,
            memory_write_failed=create is not None
            and not create.ok
            and memory_write_failed(self._version, create.fault_message),
            drives=story.drives(),
            guardian_lost=not story.ended,
        )

    def close(self) -> None:
        """Gives up a window that was not run. Idempotent."""
        if not self._used:
            self._used = True
            self._end(lost=False)

    def _expect_ready(self) -> None:
        facts = next(self._reports(START_SECONDS), None)
        if facts is None or facts.get("step") != "ready":
            code = self._process.poll()
            raise VmmError(
                "the guardian of the pause window did not start"
                + ("" if code is None else f": exit code {code}")
            )

    def _reports(self, silent_seconds: float) -> Iterator[dict[str, Any]]:
        """What the guardian says, until it ends or has been silent for so long."""
        assert self._process.stdout is not None
        fd = self._process.stdout.fileno()
        poll = select.poll()
        poll.register(fd, select.POLLIN)
        while poll.poll(silent_seconds * 1000):
            data = os.read(fd, RECEIVE_BYTES)
            if not data:
                return
            self._unread += data
            while (end := self._unread.find(b"\n")) >= 0:
                line = bytes(self._unread[:end])
                del self._unread[: end + 1]
                if line:
                    yield json.loads(line)

    def _resume(self, story: _Story) -> None:
        """Resumes the source in the place of a guardian that was lost. Its last request may be with
        Firecracker still, unread, and be done after ours: so it is looked at and asked again."""
        story.end_ns = 0
        if self.was_paused:
            return
        try:
            with ApiConnection.open(self._folder, SILENT_SECONDS) as connection:
                for _ in range(RESUME_TIMES):
                    story.replies["resume"] = connection.pipeline(RESUME_REQUEST.encode(), 1)[0]
                    if connection.request("GET", "/")["state"] == "Running":
                        break
        except VmmGone:
            story.gone = True
        except (VmmError, OSError, KeyError, TypeError):
            # It is not known whether it runs: `resume_failed` has it asked for again.
            story.replies["resume"] = ApiReply(0, b"the source could not be resumed")

    def _end(self, *, lost: bool) -> None:
        """Lets the guardian go, and ends one that doesn't by itself, or is `lost`. A thread of it
        that hangs in the kernel keeps it from its end, and is left to itself."""
        process = self._process
        assert process.stdin is not None and process.stdout is not None
        with suppress(BrokenPipeError):
            process.stdin.close()
        try:
            process.wait(0 if lost else END_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            with suppress(subprocess.TimeoutExpired):
                process.wait(END_SECONDS)
        process.stdout.close()


class _Story:
    """What a guardian has told."""

    def __init__(self) -> None:
        self.replies: dict[str, ApiReply] = {}
        self.start_ns = 0
        self.end_ns = 0
        self.ended = False
        self.gone = False
        self._clone: dict[str, Any] | None = None
        self._failed = ""

    def add(self, facts: dict[str, Any]) -> None:
        """One report."""
        step, at = facts["step"], facts["at"]
        if step == "start":
            self.start_ns = at
        elif step == "clone":
            self._clone = facts
            self.end_ns = at
        elif step == "failed":
            self._failed = facts["error"]
        elif step == "gone":
            self.gone = True
            self.end_ns = at
        elif step == "end":
            self.ended = True
        else:
            self.replies[step] = ApiReply(facts["status"], facts["body"].encode("latin-1"))
            self.end_ns = at

    def drives(self) -> DriveOutcome:
        """What became of the drives."""
        if self._clone is None:
            return DriveOutcome(fault=self._failed or "the window ended before they were cloned")
        return DriveOutcome(
            clone_us=self._clone["us"],
            copied=tuple(self._clone["copied"]),
            fault=self._clone["fault"],
        )
