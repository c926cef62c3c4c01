"""A server that can't start says why and what to do, by its own exit code, and leaves nothing."""

from __future__ import annotations

import io
import os
import socket
import sqlite3
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import redirect_stderr
from pathlib import Path
from unittest import mock

import pytest

from forkpoint.v1 import server_service_pb2
from forkpointd.__main__ import main
from forkpointd.sandboxes.datadir import open_data_dir
from forkpointd.vmm import simulator_binary
from tests.integration.serving import START_SECONDS, House
from tests.integration.vmms import kvm_refusal

USAGE, NO_VMM, CANT_CREATE, LOCKED, CONFIG = 2, 69, 73, 75, 78


class Stillborn(House):
    """A house whose server is expected not to start."""

    def fails(
        self,
        code: int,
        *words: str,
        arguments: tuple[str, ...] = (),
        environment: dict[str, str] | None = None,
        before: tuple[str, ...] = (),
        pids: Sequence[int] = (),
    ) -> str:
        """Starts it, and checks its exit code, its words (without a traceback) and that it left
        neither socket, staging folder nor process (nor ended those in `pids`)."""
        had_socket = self.socket.exists()
        command = [*before, *self.command(), *arguments]
        variables = self.environment() | (environment or {})
        found, said = (run_here if code in (USAGE, CONFIG) else run)(command, variables)
        assert found == code, said
        assert "Traceback" not in said
        last = said.strip().splitlines()[-1]
        assert last.startswith(("forkpointd: ", "forkpointd serve: error: ")), said
        for part in words:
            assert part in last, f"{part!r} is not in {last!r}"
        assert self.socket.exists() == had_socket
        assert self.vmm_pids() == list(pids)
        if (self.data_dir / "id").is_file() and code != LOCKED:
            staging = Path(f"/dev/shm/forkpoint-{self.identity}")
            assert not staging.exists() or list(staging.iterdir())
        return last

    async def serves(self) -> None:
        """Now it starts, answers and ends as it should."""
        await self.start()
        await self.server.GetServerInfo(server_service_pb2.GetServerInfoRequest())
        assert await self.stop() == 0


def run(command: list[str], variables: dict[str, str]) -> tuple[int, str]:
    """A server's exit code and its words."""
    done = subprocess.run(
        command,
        env=variables,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=START_SECONDS,
        check=False,
    )
    return done.returncode, done.stderr


def run_here(command: list[str], variables: dict[str, str]) -> tuple[int, str]:
    """The same in this process, for what ends before anything is begun: much faster."""
    said = io.StringIO()
    with redirect_stderr(said), mock.patch.dict(os.environ, variables, clear=True):
        try:
            code = main(command[3:])
        except SystemExit as left:  # argparse
            code = int(left.code or 0)
    return code, said.getvalue()


@pytest.fixture
async def house(witness_kernel: Path, tmp_path: Path) -> AsyncIterator[Stillborn]:
    """A house on the simulator, which is always there."""
    made = Stillborn(tmp_path / "h", simulator_binary(), witness_kernel)
    try:
        yield made
    finally:
        await made.close()


