"""Reasons become statuses with their code and details, within 4 KiB, and can be read back."""

from __future__ import annotations

import re
from pathlib import Path

import grpc
import pytest
from google.rpc import error_details_pb2
from google.rpc.status_pb2 import Status
from hypothesis import given
from hypothesis import strategies as st

from forkpoint.v1 import errors_pb2
from forkpoint.v1 import sandbox_service_pb2 as pb
from forkpointd.model import FieldViolation, ForkpointError, Problem, Reason
from forkpointd.rpc import status
from tests.unit.rpc.harness import Edge, detail, problem_of

ERRORS_PROTO = Path(__file__).parents[3] / "proto/forkpoint/v1/errors.proto"


def codes_of_the_contract() -> dict[str, str]:
    text = ERRORS_PROTO.read_text()
    found = re.findall(r"// \[([A-Z_]+)\][^=]*?ERROR_REASON_([A-Z_]+) = \d+;", text, re.S)
    return {reason: code for code, reason in found}


def test_every_reason_has_the_code_that_the_contract_names() -> None:
    contract = codes_of_the_contract()
    assert len(contract) == len(errors_pb2.ErrorReason.keys()) - 1
    assert {reason.value: code.name for reason, code in status.CODES.items()} == contract


@pytest.mark.parametrize("reason", list(Reason))
async def test_every_reason_reaches_the_client(edge: Edge, reason: Reason) -> None:
    problem = Problem(reason, f"because of {reason}", {"figure": "42"}, (), 1.5)
    edge.rooms.sandboxes.fails_with = ForkpointError.of(problem)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await edge.sandboxes.GetSandbox(pb.GetSandboxRequest(sandbox_id="agent-7"))
    assert caught.value.code().name == codes_of_the_contract()[reason.value]
    assert caught.value.details() == problem.message
    assert problem_of(caught.value) == problem
    info = detail(caught.value, error_details_pb2.ErrorInfo)
    assert (info.domain, info.reason) == ("forkpoint", reason.value)


PARTS = (FieldViolation("cpu_vendor", "AMD here, Intel there"), FieldViolation("page_size", "4k"))


@pytest.mark.parametrize(
    ("reason", "kind"),
    [
        (Reason.INVALID_FIELD, error_details_pb2.BadRequest),
        (Reason.HOST_MISMATCH, error_details_pb2.PreconditionFailure),
        (Reason.NO_DISK_SPACE, error_details_pb2.QuotaFailure),
    ],
)
def test_the_parts_of_a_problem_are_in_the_detail_that_fits(reason: Reason, kind: type) -> None:
    problem = Problem(reason, "m", {"a": "1"}, PARTS)
    found = status.to_status(problem)
    assert [each.Is(kind.DESCRIPTOR) for each in found.details] == [False, True]  # type: ignore[attr-defined]
    assert status.from_status(found) == problem


def test_a_full_disk_tells_its_figures_as_a_quota() -> None:
    problem = Problem(Reason.NO_DISK_SPACE, "m", {"needed_bytes": "9", "free_bytes": "1"})
    quota = error_details_pb2.QuotaFailure()
    assert status.to_status(problem).details[1].Unpack(quota)
    [violation] = quota.violations
    assert (violation.subject, violation.description) == ("disk", "free_bytes=1, needed_bytes=9")
    assert status.from_status(status.to_status(problem)) == problem


words = st.text(max_size=40)
problems = st.builds(
    Problem,
    st.sampled_from(Reason),
    words,
    st.dictionaries(words, words, max_size=4),
    st.lists(st.builds(FieldViolation, words, words), max_size=4).map(tuple),
    st.none() | st.integers(0, 10**9).map(lambda micros: micros / 1_000_000),
)


@given(problems)
def test_a_problem_survives_its_status(problem: Problem) -> None:
    assert status.from_status(status.to_status(problem)) == problem


anything = st.text(st.characters(codec=None), max_size=6000)


@given(
    st.builds(
        Problem,
        st.sampled_from(Reason),
        anything,
        st.dictionaries(st.text(max_size=300), anything, max_size=40),
        st.lists(st.builds(FieldViolation, anything, anything), max_size=40).map(tuple),
        st.none() | st.just(3.0),
    )
)
def test_no_problem_takes_more_than_4_kib_of_metadata(problem: Problem) -> None:
    found = status.to_trailing_status(problem)
    assert status.metadata_bytes(found) <= status.MAX_METADATA_BYTES
    back = status.from_status(found)
    assert back.reason is problem.reason
    assert (back.retry_after_seconds is None) == (problem.retry_after_seconds is None)


def test_a_cut_problem_says_that_it_was_cut() -> None:
    fields = tuple(FieldViolation(f"labels[{i}]", "y" * 300) for i in range(100))
    back = status.from_status(
        status.to_trailing_status(Problem(Reason.INVALID_FIELD, "x" * 5000, {}, fields))
    )
    assert back.message.endswith("...")
    assert back.fields[0].field == "labels[0]"
    left_out = 100 - (len(back.fields) - 1)
    assert back.fields[-1] == FieldViolation("", f"and {left_out} more")


async def test_the_largest_problem_reaches_the_client_with_its_own_code(edge: Edge) -> None:
    """Metadata over 8 KiB would show as RESOURCE_EXHAUSTED."""
    edge.rooms.sandboxes.fails_with = ForkpointError(
        Reason.VMM_EXITED, "last words:\n" + "ü\n%" * 5000, metadata={"log": "ü" * 9000}
    )
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await edge.sandboxes.GetSandbox(pb.GetSandboxRequest(sandbox_id="agent-7"))
    assert caught.value.code() is grpc.StatusCode.ABORTED
    assert problem_of(caught.value).message.startswith("last words:\nü\n%")


def test_a_status_of_others_is_not_ours() -> None:
    with pytest.raises(ValueError, match="without ErrorInfo"):
        status.from_status(Status(code=2))


def test_bytes_that_are_no_text_do_not_break_a_status() -> None:
    broken = b"/images/\xff".decode("utf-8", "surrogateescape")
    found = status.to_status(Problem(Reason.IMAGE_DAMAGED, broken, {"path": broken}))
    assert found.message == "/images/\\udcff"
