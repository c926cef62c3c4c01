"""forkpointd: the server that branches running microVMs; its rooms and rules are in docs/design/."""

from importlib.metadata import version

__version__ = version("forkpoint")
