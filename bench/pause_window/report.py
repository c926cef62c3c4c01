"""RESULTS.md: written from the rows of the CSVs, and from nothing else."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from bench.pause_window.cells import NOTHING, PHASES
from bench.pause_window.claims import VMM_TOTAL, findings
from bench.pause_window.plots import PLOTS as DRAWN
from bench.pause_window.rows import READY_SECONDS, TABLE, Row
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
from bench.rounds import FLOOR, FORKPOINT
from bench.rows import Outcome, newest, path_of
from bench.stats import RESAMPLES
from bench.summary import Group, Spread, grouped
from bench.targets import Finding

SHOWN_NUMBERS = (1, 2, 5, 10, 20, 30, 50, 100)
"""Of a row of branches."""

INTRODUCTION = """\
# The pause window: results

Written by `python -m bench.pause_window` from the rows in [results](results) and from nothing else;
`--report-only` writes it anew. [README](../README.md) says how the bench works.

- **floor**: Firecracker by plain sockets: pause, create and resume in one write, into a file that
  is there already. **control** is the same once more, from a source of its own: what it differs by
  is noise. **floor-preallocated** is the floor into a file whose pages were had before.
- **forkpoint**: a server of its own, through its public gRPC API.
- **sequential-disk**: bench code that does what the published figures of others did: one call after
  the other, staged on the disk, whole-image copy.

