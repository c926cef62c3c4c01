"""The stubs in the tree are what the contract says; the generator keeps out of others' names."""

import ast
import shutil
from pathlib import Path

import pytest

import stubs

ROOT = Path(__file__).parents[2]


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """The contract and its stubs, free to be changed."""
    for folder in ("proto", "third_party", "client/forkpoint/v1"):
        shutil.copytree(ROOT / folder, tmp_path / folder)
    return tmp_path


def test_the_stubs_in_the_tree_are_fresh() -> None:
    assert stubs.stale(ROOT) == [], "run `make stubs`"


def test_a_changed_contract_makes_them_stale_until_they_are_written(copy: Path) -> None:
    with (copy / "proto/forkpoint/v1/snapshot.proto").open("a") as contract:
        contract.write("\n// For this test.\nmessage Extra { string name = 1; }\n")
    assert stubs.stale(copy) == ["snapshot_pb2.py", "snapshot_pb2.pyi"]
    assert stubs.write(copy)
    assert stubs.stale(copy) == []
    assert not stubs.write(copy)


def test_an_edited_a_missing_and_a_foreign_file_are_stale_and_mended(copy: Path) -> None:
    generated = copy / "client/forkpoint/v1"
    (generated / "branch_pb2.py").write_text("# edited\n")
    (generated / "fork_pb2.pyi").unlink()
    (generated / "gone_pb2.py").write_text("# of a .proto that is no more\n")
    assert stubs.stale(copy) == ["branch_pb2.py", "fork_pb2.pyi", "gone_pb2.py"]
    assert stubs.write(copy)
    assert stubs.stale(copy) == []


def test_a_broken_contract_says_where_and_leaves_the_stubs_alone(copy: Path) -> None:
    before = (copy / "client/forkpoint/v1/fork_pb2.py").read_bytes()
    (copy / "proto/forkpoint/v1/fork.proto").write_text("syntax = 'proto3'; message {\n")
    with pytest.raises(stubs.StubsError, match=r"forkpoint/v1/fork\.proto:1:"):
        stubs.write(copy)
    assert (copy / "client/forkpoint/v1/fork_pb2.py").read_bytes() == before


def test_generated_code_imports_ours_as_forkpoint_v1_and_no_package_called_proto() -> None:
    imported = set()
    for file in (ROOT / "client/forkpoint/v1").glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ImportFrom):
                imported.add(node.module)
    ours = {name for name in imported if name and name.startswith("forkpoint")}
    assert ours == {"forkpoint.v1"}
    for package in ("proto", "google"):
        assert not list(ROOT.glob(f"*/{package}/__init__.py"))
