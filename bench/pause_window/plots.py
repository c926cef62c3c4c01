"""The plots of RESULTS.md: SVG, the same bytes for the same rows.

Points are medians, bars reach from the 10th to the 90th percentile. A role has one colour and one
mark in all of them.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import matplotlib as mpl

mpl.use("svg")  # before pyplot, which may else ask for a display

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter, NullLocator

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
from bench.pause_window.summary import Group, Spread, grouped
from bench.rounds import FLOOR, FORKPOINT

STYLE: Mapping[str, tuple[str, str, str]] = {
    FLOOR: ("#555555", "o", "floor: plain sockets, one write"),
    PREALLOCATED: ("#56B4E9", "v", "floor, pages allocated before"),
    FORKPOINT: ("#D55E00", "s", "forkpoint"),
    SEQUENTIAL: ("#009E73", "^", "sequential-disk: calls one by one"),
}
"""Colour, mark and words; colours that differ also for the colour-blind (Okabe and Ito)."""

SETTINGS: dict[Any, Any] = {
    "svg.hashsalt": "forkpoint",
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 9,
    "axes.grid": True,
    "grid.alpha": 0.3,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 10,
}
WINDOW_LABEL = "pause window, ms (log)"
SERVED_NOTE = "Points: medians. Bars: 10th to 90th percentile."

Point = tuple[float, Spread]


def draw(rows: Mapping[str, Sequence[Row]], folder: Path) -> dict[str, list[str]]:
    """Writes the plots of the phases that have rows; returns the file names by phase."""
    folder.mkdir(parents=True, exist_ok=True)
    made: dict[str, list[str]] = {}
    with mpl.rc_context(SETTINGS):
        for phase, plot in PLOTS.items():
            if not rows.get(phase):
                continue
            figure = plot(rows[phase])
            name = f"{phase}.svg"
            (folder / name).write_bytes(_svg(figure))
            made[phase] = [name]
    return made


def _svg(figure: Figure) -> bytes:
    out = io.BytesIO()
    figure.savefig(out, format="svg", metadata={"Date": None, "Creator": None})
    plt.close(figure)
    # matplotlib leaves spaces at the ends of some lines.
    return b"\n".join(line.rstrip() for line in out.getvalue().split(b"\n"))


# --- the phases --------------------------------------------------------------------------------


def _memory(rows: Sequence[Row]) -> Figure:
    figure, axes = _panels(
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
        place.set_xticks(SIZES_MIB, [_size(size) for size in SIZES_MIB])
        place.xaxis.set_minor_locator(NullLocator())
        _milliseconds(place)
        place.set_xlabel("memory of the source (log)")
    return _finished(figure, axes)


def _dirtied(rows: Sequence[Row]) -> Figure:
    figure, axes = _panels(
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
    return _finished(figure, axes)


def _in_a_row(rows: Sequence[Row]) -> Figure:
    figure, axes = _panels(
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
    return _finished(figure, axes)


def _crossover(rows: Sequence[Row]) -> Figure:
    mib = rows[0].cell.source_mib
    figure, axes = _panels(
        1, 1, f"1d. DIFF against FULL: pause window of a {mib} MiB source by what it wrote"
    )
    place = axes[0][0]
    for mode, line in ((DIFF, "-"), (FULL, "--")):
        chosen = [row for row in rows if row.mode == mode]
        _lines(place, chosen, _share, line=line, suffix=f", {mode}")
    _milliseconds(place)
    place.set_xlabel("share of the memory a guest can write to, %")
    return _finished(figure, axes)


def _loaded(rows: Sequence[Row]) -> Figure:
    figure, axes = _panels(
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
    return _finished(figure, axes)


def _writing(rows: Sequence[Row]) -> Figure:
    checked = [row for row in rows if "generation_changes" in row.figures]
    whole = sum(not row.error for row in checked)
    figure, axes = _panels(
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
    return _finished(figure, axes, note="Each point is one snapshot.")


def _ready(rows: Sequence[Row]) -> Figure:
    figure, axes = _panels(
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
    place.set_xticks(range(len(images)), [f"image of {_size(image)}" for image in images])
    place.set_xlim(-0.5, len(images) - 0.5)
    place.set_xlabel("what the image holds")
    _seconds(place)
    return _finished(figure, axes)


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


def _panels(
    high: int, wide: int, title: str, *, height: float = 4.4, sharey: bool | Literal["row"] = False
) -> tuple[Figure, list[list[Axes]]]:
    figure, axes = plt.subplots(
        high, wide, figsize=(9.5, height), squeeze=False, sharey=sharey, layout="constrained"
    )
    figure.suptitle(title, fontsize=12, fontweight="bold")
    return figure, [list(row) for row in axes]


def _lines(
    place: Axes,
    rows: Sequence[Row],
    where: Callable[[Row], float],
    *,
    figure_name: str = "vmm_total_us",
    line: str = "-",
    suffix: str = "",
    spread: float = 0.0,
    faint: bool = False,
    bars: bool = True,
    label: bool = True,
    words: Mapping[str, str] | None = None,
) -> None:
    """A line a role: a median for each place on the x axis. `spread` moves the roles apart."""
    for number, (role, (colour, mark, usual)) in enumerate(STYLE.items()):
        groups = grouped([row for row in rows if row.role == role], where)
        points = _points(groups, figure_name)
        if not points:
            continue
        scale = 1000 if figure_name.endswith("_us") else 1
        middle = [point.median / scale for _, point in points]
        reach = [
            [(point.median - point.p10) / scale for _, point in points],
            [(point.p90 - point.median) / scale for _, point in points],
        ]
        place.errorbar(
            [x + spread * (number - 1.5) for x, _ in points],
            middle,
            yerr=reach if bars else None,
            label=(words or {}).get(role, usual) + suffix if label else None,
            color=colour,
            marker="" if faint or not label else mark,
            markersize=5,
            linestyle=line,
            linewidth=1.3 if label else 0.8,
            alpha=1.0 if label else 0.6,
            capsize=2,
            elinewidth=1,
            markerfacecolor="white" if line == "--" else colour,
        )


def _points(groups: Mapping[float, Group], figure_name: str) -> list[Point]:
    spreads = ((x, groups[x].spread(figure_name)) for x in sorted(groups))
    return [(x, spread) for x, spread in spreads if spread is not None]


def _finished(figure: Figure, axes: list[list[Axes]], *, note: str = SERVED_NOTE) -> Figure:
    entries: dict[str, Any] = {}
    for place in (place for row in axes for place in row):
        handles, labels = place.get_legend_handles_labels()
        entries |= dict(zip(labels, handles, strict=True))
    figure.legend(
        entries.values(),
        entries.keys(),
        loc="outside lower center",
        ncols=2,
        frameon=False,
        title=note,
        title_fontsize=8,
    )
    return figure


def _milliseconds(place: Axes) -> None:
    _logarithmic(place, WINDOW_LABEL)


def _seconds(place: Axes) -> None:
    _logarithmic(place, "seconds (log)")


def _logarithmic(place: Axes, label: str) -> None:
    place.set_yscale("log")
    place.set_ylabel(label)
    place.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    place.yaxis.set_major_formatter(FuncFormatter(_plain))
    place.yaxis.set_minor_locator(NullLocator())


def _plain(value: float, _: int | None) -> str:
    return f"{value:g}"


def _share(row: Row) -> float:
    return round(100 * row.cell.dirty_mib / row.cell.region_mib)


def _size(mib: int) -> str:
    return f"{mib} MiB" if mib < 1024 else f"{mib / 1024:g} GiB"
