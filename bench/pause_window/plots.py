"""The plots of RESULTS.md."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, NullFormatter, NullLocator

from bench.pause_window.cells import (
    CALLS,
    DIFF,
    DISK,
    FORKS,
    FRESH,
    FULL,
    IDLE,
    NOTHING,
    PREALLOCATED,
    PRECOPIES,
    REPEATED,
    SEQUENTIAL,
    SIZES_MIB,
    TMPFS,
)
from bench.pause_window.rows import READY_SECONDS, Row
from bench.plotting import Style, finished, lines, logarithmic, panels, size_text
from bench.rounds import FLOOR, FORKPOINT

STYLE: Style = {
    FLOOR: ("#555555", "o", "floor: plain sockets, one write"),
    PREALLOCATED: ("#56B4E9", "v", "floor, pages allocated before"),
    FORKPOINT: ("#D55E00", "s", "forkpoint"),
    SEQUENTIAL: ("#009E73", "^", "sequential-disk: calls one by one"),
}
"""Colour, mark and words; colours that differ also for the colour-blind (Okabe and Ito)."""

WINDOW_LABEL = "pause window, ms (log)"


# --- the phases --------------------------------------------------------------------------------


def _memory(rows: Sequence[Row]) -> Figure:
    figure, axes = panels(
        2, 2, "1a. Pause window of an idle source by its memory", height=7.2, sharey="row"
    )
    for place, mode, staging in (
        (axes[0][0], DIFF, TMPFS),
        (axes[0][1], DIFF, DISK),
        (axes[1][0], FULL, TMPFS),
        (axes[1][1], FULL, DISK),
    ):
        chosen = [
            row
            for row in rows
            if row.mode == mode and row.cell.guest == IDLE and row.cell.staging == staging
        ]
        on = "in memory (tmpfs)" if staging == TMPFS else "on the disk"
        place.set_title(f"{mode}, staged {on}")
        _lines(place, chosen, lambda row: row.cell.source_mib)
        place.set_xscale("log", base=2)
        place.set_xticks(SIZES_MIB, [size_text(size) for size in SIZES_MIB])
        place.xaxis.set_minor_locator(NullLocator())
        _milliseconds(place)
        place.set_xlabel("memory of the source (log)")
    return finished(figure, axes)


def _dirtied(rows: Sequence[Row]) -> Figure:
    figure, axes = panels(
        1,
        2,
        "1b. Pause window of a 2 GiB source by what it wrote since the last (DIFF, tmpfs)",
        sharey=True,
    )
    for place, pattern, title in (
        (axes[0][0], FRESH, "pages that it never wrote before"),
        (axes[0][1], REPEATED, "the same pages each time"),
    ):
        chosen = [row for row in rows if row.cell.pattern == pattern and row.cell.guest == IDLE]
        place.set_title(title)
        _lines(place, chosen, lambda row: row.cell.dirty_mib)
        place.set_xscale("log")
        ticks = [10, 25, 50, 100, 250, 500, 1000, 2000]
        place.set_xticks(ticks, [str(tick) for tick in ticks])
        place.xaxis.set_minor_formatter(NullFormatter())
        _milliseconds(place)
        place.set_xlabel("written before each window, MiB (log)")
    return finished(figure, axes)


def _in_a_row(rows: Sequence[Row]) -> Figure:
    figure, axes = panels(
        1, 2, "1c. Branch after branch of one 2 GiB source, 100 MiB written before each"
    )
    window, ready = axes[0]
    longest = max(row.cell.in_a_row for row in rows)
    for place, figure_name in ((window, "vmm_total_us"), (ready, READY_SECONDS)):
        for length in sorted({row.cell.in_a_row for row in rows}):
            chosen = [row for row in rows if row.cell.in_a_row == length]
            _lines(
                place,
                chosen,
                lambda row: row.number + 1,
                figure_name=figure_name,
                faint=length not in (10, longest),
                bars=length == 10,
                label=length == 10,
            )
        place.set_xscale("log")
        place.set_xticks([1, 2, 5, 10, 20, 50, 100], ["1", "2", "5", "10", "20", "50", "100"])
        place.xaxis.set_minor_formatter(NullFormatter())
        place.set_xlabel("branch of the row (log); rows of 10, 30 and 100")
    _milliseconds(window)
    window.set_title("pause window")
    ready.set_title("request to a usable snapshot (the floor makes none)")
    _seconds(ready)
    return finished(figure, axes)


def _crossover(rows: Sequence[Row]) -> Figure:
    mib = rows[0].cell.source_mib
    figure, axes = panels(
        1, 1, f"1d. DIFF against FULL: pause window of a {mib} MiB source by what it wrote"
    )
    place = axes[0][0]
    for mode, line in ((DIFF, "-"), (FULL, "--")):
        chosen = [row for row in rows if row.mode == mode]
        _lines(place, chosen, _share, line=line, suffix=f", {mode}")
    _milliseconds(place)
    place.set_xlabel("share of the memory a guest can write to, %")
    return finished(figure, axes)


def _loaded(rows: Sequence[Row]) -> Figure:
    figure, axes = panels(
        1, 2, "1e. Pause window of a 1 GiB source, alone and while others work", sharey=True
    )
    besides = (NOTHING, PRECOPIES, FORKS, CALLS)
    words = ("alone", "8 branches\n(floor: 8 cp)", "100 forks\nagain and again", "unary calls")
    for place, dirty in zip(axes[0], (0, 100), strict=True):
        chosen = [row for row in rows if row.cell.dirty_mib == dirty]
        place.set_title("idle" if not dirty else f"{dirty} MiB written before each window")
        _lines(place, chosen, lambda row: besides.index(row.beside), line="none", spread=0.12)
        place.set_xticks(range(len(besides)), words)
        place.set_xlim(-0.5, len(besides) - 0.5)
        _milliseconds(place)
        place.set_xlabel("beside")
    return finished(figure, axes)


def _writing(rows: Sequence[Row]) -> Figure:
    checked = [row for row in rows if "generation_changes" in row.figures]
    whole = sum(not row.error for row in checked)
    figure, axes = panels(
        1,
        1,
        f"1f. A source that keeps writing: {whole} of {len(checked)} children of its snapshots\n"
        "found the memory of one moment",
    )
    place = axes[0][0]
    _lines(place, rows, lambda row: row.round, bars=False, line="none")
    _milliseconds(place)
    place.xaxis.set_major_locator(MaxNLocator(integer=True))
    place.set_xlabel("round")
    return finished(figure, axes, note="Each point is one snapshot.")


def _ready(rows: Sequence[Row]) -> Figure:
    figure, axes = panels(
        1, 1, "READY: from the request to a usable snapshot of an idle 4 GiB source"
    )
    place = axes[0][0]
    images = sorted({row.cell.touched_mib for row in rows})
    _lines(
        place,
        rows,
        lambda row: images.index(row.cell.touched_mib),
        figure_name=READY_SECONDS,
        line="none",
        spread=0.1,
        words={FLOOR: "cp of as many bytes, and fsync"},
    )
    place.set_xticks(range(len(images)), [f"image of {size_text(image)}" for image in images])
    place.set_xlim(-0.5, len(images) - 0.5)
    place.set_xlabel("what the image holds")
    _seconds(place)
    return finished(figure, axes)


PLOTS: Mapping[str, Callable[[Sequence[Row]], Figure]] = {
    "1a": _memory,
    "1b": _dirtied,
    "1c": _in_a_row,
    "1d": _crossover,
    "1e": _loaded,
    "1f": _writing,
    "ready": _ready,
}


# --- parts -------------------------------------------------------------------------------------


def _lines(place: Axes, rows: Sequence[Row], where: Callable[[Row], float], **how: Any) -> None:
    lines(place, rows, where, STYLE, **{"figure_name": "vmm_total_us", **how})


def _milliseconds(place: Axes) -> None:
    logarithmic(place, WINDOW_LABEL)


def _seconds(place: Axes) -> None:
    logarithmic(place, "seconds (log)")


def _share(row: Row) -> float:
    return round(100 * row.cell.dirty_mib / row.cell.region_mib)
