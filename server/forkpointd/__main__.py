"""`forkpointd`: serve, doctor, fsck, version.

Exit codes (sysexits.h but for 1 and 2): 0 fine; 1 doctor or fsck found something; 2 wrong usage; 69
no VMM, or the server's libraries are not installed; 73 the data folder or socket can't be made; 75
another server works on the data folder; 78 a wrong setting; 70 anything else.
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import json
import logging
import os
import signal
import sys
import tomllib
from pathlib import Path
from typing import TYPE_CHECKING

import forkpointd

if TYPE_CHECKING:
    from pydantic import ValidationError

    from forkpointd.config import Settings

EX_USAGE, EX_UNAVAILABLE, EX_SOFTWARE, EX_CANTCREAT, EX_TEMPFAIL, EX_CONFIG = 2, 69, 70, 73, 75, 78


def main(arguments: list[str] | None = None) -> int:
    """Runs one command; returns its exit code."""
    parser = _parser()
    options = parser.parse_args(arguments)
    if options.command is None:
        parser.print_help()
        return EX_USAGE
    if options.command == "version":
        print(f"forkpointd {forkpointd.__version__}")
        return 0
    try:
        from pydantic import ValidationError

        from forkpointd.config import UnknownVariableError
    except ImportError as error:
        return _fail(
            EX_UNAVAILABLE,
            f"the server's libraries are not installed ({error.name} is missing): "
            "pip install 'forkpoint[server]'",
        )
    try:
        settings = _settings(options)
    except ValidationError as error:
        return _fail(EX_CONFIG, _describe(error))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        return _fail(EX_CONFIG, f"the settings file is no TOML: {error}")
    except (UnknownVariableError, OSError) as error:
        return _fail(EX_CONFIG, str(error))
    if options.command == "doctor":
        return _doctor(settings, options.json)
    if options.command == "fsck":
        return _fsck(settings, options.repair, options.json)
    return _serve(settings)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="forkpointd",
        description="Branches running Firecracker microVMs in milliseconds and forks children "
        "from them, over gRPC.",
        epilog="example: forkpointd serve --data-dir /var/lib/forkpoint --image-root /srv/kernels",
    )
    parser.add_argument(
        "--version", action="version", version=f"forkpointd {forkpointd.__version__}"
    )
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    serve = commands.add_parser("serve", help="serve until SIGTERM; sandboxes outlive the server")
    doctor = commands.add_parser("doctor", help="tell what this host can do, and what to mend")
    fsck = commands.add_parser(
        "fsck", help="look whether the disk holds what the registry says; the server must not run"
    )
    commands.add_parser("version", help="print the version")
    for command in (serve, doctor, fsck):
        command.add_argument("--config", type=Path, help="settings as TOML (FORKPOINT_CONFIG)")
        command.add_argument("--data-dir", type=Path, help="registry, sandboxes, snapshots")
        command.add_argument("--staging-dir", type=Path, help="a tmpfs for pause windows")
        command.add_argument(
            "--vmm", choices=("auto", "firecracker", "simulator"), help="what runs guests"
        )
        command.add_argument("--firecracker", type=Path, help="the Firecracker to run")
    serve.add_argument("--listen", metavar="unix:PATH", help="where to serve")
    serve.add_argument(
        "--image-root",
        action="append",
        type=Path,
        dest="image_roots",
        metavar="DIR",
        help="a folder in which kernels, initrds and drives may lie; may be repeated",
    )
    serve.add_argument("--log-level", choices=("debug", "info", "warning", "error"))
    fsck.add_argument(
        "--repair", action="store_true", help="mend what can be mended without losing anything"
    )
    for command in (doctor, fsck):
        command.add_argument("--json", action="store_true", help="print one JSON object")
    return parser


def _settings(options: argparse.Namespace) -> Settings:
    from forkpointd.config import Settings

    given = vars(options).copy()
    for name in ("command", "json", "repair"):
        given.pop(name, None)
    config = given.pop("config")
    if config is None and "FORKPOINT_CONFIG" in os.environ:
        config = Path(os.environ["FORKPOINT_CONFIG"])
    return Settings.load(config, **given)


def _serve(settings: Settings) -> int:
    from forkpointd.daemon import Daemon, StartError
    from forkpointd.model import ForkpointError, Reason
    from forkpointd.registry import RegistryError
    from forkpointd.rpc.unix_socket import ListenError
    from forkpointd.sandboxes.datadir import DataDirError, DataDirLocked
    from forkpointd.telemetry.logs import configure_logging

    configure_logging(settings.log_level)

    async def run() -> None:
        daemon = Daemon(settings, say)
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, daemon.stop)
        await daemon.run()

    try:
        asyncio.run(run())
    except DataDirLocked as error:
        return _fail(EX_TEMPFAIL, str(error))
    except (DataDirError, StartError, RegistryError, ListenError) as error:
        return _fail(EX_CANTCREAT, str(error))
    except ForkpointError as error:
        return _fail(EX_UNAVAILABLE if error.reason is Reason.NO_VMM else EX_SOFTWARE, str(error))
    except OSError as error:
        return _fail(EX_CANTCREAT, f"the server can't start or go on: {error}")
    except Exception as error:
        logging.getLogger(__name__).exception("a fault of the server")
        return _fail(EX_SOFTWARE, f"a fault of the server, whose trace is above: {error!r}")
    return 0


def _doctor(settings: Settings, as_json: bool) -> int:
    from forkpointd.host import all_checks
    from forkpointd.model import CheckOutcome

    checks = all_checks(settings)
    if as_json:
        print(
            json.dumps(
                {
                    "version": forkpointd.__version__,
                    "checks": [
                        {
                            "name": check.name,
                            "outcome": str(check.outcome),
                            "detail": check.detail,
                            "remedy": check.remedy,
                        }
                        for check in checks
                    ],
                }
            )
        )
    else:
        for check in checks:
            print(f"{check.outcome:<8}{check.name:<10}{check.detail}")
            if check.remedy:
                print(f"{'':18}-> {check.remedy}")
    return 1 if any(check.outcome is CheckOutcome.FAILED for check in checks) else 0


def _fsck(settings: Settings, repair: bool, as_json: bool) -> int:
    from forkpointd.fsck import check_data_folder, describe
    from forkpointd.registry import RegistryError
    from forkpointd.sandboxes.datadir import (
        REGISTRY_NAME,
        DataDirError,
        DataDirLocked,
        open_data_dir,
    )

    registry = settings.data_dir / REGISTRY_NAME
    if not registry.is_file():
        return _fail(EX_CANTCREAT, f"there is no registry {registry}: no server has worked there")
    try:
        data = open_data_dir(settings.data_dir, settings.staging_dir, settings.memory_images_dir)
        try:
            report = asyncio.run(check_data_folder(data, repair=repair))
        finally:
            data.close()
    except DataDirLocked as error:
        return _fail(EX_TEMPFAIL, str(error))
    except (DataDirError, RegistryError, OSError) as error:
        return _fail(EX_CANTCREAT, str(error))
    if as_json:
        print(json.dumps(dataclasses.asdict(report)))
    else:
        print("\n".join(describe(report)))
    return 1 if report.left else 0


def say(line: str) -> None:
    """A line for the person, or the journal, that started the server."""
    print(line, file=sys.stderr, flush=True)


def _fail(code: int, message: str) -> int:
    say(f"forkpointd: {message}")
    return code


def _describe(error: ValidationError) -> str:
    lines = [
        f"setting {'.'.join(str(part) for part in one['loc']) or '?'}: "
        + one["msg"].removeprefix("Value error, ")
        for one in error.errors(include_url=False)
    ]
    return "; ".join(lines)


if __name__ == "__main__":
    sys.exit(main())
