"""What the demo does, in order, and what it claims."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from itertools import pairwise
from pathlib import Path
from typing import Protocol

import forkpoint
from forkpoint.demo.guest import PAGES_PER_MIB, GuestClock, Memory, Witness
from forkpoint.demo.machine import memory_mib
from forkpoint.demo.server import running_server, staging_folder, temporary_folder, witness_kernel
from forkpoint.enums import BranchMode, SandboxState
from forkpoint.views import BranchUpdate, ForkUpdate, PauseWindow, ServerInfo, Vmm

REGION_MIB = 100
"""What the source stamps before its first branch."""

Stamp = tuple[int, int]
"""First page and number of pages."""

DIFFS: Sequence[Stamp] = (
    (0, 50 * PAGES_PER_MIB),
    (0, 25 * PAGES_PER_MIB),
    (20_000, 500),
    (0, 10 * PAGES_PER_MIB),
)
"""What the source writes before each DIFF branch."""

LATER: Sequence[Stamp] = ((0, 5 * PAGES_PER_MIB), (24_000, 100))
"""What the source writes after the children were started."""


@dataclass(frozen=True)
class Options:
    """How the demo is run."""

    children: int = 10
    memory_mib: int | None = None
    """None: as much as this machine has room for, at most 4096."""
    vmm: str | None = None
    """None: Firecracker where there is KVM, else the simulator."""


@dataclass(frozen=True)
class BranchRow:
    """One branch of the source."""

    mode: BranchMode
    written_bytes: int
    """What the source was told to write since the branch before."""
    precopied_bytes: int | None
    """None for FULL, which has no pre-copy."""
    precopy_holes_bytes: int | None
    pause: PauseWindow
    guest_gap: timedelta | None
    """The longest gap the source itself saw; None where its clock can't be compared."""
    ready_after: timedelta
    """From the request to READY, by this client's clock."""
    disk_bytes: int


@dataclass(frozen=True)
class Claim:
    """Something the demo claims."""

    text: str
    held: bool
    detail: str = ""


@dataclass
class Outcome:
    """What came of it."""

    server_version: str = ""
    vmm: Vmm | None = None
    guest: str = "witness: a small kernel that stamps its memory and tells what it finds; not Linux"
    kernel: Path | None = None
    memory_mib: int = 0
    branches: list[BranchRow] = field(default_factory=list)
    children: int = 0
    children_ready_after: timedelta | None = None
    child_starts: list[timedelta] = field(default_factory=list)
    claims: list[Claim] = field(default_factory=list)
    took: timedelta = timedelta()

    @property
    def held(self) -> bool:
        """Whether everything that was claimed held."""
        return bool(self.claims) and all(claim.held for claim in self.claims)

    def claim(self, text: str, wrong: Sequence[str]) -> Claim:
        """Notes a claim: it held where nothing was wrong."""
        made = Claim(text, not wrong, "; ".join(list(wrong)[:5]))
        self.claims.append(made)
        return made


class Teller(Protocol):
    """Who tells the story while it goes on."""

    def say(self, text: str) -> None: ...

    def server(self, info: ServerInfo, folder: Path) -> None: ...

    def branch(self, number: int, total: int, mode: BranchMode, written_bytes: int) -> None: ...

    def branch_update(self, update: BranchUpdate) -> None: ...

    def branch_end(self, row: BranchRow) -> None: ...

    def fork_update(self, fork: ForkUpdate) -> None: ...

    def claim(self, claim: Claim) -> None: ...


async def perform(options: Options, teller: Teller) -> Outcome:
    """Runs the demo. Whatever happens, it leaves nothing behind."""
    started = time.monotonic()
    outcome = Outcome()
    with temporary_folder() as folder, staging_folder(folder.name) as staging:
        outcome.memory_mib = options.memory_mib or memory_mib(folder)
        kernel = outcome.kernel = await asyncio.to_thread(witness_kernel)
        async with running_server(folder, kernel.parent, staging=staging, vmm=options.vmm) as fp:
            info = await fp.server.info()
            outcome.server_version, outcome.vmm = info.version, info.vmm
            teller.server(info, folder)
            await _Story(fp, options, outcome, teller).run(kernel)
    outcome.took = timedelta(seconds=time.monotonic() - started)
    return outcome


