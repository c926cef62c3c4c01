"""RESULTS.md: from given rows to verdicts, tables and plots."""

import math
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from bench.machine import Machine
from bench.pause_window.__main__ import main
from bench.pause_window.cells import (
    DIFF,
    FULL,
    NOTHING,
    PHASES,
    PRECOPIES,
    SEQUENTIAL,
    SIZES_MIB,
    WRITING,
    Cell,
)
from bench.pause_window.claims import TARGETS, findings, slope
from bench.pause_window.report import write_report
from bench.pause_window.rows import TABLE, Row
from bench.rounds import CONTROL, FLOOR, FORKPOINT
from bench.rows import Outcome
from bench.stats import Verdict, quantile
from bench.summary import Spread
from bench.targets import Finding

RESAMPLES = 200
"""Enough to tell these apart."""
IDLE = Cell("1a", 4096)
MACHINE = Machine("cpu", 2, 1024, "6.1", "ext4", "1.12.1", "0.1.0", "3.11.2", "1.85.0", "c0ffee")


def row(cell: Cell, role: str, turn: int, value: float | None, **other: object) -> Row:
    """A trial; one without a value failed."""
    figure = "ready_seconds" if cell.phase == "ready" else "vmm_total_us"
    values: dict[str, object] = {
        "mode": FULL if cell.mode == FULL else DIFF,
        "beside": NOTHING,
        "number": 0,
        "start": 1_700_000_000.0 + turn,
        "outcome": Outcome.FAILED if value is None else Outcome.OK,
        "error": "it broke" if value is None else "",
        "figures": {} if value is None else {figure: value, "total_us": value * 1.01},
        "machine": {name: str(value) for name, value in MACHINE.row().items()},
        "position": 0,
        **other,
    }
    return Row(cell=cell, round=turn, role=role, **values)  # type: ignore[arg-type]


def wobble(number: int) -> float:
    """Between 0.99 and 1.01."""
    return 1 + 0.01 * math.sin(number)


def rounds(cell: Cell, count: int, floor: float, forkpoint: float, **other: object) -> list[Row]:
    rows = []
    for turn in range(count):
        for role, value in ((FLOOR, floor), (CONTROL, floor), (FORKPOINT, forkpoint)):
            rows.append(row(cell, role, turn, value * wobble(turn + len(role)), **other))
    return rows


def finding(name: str, rows: Sequence[Row]) -> Finding:
    return {found.target.name: found for found in findings(rows, resamples=RESAMPLES)}[name]


# --- verdicts ---


def test_every_target_has_a_finding_and_nothing_measured_is_undecided() -> None:
    found = findings([])
    assert [f.target for f in found] == list(TARGETS)
    assert {f.verdict for f in found} == {Verdict.UNDECIDED}
    assert all(f.line().startswith(f"target {f.target.name} value - goal <=") for f in found)


@pytest.mark.parametrize(
    ("forkpoint", "verdict"),
    [(1.02, Verdict.MET), (1.2, Verdict.MISSED), (1.05, Verdict.UNDECIDED)],
)
def test_a_ratio_is_judged_by_its_interval(forkpoint: float, verdict: Verdict) -> None:
    found = finding("idle_4gib_median", rounds(IDLE, 200, 1000, 1000 * forkpoint))
    assert found.verdict is verdict
    assert found.control is not None
    assert found.control.low <= 1 <= found.control.high


def test_below_two_hundred_pairs_nothing_is_claimed() -> None:
    assert finding("idle_4gib_median", rounds(IDLE, 199, 1000, 500)).verdict is Verdict.UNDECIDED


def test_a_percentile_needs_a_thousand() -> None:
    assert finding("idle_4gib_p99", rounds(IDLE, 999, 1000, 900)).verdict is Verdict.UNDECIDED
    assert finding("idle_4gib_p99", rounds(IDLE, 1000, 1000, 900)).verdict is Verdict.MET


