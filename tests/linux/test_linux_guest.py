"""Linux in real Firecracker: files in memory and on drives, through branches, forks and flattens.

The contents that are expected are made here, from the same plan (plan.py) that the guests follow.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from functools import cache
from typing import Any

import pytest

from tests.linux import plan
from tests.linux.machine import STORY_SECONDS, Told

pytestmark = pytest.mark.timeout(STORY_SECONDS + 600)

SNAPSHOTS = [chapter.snapshot for chapter in plan.CHAPTERS]
FAMILY = [pytest.param(s, n, id=f"{s}-{n}") for s in SNAPSHOTS for n in plan.CHILDREN]
BROKEN = "the story broke off, as test_the_story_came_to_its_end says"
BOOK_SECTORS = len(plan.BOOK.apply(None, plan.seed())) // 512


@cache
def contents(snapshot: str) -> Mapping[str, bytes]:
    """What the source's files hold when it is branched."""
    seed = plan.seed()
    files = {plan.BOOK.path: plan.BOOK.apply(None, seed)}
    for chapter in plan.CHAPTERS:
        files = plan.applied(chapter.writes, files, seed)
        if chapter.snapshot == snapshot:
            return files
    raise KeyError(snapshot)


def hashes(files: Mapping[str, bytes]) -> dict[str, str]:
    return {path: hashlib.sha256(content).hexdigest() for path, content in files.items()}


def of_child(snapshot: str, number: int) -> dict[str, str]:
    """What a child's files hold after it wrote."""
    writes = plan.child_writes(snapshot, number)
    return hashes(plan.applied(writes, contents(snapshot), plan.seed()))


def disk_sectors(snapshot: str, number: int) -> int:
    """What a child's files on its writable drive take there."""
    writes = plan.child_writes(snapshot, number)
    files = plan.applied(writes, contents(snapshot), plan.seed())
    sizes = [len(content) for path, content in files.items() if path.startswith("/disk/")]
    return sum(sizes) // 512


def of_source_at_last() -> dict[str, str]:
    return hashes(plan.applied(plan.AFTERWARDS, contents(SNAPSHOTS[-1]), plan.seed()))


def look(told: Told, who: str, when: str) -> dict[str, Any]:
    """The one look that a guest took then."""
    for record in told.all("look"):
        if (record["who"], record["when"]) == (who, when):
            return record
    pytest.fail(f"{who} never looked {when!r}: {BROKEN}", pytrace=False)


def source_looks(told: Told) -> list[dict[str, Any]]:
    looks = [record for record in told.all("look") if record["who"] == "source"]
    if len(looks) != 3 * len(SNAPSHOTS) + 1:
        pytest.fail(f"the source looked {len(looks)} times: {BROKEN}", pytrace=False)
    return looks


def branched(told: Told) -> list[dict[str, Any]]:
    made = told.all("branched")
    if len(made) != len(SNAPSHOTS):
        pytest.fail(f"the source was branched {len(made)} times: {BROKEN}", pytrace=False)
    return made


def only(told: Told, what: str) -> dict[str, Any]:
    """What is told once."""
    records = told.all(what)
    if len(records) != 1:
        pytest.fail(f"{what} was told {len(records)} times: {BROKEN}", pytrace=False)
    return records[0]


def test_the_story_came_to_its_end(told: Told) -> None:
    last = told.records[-1] if told.records else {"what": "nothing"}
    if last["what"] != "end":
        said = {key: value for key, value in last.items() if key not in ("trace", "server_log")}
        pytest.fail(
            f"the machine {told.ended}\nthe last it told: {said}\n"
            f"{last.get('trace', '')}\n--- the server's log\n{last.get('server_log', '')}\n"
            f"--- the outer machine's console\n{told.console[-4000:]}",
            pytrace=False,
        )


def test_the_guests_ran_on_firecracker(told: Told) -> None:
    assert only(told, "serving")["vmm"].startswith("Firecracker ")


@pytest.mark.parametrize("chapter", plan.CHAPTERS, ids=SNAPSHOTS)
def test_a_branch_is_made_as_it_was_asked_for(told: Told, chapter: plan.Chapter) -> None:
    made = branched(told)[SNAPSHOTS.index(chapter.snapshot)]
    assert made["snapshot"] == chapter.snapshot
    assert (made["mode"], made["layout"]) == (chapter.mode.upper(), chapter.layout.upper())


def test_each_branch_stands_on_the_one_before_and_writes_only_what_changed(told: Told) -> None:
    made = branched(told)
    assert [record["parent"] for record in made] == [None, *SNAPSHOTS[:-1]]
    assert all(record["dirty_bytes"] < record["memory_bytes"] / 2 for record in made[1:])


def test_a_layer_that_was_flattened_is_flat(told: Told) -> None:
    flattened = only(told, "flattened")
    assert (flattened["snapshot"], flattened["layout"]) == (plan.FLATTENED, "FLAT")