@pytest.fixture(scope="module", autouse=True)
def hanging(
    witness_kernel: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[subprocess.Popen[str]]:
    """A start with a Firecracker that never answers: it takes ten seconds to be given up, beside
    the other tests."""
    house = House(tmp_path_factory.mktemp("hanging") / "h", simulator_binary(), witness_kernel)
    path = script(house.root / "firecracker", "#!/bin/sh\nexec sleep 600\n")
    environment = {"FORKPOINT_VMM": "firecracker", "FORKPOINT_FIRECRACKER": str(path)}
    process = subprocess.Popen(
        house.command(),
        env=house.environment() | environment,
        stdin=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    yield process
    process.kill()
    process.communicate()


# --- the data folder ---------------------------------------------------------------------------


async def test_a_second_server_on_one_data_folder(house: Stillborn, tmp_path: Path) -> None:
    await house.start()
    house.fails(
        LOCKED,
        f"another forkpointd works in {house.data_dir}",
        "choose another --data-dir",
        arguments=("--listen", f"unix:{tmp_path}/other.sock"),
    )
    assert not (tmp_path / "other.sock").exists()
    await house.server.GetServerInfo(server_service_pb2.GetServerInfoRequest())
    assert await house.stop() == 0


@pytest.mark.parametrize("name", ["", "deeper/than/a/file", "sandboxes", "snapshots", "staging"])
async def test_a_file_where_a_folder_should_be(house: Stillborn, name: str) -> None:
    if name.startswith("deeper"):
        file = house.data_dir
        house.data_dir = house.data_dir / name
    else:
        file = house.data_dir / name
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("not ours")
    house.fails(CANT_CREATE, f"{file}", "is a file where a folder should be", "--data-dir")
    assert file.read_text() == "not ours"
    file.unlink()
    if not name:
        await house.serves()


@pytest.mark.parametrize("name", ["lock", "id", "forkpoint.db"])
async def test_a_folder_where_a_file_should_be(house: Stillborn, name: str) -> None:
    folder = house.data_dir / name
    folder.mkdir(parents=True)
    try:
        house.fails(CANT_CREATE, str(folder), "folder", "move it away", "--data-dir")
    finally:
        folder.rmdir()
    if name == "lock":
        await house.serves()


async def test_a_data_folder_that_may_not_be_written(house: Stillborn) -> None:
    closed = house.root / "closed"
    closed.mkdir()
    before: tuple[str, ...] = ()
    if os.geteuid() == 0:  # root without its privilege over others' files
        os.chown(closed, 65534, 65534)
        before = ("setpriv", "--bounding-set", "-dac_override,-dac_read_search")
    closed.chmod(0o555)
    house.data_dir = closed / "data"
    house.fails(CANT_CREATE, "no permission for", str(house.data_dir), "--data-dir", before=before)
    house.data_dir = closed
    house.fails(CANT_CREATE, "no permission for", str(closed), "--data-dir", before=before)
    assert list(closed.iterdir()) == []


# --- the registry ------------------------------------------------------------------------------


def garbage(path: Path) -> None:
    path.write_bytes(b"this is no database" * 1000)


def overwritten(path: Path) -> None:
    with path.open("r+b") as file:
        file.seek(4096)
        file.write(b"\xff" * 8192)


def of_another_program(path: Path) -> None:
    path.unlink()
    with sqlite3.connect(path) as connection:
        connection.execute("CREATE TABLE recipes (name TEXT)")
    connection.close()


def newer(path: Path) -> None:
    with sqlite3.connect(path) as connection:
        connection.execute("PRAGMA user_version = 999")
    connection.close()


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (garbage, ("damaged or no SQLite database", "move")),
        (overwritten, ("damaged", "move")),
        (of_another_program, ("another program", "move")),
        (newer, ("newer", "forkpoint")),
    ],
)
async def test_a_registry_that_cant_be_used(
    house: Stillborn, damage: Callable[[Path], None], words: tuple[str, ...]
) -> None:
    await house.serves()
    path = house.data_dir / "forkpoint.db"
    good = path.read_bytes()
    damage(path)
    bad = path.read_bytes()
    house.fails(CANT_CREATE, f"the registry {path} can't be used", *words)
    assert path.read_bytes() == bad, "what may be mended is left as it was"
    if damage is garbage:
        path.write_bytes(good)
        await house.serves()


async def test_a_row_that_cant_be_read(house: Stillborn) -> None:
    await house.start()
    await house.boot("src", 80)
    assert await house.stop() == 0
    pids = house.vmm_pids()
    path = house.data_dir / "forkpoint.db"
    with sqlite3.connect(path) as connection:
        connection.execute("UPDATE sandboxes SET state = 'DREAMING'")
    connection.close()
    house.fails(CANT_CREATE, "'src' in table sandboxes can't be read", pids=pids)


# --- the socket --------------------------------------------------------------------------------


async def test_a_socket_on_which_another_server_answers(house: Stillborn) -> None:
    await house.start()
    first = house.data_dir
    house.data_dir = house.root / "second"
    house.fails(CANT_CREATE, str(house.socket), "another server is there", "listen elsewhere")
    house.data_dir = first
    await house.server.GetServerInfo(server_service_pb2.GetServerInfoRequest())
    assert await house.stop() == 0


