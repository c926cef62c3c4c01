"""The images' phases: from given rows to verdicts, tables and plots; what is refused, and how."""

import math
import os
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from bench import loop_disk
from bench.images.__main__ import main
from bench.images.cells import (
    AGAIN,
    CHILD,
    FLAT,
    FLATTEN,
    PHASES,
    READY,
    REFLINK,
    ROW,
    ROW_LENGTH,
    ROWS,
    SIZES_MIB,
    XFS,
    Cell,
    Job,
    Slot,
)
from bench.images.claims import TARGETS, findings
from bench.images.measures import Images, Shot
from bench.images.report import write_report
from bench.images.rows import (
    BYTES_PER_SECOND,
    COLUMNS,
    COPY,
    FLATTENED,
    FLATTENS,
    FORK,
    GROWN,
    PARTS,
    REST,
    SECONDS,
    STORE,
    TABLE,
    WINDOW_PART,
    WRITTEN,
    Row,
)
from bench.images.running import Runner
from bench.images.sources import parts_of
from bench.loop_disk import xfs_on_loop
from bench.machine import Machine
from bench.phase_running import RefusedError
from bench.rounds import CONTROL, FLOOR, FORKPOINT
from bench.rows import Outcome, Progress, identity, path_of, progress_of
from bench.scratch import Scratch
from bench.sparse import allocated_bytes, copy_extent, data_extents
from bench.stats import Pair, Verdict, estimate_ratio
from bench.targets import Finding
from forkpoint.v1 import branch_pb2

RESAMPLES = 200
MACHINE = Machine("cpu", 2, 1024, "6.1", "ext4", "1.12.1", "0.1.0", "3.11.2", "1.85.0", "c0ffee")
IN_A_ROW = Cell(ROW, touched_mib=128, dirty_mib=10, in_a_row=ROW_LENGTH)
MIB = 2**20


def row(cell: Cell, role: str, turn: int, value: float | None, **other: object) -> Row:
    """A trial; one without a value failed."""
    values: dict[str, Any] = {
        "number": 0,
        "source_mib": 0 if role in (FLOOR, CONTROL) else 4096,
        "start": 1_700_000_000.0 + turn,
        "outcome": Outcome.FAILED if value is None else Outcome.OK,
        "error": "it broke" if value is None else "",
        "figures": {} if value is None else {SECONDS: value},
        "machine": identity(MACHINE),
        "position": 0,
        **other,
    }
    return Row(cell=cell, round=turn, role=role, **values)


def wobble(number: int) -> float:
    """Between 0.99 and 1.01."""
    return 1 + 0.01 * math.sin(number)


def rounds(cell: Cell, floor: float, forkpoint: float, count: int = 200) -> list[Row]:
    roles = ((FLOOR, floor), (CONTROL, floor), (FORKPOINT, forkpoint))
    return [
        row(cell, role, turn, value * wobble(turn + len(role)))
        for turn in range(count)
        for role, value in roles
    ]


def finding(name: str, rows: Sequence[Row]) -> Finding:
    return {found.target.name: found for found in findings(rows, resamples=RESAMPLES)}[name]


# --- verdicts ---


def test_every_target_has_a_finding_and_nothing_measured_is_undecided() -> None:
    found = findings([])
    assert [f.target for f in found] == list(TARGETS)
    assert {f.verdict for f in found} == {Verdict.UNDECIDED}
    assert all(f.estimate is None for f in found)


@pytest.mark.parametrize(
    ("name", "cell", "goal"),
    [
        ("layered_ready_4gib", Cell(READY), 3.0),
        ("flatten_reflink", Cell(REFLINK, XFS), 1.5),
        ("children_10_reflink", Cell(CHILD, XFS), 1.3),
        ("children_10_copied", Cell(CHILD, touched_mib=256), 1.3),
        ("children_10_copied_4gib", Cell(CHILD), 1.3),
    ],
)
def test_a_time_is_held_against_the_floor_of_its_own_cell(
    name: str, cell: Cell, goal: float
) -> None:
    assert finding(name, rounds(cell, 1.0, goal * 0.95)).verdict is Verdict.MET
    assert finding(name, rounds(cell, 1.0, goal * 1.05)).verdict is Verdict.MISSED
    assert finding(name, rounds(cell, 1.0, goal)).verdict is Verdict.UNDECIDED
    few = finding(name, rounds(cell, 1.0, 0.5, count=199))
    assert (few.verdict, few.control is not None) == (Verdict.UNDECIDED, True)
    told = {f.target.name for f in findings(rounds(cell, 1.0, 1.0), resamples=9) if f.estimate}
    assert told == {name}


