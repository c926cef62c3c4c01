"""What to type instead: for hands that are used to docker, kubectl or `forkpoint fork SANDBOX`."""

from __future__ import annotations

from typing import Any

from typer.core import TyperGroup

ELSEWHERE = {
    "create": "forkpoint sandbox create",
    "run": "forkpoint sandbox create",
    "ps": "forkpoint sandbox list",
    "ls": "forkpoint sandbox list",
    "list": "forkpoint sandbox list",
    "get": "forkpoint sandbox get SANDBOX",
    "inspect": "forkpoint sandbox get SANDBOX",
    "describe": "forkpoint sandbox get SANDBOX",
    "logs": "forkpoint sandbox console SANDBOX --no-follow",
    "attach": "forkpoint sandbox console SANDBOX",
    "exec": "forkpoint sandbox console SANDBOX",
    "pause": "forkpoint sandbox pause SANDBOX",
    "resume": "forkpoint sandbox resume SANDBOX",
    "rm": "forkpoint sandbox rm SANDBOX",
    "kill": "forkpoint sandbox rm SANDBOX",
    "delete": "forkpoint sandbox rm SANDBOX",
    "commit": "forkpoint branch start SANDBOX",
    "info": "forkpoint server info",
}
"""Commands that others have at the top."""


class TopGroup(TyperGroup):
    """`forkpoint` itself."""

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """The command; says where it is if it is elsewhere."""
        found = super().get_command(ctx, cmd_name)
        if found is None and cmd_name in ELSEWHERE and not ctx.resilient_parsing:
            ctx.fail(f"No such command {cmd_name!r}: try `{ELSEWHERE[cmd_name]}`.")
        return found


class BranchGroup(TyperGroup):
    """`forkpoint branch`, after which a sandbox's name is what comes to mind."""

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """The command; an unknown one may be meant as a sandbox."""
        found = super().get_command(ctx, cmd_name)
        if found is None and not ctx.resilient_parsing:
            ctx.fail(
                f"No such command {cmd_name!r}: to branch a sandbox of that name, "
                f"`forkpoint branch start {cmd_name}`."
            )
        return found
