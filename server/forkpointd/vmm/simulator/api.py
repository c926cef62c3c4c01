"""From an HTTP request to what the machine does, and back to an answer.

Which method, path and body are accepted, and in which words others are refused, follows
src/firecracker/src/api_server of 1.12.1. One path is our own: /simulator/faults.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from typing import Any, Final

from . import bodies
from .body import Struct, deserializing
from .errors import FatalLoadFault, Fault, io_text
from .faults import FaultRuleError, IgnoredRequest, RefusedRequest
from .http import Request, Response
from .journal import LEVELS
from .machine import Machine
from .versions import APP_NAME, VMM_VERSION

_ABSENT: Final = {
    "network-interfaces": "network devices",
    "vsock": "vsock device",
    "balloon": "balloon device",
    "entropy": "entropy device",
    "mmds": "MMDS",
    "cpu-config": "custom CPU templates",
}
"""What Firecracker has and the simulator has not: refused before the start, saying so."""

_EMPTY: Final = Response(204)


class Api:
    """Answers the requests of one machine."""

    def __init__(self, machine: Machine) -> None:
        self._machine = machine
        self._journal = machine.journal
        self.failed_load = False
        """A load failed: the process is to end after the answer is sent."""

    def handle(self, request: Request) -> Response | None:
        """The answer; None where a simulated fault swallows the request."""
        began = time.monotonic_ns()
        described = f'"/{request.path.strip("/")}"'
        self._journal.info(
            f"The API server received a {request.method.title()} request on {described}.", "fc_api"
        )
        try:
            name, action = self._route(request)
            self._reach(name)
            response = action()
            self._took(name, request, began)
            self._reach(f"{name}.reply")
        except IgnoredRequest:
            return None
        except (Fault, RefusedRequest) as fault:
            self.failed_load |= isinstance(fault, FatalLoadFault)
            self._journal.error(
                f"Received Error. Status code: 400 Bad Request. Message: {fault}", "fc_api"
            )
            return Response(400, {"fault_message": str(fault)})
        self._journal.info(
            f"The request was executed successfully. Status code: {response.status}.", "fc_api"
        )
        return response

    def _reach(self, point: str) -> None:
        self._machine.faults.reach(point)

    def _took(self, name: str, request: Request, began_ns: int) -> None:
        """Firecracker's `latencies_us` as its API thread sees them: only of what succeeded."""
        metrics = self._machine.metrics
        if name in ("pause", "resume"):
            metrics.took(f"{name}_vm", began_ns)
        elif name == "load":
            metrics.took("load_snapshot", began_ns)
        elif name == "create":
            kind = json.loads(request.body or b"{}").get("snapshot_type", "Full").lower()
            metrics.took(f"{kind}_create_snapshot", began_ns)

    # --- routes ----------------------------------------------------------------------------------

    def _route(self, request: Request) -> tuple[str, Callable[[], Response]]:
        """The action's name, for faults and metrics, and the action. Raises Fault."""
        method, body = request.method, request.body
        first, *rest = request.path.lstrip("/").removesuffix("/").split("/")
        rest = rest or [""]
        if method == "GET":
            if body is not None:
                raise Fault("GET request cannot have a body.")
            return "get", self._get(first, rest)
        if first == "simulator" and rest == ["faults"] and method == "PUT":
            return "", lambda: self._put_faults(body or b"")
        if body is None:
            raise Fault(f"Empty {method} request.")
        routes: dict[tuple[str, str], Callable[[bytes, list[str]], _Routed]] = {
            ("PUT", "actions"): self._put_actions,
            ("PUT", "boot-source"): self._put_boot_source,
            ("PUT", "drives"): self._put_drive,
            ("PUT", "logger"): self._put_logger,
            ("PUT", "machine-config"): self._put_machine,
            ("PUT", "metrics"): self._put_metrics,
            ("PUT", "snapshot"): self._put_snapshot,
            ("PATCH", "drives"): self._patch_drive,
            ("PATCH", "machine-config"): self._patch_machine,
            ("PATCH", "vm"): self._patch_vm,
        }
        if route := routes.get((method, first)):
            return route(body, rest)
        if first in _ABSENT:
            return "", lambda: self._refuse_absent(first)
        raise Fault(f"Invalid request method and/or path: {method} {first}.")

    def _get(self, first: str, rest: list[str]) -> Callable[[], Response]:
        machine = self._machine
        match first, rest[0]:
            case "", _:
                return lambda: Response(
                    200,
                    {
                        "id": machine.journal.instance_id,
                        "state": machine.state.value,
                        "vmm_version": VMM_VERSION,
                        "app_name": APP_NAME,
                    },
                )
            case "version", _:
                return lambda: Response(200, {"firecracker_version": VMM_VERSION})
            case "machine-config", _:
                return lambda: Response(200, machine.config.machine_json())
            case "vm", "config":
                return lambda: Response(200, machine.config.full_json())
            case "mmds", _:
                return lambda: Response(200, {})
            case "balloon", _:
                return self._no_balloon
            case "simulator", "faults":
                return lambda: Response(200, {"rules": machine.faults.as_json()})
        raise Fault(f"Invalid request method and/or path: GET {first}.")

    def _no_balloon(self) -> Response:
        started = self._machine.state.value != "Not started"
        prefix = "Error creating the balloon device: " if started else ""
        raise Fault(f"Balloon config error: {prefix}No balloon device found.")

    def _refuse_absent(self, first: str) -> Response:
        self._machine.before_start()
        raise Fault(f"The simulator has no {_ABSENT[first]}.")

    # --- before the start ------------------------------------------------------------------------

    def _before_start(
        self, act: Callable[[dict[str, Any]], None], values: dict[str, Any]
    ) -> _Routed:
        def run() -> Response:
            self._machine.before_start()
            act(values)
            return _EMPTY

        return "", run

    def _put_boot_source(self, body: bytes, _: list[str]) -> _Routed:
        values = bodies.BOOT_SOURCE.parse(body)
        return self._before_start(self._machine.config.set_boot_source, values)

    def _put_machine(self, body: bytes, _: list[str]) -> _Routed:
        values = bodies.MACHINE.parse(body)
        complete = {"smt": False, "track_dirty_pages": False, "huge_pages": "None"} | values
        return self._before_start(self._machine.config.update_machine, complete)

    def _patch_machine(self, body: bytes, _: list[str]) -> _Routed:
        values = bodies.MACHINE_UPDATE.parse(body)
        if not values:
            raise Fault("Empty PATCH request.")
        return self._before_start(self._machine.config.update_machine, values)

    def _put_drive(self, body: bytes, rest: list[str]) -> _Routed:
        values = self._with_id(rest[0], bodies.DRIVE, body)
        return self._before_start(self._machine.config.set_drive, values)

    def _with_id(self, drive_id: str, struct: Struct, body: bytes) -> dict[str, Any]:
        if not drive_id:
            raise Fault("The ID cannot be empty.")
        if not all(c == "_" or c.isalnum() for c in drive_id):
            raise Fault(
                "API Resource IDs can only contain alphanumeric characters and underscores."
            )
        values = struct.parse(body)
        if values["drive_id"] != drive_id:
            raise Fault("The id from the path does not match the id from the body!")
        return values

    def _put_metrics(self, body: bytes, _: list[str]) -> _Routed:
        def act(values: dict[str, Any]) -> None:
            prefix = "Metrics error: Cannot initialize the metrics system due to bad user input:"
            if self._machine.metrics.open:
                raise Fault(f"{prefix} Reinitialization of metrics not allowed.")
            try:
                self._machine.metrics.send_to(values["metrics_path"])
            except OSError as error:
                raise Fault(f"{prefix} {io_text(error)}") from error

        return self._before_start(act, bodies.METRICS.parse(body))

    def _put_logger(self, body: bytes, _: list[str]) -> _Routed:
        values = bodies.LOGGER.parse(body)
        level = values.get("level")
        if level is not None and level.lower() not in LEVELS:
            raise Fault(deserializing(f"unknown variant `{level}`"))

        def act(values: dict[str, Any]) -> None:
            try:
                if path := values.get("log_path"):
                    self._journal.send_to(path)
            except OSError as error:
                raise Fault(
                    f"Logger error: Failed to open target file: {io_text(error)}"
                ) from error
            if level is not None:
                self._journal.level = LEVELS[level.lower()]
            self._journal.show_level = values.get("show_level", self._journal.show_level)

        return self._before_start(act, values)

    # --- the machine's life ----------------------------------------------------------------------

    def _put_actions(self, body: bytes, _: list[str]) -> _Routed:
        kind = bodies.ACTION.parse(body)["action_type"]
        if kind == "InstanceStart":
            return "start", lambda: self._empty(self._machine.start)
        if kind == "FlushMetrics":
            return "flush", lambda: self._empty(self._machine.flush_metrics)
        return "", lambda: self._empty(self._machine.started)  # a key press nobody listens to

    def _patch_vm(self, body: bytes, _: list[str]) -> _Routed:
        if bodies.VM.parse(body)["state"] == "Paused":
            return "pause", lambda: self._empty(self._machine.pause)
        return "resume", lambda: self._empty(self._machine.resume)

    def _patch_drive(self, body: bytes, rest: list[str]) -> _Routed:
        values = self._with_id(rest[0], bodies.DRIVE_UPDATE, body)
        drive_id, path = values["drive_id"], values.get("path_on_host")
        return "", lambda: self._empty(lambda: self._machine.patch_drive(drive_id, path))

    def _put_snapshot(self, body: bytes, rest: list[str]) -> _Routed:
        match rest[0]:
            case "create":
                given = bodies.SNAPSHOT_CREATE.parse(body)
                return "create", lambda: self._empty(
                    lambda: self._machine.create_snapshot(
                        given.get("snapshot_type", "Full"),
                        given["snapshot_path"],
                        given["mem_file_path"],
                    )
                )
            case "load":
                return "load", self._load(bodies.SNAPSHOT_LOAD.parse(body))
            case "":
                raise Fault("Missing snapshot operation type.")
            case other:
                raise Fault(f"Invalid request method and/or path: PUT /snapshot/{other}.")

    def _load(self, given: dict[str, Any]) -> Callable[[], Response]:
        backend, path = given.get("mem_backend"), given.get("mem_file_path")
        if backend is not None and path is not None:
            wanted = "either `mem_backend` or `mem_file_path` exclusively is required"
            raise Fault(deserializing(f"too many fields: {wanted}"))
        if backend is None and path is None:
            wanted = "either `mem_backend` or `mem_file_path` is required"
            raise Fault(deserializing(f"missing field: {wanted}"))

        def run() -> None:
            if given.get("network_overrides"):
                raise FatalLoadFault(
                    "Load snapshot error: Failed to restore from snapshot: Failed to get snapshot "
                    "state from file: Unknown Network Device."
                )
            self._machine.load_snapshot(
                given["snapshot_path"],
                backend or {"backend_type": "File", "backend_path": path},
                tracked=given.get("enable_diff_snapshots", False),
                resume=given.get("resume_vm", False),
            )

        return lambda: self._empty(run)

    def _empty(self, act: Callable[[], object]) -> Response:
        act()
        return _EMPTY

    # --- our own ---------------------------------------------------------------------------------

    def _put_faults(self, body: bytes) -> Response:
        try:
            self._machine.faults.replace(bodies.FAULTS.parse(body)["rules"])
        except FaultRuleError as error:
            raise Fault(f"Simulated faults: {error}") from error
        return _EMPTY


_Routed = tuple[str, Callable[[], Response]]
