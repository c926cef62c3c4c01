"""Admission: which mode a branch uses, what is refused, and the room that is reserved for it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from forkpointd.branching.prediction import PausePredictor
from forkpointd.images import MemoryRoom, NoRoom, Reservation, Room, StagingRoom
from forkpointd.model import (
    MIB,
    BranchMode,
    DirtyBaseState,
    Durability,
    ForkpointError,
    Layout,
    Reason,
    Sandbox,
    StagingKind,
)
from forkpointd.sandboxes.live import LastDiff

ROOM_RETRY_SECONDS = 30.0

VMSTATE_BYTES = 1 * MIB
"""More than a vmstate and a manifest have, but for those of many extents."""


@dataclass(frozen=True, slots=True)
class Plan:
    """How a branch will be taken."""

    mode: BranchMode
    reason: str
    """Why AUTO chose the mode; empty where it was asked for."""
    predicted_us: int


@dataclass(slots=True)
class Holding:
    """The room that one branch has reserved: given back by `release`, whatever happens."""

    mode: BranchMode
    staging: StagingKind
    image: Reservation | None
    staged: Reservation | None
    """None after a restart: the bytes are on the disks already."""
    ahead: Reservation | None = None
    """Of the budget for what is allocated before the window."""

    def release(self) -> None:
        """Gives the room back. Idempotent."""
        for reservation in (self.image, self.staged, self.ahead):
            if reservation is not None:
                reservation.release()


class Admission:
    """Decides on branches before they touch anything."""

    def __init__(
        self,
        *,
        predictor: PausePredictor,
        image_room: Room,
        memory_room: MemoryRoom | None,
        staging_room: StagingRoom,
        auto_full_max_pause_us: int,
    ) -> None:
        self._predictor = predictor
        self._image_room = image_room
        self._memory_room = memory_room
        self._staging_room = staging_room
        self._auto_full_max_pause_us = auto_full_max_pause_us

    def reserve(
        self,
        row: Sandbox,
        mode: BranchMode,
        layout: Layout = Layout.AUTO,
        durability: Durability = Durability.DISK,
    ) -> Holding:
        """Room for one branch: for its image, and for staging (step 1). The image is as large as
        the memory; of a layer in memory, which takes over the staged file, what is staged.

        Raises NO_DISK_SPACE, NO_MEMORY_SPACE or NO_STAGING_SPACE with the figures.
        """
        memory_bytes = row.machine.memory_bytes
        if durability is Durability.DISK:
            image = self.reserve_image(row)
        else:
            image = self._reserve_in_memory(row, mode, layout)
        try:
            kind, staged = self._staging_room.choose(
                memory_bytes,
                expected_bytes=row.last_diff_bytes,
                full=mode is BranchMode.FULL,
                what=f"window of a branch of {row.sandbox_id}",
            )
        except NoRoom as error:
            image.release()
            raise no_room(Reason.NO_STAGING_SPACE, error) from error
        return Holding(mode, kind, image, staged)

    def reserve_image(self, row: Sandbox) -> Reservation:
        """Room for one image of a source's memory, or NO_DISK_SPACE."""
        return self.reserve_bytes(row.machine.memory_bytes, f"an image of sandbox {row.sandbox_id}")

    def _reserve_in_memory(self, row: Sandbox, mode: BranchMode, layout: Layout) -> Reservation:
        needed = memory_bytes = row.machine.memory_bytes
        on_parent = mode is BranchMode.DIFF and row.dirty_base.snapshot_id is not None
        if layout is Layout.LAYERED and on_parent and row.last_diff_bytes is not None:
            needed = min(row.last_diff_bytes + VMSTATE_BYTES, memory_bytes)
        if self._memory_room is None:
            raise _no_tier()
        try:
            return self._memory_room.reserve(
                needed, f"an image of sandbox {row.sandbox_id} in memory"
            )
        except NoRoom as error:
            raise no_room(Reason.NO_MEMORY_SPACE, error) from error

    def reserve_bytes(self, count: int, what: str) -> Reservation:
        """Room among the images, or NO_DISK_SPACE."""
        try:
            return self._image_room.reserve(count, what)
        except NoRoom as error:
            raise no_room(Reason.NO_DISK_SPACE, error) from error

    def decide(
        self,
        row: Sandbox,
        requested: BranchMode,
        max_pause_us: int | None,
        staging: StagingKind,
        expected_diff_bytes: int,
    ) -> Plan:
        """The mode for a source as it is now. Raises DIRTY_BASE_INVALID or PAUSE_TOO_LONG."""
        base = row.dirty_base
        memory_bytes = row.machine.memory_bytes
        full_us = self._predictor.predict_us(
            BranchMode.FULL, staging, memory_bytes=memory_bytes, data_bytes=memory_bytes
        )
        diff_us = self._predictor.predict_us(
            BranchMode.DIFF, staging, memory_bytes=memory_bytes, data_bytes=expected_diff_bytes
        )
        valid = base.state is DirtyBaseState.VALID
        if requested is BranchMode.DIFF:
            if not valid:
                raise _invalid_base(row)
            plan = Plan(BranchMode.DIFF, "", diff_us)
        elif requested is BranchMode.FULL:
            plan = Plan(BranchMode.FULL, "", full_us)
        elif valid:
            plan = Plan(BranchMode.DIFF, "the source's dirty base is valid", diff_us)
        else:
            plan = Plan(
                BranchMode.FULL,
                f"the source's dirty base is {base.state.lower()}: {base.invalid_reason}",
                full_us,
            )
            limit = self._auto_full_max_pause_us if max_pause_us is None else max_pause_us
            if full_us > limit:
                raise _too_long(row, full_us, limit, base.invalid_reason)
        if max_pause_us is not None and plan.predicted_us > max_pause_us:
            raise _too_long(row, plan.predicted_us, max_pause_us, "")
        return plan


