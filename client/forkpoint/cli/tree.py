"""`forkpoint tree`: who was branched from whom."""

from __future__ import annotations

import sys
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

import forkpoint
from forkpoint.cli import output
from forkpoint.cli.common import Address, Json, collect, run
from forkpoint.views import SandboxView, SnapshotView


@dataclass
class Node:
    """A sandbox or a snapshot, with what came from it."""

    kind: str
    """"sandbox" or "snapshot"."""
    id: str
    view: SandboxView | SnapshotView | None
    """None where it is deleted and only known from what came from it."""
    children: list[Node] = field(default_factory=list)


def lineage(sandboxes: Sequence[SandboxView], snapshots: Sequence[SnapshotView]) -> list[Node]:
    """The forest: a sandbox's snapshots below it, a snapshot's sandboxes below that.

    What was deleted appears as long as something of it is left.
    """
    nodes: dict[tuple[str, str], Node] = {}
    below: dict[tuple[str, str], list[tuple[str, str]]] = defaultdict(list)
    parents: dict[tuple[str, str], tuple[str, str] | None] = {}
    for sandbox in sandboxes:
        key = ("sandbox", sandbox.id)
        nodes[key] = Node("sandbox", sandbox.id, sandbox)
        parents[key] = ("snapshot", sandbox.snapshot_id) if sandbox.snapshot_id else None
        if sandbox.snapshot_id and sandbox.source_sandbox_id:
            parents.setdefault(
                ("snapshot", sandbox.snapshot_id), ("sandbox", sandbox.source_sandbox_id)
            )
    for snapshot in snapshots:
        key = ("snapshot", snapshot.id)
        nodes[key] = Node("snapshot", snapshot.id, snapshot)
        parents[key] = (
            ("sandbox", snapshot.source_sandbox_id) if snapshot.source_sandbox_id else None
        )
    for key, parent in list(parents.items()):
        nodes.setdefault(key, Node(key[0], key[1], None))
        if parent is not None:
            nodes.setdefault(parent, Node(parent[0], parent[1], None))
            below[parent].append(key)
    roots: list[Node] = []
    for key, node in nodes.items():
        node.children = sorted((nodes[child] for child in below[key]), key=_age)
        if parents.get(key) is None:
            roots.append(node)
    return sorted(roots, key=_age)


def _age(node: Node) -> datetime:
    """What nodes are sorted by: their creation, and for deleted ones what came from them."""
    if node.view is not None and node.view.create_time is not None:
        return node.view.create_time
    return min((_age(child) for child in node.children), default=datetime.min.replace(tzinfo=UTC))


def tree(address: Address = None, json: Json = False) -> None:
    """Show the lineage: sandboxes, the snapshots branched from them, and their children.

    What was deleted is shown as long as something of it is left.

    Example: `forkpoint tree`
    """

    async def work() -> tuple[list[forkpoint.Sandbox], list[forkpoint.Snapshot]]:
        async with forkpoint.connect(address) as fp:
            return (
                await collect(fp.sandboxes.list(page_size=1000)),
                await collect(fp.snapshots.list(page_size=1000)),
            )

    sandboxes, snapshots = run(work, json=json)
    forest = lineage(sandboxes, snapshots)
    if json:
        output.print_json([_data(node) for node in forest])
        return
    if not forest:
        output.say("no sandboxes and no snapshots")
        return
    for root in forest:
        for line in _lines(root):
            if output.out.is_terminal:
                output.out.print(line)
            else:
                sys.stdout.write(output.plain(line) + "\n")


def _data(node: Node) -> dict[str, Any]:
    return {
        "kind": node.kind,
        "id": node.id,
        "deleted": node.view is None,
        "view": output.as_data(node.view),
        "children": [_data(child) for child in node.children],
    }


def _lines(node: Node, indent: str = "", branch: str = "") -> Iterator[str]:
    yield f"{indent}{branch}{_describe(node)}"
    below = indent + {"": "", "├─ ": "│  ", "└─ ": "   "}[branch]
    for number, child in enumerate(node.children, start=1):
        yield from _lines(child, below, "└─ " if number == len(node.children) else "├─ ")


def _describe(node: Node) -> str:
    if node.view is None:
        return f"[dim]{node.id}  {node.kind}, deleted[/dim]"
    if isinstance(node.view, SandboxView):
        colour = {"RUNNING": "green", "PAUSED": "yellow"}.get(node.view.state.value, "red")
        origin = "" if node.view.snapshot_id else "  booted"
        return (
            f"[bold]{node.id}[/bold]  sandbox [{colour}]{node.view.state.value}[/{colour}]"
            f"{origin}  {output.age(node.view.create_time)}"
        )
    return (
        f"[cyan]{node.id}[/cyan]  snapshot {node.view.mode.value}"
        f"  {output.size(node.view.dirty_bytes)} dirtied  {output.age(node.view.create_time)}"
    )
