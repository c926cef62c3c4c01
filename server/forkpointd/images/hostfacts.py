"""What of a host a snapshot depends on, read from the host itself.

A memory image is full of what the guest found out about its CPU when it booted; resumed on another
one it dies of the first missing instruction, or computes wrongly. So every snapshot has a witness
of the host it was taken on (`manifest`), and every host can say what it is (here).
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from forkpointd.model import VmmVersion

_CPUINFO = Path("/proc/cpuinfo")

_VENDOR_KEYS = ("vendor_id", "CPU implementer")
_FEATURE_KEYS = ("flags", "Features")
_MODEL_KEYS = ("model name", "CPU part")
_MODEL_NUMBER_KEYS = ("cpu family", "model", "CPU variant", "CPU architecture")


@dataclass(frozen=True, slots=True)
class HostFacts:
    """A host as snapshots see it."""

    vmm: VmmVersion
    snapshot_version: str
    """Of the snapshots that its VMM writes, for example `6.0.0`."""
    architecture: str
    """`x86_64` or `aarch64`."""
    cpu_vendor: str
    cpu_model: str
    """The model's name, and its numbers where there are any."""
    cpu_features: frozenset[str]
    """Those that all its CPUs have."""
    kernel_release: str
    page_bytes: int


def read_host_facts(
    vmm: VmmVersion, snapshot_version: str, *, cpuinfo: Path = _CPUINFO
) -> HostFacts:
    """This host, with the VMM that the caller will start. Raises OSError."""
    system = os.uname()
    cpus = _parse_cpuinfo(cpuinfo.read_text(encoding="utf-8", errors="replace"))
    first = cpus[0] if cpus else {}
    features = [set(_first_of(cpu, _FEATURE_KEYS).split()) for cpu in cpus]
    numbers = [f"{key} {first[key]}" for key in _MODEL_NUMBER_KEYS if key in first]
    model = _first_of(first, _MODEL_KEYS)
    return HostFacts(
        vmm=vmm,
        snapshot_version=snapshot_version,
        architecture=system.machine,
        cpu_vendor=_first_of(first, _VENDOR_KEYS),
        cpu_model=f"{model} ({', '.join(numbers)})" if numbers else model,
        cpu_features=frozenset(set.intersection(*features)) if features else frozenset(),
        kernel_release=system.release,
        page_bytes=os.sysconf("SC_PAGE_SIZE"),
    )


def _parse_cpuinfo(text: str) -> list[dict[str, str]]:
    """One mapping a CPU. Blocks without features (aarch64's summary at the end) are left out."""
    cpus = []
    for block in text.split("\n\n"):
        pairs = (line.partition(":") for line in block.splitlines())
        facts = {key.strip(): value.strip() for key, colon, value in pairs if colon}
        if _first_of(facts, _FEATURE_KEYS):
            cpus.append(facts)
    return cpus


def _first_of(facts: dict[str, str], keys: tuple[str, ...]) -> str:
    return next((facts[key] for key in keys if key in facts), "")
