"""The process: its command line, its socket, its exit codes; all as Firecracker's."""

from __future__ import annotations

import os
import signal
import socket
import sys
import time
from typing import Final, NoReturn

from . import vmstate
from .api import Api
from .errors import PanicError, io_text
from .faults import FaultRuleError, Faults
from .http import DEFAULT_MAX_BODY_BYTES, Server
from .journal import LEVELS, Journal, Metrics
from .machine import Machine
from .versions import FOLLOWS, SNAPSHOT_VERSION, VERSION_LINE

_EXIT_BAD_LEVEL: Final = 152
_EXIT_BAD_ARGUMENTS: Final = 153
_EXIT_SIGHUP: Final = 156
_SUN_PATH_BYTES: Final = 108

_WITH_VALUE: Final = {
    "api-sock": "/run/firecracker.socket",
    "id": "anonymous-instance",
    "level": "Info",
    "log-path": None,
    "metrics-path": None,
    "module": None,
    "http-api-max-payload-size": str(DEFAULT_MAX_BODY_BYTES),
    "start-time-us": None,
    "start-time-cpu-us": None,
    "parent-cpu-time-us": None,
    "seccomp-filter": None,
    "describe-snapshot": None,
}
_FLAGS: Final = (
    "version",
    "snapshot-version",
    "help",
    "show-level",
    "show-log-origin",
    "boot-timer",
    "no-seccomp",
)
_HELP: Final = f"""{VERSION_LINE}: answers Firecracker v{FOLLOWS}'s API, without a virtual machine.

options, as Firecracker's: --api-sock PATH  --id ID  --level LEVEL  --log-path PATH
  --metrics-path PATH  --show-level  --http-api-max-payload-size BYTES
  --version  --snapshot-version  --describe-snapshot PATH  --help
accepted and without effect: --module  --show-log-origin  --boot-timer  --no-seccomp
  --seccomp-filter  --start-time-us  --start-time-cpu-us  --parent-cpu-time-us
simulated faults: the environment variable FORKPOINT_SIMULATOR_FAULTS, or PUT /simulator/faults;
  the docstring of forkpointd/vmm/simulator/__init__.py describes them
"""


class _Exit(Exception):
    """The process is to end: exit code, what the log says, what stderr says."""

    def __init__(self, code: int, logged: str = "", stderr: str = "") -> None:
        super().__init__(logged)
        self.code, self.logged, self.stderr = code, logged, stderr


