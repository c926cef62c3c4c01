"""The rows of the pause window's phases: what is written, what a restarted run skips."""

import csv
from pathlib import Path

import grpc
import pytest

from bench.floor import FloorError
from bench.machine import Machine
from bench.pause_window.cells import (
    CELL_COLUMNS,
    DIFF,
    PHASES,
    SEQUENTIAL,
    Cell,
    Job,
    Slot,
)
from bench.pause_window.measures import Shot, Windows
from bench.pause_window.rows import COLUMNS, TABLE, Row
from bench.pause_window.running import Runner, row_of
from bench.pause_window.subjects import Verdict
from bench.phase_running import RefusedError, Rounds, outcome_of
from bench.rounds import CONTROL, FAILURES_IN_A_ROW, FLOOR, FORKPOINT
from bench.rows import Outcome, Progress, ResultsError, newest, path_of, progress_of
from bench.scratch import Scratch
from bench.witness import file_range

CELL = Cell("1a", 4096)
JOB = Job(CELL, (Slot(FLOOR), Slot(CONTROL), Slot(FORKPOINT), Slot(SEQUENTIAL, every=2)), 4)


def machine(commit: str = "c0ffee") -> Machine:
    return Machine("cpu", 2, 1024, "6.1", "ext4", "1.12.1", "0.1.0", "3.11.2", "1.85.0", commit)


def identity(commit: str = "c0ffee") -> dict[str, str]:
    return {name: str(value) for name, value in machine(commit).row().items()}


def row(role: str, round_number: int = 0, outcome: Outcome = Outcome.OK, **other: object) -> Row:
    values: dict[str, object] = {
        "cell": CELL,
        "round": round_number,
        "position": 0,
        "role": role,
        "mode": DIFF,
        "beside": "nothing",
        "number": 0,
        "start": 1_700_000_000.25,
        "outcome": outcome,
        "machine": identity(),
        **other,
    }
    return Row(**values)  # type: ignore[arg-type]


def test_a_row_comes_back_as_it_was_written(tmp_path: Path) -> None:
    given = row(
        FORKPOINT,
        3,
        Outcome.REFUSED,
        error='it said "no", twice',
        staging_used="disk",
        figures={"vmm_total_us": 1234.0, "ready_seconds": 0.25},
    )
    with TABLE.log(tmp_path / "results", "1a", machine()) as log:
        log.add(given)
        assert TABLE.read(log.path) == [given]  # at once, not when the run ends
    with log.path.open(newline="") as opened:
        assert tuple(next(csv.reader(opened))) == COLUMNS


def test_no_column_has_two_meanings() -> None:
    assert len(set(COLUMNS)) == len(COLUMNS)
    assert set(CELL_COLUMNS) <= set(COLUMNS)


def test_a_figure_without_a_column_is_a_mistake(tmp_path: Path) -> None:
    with TABLE.log(tmp_path, "1a", machine()) as log, pytest.raises(ValueError, match="speed"):
        log.add(row(FLOOR, figures={"speed": 1.0}))


def test_a_line_that_a_kill_cut_off_is_removed_and_the_file_goes_on(tmp_path: Path) -> None:
    with TABLE.log(tmp_path, "1a", machine()) as log:
        log.add(row(FLOOR))
    with log.path.open("ab") as opened:
        opened.write(b"1a,4096,DIFF,tm")
    with TABLE.log(tmp_path, "1a", machine()) as log:
        log.add(row(CONTROL))
    assert [there.role for there in TABLE.read(log.path)] == [FLOOR, CONTROL]


def test_a_file_with_other_columns_is_not_added_to(tmp_path: Path) -> None:
    path_of(tmp_path, "1a").write_text("phase,speed\n1a,3\n")
    with pytest.raises(ResultsError, match="other columns"):
        TABLE.log(tmp_path, "1a", machine())
    assert path_of(tmp_path, "1a").read_text() == "phase,speed\n1a,3\n"


# --- what is skipped ---


def everyone(number: int, **other: object) -> list[Row]:
    roles = [slot.role for slot in JOB.order(number)]
    return [row(role, number, **other) for role in roles]  # type: ignore[arg-type]


