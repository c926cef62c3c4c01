"""The story of the lab. It runs in the outer machine, where Firecracker boots Linux.

`python -m tests.linux.story DEVICE` starts a forkpointd on the XFS file system at /data and goes
through it by the public client alone. What it saw it tells as JSON lines on DEVICE, a serial line;
it judges nothing: that is for the tests, outside.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import traceback
import tty
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from forkpoint import sync
from forkpoint.views import Drive
from tests.linux import plan

LAB = Path("/lab")
IMAGES = LAB / "images"
DATA = Path("/data/forkpoint")
WRITABLE_IMAGES = Path("/data/images")
"""On the file system of the server's data: so a writable drive can be cloned from here."""
SOCKET = Path("/run/forkpoint.sock")
SERVER_LOG = Path("/data/server.log")
MEMORY_MIB = 256
SOURCE = "source"

# An emulated processor is some twenty times slower than a real one.
START_SECONDS = 180
ASK_SECONDS = 120
SLOW_HOST = {
    "FORKPOINT_FIRECRACKER": str(LAB / "firecracker"),
    "FORKPOINT_VMM": "firecracker",
    "FORKPOINT_WINDOW_DEADLINE_SECONDS": "120",
    "FORKPOINT_VMM_CALL_TIMEOUT_SECONDS": "60",
}


DRIVES = ("vda", "vdb")
READ_SO_FAR = f"cat {' '.join(f'/sys/block/{drive}/stat' for drive in DRIVES)}"
"""A line each; its third number counts sectors that were read (Documentation/block/stat.rst)."""

LOOKING = (
    "hexdump -n 16 -ve '/1 \"%02x\"' /dev/urandom; echo",
    READ_SO_FAR,
    "find /mem /book /disk -type f -exec sha256sum {} +",
    READ_SO_FAR,
    "cat /proc/sys/kernel/random/boot_id /ticker /ticks && cut -d' ' -f1 /proc/uptime",
    "kill -0 $(cat /ticker) && echo yes",
    "cat /torn",
)


class Teller:
    """Writes what was seen, a JSON object a line."""

    def __init__(self, device: str) -> None:
        self._file = open(device, "w", encoding="ascii")  # noqa: SIM115  # for the whole process
        tty.setraw(self._file.fileno())
        self._start = time.monotonic()

    def tell(self, what: str, **facts: object) -> None:
        """One line, with the seconds since the story began."""
        line = {"what": what, "seconds": round(time.monotonic() - self._start, 1), **facts}
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()


class Guest:
    """A sandbox whose first process does what is written to its console."""

    def __init__(self, sandbox: sync.Sandbox) -> None:
        self.sandbox = sandbox
        self._asked = 0

    def run(self, command: str) -> str:
        """What a command prints. Raises where it fails."""
        self._asked += 1
        tag = f"{self.sandbox.id}/{self._asked}"
        end = re.compile(rb"\n" + tag.encode() + rb" (\d+)\n")
        said = self.sandbox.console.ask(f"{tag} {command}", until=end, timeout=ASK_SECONDS)
        found = end.search(said)
        assert found is not None
        output = said[: found.start()].decode()
        if found[1] != b"0":
            raise RuntimeError(f"{self.sandbox.id}: `{command}` exits {found[1]!r}: {output}")
        return output

    def write(self, *writes: plan.Write) -> None:
        """Does these, one after the other."""
        for write in writes:
            self.run(write.shell())

    def look(self) -> dict[str, object]:
        """All files' hashes, how much was read from each drive for that, and who the guest is.

        One command, since each costs some tenths of a second here.
        """
        said = self.run("; echo =; ".join(LOOKING)).split("=\n")
        random, before, hashes, after, about, alive, torn = said
        reads = [[int(line.split()[2]) for line in part.splitlines()] for part in (before, after)]
        boot_id, ticker, ticks, uptime = about.split()
        return {
            "files": {path: digest for digest, path in map(str.split, hashes.splitlines())},
            "sectors_read": {
                drive: later - earlier for drive, earlier, later in zip(DRIVES, *reads, strict=True)
            },
            "boot_id": boot_id,
            "ticker": int(ticker),
            "ticker_lives": alive.strip() == "yes",
            "torn": torn,
            "ticks": int(ticks),
            "uptime": float(uptime),
            "random": random.strip(),
        }

    def forget_caches(self) -> None:
        """All that is clean leaves the page cache; what was written goes to the disk first."""
        self.run("sync && echo 3 >/proc/sys/vm/drop_caches")


@contextmanager
def serving() -> Iterator[sync.Client]:
    """A forkpointd, and a client of it."""
    command = [sys.executable, "-m", "forkpointd", "serve"]
    command += ["--data-dir", str(DATA), "--listen", f"unix:{SOCKET}"]
    command += ["--image-root", str(IMAGES), "--image-root", str(WRITABLE_IMAGES)]
    with SERVER_LOG.open("wb") as log:
        server = subprocess.Popen(command, env=os.environ | SLOW_HOST, stdout=log, stderr=log)
    try:
        until = time.monotonic() + START_SECONDS
        while not SOCKET.exists():
            if server.poll() is not None or time.monotonic() > until:
                raise RuntimeError(f"the server does not serve (exit code {server.poll()})")
            time.sleep(0.1)
        with sync.connect(f"unix:{SOCKET}", timeout=ASK_SECONDS) as client:
            yield client
        server.send_signal(signal.SIGTERM)
        server.wait(START_SECONDS)
    finally:
        server.kill()
        server.wait()