def test_a_smaller_source_s_time_is_not_that_of_4_gib() -> None:
    rows = rounds(Cell(READY), 1.0, 2.0)
    rows += [row(Cell(READY), FORKPOINT, turn, 99.0, source_mib=1024) for turn in range(200)]
    found = finding("layered_ready_4gib", rows)
    assert found.estimate is not None
    assert found.estimate.value == pytest.approx(2.0, rel=0.01)


@pytest.mark.parametrize(("slower", "verdict"), [(1.2, Verdict.MET), (1.4, Verdict.MISSED)])
def test_4_gib_is_held_against_1_gib_of_the_same_round(slower: float, verdict: Verdict) -> None:
    rows = []
    for turn in range(200):
        minute = 1 + turn % 7  # the machine is seven times slower now and then
        for role, size, value in (
            (FORKPOINT, 1024, 0.1),
            (FORKPOINT, 2048, 0.5),
            (FORKPOINT, 4096, 0.1 * slower),
            (AGAIN, 1024, 0.1),
        ):
            rows.append(
                row(Cell(READY), role, turn, value * minute * wobble(turn), source_mib=size)
            )
    found = finding("layered_4gib_by_1gib", rows)
    assert found.verdict is verdict
    assert found.control is not None
    assert found.control.value == pytest.approx(1.0, rel=0.01)


def rows_of_branches(
    grows: float, end: Mapping[str, float] | None = None, count: int = ROWS
) -> list[Row]:
    """Each branch of a row takes longer by this share of the first; `end`: figures of its last."""
    rows = []
    for turn in range(count):
        for number in range(ROW_LENGTH):
            value = 0.1 * (1 + grows * number) * wobble(turn + number)
            figures = {SECONDS: value, **(end or {} if number == ROW_LENGTH - 1 else {})}
            rows.append(row(IN_A_ROW, FORKPOINT, turn, value, number=number, figures=figures))
    return rows


@pytest.mark.parametrize(("grows", "verdict"), [(0.001, Verdict.MET), (0.01, Verdict.MISSED)])
def test_the_last_branches_of_a_row_are_held_against_those_up_to_the_tenth(
    grows: float, verdict: Verdict
) -> None:
    found = finding("hundredth_by_tenth", rows_of_branches(grows))
    assert found.verdict is verdict
    assert found.estimate is not None
    assert found.estimate.samples == 5 * ROWS
    assert found.estimate.value == pytest.approx((1 + 97 * grows) / (1 + 7 * grows), rel=0.01)
    assert found.control is not None
    assert found.control.value == pytest.approx((1 + 97 * grows) / (1 + 92 * grows), rel=0.01)


def test_the_interval_of_rows_draws_rows_and_not_their_branches() -> None:
    rows = []
    for one in rows_of_branches(0.0):  # all late branches of a row have their minute in common
        minute = 1 + 0.5 * math.sin(one.round) if one.number >= 95 else 1
        rows.append(replace(one, figures={SECONDS: one.figures[SECONDS] * minute}))
    seconds = {(one.round, one.number): one.figures[SECONDS] for one in rows}
    late = range(95, 100)
    pairs = [Pair(seconds[r, n], seconds[r, n - 90]) for r in range(ROWS) for n in late]
    narrow, found = estimate_ratio(pairs, resamples=RESAMPLES), finding("hundredth_by_tenth", rows)
    assert found.estimate is not None
    assert found.estimate.value == narrow.value
    assert found.estimate.high - found.estimate.low > 1.5 * (narrow.high - narrow.low)


def test_a_row_that_broke_off_counts_as_infinitely_slow_and_large() -> None:
    end = {GROWN: 1000.0 * MIB, WRITTEN: 1000.0 * MIB}
    rows = [r for r in rows_of_branches(0.0, end) if r.round >= 35 or r.number < 50]
    rows += [row(IN_A_ROW, FORKPOINT, turn, None, number=50) for turn in range(35)]
    for name in ("hundredth_by_tenth", "row_growth"):
        found = finding(name, rows)
        assert found.estimate is not None
        assert (found.estimate.value, found.verdict) == (math.inf, Verdict.MISSED)
        assert found.failed == 35


