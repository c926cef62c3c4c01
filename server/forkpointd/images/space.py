"""Room on disks is reserved, not checked: what one branch was promised no other can be given.

A `Room` is one file system (or a part of one). What is free in it is what the file system says,
less all reservations that were not yet used up: `consume` says that bytes have landed, where the
file system counts them itself from then on. tmpfs says "room" until the OOM killer comes, so there
MemAvailable and the operator's budget count as well.
"""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from forkpointd.images.staging import StagingArea
from forkpointd.model import StagingKind

FULL_TMPFS_TIMES = 3
"""A FULL window is staged on tmpfs only where it fits so many times over (step 1)."""

MEMINFO = Path("/proc/meminfo")


class NoRoom(Exception):
    """What was asked for doesn't fit; nothing was reserved."""

    def __init__(
        self,
        what: str,
        needed_bytes: int,
        free_bytes: int,
        reserved_bytes: int,
        path: Path,
        limited_by: str = "",
    ) -> None:
        """`limited_by`: the setting that leaves less than the file system has."""
        within = f" within {limited_by}" if limited_by else ""
        super().__init__(
            f"no room for {what}: it needs {needed_bytes} bytes, {path} has "
            f"{max(0, free_bytes)} free{within} beside {reserved_bytes} that others have reserved"
        )
        self.what = what
        self.needed_bytes = needed_bytes
        self.free_bytes = free_bytes
        """Without what is reserved."""
        self.reserved_bytes = reserved_bytes
        self.path = path
        self.limited_by = limited_by


@dataclass(frozen=True, slots=True)
class Limit:
    """What keeps a room smaller than its file system."""

    name: str
    """A setting's name, for whoever is refused."""
    left: Callable[[int], int]
    """How many bytes may land at most, of so many that the file system has free. Blocks."""


def low_water(name: str, kept_bytes: int) -> Limit:
    """So many bytes of the file system stay free."""
    return Limit(name, lambda free: free - kept_bytes)


def quota(name: str, quota_bytes: int, used_bytes: Callable[[], int]) -> Limit:
    """So many bytes may be used, whoever uses the rest of the file system."""
    return Limit(name, lambda free: min(free, quota_bytes - used_bytes()))


class Ledger:
    """The reservations on one file system, shared by all rooms that are parts of it."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self._left_bytes: dict[Reservation, int] = {}

    @property
    def reserved_bytes(self) -> int:
        """What is promised and has not landed."""
        with self.lock:
            return sum(self._left_bytes.values())

    def add(self, count: int, what: str) -> Reservation:
        """Writes a promise down. Whether it can be kept is the room's business."""
        with self.lock:
            reservation = Reservation(self, count, what)
            self._left_bytes[reservation] = count
            return reservation

    def left(self, reservation: Reservation) -> int:
        """What of a promise has not landed; 0 once it is given back."""
        with self.lock:
            return self._left_bytes.get(reservation, 0)

    def consume(self, reservation: Reservation, count: int) -> None:
        """Bytes of a promise have landed."""
        with self.lock:
            if reservation in self._left_bytes:
                self._left_bytes[reservation] = max(0, self._left_bytes[reservation] - count)

    def remove(self, reservation: Reservation) -> None:
        """Takes a promise back, once or often."""
        with self.lock:
            self._left_bytes.pop(reservation, None)


class Reservation:
    """Room that nobody else is given until `release`. A context manager; safe in any thread."""

    def __init__(self, ledger: Ledger, count: int, what: str) -> None:
        self._ledger = ledger
        self.reserved_bytes = count
        """At first."""
        self.what = what

    @property
    def left_bytes(self) -> int:
        """What has not landed yet."""
        return self._ledger.left(self)

    def consume(self, count: int) -> None:
        """Says that so many bytes have landed: the file system counts them itself from now on.
        More than was reserved counts as all of it."""
        if count < 0:
            raise ValueError(f"bytes that landed are not negative: {count}")
        self._ledger.consume(self, count)

    def keep(self, count: int) -> None:
        """Gives back what is left beyond so many bytes: less is needed than was thought."""
        with self._ledger.lock:
            self._ledger.consume(self, max(0, self.left_bytes - count))

    def release(self) -> None:
        """Gives back what is left. Idempotent."""
        self._ledger.remove(self)

    def __enter__(self) -> Reservation:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()