def main(argv: list[str]) -> NoReturn:
    """Runs until the process ends."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGHUP, lambda *_: os._exit(_EXIT_SIGHUP))
    journal = Journal("anonymous-instance")
    try:
        _run(argv, journal)
    except _Exit as end:
        if end.logged:
            journal.error(end.logged)
        ending = "successfully" if end.code == 0 else "with error"
        (journal.error if end.code else journal.info)(
            f"Firecracker exiting {ending}. exit_code={end.code}"
        )
        if end.stderr:
            os.write(2, f"Error: {end.stderr}\n".encode())
        os._exit(end.code)
    except PanicError as error:
        journal.error(f"Firecracker panicked: {error}")
        os.abort()
    raise AssertionError("unreachable")


def _run(argv: list[str], journal: Journal) -> NoReturn:
    options, flags = _parse(argv)
    for flag, text in (
        ("help", _HELP),
        ("version", f"{VERSION_LINE}\n"),
        ("snapshot-version", f"v{SNAPSHOT_VERSION}"),
    ):
        if flag in flags:
            print(text, flush=True)
            raise _Exit(0)
    if path := options["describe-snapshot"]:
        _describe(path)
    journal.instance_id = _checked_id(options["id"] or "")
    level = (options["level"] or "").lower()
    if level not in LEVELS:
        raise _Exit(
            _EXIT_BAD_LEVEL,
            f"Invalid value for logger level: Failed to parse string to level filter: "
            f"{options['level']}.Possible values: [Error, Warning, Info, Debug]",
            f'InvalidLogLevel(LevelFilterFromStrError("{options["level"]}"))',
        )
    metrics = Metrics()
    try:
        if options["log-path"]:
            journal.send_to(options["log-path"])
        journal.level, journal.show_level = LEVELS[level], "show-level" in flags
        if options["metrics-path"]:
            metrics.send_to(options["metrics-path"])
    except OSError as error:
        text = f"Could not initialize logger: Failed to open target file: {io_text(error)}"
        raise _Exit(1, text, f"LoggerInitialization({error})") from error
    journal.info(f"Running {VERSION_LINE}: a simulator, not a virtual machine")
    try:
        faults = Faults.of_environment(os.environ)
    except FaultRuleError as error:
        raise _Exit(_EXIT_BAD_ARGUMENTS, str(error), str(error)) from error
    listener = _listen(options["api-sock"] or "")
    sys.setswitchinterval(0.0005)  # the API thread must not wait long for a busy guest
    limit = int(options["http-api-max-payload-size"] or DEFAULT_MAX_BODY_BYTES)
    _serve(Machine(journal, metrics, faults), listener, limit)


def _serve(machine: Machine, listener: socket.socket, max_body_bytes: int) -> NoReturn:
    api = Api(machine)
    server = Server(listener, api.handle, max_body_bytes)
    metrics = machine.metrics
    woken_by: int | None = None
    while True:
        due = metrics.due_s
        server.serve_once(None if due is None else max(0.0, due - time.monotonic()))
        if woken_by is None and (woken_by := machine.shutdown_event) is not None:
            server.wake_by(woken_by)
        if machine.shut_down:
            server.flush()
            machine.journal.error("Unexpected exit reason on vcpu run: Shutdown", "fc_vcpu 0")
            raise _Exit(0)
        if api.failed_load:
            server.flush()
            raise _Exit(
                1,
                "RunWithApiError error: Failed to build MicroVM: Loading snapshot failed..",
                "RunWithApi(BuildMicroVmError(Restore))",
            )
        if due is not None and time.monotonic() >= due:
            try:
                metrics.write()
            except OSError as error:
                machine.journal.error(f"Failed to write metrics: {io_text(error)}")


def _listen(path: str) -> socket.socket:
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    bad = "Failed to bind and run the HTTP server: IO error"
    try:
        if len(os.fsencode(path)) >= _SUN_PATH_BYTES:
            text = "path must be shorter than SUN_LEN"
            raise _Exit(1, f"RunWithApiError error: {bad}: {text}", f"RunWithApi({text})")
        listener.bind(path)
        listener.listen(128)
    except OSError as error:
        if error.errno == 98:
            raise _Exit(
                1,
                f"RunWithApiError error: Failed to open the API socket at: {path}. Check that it "
                "is not already used.",
                f'RunWithApi(FailedToBindSocket("{path}"))',
            ) from error
        raise _Exit(
            1,
            f"RunWithApiError error: {bad}: {io_text(error)}",
            f"RunWithApi(FailedToBindAndRunHttpServer({io_text(error)}))",
        ) from error
    return listener


def _describe(path: str) -> NoReturn:
    try:
        print(f"v{vmstate.describe(path)}", flush=True)
    except vmstate.VmstateError as error:
        text = f"Invalid data format version of snapshot file: {error}"
        raise _Exit(1, f"When printing Snapshot Data format: {text}", str(error)) from error
    raise _Exit(0)


def _checked_id(instance_id: str) -> str:
    """1 to 64 characters, letters, digits and '-'."""
    if not 1 <= len(instance_id) <= 64:
        raise PanicError(f"Invalid instance ID: InvalidLen({len(instance_id)}, 1, 64)")
    for at, char in enumerate(instance_id):
        if not (char == "-" or char.isalnum()):
            raise PanicError(f"Invalid instance ID: InvalidChar({char!r}, {at})")
    return instance_id


def _parse(argv: list[str]) -> tuple[dict[str, str | None], set[str]]:
    options, flags = dict(_WITH_VALUE), set[str]()
    words = iter(argv)
    for word in words:
        name = word.removeprefix("--")
        if word.startswith("--") and name in _FLAGS:
            flags.add(name)
        elif word.startswith("--") and name in options:
            value = next(words, None)
            if value is None:
                raise _Exit(
                    _EXIT_BAD_ARGUMENTS,
                    f"Arguments parsing error: The argument '{name}' requires a value, but none "
                    "was supplied. \\n\\nFor more information try --help.",
                    f'ParseArguments(MissingValue("{name}"))',
                )
            options[name] = value
        else:
            raise _Exit(
                _EXIT_BAD_ARGUMENTS,
                f"Arguments parsing error: Found argument '{name}' which wasn't expected, or "
                "isn't valid in this context. \\n\\nFor more information try --help.",
                f'ParseArguments(UnexpectedArgument("{name}"))',
            )
    return options, flags