@pytest.mark.parametrize(("grown", "verdict"), [(1040, Verdict.MET), (1060, Verdict.MISSED)])
def test_growth_is_what_the_disk_has_more_by_what_the_guest_wrote(
    grown: int, verdict: Verdict
) -> None:
    end = {GROWN: grown * MIB, WRITTEN: 1000.0 * MIB, FLATTENS: 0.0, FLATTENED: 0.0}
    assert finding("row_growth", rows_of_branches(0.0, end)).verdict is verdict
    assert finding("row_growth", rows_of_branches(0.0, end, 40)).verdict is Verdict.UNDECIDED


def test_rows_with_the_flatten_policy_on_decide_nothing() -> None:
    end = {GROWN: 2000.0 * MIB, WRITTEN: 1000.0 * MIB}
    on = replace(IN_A_ROW, flatten_depth=32)
    rows = [replace(r, cell=on) for r in rows_of_branches(0.1, end)]
    assert finding("row_growth", rows).estimate is None
    assert finding("hundredth_by_tenth", rows).estimate is None


def test_a_flatten_that_failed_has_a_rate_of_nothing() -> None:
    def rates(forkpoint: float | None) -> list[Row]:
        rows = []
        for turn in range(200):
            for role, value in ((FLOOR, 1000.0), (CONTROL, 1000.0), (FORKPOINT, forkpoint)):
                figures = {} if value is None else {BYTES_PER_SECOND: value * wobble(turn)}
                rows.append(row(Cell(FLATTEN, touched_mib=512), role, turn, value, figures=figures))
        return rows

    assert finding("flatten_rate", rates(950.0)).verdict is Verdict.MET
    assert finding("flatten_rate", rates(850.0)).verdict is Verdict.MISSED
    found = finding("flatten_rate", rates(None))
    assert found.estimate is not None
    assert (found.estimate.value, found.failed, found.verdict) == (0, 200, Verdict.MISSED)


# --- the plan, the rows ---


def test_the_plan_has_what_the_claims_need() -> None:
    jobs = [job for phase in PHASES.values() for job in phase.jobs]
    cells = {job.cell: job for job in jobs}
    assert len(cells) == len(jobs)
    for cell in (
        Cell(READY),
        Cell(FLATTEN, touched_mib=512),
        Cell(REFLINK, XFS),
        Cell(CHILD, XFS),
        Cell(CHILD, touched_mib=256),
    ):
        assert cells[cell].rounds >= 200
        roles = [slot.role for slot in cells[cell].slots if slot.every == 1]
        assert {FLOOR, CONTROL, FORKPOINT} <= set(roles)
        assert FLAT in {slot.role for slot in cells[cell].slots}
    assert 5 * cells[IN_A_ROW].rounds >= 200
    assert {slot.source_mib for slot in cells[Cell(READY)].slots} == {0, *SIZES_MIB}
    assert all(job.cell.phase == name for name, phase in PHASES.items() for job in phase.jobs)
    assert sum(phase.minutes for phase in PHASES.values()) <= 60


@pytest.mark.parametrize(
    "cell", [job.cell for phase in PHASES.values() for job in phase.jobs], ids=str
)
def test_a_cell_comes_back_from_its_columns(cell: Cell) -> None:
    assert Cell.of(cell.row()) == cell


def test_a_row_comes_back_as_it_was_written(tmp_path: Path) -> None:
    given = row(Cell(READY), FORKPOINT, 3, 0.25, number=7, source_mib=2048)
    with TABLE.log(tmp_path, READY, MACHINE) as log:
        log.add(given)
        with pytest.raises(ValueError, match="speed"):
            log.add(row(Cell(READY), FLOOR, 4, 1.0, figures={"speed": 1.0}))
    assert TABLE.read(log.path) == [given]
    assert len(set(COLUMNS)) == len(COLUMNS)


def test_sources_of_different_sizes_are_different_slots() -> None:
    (job,) = PHASES[READY].jobs
    here = identity(MACHINE)
    rows = [row(job.cell, slot.role, 0, 1.0, source_mib=slot.source_mib) for slot in job.order(0)]
    assert progress_of(job, rows, here) == Progress(1, 1)
    assert progress_of(job, rows[1:], here) == Progress(0, 1)


