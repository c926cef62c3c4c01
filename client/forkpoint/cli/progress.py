"""A branch as it goes on: bars in a terminal, a line a stage elsewhere."""

from __future__ import annotations

from types import TracebackType
from typing import Self

from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    ProgressColumn,
    SpinnerColumn,
    Task,
    TaskID,
    TextColumn,
)
from rich.text import Text

from forkpoint import views
from forkpoint.cli import output
from forkpoint.enums import BranchMode, BranchStage, CopyMethod, StagingKind
from forkpoint.views import BranchUpdate, ForkUpdate, PauseWindow

_WORDS = {
    BranchStage.QUEUED: "waits for an earlier branch or its turn to copy",
    BranchStage.PRECOPYING: "pre-copies what is known, while the source runs",
    BranchStage.MERGING: "lays the diff over the image",
    BranchStage.FINALIZING: "makes the snapshot durable",
    BranchStage.FORKING: "starts the children",
}
_WINDOW = "window"
"""The bar that stands for the pause window of a FULL branch, which has no progress to show."""
_SPEED_SECONDS = 0.1
"""A speed over less than this is noise."""


class _Amount(DownloadColumn):
    """How much of how much; nothing where that isn't known."""

    def render(self, task: Task) -> Text:
        return Text() if task.total is None else super().render(task)


class _Speed(ProgressColumn):
    """Bytes a second since the bar is there."""

    def render(self, task: Task) -> Text:
        seconds = task.elapsed if task.finished_time is None else task.finished_time
        if task.total is None or seconds is None or seconds < _SPEED_SECONDS:
            return Text()
        return Text(f"{output.size(int(task.completed / seconds))}/s", style="progress.data.speed")


class _Display:
    """Bars in a terminal, none elsewhere; used as a block around updates."""

    def __init__(self, console: Console, *, quiet: bool) -> None:
        self._progress: Progress | None = None
        if console.is_terminal and not quiet:
            self._progress = Progress(
                SpinnerColumn(finished_text="[green]✓[/green]"),
                TextColumn("{task.description}"),
                BarColumn(bar_width=30),
                _Amount(binary_units=True),
                _Speed(),
                TextColumn("{task.fields[note]}"),
                console=console,
                transient=True,
            )

    def __enter__(self) -> Self:
        if self._progress is not None:
            self._progress.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._progress is not None:
            self._progress.stop()


class CopyDisplay(_Display):
    """Shows one copy."""

    def __init__(self, console: Console, name: str, *, quiet: bool = False) -> None:
        super().__init__(console, quiet=quiet)
        self._bar: TaskID | None = None
        if self._progress is not None:
            self._bar = self._progress.add_task(name, total=None, note="")

    def update(self, progress: views.Progress) -> None:
        """Shows the newest state."""
        if self._progress is not None and self._bar is not None and progress.total_bytes:
            done, total = progress.done_bytes, progress.total_bytes
            self._progress.update(self._bar, completed=done, total=total)


class BranchDisplay(_Display):
    """Shows updates of one branch."""

    def __init__(self, console: Console, *, quiet: bool = False, terse: bool = False) -> None:
        super().__init__(console, quiet=quiet)
        self._console = console
        self._quiet = quiet
        self._terse = terse
        self._shown: BranchStage | None = None
        self._pause_told = False
        self._flatten_told = False
        self._bars: dict[str, TaskID] = {}

    def update(self, update: BranchUpdate) -> None:
        """Shows the newest state."""
        if self._quiet:
            return
        self._wait_for_window(update)
        if update.precopy is not None:
            note = "reflink" if update.precopy.method is CopyMethod.REFLINK else ""
            self._bar("pre-copy", update.precopy, note)
        if update.merge is not None:
            self._bar("merge", update.merge, "")
        if update.fork is not None:
            self.update_fork(update.fork)
        if not self._terse:
            self._tell(update)

    def update_fork(self, update: ForkUpdate) -> None:
        """Shows what children wait for."""
        if self._quiet or update.flatten is None:
            return
        self._bar("flatten", update.flatten, "")
        if self._progress is None and not self._flatten_told:
            self._flatten_told = True
            self._console.print("flatten: makes the layered snapshot one file, for the children")

    def _wait_for_window(self, update: BranchUpdate) -> None:
        """Something that moves while a FULL window, which takes seconds, is open."""
        if self._progress is None:
            return
        full = BranchMode.FULL in (update.mode, update.requested_mode)
        if full and update.pause is None and not update.stage.over:
            if _WINDOW not in self._bars:
                self._bars[_WINDOW] = self._progress.add_task(
                    _WINDOW.ljust(8), total=None, note="all memory is written"
                )
        elif _WINDOW in self._bars:
            self._progress.remove_task(self._bars.pop(_WINDOW))

    def _tell(self, update: BranchUpdate) -> None:
        """Says what is new; stages only where there are no bars that show them."""
        if update.pause is not None and not self._pause_told:
            self._pause_told = True
            self._console.print(escape(pause_line(update.pause)))
        if update.stage is not self._shown:
            self._shown = update.stage
            if self._progress is None and update.stage in _WORDS:
                self._console.print(f"{update.stage.value.lower()}: {_WORDS[update.stage]}")

    def _bar(self, name: str, progress: views.Progress, note: str) -> None:
        if self._progress is None or not progress.total_bytes:
            return
        total, done = progress.total_bytes, progress.done_bytes
        if name not in self._bars:
            self._bars[name] = self._progress.add_task(name.ljust(8), total=total, note=note)
        self._progress.update(self._bars[name], completed=done, total=total, note=note)


def pause_line(pause: PauseWindow) -> str:
    """The pause window in a line."""
    if pause.was_paused:
        return f"the source was paused by its owner; {output.size(pause.dirty_bytes)} written"
    return (
        f"the source stood still for {output.span(pause.total)}"
        f" ({output.size(pause.dirty_bytes)} written)"
    )


def pause_facts(pause: PauseWindow) -> list[tuple[str, str | None]]:
    """The pause window's figures, with where each comes from."""
    where = {StagingKind.TMPFS: "memory", StagingKind.DISK: "disk"}.get(pause.staging, "-")
    if pause.was_paused:
        total = "none: the source was paused by its owner"
    else:
        total = f"{output.span(pause.total)} by the server's clock"
    drives = f" + drives {output.span(pause.drive_clone)}" if pause.drive_clone else ""
    return [
        ("pause", total),
        (
            "  VMM",
            (
                f"{output.span(pause.vmm_total)} = pause {output.span(pause.pause)}"
                f" + write {output.span(pause.snapshot)} + resume {output.span(pause.resume)}"
                f"{drives}"
            ),
        ),
        ("  wrote", f"{output.size(pause.dirty_bytes)}, staged in {where}"),
    ]