def tell_story(teller: Teller, client: sync.Client) -> None:
    """From the boot of the source to the last look at it."""
    template = WRITABLE_IMAGES / "disk.ext4"
    before = sha256(template)
    sandbox = client.sandboxes.create(
        SOURCE,
        kernel=IMAGES / "vmlinux",
        initrd=IMAGES / "inner.img",
        memory_mib=MEMORY_MIB,
        boot_args="console=ttyS0 reboot=k panic=1 quiet",
        drives=[
            Drive("book", str(IMAGES / "book.ext4")),
            Drive("disk", str(template), read_only=False),
        ],
    )
    sandbox.console.expect(b"inner: ready\n", timeout=START_SECONDS)
    source = Guest(sandbox)
    teller.tell("booted", kernel=source.run("uname -r").strip())
    source.run("mount -t ext4 -o ro /dev/vda /book && cat /book/book >/dev/null")
    source.run("mount -t ext4 /dev/vdb /disk")

    for chapter in plan.CHAPTERS:
        source.write(*chapter.synced)
        source.run("sync")
        source.write(*chapter.unsynced)
        look(teller, source, f"before {chapter.snapshot}")
        branch(teller, source, chapter)
        look(teller, source, f"after {chapter.snapshot}")
    snapshot = client.snapshots.get(plan.FLATTENED).flatten(timeout=ASK_SECONDS)
    teller.tell("flattened", snapshot=snapshot.id, layout=snapshot.layout.value)

    source.write(*plan.AFTERWARDS)
    for chapter in plan.CHAPTERS:
        fork(teller, client.snapshots.get(chapter.snapshot))
        look(teller, source, f"after the children of {chapter.snapshot}")
    source.forget_caches()
    look(teller, source, "at the end")
    check_drive(teller, source)
    source.sandbox.delete()
    teller.tell("template", sha256=sha256(template), before=before)


def branch(teller: Teller, source: Guest, chapter: plan.Chapter) -> None:
    """One branch, as it ended."""
    branching = source.sandbox.branching(
        mode=chapter.mode, layout=chapter.layout, snapshot_id=chapter.snapshot
    )
    snapshot = branching.wait()
    last = branching.last
    assert last is not None
    assert last.pause is not None
    teller.tell(
        "branched",
        snapshot=snapshot.id,
        mode=snapshot.mode.value,
        layout=last.layout.value,
        parent=snapshot.parent_snapshot_id,
        disk_bytes=snapshot.disk_bytes,
        dirty_bytes=snapshot.dirty_bytes,
        memory_bytes=snapshot.memory_mib << 20,
        pause_seconds=last.pause.total.total_seconds(),
    )


def fork(teller: Teller, snapshot: sync.Snapshot) -> None:
    """Two children wake up, both write, both look at their disks."""
    with snapshot.fork(len(plan.CHILDREN), fork_id=f"of-{snapshot.id}", strict=True) as children:
        guests = {child.id: Guest(child) for child in children}
        pairs = [(n, guests[plan.child_id(snapshot.id, n)]) for n in plan.CHILDREN]
        for _, guest in pairs:
            look(teller, guest, "woken")
        for number, guest in pairs:
            guest.write(*plan.child_writes(snapshot.id, number))
        for _, guest in pairs:
            look(teller, guest, "written")
        for _, guest in pairs:
            guest.forget_caches()
        for _, guest in pairs:
            look(teller, guest, "without caches")
            check_drive(teller, guest)


def check_drive(teller: Teller, guest: Guest) -> None:
    """What e2fsck finds on a guest's own drive, which the guest has let go of."""
    guest.run("umount /disk")
    drive = DATA / "sandboxes" / guest.sandbox.id / "drives/disk"
    command = [str(LAB / "e2fsck"), "-f", "-n", str(drive)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    teller.tell("e2fsck", who=guest.sandbox.id, code=done.returncode, said=done.stdout[-2000:])


def sha256(path: Path) -> str:
    """Of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def look(teller: Teller, guest: Guest, when: str) -> None:
    """What a guest finds now."""
    sandbox = guest.sandbox.refresh()
    teller.tell("look", who=sandbox.id, when=when, pid=sandbox.pid, **guest.look())


def check_data_folder(teller: Teller) -> None:
    """What fsck finds, now that the server is gone."""
    command = [sys.executable, "-m", "forkpointd", "fsck", "--json", "--data-dir", str(DATA)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    teller.tell("fsck", code=done.returncode, said=(done.stdout + done.stderr)[-4000:])


def main(device: str) -> int:
    """Tells it all; what goes wrong as well."""
    teller = Teller(device)
    shutil.copytree(LAB / "writable-images", WRITABLE_IMAGES)
    try:
        with serving() as client:
            teller.tell("serving", vmm=str(client.server.info().vmm))
            tell_story(teller, client)
        check_data_folder(teller)
    except BaseException as error:  # noqa: BLE001  # told to the tests, who have nothing else
        trace = "".join(traceback.format_exception(error))
        log = SERVER_LOG.read_text(errors="replace") if SERVER_LOG.exists() else ""
        teller.tell("broken", trace=trace[-8000:], server_log=log[-8000:])
        return 1
    teller.tell("end")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
