"""Fault tests use the integration tests' VMMs and guest."""

from tests.integration.conftest import binary, witness_kernel

__all__ = ["binary", "witness_kernel"]