def expected_diff_bytes(
    row: Sandbox, last: LastDiff | None, resident_bytes: Callable[[int], int]
) -> int:
    """What the next window of a source will write, as far as one can tell from outside.

    Before the first: all that its process holds (an upper bound). Later: what the last one wrote,
    but no less than the process has grown by since, for that was all written. What was written over
    and over, nobody sees.
    """
    memory_bytes = row.machine.memory_bytes
    if row.process is None:
        return memory_bytes if row.last_diff_bytes is None else row.last_diff_bytes
    resident = resident_bytes(row.process.pid)
    if row.last_diff_bytes is None:
        return min(memory_bytes, resident)
    grown = 0 if last is None else resident - last.resident_bytes
    return min(memory_bytes, max(row.last_diff_bytes, grown))


def no_room(reason: Reason, error: NoRoom) -> ForkpointError:
    """The refusal for room that isn't there."""
    return ForkpointError(
        reason,
        f"{error}. {_room_remedy(reason, error)}",
        metadata={
            "needed_bytes": str(error.needed_bytes),
            "free_bytes": str(error.free_bytes),
            "reserved_bytes": str(error.reserved_bytes),
            "path": str(error.path),
            "limited_by": error.limited_by,
        },
        retry_after_seconds=ROOM_RETRY_SECONDS,
    )


def _room_remedy(reason: Reason, error: NoRoom) -> str:
    prune = "elete snapshots that nobody needs (`forkpoint snapshot prune`), or "
    prune += (
        f"change the server's setting {error.limited_by}"
        if error.limited_by.endswith("_bytes")
        else "give the server more room"
    )
    if reason is Reason.NO_MEMORY_SPACE:
        return f"Ask for durability DISK, wait until images were written back to it, d{prune}"
    return f"D{prune}"


def _no_tier() -> ForkpointError:
    return ForkpointError(
        Reason.NO_MEMORY_SPACE,
        "this server keeps no images in memory: its memory_images_bytes is 0, or its "
        "memory_images_dir is no tmpfs (`forkpoint server info`). Ask for durability DISK",
        metadata={"free_bytes": "0"},
    )


def _invalid_base(row: Sandbox) -> ForkpointError:
    base = row.dirty_base
    return ForkpointError(
        Reason.DIRTY_BASE_INVALID,
        f"sandbox {row.sandbox_id} has no valid dirty base ({base.invalid_reason or base.state}), "
        "so a DIFF has nothing to stand on: branch it with mode FULL once",
        metadata={"sandbox_id": row.sandbox_id, "dirty_base": str(base.state)},
    )


def _too_long(row: Sandbox, predicted_us: int, limit_us: int, why_full: str) -> ForkpointError:
    because = f" (FULL, since {why_full})" if why_full else ""
    return ForkpointError(
        Reason.PAUSE_TOO_LONG,
        f"the pause window of sandbox {row.sandbox_id} would take about {predicted_us / 1000:.0f} "
        f"ms{because}, more than {limit_us / 1000:.0f} ms. "
        + (
            "Ask with mode: FULL to accept it"
            if why_full
            else "Ask with a larger max_pause, or none, to accept it"
        ),
        metadata={
            "sandbox_id": row.sandbox_id,
            "predicted_pause_ms": f"{predicted_us / 1000:.1f}",
            "max_pause_ms": f"{limit_us / 1000:.1f}",
        },
    )