def test_what_failed_counts_as_infinitely_slow() -> None:
    rows = rounds(IDLE, 200, 1000, 1000)
    bad = [
        row(IDLE, FORKPOINT, r.round, None) if r.role == FORKPOINT and r.round < 101 else r
        for r in rows
    ]
    found = finding("idle_4gib_median", bad)
    assert found.failed == 101
    assert found.estimate is not None
    assert found.estimate.value == math.inf
    assert found.verdict is not Verdict.MET


def test_other_cells_do_not_count() -> None:
    others = [Cell("1a", 4096, guest="watching"), Cell("1a", 4096, staging="disk")]
    rows = [r for cell in others for r in rounds(cell, 200, 1000, 500)]
    assert finding("idle_4gib_median", rows).estimate is None


def grown(per_gib: float) -> list[float]:
    return [1000 + per_gib * size / 1024 for size in SIZES_MIB]


def test_growth_is_the_slope_over_all_sizes() -> None:
    assert slope(grown(250)) == pytest.approx(250)
    assert slope([5.0] * len(SIZES_MIB)) == pytest.approx(0)


@pytest.mark.parametrize(("steeper", "verdict"), [(1.1, Verdict.MET), (1.5, Verdict.MISSED)])
def test_growth_is_judged_against_the_floor_s(steeper: float, verdict: Verdict) -> None:
    rows = []
    for size, floor, forkpoint in zip(SIZES_MIB, grown(1000), grown(1000 * steeper), strict=True):
        rows += rounds(Cell("1a", size), 200, floor, forkpoint)
    found = finding("memory_slope", rows)
    assert found.estimate is not None
    assert found.estimate.value == pytest.approx(steeper, rel=0.01)
    assert found.verdict is verdict


def test_growth_without_growth_of_the_floor_is_not_met() -> None:
    rows = []
    for size in SIZES_MIB:
        rows += rounds(Cell("1a", size), 200, 5000 - size / 10, 1000)
    assert finding("memory_slope", rows).verdict is not Verdict.MET


def test_ten_in_a_row_compares_the_tenth_with_the_first() -> None:
    cell = Cell("1c", 2048, touched_mib=0, dirty_mib=100, pattern="repeated", in_a_row=10)
    rows = []
    for number in range(10):
        rows += rounds(cell, 200, 1000, 1000 + 100 * number, number=number)
    found = finding("ten_in_a_row", rows)
    assert found.estimate is not None
    assert found.estimate.value == pytest.approx(1.9, rel=0.01)
    assert found.verdict is Verdict.MISSED
    assert found.control is not None
    assert found.control.value == pytest.approx(1.9 / 1.8, rel=0.01)


def test_stretch_is_a_ratio_of_ratios() -> None:
    cell = Cell("1e", 1024, load=PRECOPIES, in_a_row=10)
    rows = rounds(cell, 200, 1000, 1100) + rounds(cell, 200, 4000, 2200, beside=PRECOPIES)
    figures = {"load_bytes_per_second": 5.0}
    rows.append(row(cell, FLOOR, 0, 1.0, beside=PRECOPIES, number=10, figures=figures))
    found = finding("stretch_beside_precopies", rows)
    assert found.estimate is not None
    assert found.estimate.value == pytest.approx(0.5, rel=0.01)
    assert found.estimate.samples == 200
    assert found.verdict is Verdict.MET


def test_ready_is_judged_by_its_own_figure() -> None:
    cell = Cell("ready", 4096, touched_mib=2048)
    found = finding("ready_2gib", rounds(cell, 200, 2.0, 3.0))
    assert found.estimate is not None
    assert found.estimate.value == pytest.approx(1.5, rel=0.01)
    assert (found.verdict, found.reference_median) == (Verdict.MET, "2.000 s")


def test_quantiles_lie_between_neighbours() -> None:
    assert quantile([4.0, 1.0, 3.0, 2.0, 5.0], 0.5) == 3
    assert quantile([1.0, 2.0], 0.25) == 1.25
    assert quantile([1.0, math.inf, math.inf], 1) == math.inf
    with pytest.raises(ValueError, match="no values"):
        quantile([], 0.5)
    assert Spread.of([]) is None


# --- the report ---