def test_a_row_of_branches_is_done_with_its_last() -> None:
    job = Job(IN_A_ROW, (Slot(FORKPOINT, 4096, trials=3),), 1)
    rows: list[Row] = []
    for number in range(3):
        assert progress_of(job, rows, identity(MACHINE)).done == 0
        rows.append(row(IN_A_ROW, FORKPOINT, 0, 1.0, number=number))
    assert progress_of(job, rows, identity(MACHINE)).done == 1


# --- running ---


class Given(Images):
    """Trials that come at once."""

    def __init__(self) -> None:
        self.prepared: list[int] = []

    def prepare(self, number: int, *, afresh: bool) -> None:
        self.prepared.append(number)

    def shots(self, slot: Slot) -> Iterator[Shot]:
        for number in range(slot.trials):
            yield Shot(number, {SECONDS: 1.0})


@dataclass(frozen=True, slots=True)
class GivenRunner(Runner):
    @contextmanager
    def measuring(self, job: Job) -> Iterator[Images]:
        if job.cell.disk == XFS:
            raise RefusedError("only root can mount one")
        yield Given()


def test_what_this_host_has_not_is_a_refused_row_and_no_error(tmp_path: Path) -> None:
    said: list[str] = []
    place = Scratch(tmp_path, tmp_path)
    runner = GivenRunner(place, tmp_path, tmp_path, MACHINE, tmp_path, said.append, 2)
    assert runner.run([PHASES[REFLINK], PHASES[FLATTEN]]) == 0
    refused = TABLE.read(path_of(tmp_path, REFLINK))
    assert {(r.outcome, r.error) for r in refused} == {
        (Outcome.REFUSED, "RefusedError: only root can mount one")
    }
    assert {r.role for r in refused} == {FLOOR, CONTROL, FORKPOINT, FLAT}
    assert any("only root can mount one" in line for line in said)
    taken = TABLE.read(path_of(tmp_path, FLATTEN))
    assert [r.round for r in taken if r.role == FORKPOINT] == [0, 1]


def test_a_second_run_goes_on_where_the_first_was(tmp_path: Path) -> None:
    place = Scratch(tmp_path, tmp_path)
    for rounds_wanted in (1, 3):
        runner = GivenRunner(
            place, tmp_path, tmp_path, MACHINE, tmp_path, lambda _: None, rounds_wanted
        )
        assert runner.run([PHASES[FLATTEN]]) == 0
    taken = TABLE.read(path_of(tmp_path, FLATTEN))
    assert [r.round for r in taken if r.role == FORKPOINT] == [0, 1, 2]


