"""Reflection finds what people ask for: a method is a symbol too."""

import pytest

from forkpoint.v1 import sandbox_service_pb2
from forkpointd.rpc.reflection_service import _Pool

FILE = "forkpoint/v1/sandbox_service.proto"


@pytest.mark.parametrize(
    "symbol",
    [
        "forkpoint.v1.SandboxService",
        "forkpoint.v1.SandboxService.BranchSandbox",
        "forkpoint.v1.BranchSandboxRequest",
    ],
)
def test_a_symbol_of_the_contract_is_found(symbol: str) -> None:
    assert sandbox_service_pb2.DESCRIPTOR.name == FILE
    assert _Pool().FindFileContainingSymbol(symbol).name == FILE


@pytest.mark.parametrize("symbol", ["forkpoint.v1.SandboxService.Nope", "nope.Nope", "nope", ""])
def test_what_is_not_there_is_not_found(symbol: str) -> None:
    with pytest.raises(KeyError):
        _Pool().FindFileContainingSymbol(symbol)