def some_of_all() -> dict[str, list[Row]]:
    """A few rows of each phase."""
    rows: dict[str, list[Row]] = {}
    for name, phase in PHASES.items():
        rows[name] = []
        for job in phase.jobs:
            for turn in range(2):
                for slot in job.order(turn):
                    made = row(job.cell, slot.role, turn, 1500.0 + turn)
                    figures = dict(made.figures)
                    if job.cell.guest == WRITING and slot.role != FLOOR:
                        figures |= {"generation_changes": 1.0, "misplaced_pages": 0.0}
                    rows[name].append(
                        replace(made, mode=slot.mode, beside=slot.beside, figures=figures)
                    )
    return rows


def written(folder: Path, rows: dict[str, list[Row]]) -> str:
    results = folder / "results"
    for name, of in rows.items():
        with TABLE.log(results, name, MACHINE) as log:
            for one in of:
                log.add(one)
    write_report(results, resamples=RESAMPLES)
    return (folder / "RESULTS.md").read_text(encoding="utf-8")


def test_a_report_of_all_phases_has_tables_plots_and_target_lines(tmp_path: Path) -> None:
    text = written(tmp_path, some_of_all())
    for name, phase in PHASES.items():
        assert f"## {name}: {phase.about}" in text
        assert f"(plots/{name}.svg)" in text
        assert (tmp_path / "plots" / f"{name}.svg").read_bytes().startswith(b"<?xml")
    lines = re.findall(r"^target (\S+) value \S+ goal <=\S+ undecided$", text, re.MULTILINE)
    assert lines == [target.name for target in TARGETS]
    assert SEQUENTIAL in text


def test_a_report_of_the_same_rows_is_the_same_byte_for_byte(tmp_path: Path) -> None:
    rows = some_of_all()
    for folder in ("a", "b"):
        written(tmp_path / folder, rows)
    files = [path.relative_to(tmp_path / "a") for path in (tmp_path / "a").rglob("*.*")]
    assert len(files) == 2 * len(PHASES) + 1
    for file in files:
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


def test_failed_trials_are_in_the_table_and_listed_with_their_error(tmp_path: Path) -> None:
    text = written(tmp_path, {"1a": [*rounds(IDLE, 3, 2000, 3000), row(IDLE, FORKPOINT, 3, None)]})
    assert re.search(r"\| forkpoint \| 4 \| 1 \| [23]\.\d\d \[", text)
    assert "- forkpoint failed 1 times (1a, 4096 MiB, DIFF, tmpfs, idle): it broke" in text


def test_what_was_not_measured_is_said(tmp_path: Path) -> None:
    text = written(tmp_path, {"1a": rounds(IDLE, 3, 2000, 3000)})
    assert "Not measured: 1b, 1c, 1d, 1e, 1f, ready." in text
    assert "## 1b" not in text


def test_rows_of_another_commit_are_left_out_and_counted(tmp_path: Path) -> None:
    results = tmp_path / "results"
    old = Machine(**{**MACHINE.row(), "commit": "01d"})  # type: ignore[arg-type]
    with TABLE.log(results, "1a", old) as log:
        log.add(row(IDLE, FLOOR, 0, 99_000.0))
    text = written(tmp_path, {"1a": rounds(IDLE, 3, 2000, 3000)})
    assert "1 trials of other commits or machines are in the CSVs and not here." in text
    assert "99.0" not in text


def test_without_any_row_the_report_says_so_and_the_command_succeeds(tmp_path: Path) -> None:
    assert main(["--report-only", "--results", str(tmp_path / "results")]) == 0
    text = (tmp_path / "RESULTS.md").read_text(encoding="utf-8")
    assert "0 trials in all" in text


def test_a_csv_that_can_t_be_read_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "1b.csv").write_text("what,is,this\n")
    assert main(["--report-only", "--results", str(tmp_path / "results")]) == 1
    assert "1b.csv has other columns" in capsys.readouterr().out


@pytest.mark.parametrize("wrong", [["--phases", "1a,9z"], ["--rounds", "0"], ["--rounds", "x"]])
def test_wrong_usage_is_refused(wrong: list[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(wrong)
    assert caught.value.code == 2
