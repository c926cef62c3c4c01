"""Plots of a bench in phases: SVG, the same bytes for the same rows.

Points are medians, bars reach from the 10th to the 90th percentile. A role has one colour and one
mark in all plots of a bench.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

import matplotlib as mpl

mpl.use("svg")  # before pyplot, which may else ask for a display

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from bench.rows import TrialRow
from bench.summary import Group, Spread, grouped

R = TypeVar("R", bound=TrialRow[Any])
Style = Mapping[str, tuple[str, str, str]]
"""By role: colour, mark and words."""

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
NOTE = "Points: medians. Bars: 10th to 90th percentile."

Point = tuple[float, Spread]


def draw(
    plots: Mapping[str, Callable[[Sequence[R]], Figure]],
    rows: Mapping[str, Sequence[R]],
    folder: Path,
) -> dict[str, list[str]]:
    """Writes the plots of the phases that have rows; returns the file names by phase."""
    folder.mkdir(parents=True, exist_ok=True)
    made: dict[str, list[str]] = {}
    with mpl.rc_context(SETTINGS):
        for phase, plot in plots.items():
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


def panels(
    high: int, wide: int, title: str, *, height: float = 4.4, sharey: bool | Literal["row"] = False
) -> tuple[Figure, list[list[Axes]]]:
    """A figure with a title and places for plots, row by row."""
    figure, axes = plt.subplots(
        high, wide, figsize=(9.5, height), squeeze=False, sharey=sharey, layout="constrained"
    )
    figure.suptitle(title, fontsize=12, fontweight="bold")
    return figure, [list(row) for row in axes]


def lines(
    place: Axes,
    rows: Sequence[R],
    where: Callable[[R], float],
    style: Style,
    *,
    figure_name: str,
    line: str = "-",
    suffix: str = "",
    spread: float = 0.0,
    faint: bool = False,
    bars: bool = True,
    label: bool = True,
    words: Mapping[str, str] | None = None,
) -> None:
    """A line a role: a median for each place on the x axis. `spread` moves the roles apart."""
    for number, (role, (colour, mark, usual)) in enumerate(style.items()):
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
            [x + spread * (number - (len(style) - 1) / 2) for x, _ in points],
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


def _points(groups: Mapping[float, Group[R]], figure_name: str) -> list[Point]:
    spreads = ((x, groups[x].spread(figure_name)) for x in sorted(groups))
    return [(x, spread) for x, spread in spreads if spread is not None]


def finished(figure: Figure, axes: list[list[Axes]], *, note: str = NOTE) -> Figure:
    """With one legend for all places below them."""
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


def logarithmic(place: Axes, label: str) -> None:
    """A logarithmic y axis with plain numbers."""
    place.set_yscale("log")
    place.set_ylabel(label)
    place.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    place.yaxis.set_major_formatter(FuncFormatter(_plain))
    place.yaxis.set_minor_locator(NullLocator())


def _plain(value: float, _: int | None) -> str:
    return f"{value:g}"


def size_text(mib: int) -> str:
    """Of memory, in words."""
    return f"{mib} MiB" if mib < 1024 else f"{mib / 1024:g} GiB"