class Budget:
    """Bytes that may be taken at once, by all together. Safe in any thread."""

    def __init__(self, limit_bytes: int) -> None:
        self.limit_bytes = limit_bytes
        self._ledger = Ledger()

    @property
    def taken_bytes(self) -> int:
        """What is taken now."""
        return self._ledger.reserved_bytes

    def take_up_to(self, count: int, what: str) -> Reservation:
        """Takes `count` bytes, or as many as there are, until the reservation is released."""
        with self._ledger.lock:
            return self._ledger.add(min(count, self.limit_bytes - self.taken_bytes), what)


class Room:
    """The room on one file system: of `path`, which must exist when it is asked."""

    def __init__(
        self,
        path: Path,
        *,
        ledger: Ledger | None = None,
        limits: Sequence[Limit] = (),
    ) -> None:
        """`ledger` is another room's, if that lies on the same file system."""
        self.path = path
        self.ledger = ledger or Ledger()
        self._limits = tuple(limits)

    def free_bytes(self) -> int:
        """What a new reservation could have: never negative. Raises OSError."""
        with self.ledger.lock:
            return max(0, self._unreserved()[0] - self.ledger.reserved_bytes)

    def reserve(self, count: int, what: str) -> Reservation:
        """Promises `count` bytes to `what` (words for the error). Raises NoRoom, OSError."""
        if count < 0:
            raise ValueError(f"a reservation is not negative: {count}")
        with self.ledger.lock:
            (free, limited_by), reserved = self._unreserved(), self.ledger.reserved_bytes
            if count > free - reserved:
                raise NoRoom(what, count, free, reserved, self.path, limited_by)
            return self.ledger.add(count, what)

    def _unreserved(self) -> tuple[int, str]:
        """What there is but for reservations, and the name of the limit that makes it less."""
        answer = os.statvfs(self.path)
        free = answer.f_bavail * answer.f_frsize
        least, limited_by = free, ""
        for limit in self._limits:
            if (left := limit.left(free)) < least:
                least, limited_by = left, limit.name
        return least, limited_by


# --- staging -----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class StagingChoice:
    """Where a window is staged, and the room it needs there."""

    kind: StagingKind
    bytes_to_reserve: int
    reason: str


def choose_staging(
    *,
    memory_bytes: int,
    expected_bytes: int | None,
    full: bool,
    tmpfs_free_bytes: int | None,
) -> StagingChoice:
    """Step 1: tmpfs where it holds the source's whole memory (FULL: three times over), else
    the disk. What is reserved is the expected diff, or the memory's size where that is unknown.

    `tmpfs_free_bytes` is less all reservations; None where there is no tmpfs to stage on. A FULL
    window on disk needs nothing of its own: its file becomes the image, whose room is reserved.
    """
    needed = memory_bytes
    if expected_bytes is not None and not full:
        needed = min(expected_bytes, memory_bytes)
    times = FULL_TMPFS_TIMES if full else 1
    if tmpfs_free_bytes is None:
        reason = "there is no tmpfs to stage on"
    elif tmpfs_free_bytes < times * memory_bytes:
        reason = f"tmpfs has {tmpfs_free_bytes} bytes for {times} x {memory_bytes}"
    else:
        return StagingChoice(StagingKind.TMPFS, needed, "tmpfs holds it")
    return StagingChoice(StagingKind.DISK, 0 if full else needed, reason)


