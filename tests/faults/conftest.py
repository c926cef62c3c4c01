"""Fault tests use the integration tests' VMMs and guest."""

from tests.integration.conftest import witness_kernel

__all__ = ["witness_kernel"]