class _Story:
    """One run."""

    def __init__(
        self, fp: forkpoint.Client, options: Options, outcome: Outcome, teller: Teller
    ) -> None:
        self._fp = fp
        self._options = options
        self._outcome = outcome
        self._teller = teller
        self._clock = GuestClock()

    async def run(self, kernel: Path) -> None:
        """All of it."""
        source, memory = await self._boot(kernel)
        await self._clock.look(source)
        memory = memory.asked()
        plan = [(BranchMode.FULL, (0, REGION_MIB * PAGES_PER_MIB))]
        plan += [(BranchMode.DIFF, stamp) for stamp in DIFFS]
        older: forkpoint.Snapshot | None = None
        snapshot: forkpoint.Snapshot | None = None
        at_branch = memory
        wrong: list[str] = []
        for number, (mode, stamp) in enumerate(plan, start=1):
            self._teller.branch(number, len(plan), mode, stamp[1] * 4096)
            memory = await source.stamp(memory, *stamp)
            snapshot, at_branch = await self._branch(source, memory, mode, stamp)
            memory = at_branch.asked()  # the clock was looked at
            state = (await source.sandbox.refresh()).state
            if state is not SandboxState.RUNNING:
                wrong.append(f"{state} after branch {number}")
            if older is not None:
                await older.delete()
            older = snapshot
        self._claim(f"the source ran on after each of its {len(plan)} branches", wrong)
        assert snapshot is not None
        await self._fork(source, memory, snapshot, at_branch)

    async def _boot(self, kernel: Path) -> tuple[Witness, Memory]:
        size = self._outcome.memory_mib
        began = time.monotonic()
        sandbox = await self._fp.sandboxes.create("source", kernel=kernel, memory_mib=size)
        source = Witness(sandbox)
        await source.ready()
        took = time.monotonic() - began
        self._teller.say(f"source: {size} MiB of memory, booted in {took * 1000:.0f} ms")
        return source, Memory.fresh(REGION_MIB)

    async def _branch(
        self, source: Witness, memory: Memory, mode: BranchMode, stamp: Stamp
    ) -> tuple[forkpoint.Snapshot, Memory]:
        """Branches the source while it watches its clock; what its memory held in that moment."""
        await source.watch_clock()
        held = memory.asked()
        began = time.monotonic()
        branching = source.sandbox.branch(mode=mode)
        gap: int | None = None
        async for update in branching:
            self._teller.branch_update(update)
            if gap is None and update.pause is not None:
                gap, _ = await source.longest_gap()
        ready_after = timedelta(seconds=time.monotonic() - began)
        last, snapshot = branching.last, branching.snapshot
        assert last is not None
        assert last.pause is not None
        assert snapshot is not None
        await self._clock.look(source)
        row = BranchRow(
            mode=last.mode,
            written_bytes=stamp[1] * 4096,
            precopied_bytes=last.precopy.done_bytes if last.precopy else None,
            precopy_holes_bytes=last.precopy.hole_bytes if last.precopy else None,
            pause=last.pause,
            guest_gap=None if gap is None else timedelta(seconds=self._clock.seconds(gap)),
            ready_after=ready_after,
            disk_bytes=snapshot.disk_bytes,
        )
        self._outcome.branches.append(row)
        self._teller.branch_end(row)
        return snapshot, held

    async def _fork(
        self,
        source: Witness,
        memory: Memory,
        snapshot: forkpoint.Snapshot,
        at_branch: Memory,
    ) -> None:
        """Starts children, lets the source write on, and looks at all of them."""
        count = self._options.children
        self._teller.say(f"fork: {count} children of the last snapshot")
        began = time.monotonic()
        async with snapshot.fork(count, fork_id="child", ttl="10m") as children:
            while await children.next() is not None:
                if children.fork is not None:
                    self._teller.fork_update(children.fork)
            self._outcome.children_ready_after = timedelta(seconds=time.monotonic() - began)
            self._outcome.children = len(children.ready)
            wrong = [f"{child.id}: {child.error}" for child in children.failed]
            self._claim(f"{count} of {count} children started", wrong)
            if children.fork is not None:
                starts = [child.start_duration for child in children.fork.children]
                self._outcome.child_starts = [start for start in starts if start is not None]
            await self._prove(source, memory, children.ready, at_branch)

    async def _prove(
        self,
        source: Witness,
        memory: Memory,
        children: Sequence[forkpoint.Sandbox],
        at_branch: Memory,
    ) -> None:
        before = memory
        for stamp in LATER:
            memory = await source.stamp(memory, *stamp)
        guests = [Witness(child) for child in children]
        found = await asyncio.gather(*(self._examine_child(g, at_branch) for g in guests))
        self._claim(
            f"each child holds exactly generation {at_branch.generation}:"
            f" {len(at_branch.pages)} pages, none torn or misplaced",
            [each for each in found if each],
        )
        self._claim(
            f"the source went on counting: from generation {before.generation}"
            f" to {memory.generation}",
            await self._examine_source(source, memory),
        )
        self._claim(
            "the children differ from the source only by what it wrote later"
            f" ({sum(count for _, count in LATER)} pages)",
            await self._compare(source, guests, memory, at_branch),
        )

    async def _examine_child(self, guest: Witness, wanted: Memory) -> str:
        """What is wrong with a child; nothing, as a rule.

        It was branched while it watched its clock: a byte ends that, as it does in the source.
        """
        await guest.longest_gap()
        counters = await guest.ask("t")
        if counters != (wanted.generation, wanted.commands + 1):
            return f"{guest.sandbox.id} is at generation and command {counters}"
        verdict = await guest.ask(f"v{wanted.mib}")
        if verdict != wanted.verdict():
            return f"{guest.sandbox.id} holds {verdict}, not {wanted.verdict()}"
        return ""

    async def _examine_source(self, source: Witness, wanted: Memory) -> list[str]:
        counters = await source.ask("t")
        verdict = await source.ask(f"v{wanted.mib}")
        wrong = []
        if counters[0] != wanted.generation:
            wrong.append(f"it is at generation {counters[0]}, not {wanted.generation}")
        if verdict != wanted.verdict():
            wrong.append(f"it holds {verdict}, not {wanted.verdict()}")
        return wrong

    async def _compare(
        self, source: Witness, guests: Sequence[Witness], memory: Memory, at_branch: Memory
    ) -> list[str]:
        """Reads both sides of every border between generations, and a page in between.

        `v` has told how many borders there are; together that leaves no room for other contents.
        """
        looked = _revealing_pages(memory, at_branch)

        async def read(guest: Witness) -> list[int]:
            return [await guest.page(index) for index in looked]

        said, *others = await asyncio.gather(read(source), *(read(guest) for guest in guests))
        wrong = []
        for guest, other in zip(guests, others, strict=True):
            for index, here, there in zip(looked, said, other, strict=True):
                expected = (memory.pages[index], at_branch.pages[index])
                if (here, there) != expected:
                    wrong.append(
                        f"page {index} is {here} in the source and {there} in {guest.sandbox.id},"
                        f" not {expected[0]} and {expected[1]}"
                    )
        return wrong

    def _claim(self, text: str, wrong: Sequence[str]) -> None:
        self._teller.claim(self._outcome.claim(text, wrong))


def _revealing_pages(*memories: Memory) -> list[int]:
    """The pages beside every border between generations, and one between each two borders."""
    borders = {0, len(memories[0].pages)}
    for memory in memories:
        pairs = enumerate(pairwise(memory.pages), start=1)
        borders |= {index for index, (before, after) in pairs if before != after}
    ordered = sorted(borders)
    looked = {page for border in ordered for page in (border - 1, border)}
    looked |= {(first + last) // 2 for first, last in pairwise(ordered)}
    return sorted(page for page in looked if 0 <= page < len(memories[0].pages))