class StagingRoom:
    """The room for windows: a tmpfs folder with a budget, and the disk."""

    def __init__(self, tmpfs: Path | None, budget_bytes: int | None, *, disk: Room) -> None:
        """`tmpfs` is a folder that passed its probe, or None; `budget_bytes` what may be staged in
        it at once (None: no limit but the machine's). Raises OSError."""
        self._disk = disk
        self._tmpfs: Room | None = None
        self._area: StagingArea | None = None
        if tmpfs is not None:
            area = self._area = StagingArea(tmpfs)

            limits = [Limit("the host's memory", lambda _: available_memory_bytes())]
            if budget_bytes is not None:
                limits.append(quota("staging_bytes", budget_bytes, area.used_bytes))
            same = os.stat(tmpfs).st_dev == os.stat(disk.path).st_dev
            self._tmpfs = Room(tmpfs, ledger=disk.ledger if same else None, limits=limits)

    def choose(
        self, memory_bytes: int, *, expected_bytes: int | None, full: bool, what: str
    ) -> tuple[StagingKind, Reservation]:
        """Chooses where a window is staged and reserves its room, in one step. Raises NoRoom with
        the disk's figures, OSError."""
        if self._tmpfs is None:
            choice = choose_staging(
                memory_bytes=memory_bytes,
                expected_bytes=expected_bytes,
                full=full,
                tmpfs_free_bytes=None,
            )
            return choice.kind, self._disk.reserve(choice.bytes_to_reserve, what)
        with self._tmpfs.ledger.lock:
            choice = choose_staging(
                memory_bytes=memory_bytes,
                expected_bytes=expected_bytes,
                full=full,
                tmpfs_free_bytes=self._tmpfs.free_bytes(),
            )
            room = self._tmpfs if choice.kind is StagingKind.TMPFS else self._disk
            return choice.kind, room.reserve(choice.bytes_to_reserve, what)

    @property
    def tmpfs(self) -> Room | None:
        """The room in memory; None where there is none."""
        return self._tmpfs

    def free_bytes(self) -> int:
        """What could be staged on tmpfs now; 0 without one. Raises OSError."""
        return 0 if self._tmpfs is None else self._tmpfs.free_bytes()

    def held_bytes(self) -> int:
        """Memory that staging has or was promised: files on tmpfs and what is reserved there.
        Raises OSError."""
        if self._tmpfs is None or self._area is None:
            return 0
        return self._area.used_bytes() + self._tmpfs.ledger.reserved_bytes


class MemoryRoom:
    """The room for images in memory: a folder on tmpfs with a budget of its own."""

    def __init__(
        self,
        folder: Path,
        budget_bytes: int | None,
        used_bytes: Callable[[], int],
        *,
        beside: Sequence[Room] = (),
    ) -> None:
        """`budget_bytes`: what images may have there at once (None: no limit but the machine's);
        `used_bytes` tells what they have, and blocks. `beside`: rooms that may be on the same file
        system, and share what is reserved there then. Raises OSError."""
        device = os.stat(folder).st_dev
        same = [room.ledger for room in beside if os.stat(room.path).st_dev == device]
        self._shares = bool(same)
        self._used_bytes = used_bytes
        ledger = same[0] if same else Ledger()
        self._own: weakref.WeakSet[Reservation] = weakref.WeakSet()

        def used() -> int:
            others = ledger.reserved_bytes - self._reserved_bytes()  # none of this budget
            return used_bytes() - others

        limits = [Limit("the host's memory", lambda _: available_memory_bytes())]
        if budget_bytes is not None:
            limits.append(quota("memory_images_bytes", budget_bytes, used))
        self._room = Room(folder, ledger=ledger, limits=limits)

    def reserve(self, count: int, what: str) -> Reservation:
        """Promises `count` bytes to `what` (words for the error). Raises NoRoom, OSError."""
        reservation = self._room.reserve(count, what)
        self._own.add(reservation)
        return reservation

    def free_bytes(self) -> int:
        """What a new image could have. Raises OSError."""
        return self._room.free_bytes()

    def held_bytes(self) -> int:
        """Memory that images have or were promised, but for promises that the rooms beside this
        one count as theirs. Raises OSError."""
        return self._used_bytes() + (0 if self._shares else self._reserved_bytes())

    def _reserved_bytes(self) -> int:
        return sum(reservation.left_bytes for reservation in list(self._own))


def available_memory_bytes(meminfo: Path = MEMINFO) -> int:
    """MemAvailable: what can be had without swapping. Raises OSError."""
    return meminfo_bytes("MemAvailable", path=meminfo)[0]


def meminfo_bytes(*names: str, path: Path = MEMINFO) -> tuple[int, ...]:
    """Figures of proc_meminfo(5), which are in KiB there. Raises OSError, also where one is
    missing."""
    figures = {}
    for line in path.read_text(encoding="ascii").splitlines():
        name, _, value = line.partition(":")
        if name in names:
            figures[name] = int(value.split()[0]) * 1024
    try:
        return tuple(figures[name] for name in names)
    except KeyError as error:
        raise OSError(f"{path} has no {error.args[0]}") from error
