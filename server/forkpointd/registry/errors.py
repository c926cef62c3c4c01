"""What can go wrong in the registry, besides what a client is meant to see (`ForkpointError`)."""

from __future__ import annotations

from forkpointd.model import RememberedRequest


class RegistryError(Exception):
    """Any failure of the registry itself. The message is for the operator."""


class RegistryUnusable(RegistryError):
    """The file can't be opened as a registry; the message says why and what to do."""


class RegistryDamaged(RegistryError):
    """A row can't be read as what it should be; the message names it and what is wrong."""


class RegistryFault(RegistryError):
    """SQLite could not do its work. A write that ends so has changed nothing that is visible."""


class RegistryClosed(RegistryError):
    """The registry is closed or being closed."""


class RequestSeen(Exception):
    """The request_id of an insert was used before, for the same call: nothing was inserted.

    The caller joins what `remembered` made.
    """

    def __init__(self, remembered: RememberedRequest) -> None:
        super().__init__(f"request {remembered.request_id} made {remembered.resource_id}")
        self.remembered = remembered
