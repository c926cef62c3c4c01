"""Whether a snapshot fits a host: told before the load, which would end the process (promise 7)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from forkpointd.images.hostfacts import HostFacts
from forkpointd.images.manifest import Manifest
from forkpointd.model import VmmVersion


@dataclass(frozen=True, slots=True)
class Mismatch:
    """One thing in which a host differs from the one that the snapshot was taken on."""

    field: str
    snapshot_value: str
    host_value: str
    refuses: bool
    """Whether the snapshot must not be loaded here; else the difference is worth a warning."""


class _Witness(Protocol):
    """What a manifest and a host have in common."""

    @property
    def vmm(self) -> VmmVersion: ...
    @property
    def snapshot_version(self) -> str: ...
    @property
    def architecture(self) -> str: ...
    @property
    def cpu_vendor(self) -> str: ...
    @property
    def cpu_model(self) -> str: ...
    @property
    def cpu_features(self) -> frozenset[str]: ...
    @property
    def kernel_release(self) -> str: ...
    @property
    def page_bytes(self) -> int: ...


_KERNEL_WORDS = """
    rep_good nopl xtopology nonstop_tsc nonstop_tsc_s3 cpuid tsc_known_freq tsc_reliable
    extd_apicid constant_tsc art arch_perfmon pebs bts acc_power syscall32 sysenter32 cpb
    always fxsave_leak up p3 p4 k7 k8 cpuid_fault epb cat_l3 cat_l2 cdp_l3 cdp_l2
    cqm_occup_llc cqm_mbm_total cqm_mbm_local mba smba bmec hw_pstate proc_feedback xcompacted
    pti intel_ppin amd_ppin retpoline retpoline_lfence ibrs ibpb stibp ssbd ibrs_enhanced
    ibpb_exit_to_user tpr_shadow flexpriority ept vpid ept_ad vnmi vmmcall vmcall pvunlock
    xenpv split_lock_detect bhi_ctrl per_thread_mba zen aperfmperf dtherm ida arat pln pts hwp
    hwp_notify hwp_act_window hwp_epp hwp_pkg_req hfi
"""
KERNEL_WORDS = frozenset(_KERNEL_WORDS.split())
"""Words among the flags of /proc/cpuinfo that tell what the *kernel* does with the CPU, or how it
is driven, rather than instructions that a guest may have found: another kernel release or boot
option changes them on one and the same host (arch/x86/include/asm/cpufeatures.h, "Linux-defined"
words 3, 7, 8, 11 and 21, and the thermal and power leaf). They are recorded, not compared."""


def check_fits(manifest: Manifest, host: HostFacts, strict: bool) -> list[Mismatch]:
    """In what this host differs from the snapshot's, worst first (docs/design/promises.md, 7).

    Refused: a snapshot version that this VMM can't read, another kind of VMM, architecture, CPU
    vendor or model, a missing feature, another page size. Another kernel release or release of
    the VMM is a warning, and refused only with `strict`.
    """
    found: list[Mismatch] = []

    def differs(name: str, snapshot_value: str, host_value: str, refuses: bool) -> None:
        found.append(Mismatch(name, snapshot_value, host_value, refuses))

    old: _Witness = manifest
    new: _Witness = host
    if old.vmm.kind is not new.vmm.kind:
        differs("vmm_kind", old.vmm.kind, new.vmm.kind, True)
    elif not can_read(new.snapshot_version, old.snapshot_version):
        differs("snapshot_version", old.snapshot_version, new.snapshot_version, True)
    for name in ("architecture", "cpu_vendor", "cpu_model", "page_bytes"):
        ours, theirs = str(getattr(old, name)), str(getattr(new, name))
        if ours != theirs:
            differs(name, ours, theirs, True)
    missing = old.cpu_features - new.cpu_features - KERNEL_WORDS
    if missing:
        differs("cpu_features", " ".join(sorted(missing)), "missing", True)
    if old.vmm.kind is new.vmm.kind and old.vmm.version != new.vmm.version:
        differs("vmm_version", old.vmm.version, new.vmm.version, strict)
    if old.kernel_release != new.kernel_release:
        differs("kernel_release", old.kernel_release, new.kernel_release, strict)
    return found


def can_read(reader_version: str, snapshot_version: str) -> bool:
    """Whether a Firecracker that writes snapshots of `reader_version` reads `snapshot_version`:
    the same major, and a minor that is not newer (src/vmm/src/snapshot/mod.rs)."""
    reader, snapshot = _numbers(reader_version), _numbers(snapshot_version)
    if reader is None or snapshot is None:
        return False
    return reader[0] == snapshot[0] and snapshot[1] <= reader[1]


def _numbers(version: str) -> tuple[int, int] | None:
    parts = version.split(".")
    if len(parts) != 3 or not all(part.isascii() and part.isdigit() for part in parts):
        return None
    return int(parts[0]), int(parts[1])
