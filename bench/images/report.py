"""RESULTS.md: written from the rows of the CSVs, and from nothing else."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from bench.images.cells import ALL, PHASES, ROW
from bench.images.claims import findings
from bench.images.plots import PLOTS as DRAWN
from bench.images.rows import (
    BYTES_PER_SECOND,
    COPY,
    FLATTENED,
    FLATTENS,
    FORK,
    GROWN,
    REST,
    SECONDS,
    STORE,
    TABLE,
    WINDOW_PART,
    WRITTEN,
    Row,
)
from bench.phase_report import (
    PLOTS,
    REPORT,
    markdown_table,
    middle_text,
    runs_section,
    spread_text,
    targets_section,
    troubles,
)
from bench.plotting import draw
from bench.rows import Outcome, newest, path_of
from bench.stats import RESAMPLES
from bench.summary import Group, grouped
from bench.targets import Finding

SHOWN_NUMBERS = (1, 2, 5, 10, 20, 50, 99, 100)
"""Of a row of branches."""

INTRODUCTION = """\
# Images: results

Written by `python -m bench.images` from the rows in [results](results) and from nothing else;
`--report-only` writes it anew. [README](../README.md) says how the bench works.

- **floor**: the same bytes by the plainest means; each phase says which. **control** is the same
  once more: what it differs by is noise.
- **forkpoint**: a server of its own, through its public gRPC API, layout LAYERED.
  **forkpoint-again**: the same with a second source.
- **forkpoint-flat**: the same branch with layout FLAT, in the same rounds.

*seconds* is from the request to its last message, by the client's clock; medians with the 10th and
90th percentile. *bad*: trials that failed or were refused; they are listed below each table.
"""
RULES = """\
A ratio is of medians of rounds in which both were measured, with a bootstrap 95 % interval. `met`:
the whole interval is on the right side of the goal; `missed`: all of it is on the wrong side; else
`undecided`, and always below 200 pairs. A trial of forkpoint that failed or was refused counts as
infinitely slow. A/A is the floor against itself, or what the target says.
"""
ABOUT = {
    "ready": "The floor writes 50 MiB from memory to a new file and fsyncs it. The layers below a "
    "branch are flattened every 25 rounds, outside of all clocks.",
    "row": "*branch* is the place in the row; all branches of a row are kept until it ends. "
    "*growth* is what the server's folder takes more on the disk at its end, *allowed* what the "
    "guest wrote in it, 5 % more, and the images of the row's flattens.",
    "flatten": "The floor is `cp` of the image that the last flatten made, and fsync. "
    "forkpoint-flat is a branch: it copies the image and lays the window's pages over it.",
    "reflink": "The floor clones the very image that the layer stands on, writes the layer's "
    "extents over it and fsyncs.",
    "children": "The floors: the window by plain sockets of a source of its own; 50 MiB written "
    "and synced; the base cloned, the diff written over it and synced (without reflink: cp of the "
    "base, and fsync); 10 children loaded by plain sockets. Of forkpoint *copy* is the pre-copy "
    "or the flatten that the children wait for, *diff* is from the end of the window to the READY "
    "snapshot, *rest* what the client's clock has beyond these.",
}


def write_report(results: Path, *, resamples: int = RESAMPLES) -> list[Finding]:
    """Writes RESULTS.md and the plots beside the folder of the CSVs; returns what was found out
    about each target. Raises ResultsError, OSError."""
    everything = {name: TABLE.read(path_of(results, name)) for name in PHASES}
    rows = {name: newest(of) for name, of in everything.items()}
    plots = draw(DRAWN, rows, results.parent / PLOTS)
    found = findings([row for of in rows.values() for row in of], resamples=resamples)
    parts = [INTRODUCTION, targets_section(found, RULES), runs_section(everything, rows)]
    parts += [_phase(name, of, plots.get(name, [])) for name, of in rows.items() if of]
    (results.parent / REPORT).write_text("\n".join(parts), encoding="utf-8")
    return found


Key = tuple[object, ...]
KEYS: Mapping[str, Callable[[Row], object]] = {
    "disk": lambda row: row.cell.disk,
    "populated, MiB": lambda row: "all" if row.cell.touched_mib == ALL else row.cell.touched_mib,
    "flatten_depth": lambda row: row.cell.flatten_depth,
    "branch": lambda row: row.number + 1,
    "source, MiB": lambda row: row.source_mib or "",
    "role": lambda row: row.role,
}
"""What a line of a table is about; columns stand only where they differ within the phase."""


def _phase(name: str, rows: Sequence[Row], plots: Sequence[str]) -> str:
    shown = [row for row in rows if name != ROW or row.number + 1 in SHOWN_NUMBERS]
    groups = grouped(shown, lambda row: tuple(value(row) for value in KEYS.values()))
    titles = [
        title
        for place, title in enumerate(KEYS)
        if title == "role" or len({key[place] for key in groups}) > 1
    ]
    texts = {title: [text(group) for group in groups.values()] for title, text in _FIGURES.items()}
    extra = [title for title, of in texts.items() if any(of)]
    lines: list[tuple[str, ...]] = [(*titles, "n", "bad", "seconds", *extra)]
    for number, (key, group) in enumerate(groups.items()):
        values = dict(zip(KEYS, key, strict=True))
        lines.append(
            (
                *(str(values[title]) for title in titles),
                str(group.trials),
                str(group.count(Outcome.FAILED) + group.count(Outcome.REFUSED)),
                spread_text(group.spread(SECONDS), 1, 3),
                *(texts[title][number] for title in extra),
            )
        )
    images = "".join(f"![{PHASES[name].about}]({PLOTS}/{plot})\n\n" for plot in plots)
    return (
        f"## {name}: {PHASES[name].about}\n\n{images}{ABOUT[name]}\n\n{markdown_table(lines)}"
        f"{troubles(rows)}"
    )


def _part(figure: str) -> Callable[[Group[Row]], str]:
    return lambda group: middle_text(group.spread(figure), 0.001, 1)


def _allowed(group: Group[Row]) -> str:
    """Only where a LAYERED row ended: one FLAT copies its base each time."""
    ends = [row.figures for row in group.rows if row.role == "forkpoint" and GROWN in row.figures]
    if not ends:
        return ""
    allowed = sorted(1.05 * end[WRITTEN] + end[FLATTENED] for end in ends)
    return f"{allowed[len(allowed) // 2] / 2**20:.1f}"


_FIGURES: Mapping[str, Callable[[Group[Row]], str]] = {
    "window, ms": lambda group: middle_text(group.spread("vmm_total_us"), 1000, 2),
    "MiB/s": lambda group: spread_text(group.spread(BYTES_PER_SECOND), 2**20, 0),
    "window with its calls, ms": _part(WINDOW_PART),
    "diff, ms": _part(STORE),
    "copy, ms": _part(COPY),
    "children, ms": _part(FORK),
    "rest, ms": _part(REST),
    "growth, MiB": lambda group: spread_text(group.spread(GROWN), 2**20, 1),
    "written, MiB": lambda group: middle_text(group.spread(WRITTEN), 2**20, 1),
    "flattens": lambda group: middle_text(group.spread(FLATTENS), 1, 0),
    "allowed, MiB": _allowed,
}
"""Columns that stand only where the phase has such figures."""