*window* is Firecracker's own time for pause, create and resume. *clock* is the time of whoever sent
the window (forkpoint: the server's). *READY* is from the request to a usable snapshot. All three
are medians, the first and the last with the 10th and 90th percentile. *of floor* is the ratio of
medians. *bad*: trials that failed or were refused; they are listed below each table.
"""
RULES = """\
A ratio is of medians (p99: of 99th percentiles) of rounds in which both were measured, with a
bootstrap 95 % interval. `met`: the whole interval is on the right side of the goal; `missed`: all
of it is on the wrong side; else `undecided`, and always below 200 pairs (p99: 1,000). A trial of
forkpoint that failed or was refused counts as infinitely slow. A/A is the floor against itself, or
what the target says.
"""
ABOUT = {
    "1c": "*branch* is the place in the row.",
    "1e": "A row beside *nothing* is of the same source in the same minutes. The last columns say "
    "what the load did beside the windows of that role.",
    "1f": "*checked*: children that were started from a snapshot; *whole*: those that found the "
    "memory of one moment. All guests write for one second before the branch is asked for.",
    "ready": "The floor is `cp` of as many bytes as the image has, and fsync.",
}


def write_report(results: Path, *, resamples: int = RESAMPLES) -> list[Finding]:
    """Writes RESULTS.md and the plots beside the folder of the CSVs; returns what was found out
    about each target. Raises ResultsError, OSError."""
    everything = {name: TABLE.read(path_of(results, name)) for name in PHASES}
    rows = {name: newest(of) for name, of in everything.items()}
    plots = draw(DRAWN, rows, results.parent / PLOTS)
    found = findings([row for of in rows.values() for row in of], resamples=resamples)
    parts = [INTRODUCTION, targets_section(found, RULES), runs_section(everything, rows)]
    for name, of in rows.items():
        if of:
            parts.append(_phase(name, of, plots.get(name, [])))
    parts.append(_prediction([row for of in rows.values() for row in of]))
    (results.parent / REPORT).write_text("\n".join(parts), encoding="utf-8")
    return found


# --- the prediction ----------------------------------------------------------------------------

NEAR = 2.0
"""A prediction within this factor of what came helps with `max_pause`."""
PREDICTED = """\
## The prediction

What a branch's window was predicted to take (what `max_pause` is held against) by what it took, of
all forkpoint's windows of a kind. *near*: within a factor of 2. *longer*: windows that took more
than twice what was predicted, which is what `max_pause` is to prevent.
"""


def _prediction(rows: Sequence[Row]) -> str:
    kinds = grouped(
        [row for row in rows if row.role == FORKPOINT and row.figures.get("predicted_us")],
        lambda row: (row.cell.phase, row.mode, row.cell.staging, row.cell.pattern, row.beside),
    )
    if not kinds:
        return ""
    table = [("phase", "mode", "staging", "pages", "beside", "n", "by what came", "near", "longer")]
    for kind, group in kinds.items():
        ratios = [
            row.figures["predicted_us"] / row.figures[VMM_TOTAL]
            for row in group.rows
            if row.figures.get(VMM_TOTAL)
        ]
        near = sum(1 / NEAR <= ratio <= NEAR for ratio in ratios)
        longer = sum(ratio < 1 / NEAR for ratio in ratios)
        table.append(
            (
                *kind,
                str(len(ratios)),
                spread_text(Spread.of(ratios), 1, 2),
                f"{near / len(ratios):.0%}",
                f"{longer / len(ratios):.0%}",
            )
        )
    return f"{PREDICTED}\n{markdown_table(table)}"


# --- one phase ---------------------------------------------------------------------------------

Text = Callable[[Group[Row]], str]


@dataclass(frozen=True, slots=True)
class _Key:
    """What a line of a table is about."""

    source_mib: int
    staging: str
    touched_mib: int
    dirty_mib: int
    pattern: str
    guest: str
    in_a_row: int
    load: str
    mode: str
    beside: str
    number: int
    role: str

    @classmethod
    def of(cls, row: Row) -> _Key:
        cell = row.cell
        number = row.number + 1 if cell.phase == "1c" else 0
        return cls(
            cell.source_mib,
            cell.staging,
            cell.touched_mib,
            cell.dirty_mib,
            cell.pattern,
            cell.guest,
            cell.in_a_row,
            cell.load,
            row.mode,
            row.beside,
            number,
            row.role,
        )


KEYS: Mapping[str, Callable[[_Key], object]] = {
    "source, MiB": lambda key: key.source_mib,
    "mode": lambda key: key.mode,
    "staging": lambda key: key.staging,
    "image, MiB": lambda key: key.touched_mib,
    "written, MiB": lambda key: key.dirty_mib,
    "pages": lambda key: key.pattern,
    "guest": lambda key: key.guest,
    "in a row": lambda key: key.in_a_row,
    "branch": lambda key: key.number,
    "cell": lambda key: key.load,
    "beside": lambda key: key.beside,
}
"""Columns that stand only where they differ within the phase."""

FIGURES: Mapping[str, Text] = {
    "READY, s": lambda group: spread_text(group.spread(READY_SECONDS), 1, 3),
    "predicted, ms": lambda group: middle_text(group.spread("predicted_us"), 1000, 2),
    "written in window, MiB": lambda group: middle_text(group.spread("dirty_bytes"), 1 << 20, 1),
    "guest's gap, ms": lambda group: spread_text(group.spread("guest_gap_us"), 1000, 2),
    "load, MiB/s": lambda group: middle_text(group.spread("load_bytes_per_second"), 1 << 20, 0),
    "children/s": lambda group: middle_text(group.spread("load_children_per_second"), 1, 0),
    "calls/s": lambda group: middle_text(group.spread("load_calls_per_second"), 1, 0),
    "checked": lambda group: str(len(_checked(group)) or ""),
    "whole": lambda group: str(
        sum(not row.error for row in _checked(group)) if _checked(group) else ""
    ),
}
"""Columns that stand only where the phase has such figures."""


def _phase(name: str, rows: Sequence[Row], plots: Sequence[str]) -> str:
    groups = grouped(rows, _Key.of)
    if name == "1c":
        groups = {key: group for key, group in groups.items() if key.number in SHOWN_NUMBERS}
    keys = [
        title
        for title, value in KEYS.items()
        if len({value(key) for key in groups}) > 1
        and not (title == "image, MiB" and name != "ready")
    ]
    texts = {
        title: {key: text(group) for key, group in groups.items()}
        for title, text in FIGURES.items()
    }
    extra = [title for title, of in texts.items() if any(of.values())]
    table = [(*keys, "role", "n", "bad", "window, ms", "of floor", "clock, ms", *extra)]
    for key, group in groups.items():
        table.append(
            (
                *(str(KEYS[title](key)) for title in keys),
                key.role,
                str(group.trials),
                str(group.count(Outcome.FAILED) + group.count(Outcome.REFUSED)),
                spread_text(group.spread("vmm_total_us"), 1000, 2),
                _of_floor(groups, key, "vmm_total_us" if name != "ready" else READY_SECONDS),
                middle_text(group.spread("total_us"), 1000, 2),
                *(texts[title][key] for title in extra),
            )
        )
    images = "".join(f"![{PHASES[name].about}]({PLOTS}/{plot})\n\n" for plot in plots)
    about = f"{ABOUT[name]}\n\n" if name in ABOUT else ""
    return (
        f"## {name}: {PHASES[name].about}\n\n{images}{about}{_same(keys, groups)}"
        f"{markdown_table(table)}{troubles(rows)}"
    )


def _same(keys: Sequence[str], groups: Mapping[_Key, Group[Row]]) -> str:
    """What all lines of the phase have in common."""
    key = next(iter(groups))
    values = {title: KEYS[title](key) for title in KEYS if title not in keys}
    told = [
        f"{title} {value}"
        for title, value in values.items()
        if value not in (NOTHING, 0, 1, "none")
    ]
    return f"All: {'; '.join(told)}.\n\n" if told else ""


def _of_floor(groups: Mapping[_Key, Group[Row]], key: _Key, figure: str) -> str:
    values = {name: getattr(key, name) for name in key.__slots__}
    floor = groups.get(_Key(**{**values, "role": FLOOR}))
    own = groups[key].spread(figure)
    reference = floor.spread(figure) if floor else None
    if key.role == FLOOR or own is None or reference is None:
        return ""
    return f"{own.median / reference.median:.2f}"


def _checked(group: Group[Row]) -> list[Row]:
    return [row for row in group.rows if "generation_changes" in row.figures]