def test_the_source_is_the_same_process_and_the_same_guest_all_along(told: Told) -> None:
    looks = source_looks(told)
    assert len({record["pid"] for record in looks}) == 1
    assert len({(record["boot_id"], record["ticker"]) for record in looks}) == 1
    assert all(record["ticker_lives"] for record in looks)


@pytest.mark.parametrize("clock", ["uptime", "ticks"])
def test_the_source_s_time_goes_on_through_every_branch(told: Told, clock: str) -> None:
    times = [record[clock] for record in source_looks(told)]
    assert times == sorted(times)
    assert times[-1] > times[0]


def test_a_process_that_writes_all_the_time_finds_what_it_wrote(told: Told) -> None:
    looks = source_looks(told) + [r for r in told.all("look") if r["who"] != "source"]
    assert {(record["who"], record["torn"]) for record in looks if record["torn"]} == set()


@pytest.mark.parametrize("snapshot", SNAPSHOTS)
def test_children_of_one_snapshot_have_random_numbers_of_their_own(
    told: Told, snapshot: str
) -> None:
    found = [look(told, plan.child_id(snapshot, n), "woken")["random"] for n in plan.CHILDREN]
    found.append(look(told, "source", f"after {snapshot}")["random"])
    assert [len(each) for each in found] == [32] * len(found)
    assert len(set(found)) == len(found)


@pytest.mark.parametrize("snapshot", SNAPSHOTS)
@pytest.mark.parametrize("when", ["before", "after"])
def test_a_branch_changes_no_file_of_the_source(told: Told, when: str, snapshot: str) -> None:
    assert look(told, "source", f"{when} {snapshot}")["files"] == hashes(contents(snapshot))


@pytest.mark.parametrize("snapshot", SNAPSHOTS)
def test_the_source_never_sees_what_its_children_write(told: Told, snapshot: str) -> None:
    found = look(told, "source", f"after the children of {snapshot}")
    assert found["files"] == of_source_at_last()


def test_the_source_s_files_are_right_without_its_caches(told: Told) -> None:
    assert look(told, "source", "at the end")["files"] == of_source_at_last()


@pytest.mark.parametrize(("snapshot", "number"), FAMILY)
def test_a_child_wakes_up_with_the_files_of_its_snapshot(
    told: Told, snapshot: str, number: int
) -> None:
    found = look(told, plan.child_id(snapshot, number), "woken")
    assert found["files"] == hashes(contents(snapshot))


@pytest.mark.parametrize(("snapshot", "number"), FAMILY)
def test_a_child_has_the_page_cache_of_its_source(told: Told, snapshot: str, number: int) -> None:
    found = look(told, plan.child_id(snapshot, number), "woken")
    assert found["sectors_read"] == {"vda": 0, "vdb": 0}


@pytest.mark.parametrize(("snapshot", "number"), FAMILY)
def test_a_child_goes_on_where_its_source_was_branched(
    told: Told, snapshot: str, number: int
) -> None:
    before = look(told, "source", f"before {snapshot}")
    found = look(told, plan.child_id(snapshot, number), "woken")
    assert (found["boot_id"], found["ticker"]) == (before["boot_id"], before["ticker"])
    assert found["ticker_lives"]
    assert found["ticks"] >= before["ticks"]
    assert found["uptime"] >= before["uptime"]
    assert found["pid"] != before["pid"]


@pytest.mark.parametrize(("snapshot", "number"), FAMILY)
def test_what_two_children_write_to_the_same_files_stays_their_own(
    told: Told, snapshot: str, number: int
) -> None:
    found = look(told, plan.child_id(snapshot, number), "written")
    assert found["files"] == of_child(snapshot, number)


@pytest.mark.parametrize(("snapshot", "number"), FAMILY)
def test_a_child_s_drives_hold_the_same_as_its_caches(
    told: Told, snapshot: str, number: int
) -> None:
    found = look(told, plan.child_id(snapshot, number), "without caches")
    assert found["files"] == of_child(snapshot, number)
    assert found["sectors_read"]["vda"] >= BOOK_SECTORS
    assert found["sectors_read"]["vdb"] >= disk_sectors(snapshot, number)


@pytest.mark.parametrize(("snapshot", "number"), FAMILY)
def test_a_child_s_file_system_on_its_own_drive_is_whole(
    told: Told, snapshot: str, number: int
) -> None:
    assert_whole(told, plan.child_id(snapshot, number))


def test_the_source_s_file_system_on_its_own_drive_is_whole(told: Told) -> None:
    assert_whole(told, "source")


def assert_whole(told: Told, who: str) -> None:
    found = {record["who"]: record for record in told.all("e2fsck")}
    if who not in found:
        pytest.fail(f"the drive of {who} was never looked at: {BROKEN}", pytrace=False)
    assert found[who]["code"] == 0, found[who]["said"]


def test_the_file_that_a_writable_drive_was_made_from_is_never_written_to(told: Told) -> None:
    template = only(told, "template")
    assert template["sha256"] == template["before"]


def test_the_data_folder_is_in_order_at_the_end(told: Told) -> None:
    fsck = only(told, "fsck")
    assert fsck["code"] == 0, fsck["said"]
