"""The plots of RESULTS.md."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from statistics import median
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter, NullLocator

from bench.images.cells import AGAIN, CHILD, FLAT, FLATTEN, READY, REFLINK, ROW, SIZES_MIB, Cell
from bench.images.rows import (
    COPY,
    FLATTENED,
    FORK,
    GROWN,
    REST,
    SECONDS,
    STORE,
    WINDOW_PART,
    WRITTEN,
    Row,
)
from bench.plotting import Style, finished, lines, logarithmic, panels, size_text
from bench.rounds import CONTROL, FLOOR, FORKPOINT
from bench.rows import Outcome
from bench.summary import Group, grouped

STYLE: Style = {
    FLOOR: ("#555555", "o", "floor"),
    CONTROL: ("#AAAAAA", "o", "floor, once more"),
    FORKPOINT: ("#D55E00", "s", "forkpoint, LAYERED"),
    AGAIN: ("#E69F00", "D", "forkpoint, LAYERED, a second source"),
    FLAT: ("#0072B2", "^", "forkpoint, FLAT"),
}
"""Colour, mark and words; colours that differ also for the colour-blind (Okabe and Ito)."""

PARTS: Mapping[str, tuple[str, str]] = {
    WINDOW_PART: ("#D55E00", "window"),
    STORE: ("#E69F00", "the diff made durable"),
    COPY: ("#0072B2", "copy or clone of the base"),
    FORK: ("#009E73", "children started"),
    REST: ("#CCCCCC", "all else"),
}


def _ready(rows: Sequence[Row]) -> Figure:
    figure, axes = panels(1, 1, "Request to READY by memory, all of it populated, 50 MiB dirtied")
    place = axes[0][0]
    of_sources = [row for row in rows if row.source_mib]
    _lines(place, of_sources, lambda row: row.source_mib)
    floor = Group([row for row in rows if row.role == FLOOR]).spread(SECONDS)
    if floor is not None:
        colour, _, _ = STYLE[FLOOR]
        for value, line in ((floor.median, "-"), (3 * floor.median, ":")):
            told = "write and fsync of 50 MiB" if line == "-" else "three times that"
            place.axhline(value, color=colour, linestyle=line, linewidth=1.2, label=told)
    place.set_xscale("log", base=2)
    place.set_xticks(SIZES_MIB, [size_text(size) for size in SIZES_MIB])
    place.xaxis.set_minor_locator(NullLocator())
    place.set_xlabel("memory of the source (log)")
    logarithmic(place, "seconds (log)")
    return finished(figure, axes)


def _row(rows: Sequence[Row]) -> Figure:
    figure, axes = panels(1, 2, "Branch after branch of one source, 10 MiB written before each")
    time, room = axes[0]
    for depth in sorted({row.cell.flatten_depth for row in rows}):
        chosen = [row for row in rows if row.cell.flatten_depth == depth]
        words = {FORKPOINT: f"LAYERED, {_policy(depth)}"}
        line = "--" if depth else "-"
        _lines(time, chosen, lambda row: row.number + 1, words=words, line=line, bars=not depth)
    time.set_xscale("log")
    time.set_xticks([1, 2, 5, 10, 20, 50, 100], ["1", "2", "5", "10", "20", "50", "100"])
    time.xaxis.set_minor_formatter(NullFormatter())
    time.set_xlabel("branch of the row (log)")
    time.set_title("request to READY")
    logarithmic(time, "seconds (log)")
    ends = grouped(
        [row for row in rows if row.role == FORKPOINT and GROWN in row.figures],
        lambda row: row.cell.flatten_depth,
    )
    names = []
    for number, (depth, group) in enumerate(ends.items()):
        written, images, grown = (
            median(row.figures[name] for row in group.rows) / 2**20
            for name in (WRITTEN, FLATTENED, GROWN)
        )
        names.append(_policy(depth))
        room.bar(number - 0.2, written, 0.35, color="#555555", label="written by the guest")
        if images:
            told = "images of flattens"
            room.bar(number - 0.2, images, 0.35, bottom=written, color="#AAAAAA", label=told)
        room.bar(number + 0.2, grown, 0.35, color="#56B4E9", label="growth on the disk")
    room.set_xticks(range(len(names)), names)
    room.set_title("room that a row of LAYERED takes")
    room.set_ylabel("MiB")
    return finished(figure, axes)


def _policy(depth: int) -> str:
    return f"flattened at {depth} layers" if depth else "flatten policy off"


def _flatten(rows: Sequence[Row]) -> Figure:
    return _by_role(
        rows,
        "FlattenSnapshot of 562 MiB against cp",
        {FLOOR: "cp of the image that comes of it, and fsync", FORKPOINT: "FlattenSnapshot"},
    )


def _reflink(rows: Sequence[Row]) -> Figure:
    return _by_role(
        rows,
        "FlattenSnapshot of 4 GiB by reflink, 50 MiB in the layer",
        {FLOOR: "FICLONE, the layer's extents, fsync", FORKPOINT: "FlattenSnapshot"},
    )


def _by_role(rows: Sequence[Row], title: str, words: Mapping[str, str]) -> Figure:
    figure, axes = panels(1, 1, title)
    place = axes[0][0]
    _lines(place, rows, lambda row: row.round, words=words, line="none", bars=False)
    place.set_xlabel("round")
    logarithmic(place, "seconds (log)")
    return finished(figure, axes, note="Each point is one trial.")


def _children(rows: Sequence[Row]) -> Figure:
    cells = list(dict.fromkeys(row.cell for row in rows))
    figure, axes = panels(1, len(cells), "A branch of 4 GiB to 10 running children, by its parts")
    for place, cell in zip(axes[0], cells, strict=True):
        _bars(place, cell, [row for row in rows if row.cell == cell])
    return finished(figure, axes, note="Medians of each part.")


def _bars(place: Axes, cell: Cell, rows: Sequence[Row]) -> None:
    roles = [(FLOOR, "floors"), (FORKPOINT, "LAYERED"), (FLAT, "FLAT")]
    for number, (role, _) in enumerate(roles):
        good = [row for row in rows if row.role == role and row.outcome is Outcome.OK]
        bottom = 0.0
        for part, (colour, told) in PARTS.items():
            if values := [row.figures[part] for row in good if part in row.figures]:
                height = max(0.0, median(values))
                place.bar(number, height, 0.7, bottom=bottom, color=colour, label=told)
                bottom += height
        if good and role == FLOOR:
            place.axhline(
                1.3 * bottom, color="#555555", linestyle=":", label="1.3 times the floors"
            )
    place.set_xticks(range(len(roles)), [words for _, words in roles])
    held = size_text(cell.touched_mib) if cell.touched_mib else "all"
    on = "XFS with reflink" if cell.disk == "xfs" else "disk without reflink"
    place.set_title(f"{on}, {held} populated", fontsize=9)
    place.set_ylabel("seconds")


PLOTS: Mapping[str, Callable[[Sequence[Row]], Figure]] = {
    READY: _ready,
    ROW: _row,
    FLATTEN: _flatten,
    REFLINK: _reflink,
    CHILD: _children,
}


def _lines(place: Axes, rows: Sequence[Row], where: Callable[[Row], float], **how: Any) -> None:
    lines(place, rows, where, STYLE, figure_name=SECONDS, **how)