def test_a_round_is_done_when_each_slot_has_its_row() -> None:
    assert progress_of(JOB, [], identity()) == Progress(0, 0)
    rows = everyone(0) + everyone(1)
    assert progress_of(JOB, rows, identity()) == Progress(2, 2)
    assert progress_of(JOB, rows[:-1], identity()) == Progress(1, 2)


def test_a_failed_or_refused_trial_counts_as_done() -> None:
    rows = everyone(0, outcome=Outcome.FAILED) + everyone(1, outcome=Outcome.REFUSED)
    assert progress_of(JOB, rows, identity()).done == 2


def test_sequential_disk_is_asked_for_only_in_its_rounds() -> None:
    assert SEQUENTIAL in {slot.role for slot in JOB.order(2)}
    assert SEQUENTIAL not in {slot.role for slot in JOB.order(3)}


def test_rows_of_another_commit_or_cell_are_not_this_run_s() -> None:
    assert progress_of(JOB, everyone(0), identity("beef")) == Progress(0, 0)
    other = everyone(0, cell=Cell("1a", 2048))
    assert progress_of(JOB, other, identity()) == Progress(0, 0)


def test_a_row_of_windows_is_done_with_its_last() -> None:
    job = Job(CELL, (Slot(FORKPOINT, windows=3),), 1)
    rows: list[Row] = []
    for window in range(3):
        assert progress_of(job, rows, identity()).done == 0
        rows.append(row(FORKPOINT, number=window))
    assert progress_of(job, rows, identity()).done == 1


def test_figures_of_different_commits_are_never_put_together() -> None:
    old = row(FLOOR, start=1.0, machine=identity("old"))
    new = [row(FLOOR, start=2.0), row(FORKPOINT, start=3.0)]
    assert newest([old, *new]) == new
    assert newest([]) == []


# --- the order, the plan ---


@pytest.mark.parametrize("one", [slot for slot in JOB.slots if slot.every == 1])
@pytest.mark.parametrize("other", [slot for slot in JOB.slots if slot.every == 1])
def test_of_two_slots_each_goes_first_equally_often(one: Slot, other: Slot) -> None:
    orders = [JOB.order(number) for number in range(2 * len(JOB.slots))]
    first = sum(order.index(one) < order.index(other) for order in orders)
    assert one == other or first == len(orders) // 2


def test_the_plan_has_what_the_claims_need() -> None:
    rounds = {job.cell: job.rounds for phase in PHASES.values() for job in phase.jobs}
    assert rounds[Cell("1a", 4096)] >= 1000
    for size in (256, 512, 1024, 2048, 8192):
        assert rounds[Cell("1a", size)] >= 200
    for pattern in ("fresh", "repeated"):
        cell = Cell("1b", 2048, touched_mib=0, dirty_mib=100, pattern=pattern)
        assert rounds[cell] >= 200
    for image in (100, 2048):
        assert rounds[Cell("ready", 4096, touched_mib=image)] >= 200
    cells = [job.cell for phase in PHASES.values() for job in phase.jobs]
    assert len(set(cells)) == len(cells)
    assert all(job.cell.phase == name for name, phase in PHASES.items() for job in phase.jobs)
    assert all(cell.dirty_mib <= cell.region_mib for cell in cells)


@pytest.mark.parametrize(
    "cell", [job.cell for phase in PHASES.values() for job in phase.jobs], ids=str
)
def test_a_cell_comes_back_from_its_columns(cell: Cell) -> None:
    assert Cell.of(cell.row()) == cell


# --- rounds ---


class Recorded(Windows):
    """Sources that take no windows: some fail."""

    def __init__(self, fails: set[tuple[int, str]], shots: tuple[Shot, ...]) -> None:
        self.fails = fails
        self.told = shots
        self.afresh: list[bool] = []
        self.number = -1

    def prepare(self, number: int, *, afresh: bool) -> None:
        self.number = number
        self.afresh.append(afresh)
        if (number, "prepare") in self.fails:
            raise RefusedError("no room for the sources")

    def shots(self, slot: Slot):  # type: ignore[no-untyped-def]
        yield from self.told
        if (self.number, slot.role) in self.fails:
            raise FloorError("Firecracker\nended")


def rows_of(tmp_path: Path, measure: Recorded, rounds: range) -> list[Row]:
    with TABLE.log(tmp_path, "1a", machine()) as log:
        Rounds[Slot, Shot, Row](JOB, log, lambda _: None, row_of).run(measure, rounds)
    return TABLE.read(log.path)