def test_an_xfs_is_refused_to_an_ordinary_user(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    with pytest.raises(RefusedError, match="root only"), xfs_on_loop(tmp_path, 512):
        pass
    assert list(tmp_path.iterdir()) == []


def test_an_xfs_is_refused_where_its_tools_are_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setattr(shutil, "which", lambda _: None)
    with pytest.raises(RefusedError, match="xfsprogs"), xfs_on_loop(tmp_path, 512):
        pass


def test_a_mount_that_is_refused_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setattr(loop_disk, "TOOLS", ())
    monkeypatch.setattr(loop_disk, "need_room", lambda *_: None)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    (tmp_path / "bin").mkdir()
    for tool, does in (
        ("mkfs.xfs", "exit 0"),
        ("losetup", f'echo "$@" >> {tmp_path}/bin/asked; echo /dev/loop99'),
        ("mount", "echo no such device >&2; exit 32"),
    ):
        (tmp_path / "bin" / tool).write_text(f"#!/bin/sh\n{does}\n")
        (tmp_path / "bin" / tool).chmod(0o700)
    folder = tmp_path / "disk"
    folder.mkdir()
    with pytest.raises(RefusedError, match="mount failed: no such device"), xfs_on_loop(folder, 8):
        pass
    assert list(folder.iterdir()) == []
    assert (tmp_path / "bin" / "asked").read_text().splitlines()[-1] == "--detach /dev/loop99"


# --- figures ---


def test_the_parts_of_a_branch_to_children_are_all_of_it() -> None:
    branch = branch_pb2.Branch()
    branch.pause_window.total.FromMilliseconds(20)
    for name, at_ms in (
        ("QUEUED", 0),
        ("PRECOPYING", 10),
        ("PAUSED", 110),
        ("RESUMED", 135),
        ("MERGING", 136),
        ("FINALIZING", 180),
        ("FORKING", 200),
        ("READY", 500),
    ):
        entry = branch.stages.add()
        entry.stage = branch_pb2.BranchStage.Value(f"BRANCH_STAGE_{name}")
        entry.enter_time.FromMilliseconds(1_700_000_000_000 + at_ms)
    parts = parts_of(branch, starting=1_700_000_000.3, seconds=0.51)
    wanted = {COPY: 0.2, WINDOW_PART: 0.02, STORE: 0.065, FORK: 0.2, REST: 0.025}
    assert parts == pytest.approx(wanted, abs=1e-6)
    assert sum(parts.values()) == pytest.approx(0.51)


def test_the_floor_s_extents_are_those_that_were_written(tmp_path: Path) -> None:
    source, target = tmp_path / "layer", tmp_path / "image"
    with source.open("wb") as opened:
        opened.truncate(1 << 20)
        for offset in (0, 512 << 10):
            opened.seek(offset)
            opened.write(b"x" * 65536)
    target.write_bytes(b"y" * (1 << 20))
    with source.open("rb") as one, target.open("r+b") as other:
        extents = list(data_extents(one.fileno(), 1 << 20))
        for start, end in extents:
            copy_extent(one.fileno(), other.fileno(), start, end)
    held = target.read_bytes()
    assert sum(end - start for start, end in extents) == 2 * 65536
    assert held.count(b"x") == 2 * 65536
    assert held[512 << 10 :].startswith(b"x")
    assert allocated_bytes(tmp_path) >= (1 << 20) + 2 * 65536


# --- the report ---


def some_of_all() -> dict[str, list[Row]]:
    """A few rows of each phase."""
    rows: dict[str, list[Row]] = {}
    for name, phase in PHASES.items():
        rows[name] = []
        for job in phase.jobs:
            for turn in range(2):
                for slot in job.order(turn):
                    for number in range(slot.trials):
                        figures = {SECONDS: 0.1 + 0.01 * number + 0.001 * turn}
                        if name == CHILD:
                            figures |= dict.fromkeys(PARTS, 0.05)
                        if name == FLATTEN:
                            figures |= {BYTES_PER_SECOND: 800.0 * MIB}
                        if slot.trials > 1 and number == slot.last:
                            figures |= {GROWN: 1100.0 * MIB, WRITTEN: 1000.0 * MIB}
                            figures |= {FLATTENS: 3.0, FLATTENED: 384.0 * MIB}
                        rows[name].append(
                            row(
                                job.cell,
                                slot.role,
                                turn,
                                1.0,
                                number=number,
                                source_mib=slot.source_mib,
                                figures=figures,
                            )
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
    lines = re.findall(r"^target (\S+) value \S+ goal [<>]=\S+ undecided$", text, re.MULTILINE)
    assert lines == [target.name for target in TARGETS]
    assert "1434.0" in text  # allowed: 1.05 times 1000 MiB, and 384 MiB of images


def test_a_report_of_the_same_rows_is_the_same_byte_for_byte(tmp_path: Path) -> None:
    rows = some_of_all()
    for folder in ("a", "b"):
        written(tmp_path / folder, rows)
    files = [path.relative_to(tmp_path / "a") for path in (tmp_path / "a").rglob("*.*")]
    assert len(files) == 2 * len(PHASES) + 1
    for file in files:
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


def test_refused_trials_are_listed_with_their_reason(tmp_path: Path) -> None:
    refused = row(
        Cell(REFLINK, XFS), FORKPOINT, 0, None, outcome=Outcome.REFUSED, error="root only"
    )
    text = written(tmp_path, {REFLINK: [refused]})
    cell = "reflink, xfs, all memory populated, 50 MiB dirtied"
    assert f"- forkpoint refused 1 times ({cell}): root only" in text
    assert "Not measured: ready, row, flatten, children." in text


def test_without_any_row_the_report_says_so_and_the_command_succeeds(tmp_path: Path) -> None:
    assert main(["--report-only", "--results", str(tmp_path / "results")]) == 0
    assert "0 trials in all" in (tmp_path / "RESULTS.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("wrong", [["--phases", "1a"], ["--rounds", "0"]])
def test_wrong_usage_is_refused(wrong: list[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(wrong)
    assert caught.value.code == 2