async def test_a_socket_of_another_program_that_listens(house: Stillborn) -> None:
    house.socket.parent.mkdir()
    with socket.socket(socket.AF_UNIX) as other:
        other.bind(str(house.socket))
        other.listen()
        house.fails(CANT_CREATE, "another server is there", "listen elsewhere")
    await house.serves()  # nobody listens on it any more


@pytest.mark.parametrize("kind", ["file", "folder", "link"])
async def test_a_socket_path_that_is_something_else(house: Stillborn, kind: str) -> None:
    house.socket.parent.mkdir()
    if kind == "file":
        house.socket.write_text("precious")
    elif kind == "folder":
        house.socket.mkdir()
    else:
        house.socket.symlink_to(house.root / "elsewhere")
    listed = list(house.socket.parent.iterdir())
    house.fails(CANT_CREATE, "there is a file that is no socket", "listen elsewhere")
    assert list(house.socket.parent.iterdir()) == listed


async def test_a_socket_below_a_file_or_with_too_long_a_name(house: Stillborn) -> None:
    (house.root / "file").write_text("")
    for path, words in (
        (house.root / "file" / "x.sock", "is a file where a folder should be"),
        (house.root / f"{'n' * 120}.sock", "is too long"),
    ):
        house.fails(CANT_CREATE, "can't listen at", words, arguments=("--listen", f"unix:{path}"))


@pytest.mark.parametrize(
    "listen", ["tcp:127.0.0.1:5000", "127.0.0.1:5000", "0.0.0.0:5000", "unix:", "", "/run/x.sock"]
)
async def test_only_unix_sockets_are_listened_on(house: Stillborn, listen: str) -> None:
    house.fails(
        CONFIG, "setting listen", "must be unix:PATH", "TLS", arguments=("--listen", listen)
    )
    assert not house.data_dir.exists()


# --- the VMM -----------------------------------------------------------------------------------


def skip_without_kvm() -> None:
    if refusal := kvm_refusal():
        pytest.skip(f"Firecracker is not asked for here: {refusal}")


def script(path: Path, text: str) -> Path:
    path.write_text(text)
    path.chmod(0o755)
    return path


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("true", "is not Firecracker: it says 'true "),
        ("silent", "is not Firecracker: it says ''"),
        ("another", "is not Firecracker: it says 'qemu 9.0'"),
        ("failing", "is not Firecracker"),
        ("no snapshots", "does not tell its snapshot version"),
        ("text", "can't be run"),
        ("not executable", "can't be run"),
        ("missing", "can't be run"),
        ("folder", "can't be run"),
    ],
)
async def test_a_firecracker_that_is_not_firecracker(
    house: Stillborn, kind: str, words: str
) -> None:
    skip_without_kvm()
    path = house.root / "firecracker"
    if kind == "true":
        path = Path("/bin/true")
    elif kind == "folder":
        path.mkdir()
    elif kind == "not executable":
        path.write_text("#!/bin/sh\necho Firecracker v1.12.1\n")
    elif kind != "missing":
        texts = {
            "another": "#!/bin/sh\necho qemu 9.0\n",
            "silent": "#!/bin/sh\n",
            "failing": "#!/bin/sh\necho Firecracker v1.12.1\nexit 3\n",
            "no snapshots": '#!/bin/sh\n[ "$1" = --version ] && echo "Firecracker v1.12.1"\n',
            "text": "no program at all",
        }
        script(path, texts[kind])
    environment = {"FORKPOINT_VMM": "firecracker", "FORKPOINT_FIRECRACKER": str(path)}
    said = house.fails(NO_VMM, str(path), words, environment=environment)
    assert "FORKPOINT_FIRECRACKER" in said, "what to do"


async def test_a_firecracker_that_does_not_answer(
    hanging: subprocess.Popen[str],
) -> None:
    skip_without_kvm()
    _, said = hanging.communicate(timeout=START_SECONDS)
    assert hanging.returncode == NO_VMM, said
    assert "timed out after 10.0 seconds" in said
    assert "FORKPOINT_FIRECRACKER" in said