def test_a_failed_trial_is_a_row_and_sources_are_made_afresh(tmp_path: Path) -> None:
    measure = Recorded({(0, FLOOR)}, (Shot(0, {"vmm_total_us": 1.0}),))
    rows = rows_of(tmp_path, measure, range(2))
    assert measure.afresh == [False, True]
    bad = [there for there in rows if there.outcome is not Outcome.OK]
    assert [(there.role, there.round, there.number, there.error) for there in bad] == [
        (FLOOR, 0, 1, "FloorError: Firecracker ended")
    ]
    assert len(rows) == 8  # four slots in round 0, three in round 1, and the failure


def test_a_cell_without_room_is_a_row_of_each_role(tmp_path: Path) -> None:
    rows = rows_of(tmp_path, Recorded({(0, "prepare")}, ()), range(1))
    assert {there.role for there in rows} == {slot.role for slot in JOB.slots}
    assert {there.outcome for there in rows} == {Outcome.REFUSED}
    assert progress_of(JOB, rows, identity()).done == 1


def test_what_the_staging_rule_refused_and_what_is_torn_are_told_apart(tmp_path: Path) -> None:
    shots = (Shot(0, {"vmm_total_us": 1.0}, "disk", refused="the rule took disk"),)
    rows = rows_of(tmp_path / "a", Recorded(set(), shots), range(1, 2))
    assert {(there.outcome, there.error) for there in rows} == {
        (Outcome.REFUSED, "the rule took disk")
    }
    shots = (Shot(0, {"vmm_total_us": 1.0}, "tmpfs", wrong="torn"),)
    rows = rows_of(tmp_path / "b", Recorded(set(), shots), range(1, 2))
    assert {(there.outcome, there.error) for there in rows} == {(Outcome.FAILED, "torn")}


def test_a_cell_is_given_up_when_all_fails(tmp_path: Path) -> None:
    measure = Recorded({(number, "prepare") for number in range(99)}, ())
    rows_of(tmp_path, measure, range(99))
    assert len(measure.afresh) == FAILURES_IN_A_ROW


def test_a_run_says_what_it_skips(tmp_path: Path) -> None:
    said: list[str] = []
    phase = PHASES["1f"]
    (job,) = phase.jobs
    with TABLE.log(tmp_path, phase.name, machine()) as log:
        for number in range(3):
            for slot in job.order(number):
                log.add(row(slot.role, number, cell=job.cell))
    runner = Runner(
        Scratch(tmp_path, tmp_path), tmp_path, tmp_path, machine(), tmp_path, said.append, 3
    )
    assert runner.run([phase]) == 0
    assert any("3 rounds were there already" in line for line in said)
    assert len(TABLE.read(log.path)) == len([s for n in range(3) for s in job.order(n)])


class Refused(grpc.RpcError):
    """What a stub raises has a code."""

    def __init__(self, code: grpc.StatusCode) -> None:
        self._code = code

    def code(self) -> grpc.StatusCode:
        return self._code


def test_a_refusal_is_no_failure() -> None:
    assert outcome_of(Refused(grpc.StatusCode.RESOURCE_EXHAUSTED)) is Outcome.REFUSED
    assert outcome_of(Refused(grpc.StatusCode.INTERNAL)) is Outcome.FAILED
    assert outcome_of(FloorError("no")) is Outcome.FAILED


# --- the guest ---


def test_pages_lie_in_the_memory_file_where_the_witness_says() -> None:
    assert file_range(256, 512) == (65 << 20, 2 << 20)


@pytest.mark.parametrize(
    ("answer", "whole"),
    [
        ("V 256 7 7 0 0", True),
        ("V 256 7 8 1 1", True),
        ("V 256 7 9 1 0", False),
        ("V 256 7 8 2 0", False),
        ("V 256 7 8 1 2", False),
    ],
)
def test_a_child_is_whole_only_if_its_memory_is_of_one_moment(answer: str, whole: bool) -> None:
    assert Verdict.parse(answer).one_moment is whole


@pytest.mark.parametrize("answer", ["", "? range", "V 1 2 3"])
def test_an_answer_that_is_no_verdict_is_refused(answer: str) -> None:
    with pytest.raises(FloorError, match="instead of V"):
        Verdict.parse(answer)
