"""What a VMM that was not started refuses: method, path, body, and Firecracker's words for it."""

from typing import Any

BODY = "An error occurred when deserializing the json body of a request: "
VCPUS = (
    "Machine config error: The number of vCPUs must be greater than 0, less than 32 and must be 1 "
    "or an even number if SMT is enabled."
)
MEMORY = (
    "Machine config error: The memory size (MiB) is either 0, or not a multiple of the configured "
    "page size."
)
MACHINE_FIELDS = (
    "`vcpu_count`, `mem_size_mib`, `smt`, `cpu_template`, `track_dirty_pages`, `huge_pages`"
)
DRIVE_FILE = (
    "Drive config error: Unable to create the virtio block device: Virtio backend error: Error "
    "manipulating the backing file: "
)
NOT_STARTED = "The requested operation is not supported before starting the microVM."


def machine(**changes: Any) -> dict[str, Any]:
    return {"vcpu_count": 1, "mem_size_mib": 128} | changes


def drive(**changes: Any) -> dict[str, Any]:
    body = {"drive_id": "a", "path_on_host": "disk", "is_root_device": False} | changes
    return {name: value for name, value in body.items() if value is not None}


REFUSED = [
    # unknown places
    ("GET", "/nope", None, "Invalid request method and/or path: GET nope."),
    ("GET", "/actions", None, "Invalid request method and/or path: GET actions."),
    ("GET", "/vm", None, "Invalid request method and/or path: GET vm."),
    ("GET", "/vm/configx", None, "Invalid request method and/or path: GET vm."),
    ("GET", "/", "{}", "GET request cannot have a body."),
    ("PUT", "/", None, "Empty PUT request."),
    ("PUT", "/nope", None, "Empty PUT request."),
    ("PUT", "/nope", {}, "Invalid request method and/or path: PUT nope."),
    ("PUT", "/vm", {}, "Invalid request method and/or path: PUT vm."),
    ("PATCH", "/vm", None, "Empty PATCH request."),
    ("PATCH", "/nope", {}, "Invalid request method and/or path: PATCH nope."),
    ("PUT", "/snapshot", {}, "Missing snapshot operation type."),
    ("PUT", "/snapshot/x", {}, "Invalid request method and/or path: PUT /snapshot/x."),
    # boot source
    ("PUT", "/boot-source", {}, f"{BODY}missing field `kernel_image_path` at line 1 column 2."),
    (
        "PUT",
        "/boot-source",
        {"kernel_image_path": "/nonexistent"},
        (
            "Boot source error: The kernel file cannot be opened: "
            "No such file or directory (os error 2)"
        ),
    ),
    (
        "PUT",
        "/boot-source",
        {"kernel_image_path": "/etc/passwd", "initrd_path": "/nonexistent"},
        (
            "Boot source error: The initrd file cannot be opened due to invalid path or invalid "
            "permissions. No such file or directory (os error 2)"
        ),
    ),
    (
        "PUT",
        "/boot-source",
        {"kernel_image_path": "/etc/passwd", "x": 1},
        (
            f"{BODY}unknown field `x`, expected one of `kernel_image_path`, `initrd_path`, "
            "`boot_args` at line 1 column 40."
        ),
    ),
    (
        "PUT",
        "/boot-source",
        {"kernel_image_path": 3},
        f"{BODY}invalid type: integer `3`, expected a string at line 1 column 23.",
    ),
    (
        "PUT",
        "/boot-source",
        {"kernel_image_path": "/etc/passwd", "boot_args": "x" * 3000},
        "Boot source error: The kernel command line is invalid: Invalid cmdline capacity provided.",
    ),
    # machine
    ("PUT", "/machine-config", "{", f"{BODY}EOF while parsing an object at line 1 column 1."),
    (
        "PUT",
        "/machine-config",
        "null",
        f"{BODY}invalid type: null, expected struct MachineConfig at line 1 column 4.",
    ),
    (
        "PUT",
        "/machine-config",
        "[]",
        (
            f"{BODY}invalid length 0, expected struct MachineConfig with 6 elements at line 1 "
            "column 2."
        ),
    ),
    (
        "PUT",
        "/machine-config",
        '{"vcpu_count":1,}',
        f"{BODY}trailing comma at line 1 column 17.",
    ),
    (
        "PUT",
        "/machine-config",
        '{"vcpu_count":1,\n "vcpu_count":1}',
        f"{BODY}duplicate field `vcpu_count` at line 2 column 13.",
    ),
    ("PUT", "/machine-config", {}, f"{BODY}missing field `vcpu_count` at line 1 column 2."),
    (
        "PUT",
        "/machine-config",
        {"vcpu_count": 1},
        f"{BODY}missing field `mem_size_mib` at line 1 column 17.",
    ),
    ("PUT", "/machine-config", machine(vcpu_count=0), VCPUS),
    ("PUT", "/machine-config", machine(vcpu_count=33), VCPUS),
    ("PUT", "/machine-config", machine(vcpu_count=3, smt=True), VCPUS),
    (
        "PUT",
        "/machine-config",
        machine(vcpu_count=256),
        f"{BODY}invalid value: integer `256`, expected u8 at line 1 column 18.",
    ),
    (
        "PUT",
        "/machine-config",
        machine(mem_size_mib=-1),
        f"{BODY}invalid value: integer `-1`, expected usize at line 1 column 36.",
    ),
    (
        "PUT",
        "/machine-config",
        machine(mem_size_mib=1.5),
        f"{BODY}invalid type: floating point `1.5`, expected usize at line 1 column 37.",
    ),
    (
        "PUT",
        "/machine-config",
        machine(mem_size_mib="128"),
        f'{BODY}invalid type: string "128", expected usize at line 1 column 39.',
    ),
    ("PUT", "/machine-config", machine(mem_size_mib=0), MEMORY),
    ("PUT", "/machine-config", machine(mem_size_mib=127, huge_pages="2M"), MEMORY),
    (
        "PUT",
        "/machine-config",
        machine(bogus=1),
        f"{BODY}unknown field `bogus`, expected one of {MACHINE_FIELDS} at line 1 column 46.",
    ),
    (
        "PUT",
        "/machine-config",
        machine(track_dirty_pages="yes"),
        f'{BODY}invalid type: string "yes", expected a boolean at line 1 column 65.',
    ),
    (
        "PUT",
        "/machine-config",
        machine(huge_pages="3M"),
        f"{BODY}unknown variant `3M`, expected `None` or `2M` at line 1 column 57.",
    ),
    ("PATCH", "/machine-config", {}, "Empty PATCH request."),
    ("PATCH", "/machine-config", {"vcpu_count": 0}, VCPUS),
    # broken JSON, and values of the wrong kind
    ("PUT", "/boot-source", "   ", f"{BODY}EOF while parsing a value at line 1 column 3."),
    ("PUT", "/boot-source", "{a:1}", f"{BODY}key must be a string at line 1 column 2."),
    ("PUT", "/boot-source", "{,}", f"{BODY}key must be a string at line 1 column 2."),
    (
        "PUT",
        "/boot-source",
        '{"kernel_image_path":"x',
        f"{BODY}EOF while parsing a string at line 1 column 23.",
    ),
    ("PUT", "/boot-source", '{"kernel', f"{BODY}EOF while parsing a string at line 1 column 8."),
    (
        "PUT",
        "/boot-source",
        '{"kernel_image_path":NaN}',
        f"{BODY}expected value at line 1 column 22.",
    ),
    (
        "PUT",
        "/boot-source",
        '{"kernel_image_path" "x"}',
        f"{BODY}expected `:` at line 1 column 22.",
    ),
    (
        "PUT",
        "/boot-source",
        '{"kernel_image_path":"x" "b":1}',
        f"{BODY}expected `,` or `}}` at line 1 column 26.",
    ),
    (
        "PUT",
        "/boot-source",
        '{"kernel_image_path":"x"}x',
        f"{BODY}trailing characters at line 1 column 26.",
    ),
    (
        "PUT",
        "/boot-source",
        '{"kernel_image_path":{"a":1}}',
        f"{BODY}invalid type: map, expected a string at line 1 column 21.",
    ),
    (
        "PUT",
        "/boot-source",
        '{"kernel_image_path":"ü","initrd_path":3}',
        f"{BODY}invalid type: integer `3`, expected a string at line 1 column 41.",
    ),
    (
        "PUT",
        "/machine-config",
        machine(huge_pages=None),
        f"{BODY}expected value at line 1 column 54.",
    ),
    (
        "PUT",
        "/snapshot/load",
        {"snapshot_path": "v", "mem_backend": {}},
        f"{BODY}missing field `backend_path` at line 1 column 40.",
    ),
    # drives
    ("PUT", "/drives/a", {}, f"{BODY}missing field `drive_id` at line 1 column 2."),
    (
        "PUT",
        "/drives/a",
        {"drive_id": "a"},
        f"{BODY}missing field `is_root_device` at line 1 column 17.",
    ),
    (
        "PUT",
        "/drives/a",
        drive(drive_id="b"),
        "The id from the path does not match the id from the body!",
    ),
    (
        "PUT",
        "/drives/a",
        drive(path_on_host="nope"),
        f"{DRIVE_FILE}No such file or directory (os error 2) nope",
    ),
    (
        "PUT",
        "/drives/a",
        drive(path_on_host="/tmp"),
        f"{DRIVE_FILE}Is a directory (os error 21) /tmp",
    ),
    (
        "PUT",
        "/drives/a",
        drive(cache_type="Bad"),
        f"{BODY}unknown variant `Bad`, expected `Unsafe` or `Writeback` at line 1 column 86.",
    ),
    (
        "PUT",
        "/drives/a-b",
        drive(drive_id="a-b"),
        "API Resource IDs can only contain alphanumeric characters and underscores.",
    ),
    ("PUT", "/drives/", drive(drive_id=""), "The ID cannot be empty."),
    ("PUT", "/drives", drive(), "The ID cannot be empty."),
    # what needs a running machine
    ("PATCH", "/drives/a", {"drive_id": "a", "path_on_host": "disk"}, NOT_STARTED),
    ("PUT", "/actions", {"action_type": "FlushMetrics"}, NOT_STARTED),
    ("PUT", "/actions", {"action_type": "SendCtrlAltDel"}, NOT_STARTED),
    ("PATCH", "/vm", {"state": "Paused"}, NOT_STARTED),
    ("PATCH", "/vm", {"state": "Resumed"}, NOT_STARTED),
    ("PUT", "/snapshot/create", {"snapshot_path": "v", "mem_file_path": "m"}, NOT_STARTED),
    # actions, states and snapshots that are none
    ("PUT", "/actions", {}, f"{BODY}missing field `action_type` at line 1 column 2."),
    (
        "PUT",
        "/actions",
        {"action_type": "Nope"},
        (
            f"{BODY}unknown variant `Nope`, expected one of `FlushMetrics`, `InstanceStart`, "
            "`SendCtrlAltDel` at line 1 column 22."
        ),
    ),
    (
        "PUT",
        "/actions",
        {"action_type": "InstanceStart", "payload": "x"},
        f"{BODY}unknown field `payload`, expected `action_type` at line 1 column 42.",
    ),
    ("PATCH", "/vm", {}, f"{BODY}missing field `state` at line 1 column 2."),
    (
        "PATCH",
        "/vm",
        {"state": "Nope"},
        f"{BODY}unknown variant `Nope`, expected `Paused` or `Resumed` at line 1 column 16.",
    ),
    (
        "PUT",
        "/snapshot/create",
        {"snapshot_path": "v"},
        f"{BODY}missing field `mem_file_path` at line 1 column 22.",
    ),
    (
        "PUT",
        "/snapshot/create",
        {"snapshot_type": "X", "snapshot_path": "v", "mem_file_path": "m"},
        f"{BODY}unknown variant `X`, expected `Diff` or `Full` at line 1 column 21.",
    ),
    (
        "PUT",
        "/snapshot/load",
        {"snapshot_path": "v"},
        f"{BODY}missing field: either `mem_backend` or `mem_file_path` is required.",
    ),
    (
        "PUT",
        "/snapshot/load",
        {"snapshot_path": "v", "mem_backend": {"backend_type": "Nope", "backend_path": "x"}},
        f"{BODY}unknown variant `Nope`, expected `File` or `Uffd` at line 1 column 61.",
    ),
]
