"""forkpointd: the server that branches running microVMs; docs/design/ has its rooms and rules."""

from importlib.metadata import version

__version__ = version("forkpoint")