# --- settings ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("environment", "words"),
    [
        ({"FORKPOINT_DATADIR": "/x"}, ("FORKPOINT_DATADIR", "no setting", "unset it")),
        ({"FORKPOINT_STAGING_BYTES": "much"}, ("setting staging_bytes", "valid integer")),
        ({"FORKPOINT_CONCURRENT_COPIES": "0"}, ("setting concurrent_copies", "greater than")),
        ({"FORKPOINT_VMM": "qemu"}, ("setting vmm", "'simulator'")),
        ({"FORKPOINT_CONFIG": "/no/such/file"}, ("there is no settings file /no/such/file",)),
        ({"FORKPOINT_CONFIG": "/etc"}, ("there is no settings file /etc",)),
    ],
)
async def test_a_wrong_environment(
    house: Stillborn, environment: dict[str, str], words: tuple[str, ...]
) -> None:
    house.fails(CONFIG, *words, environment=environment)
    assert not house.data_dir.exists()


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b'datadir = "/x"\n', ("setting datadir", "not permitted")),
        (b"strict_host = 7\n", ("setting strict_host", "valid boolean")),
        (b"a = 1\nb = 'x'\nconsole_bytes = 1\n", ("setting a", "setting b", "console_bytes")),
        (b"= nothing\n", ("the settings file is no TOML",)),
        (b"\xff\xfe\x00", ("the settings file is no TOML",)),
    ],
)
async def test_a_wrong_settings_file(
    house: Stillborn, content: bytes, words: tuple[str, ...]
) -> None:
    file = house.root / "forkpoint.toml"
    file.write_bytes(content)
    house.fails(CONFIG, *words, arguments=("--config", str(file)))
    assert not house.data_dir.exists()


@pytest.mark.parametrize(
    "arguments", [("--datadir", "/x"), ("--vmm", "qemu"), ("--log-level", "loud"), ("extra",)]
)
async def test_a_wrong_flag(house: Stillborn, arguments: tuple[str, ...]) -> None:
    house.fails(USAGE, arguments[0].removeprefix("--")[:3], arguments=arguments)
    assert not house.data_dir.exists()


async def test_flags_come_before_the_environment_and_that_before_the_file(
    house: Stillborn, tmp_path: Path
) -> None:
    file = tmp_path / "forkpoint.toml"
    file.write_text('max_fork_count = 3\nmax_queued_branches = 4\nlisten = "tcp:wrong"\n')
    house.settings.update(config=str(file), max_queued_branches=5)
    await house.start()  # its --listen is a flag
    answer = await house.server.GetServerInfo(server_service_pb2.GetServerInfoRequest())
    assert (answer.max_fork_count, answer.max_queued_branches) == (3, 5)
    assert await house.stop() == 0


# --- what is a warning, not a failure ----------------------------------------------------------


@pytest.mark.parametrize("kind", ["missing", "file", "disk"])
async def test_a_staging_folder_that_is_of_no_use_is_a_warning(house: Stillborn, kind: str) -> None:
    staging = house.root / "staging"
    if kind == "file":
        staging.write_text("")
    elif kind == "disk":
        staging = Path("/proc/self")
    house.settings["staging_dir"] = str(staging)
    await house.start()
    assert "warning:" in house.log
    assert "staged on disk" in house.log
    await house.boot("src", 80)
    await house.ready("src")
    await house.delete("src")
    assert await house.stop() == 0


def test_a_version_and_no_command_need_no_settings() -> None:
    for arguments, code in ((["version"], 0), (["--version"], 0), ([], USAGE)):
        done = subprocess.run(
            [sys.executable, "-m", "forkpointd", *arguments],
            env=os.environ | {"FORKPOINT_BOGUS": "1"},
            capture_output=True,
            text=True,
            timeout=START_SECONDS,
            check=False,
        )
        assert done.returncode == code, done.stderr
        assert "forkpointd" in done.stdout


@pytest.mark.parametrize("content", [b"", b"../../etc\n", b"\xff" * 16])
def test_an_id_that_is_none_is_made_anew(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "id").write_bytes(content)
    data = open_data_dir(tmp_path, tmp_path / "no-staging")
    data.close()
    assert len(data.identity) == 16
    again = open_data_dir(tmp_path, tmp_path / "no-staging")
    again.close()
    assert again.identity == data.identity
