"""A server for the demo alone: in a temporary folder, gone at the end with all that it started."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from pathlib import Path

import forkpoint
from forkpoint.errors import ForkpointError, ServerNotFound
from forkpoint.programs import forkpointd_command

SHARED_MEMORY = Path("/dev/shm")

_START_SECONDS = 60.0
_STOP_SECONDS = 10.0
"""Nothing of the demo's is worth waiting longer for: what doesn't end by then is killed."""
_POLL_SECONDS = 0.05


class ServerFailed(Exception):
    """The demo's server did not come up, or died."""


@contextmanager
def temporary_folder() -> Iterator[Path]:
    """A folder that is removed at the end, with all that is in it or works in it."""
    folder = Path(tempfile.mkdtemp(prefix="forkpoint-demo-")).resolve()
    try:
        yield folder
    finally:
        end_processes_in(folder)
        shutil.rmtree(folder)


@contextmanager
def staging_folder(name: str) -> Iterator[Path | None]:
    """A folder in memory for the pause windows; None where this machine offers none."""
    if not os.access(SHARED_MEMORY, os.W_OK | os.X_OK):
        yield None
        return
    folder = SHARED_MEMORY / name
    folder.mkdir(mode=0o700)
    try:
        yield folder
    finally:
        shutil.rmtree(folder)


def end_processes_in(folder: Path) -> None:
    """Ends every VMM that works in the folder: they outlive their server, by design.

    Nobody else's processes: a shell that looks around in the folder is left alone.
    """
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        with suppress(OSError):  # it has ended meanwhile, or belongs to someone else
            works_here = Path(os.readlink(entry / "cwd")).is_relative_to(folder)
            if works_here and b"--api-sock" in (entry / "cmdline").read_bytes().split(b"\0"):
                os.kill(int(entry.name), signal.SIGKILL)


def witness_kernel() -> Path:
    """The witness guest's kernel; builds it where it is not built yet."""
    done = subprocess.run(
        [sys.executable, "-m", "forkpointd.witness"], capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        raise ServerFailed(f"the guest can't be built:\n{done.stderr.strip()}")
    return Path(done.stdout.strip().splitlines()[-1])


@asynccontextmanager
async def running_server(
    folder: Path, image_root: Path, *, staging: Path | None = None, vmm: str | None = None
) -> AsyncIterator[forkpoint.Client]:
    """A client of a server that runs in the folder and stops at the end.

    The server is in a session of its own, so that Ctrl-C reaches the demo alone, which then ends
    the server in order.
    """
    command = forkpointd_command()
    if command is None:
        raise ServerNotFound("the server is not installed: pip install 'forkpoint[server]'")
    address = f"unix:{folder / 'forkpoint.sock'}"
    command += ["serve", "--data-dir", str(folder / "data"), "--listen", address]
    command += ["--image-root", str(image_root)]
    if staging is not None:
        command += ["--staging-dir", str(staging)]
    if vmm is not None:
        command += ["--vmm", vmm]
    log = folder / "server.log"
    with log.open("wb") as output:
        process = await asyncio.create_subprocess_exec(
            *command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
    try:
        client = await _connected(process, address, log)
        try:
            yield client
        except asyncio.CancelledError:
            # Nobody wants these guests any more, and a branch in its window would be waited for.
            await asyncio.to_thread(end_processes_in, folder)
            raise
        finally:
            await _delete_all(client)
            await client.close()
    finally:
        await _stop(process)


async def _connected(
    process: asyncio.subprocess.Process, address: str, log: Path
) -> forkpoint.Client:
    """A client, as soon as the server answers."""
    async with asyncio.timeout(_START_SECONDS):
        while True:
            client = forkpoint.connect(address)
            try:
                await client.open()
            except ServerNotFound:
                if process.returncode is not None:
                    said = await asyncio.to_thread(log.read_text, "utf-8", "replace")
                    raise ServerFailed(
                        f"the server ended with code {process.returncode}:\n{said.strip()}"
                    ) from None
                await asyncio.sleep(_POLL_SECONDS)
            else:
                return client


async def _delete_all(client: forkpoint.Client) -> None:
    """Ends all sandboxes, in order; what can't be ended so is ended with the folder."""
    with suppress(ForkpointError, TimeoutError):
        async with asyncio.timeout(_STOP_SECONDS):
            names = [sandbox.id async for sandbox in client.sandboxes.list()]
            await asyncio.gather(
                *(client.sandboxes.delete(name, missing_ok=True) for name in names)
            )


async def _stop(process: asyncio.subprocess.Process) -> None:
    """SIGTERM, and SIGKILL for one that doesn't end by that."""
    if process.returncode is not None:
        return
    process.terminate()
    try:
        async with asyncio.timeout(_STOP_SECONDS):
            await process.wait()
    except TimeoutError:
        process.kill()
        await process.wait()
