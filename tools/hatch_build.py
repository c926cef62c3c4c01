"""Hatchling hook: a wheel carries the stubs that the .proto files say, freshly generated.

An editable install is left alone, because there `make stubs` writes them into the tree.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class GenerateStubs(BuildHookInterface):  # type: ignore[type-arg]
    """Run tools/stubs.py before the files of the wheel are collected."""

    PLUGIN_NAME = "custom"

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Generate client/forkpoint/v1 unless this is an editable install."""
        if version == "editable":
            return
        tools = Path(self.root) / "tools"
        sys.path.insert(0, str(tools))
        try:
            import stubs
        finally:
            sys.path.remove(str(tools))
        stubs.write(Path(self.root))
