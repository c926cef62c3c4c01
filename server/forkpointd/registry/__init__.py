"""The registry: what the server knows durably, in one SQLite file.

The room offers one class, `Registry`, in the words of `forkpointd.model`. It knows neither gRPC,
Firecracker nor the files of sandboxes and snapshots: a row says what should be there, others make
it so. Every write that has returned is on the disk.
"""

from forkpointd.registry.errors import (
    RegistryClosed,
    RegistryDamaged,
    RegistryError,
    RegistryFault,
    RegistryUnusable,
    RequestSeen,
)
from forkpointd.registry.registry import Registry
from forkpointd.registry.sequences import SEQUENCE_BLOCK, Sequence

__all__ = [
    "SEQUENCE_BLOCK",
    "Registry",
    "RegistryClosed",
    "RegistryDamaged",
    "RegistryError",
    "RegistryFault",
    "RegistryUnusable",
    "RequestSeen",
    "Sequence",
]
