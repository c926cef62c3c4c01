"""Bad days on order: the rules that the package's docstring describes."""

from __future__ import annotations

import errno
import json
import os
import signal
import time
from collections.abc import Mapping
from typing import Any, Final

ENVIRONMENT: Final = "FORKPOINT_SIMULATOR_FAULTS"
ACTIONS: Final = ("pause", "resume", "create", "load", "start", "flush", "get")
_INSIDE: Final = (
    "create.vmstate",
    "create.open",
    "create.memory",
    "create.sync",
    "load.vmstate",
    "load.memory",
)
_ANYWHERE: Final = ("delay", "hang", "exit", "kill")
POINTS: Final = {
    **dict.fromkeys(ACTIONS, (*_ANYWHERE, "ignore", "refuse")),
    **{f"{action}.reply": _ANYWHERE for action in ACTIONS},
    **dict.fromkeys(_INSIDE, (*_ANYWHERE, "error")),
    "create.memory": (*_ANYWHERE, "error", "short"),
}
"""What can be done where."""


class FaultRuleError(ValueError):
    """A rule that makes no sense."""


class IgnoredRequest(Exception):
    """The request is neither run nor answered."""


class RefusedRequest(Exception):
    """The request is not run; the text is its fault_message."""


class Rule:
    """One rule; see the package's docstring."""

    def __init__(
        self,
        *,
        at: str,
        do: str,
        nth: int = 1,
        times: int = 1,
        errno: str = "ENOSPC",
        after_pages: int = 0,
        ms: float = 0,
        code: int = 1,
        message: str = "refused by a simulated fault",
    ) -> None:
        self.at, self.do = at, do
        self.nth, self.times = nth, times
        self.errno, self.after_pages = errno, after_pages
        self.ms, self.code, self.message = ms, code, message
        self.seen = self.applied = 0

    @classmethod
    def parse(cls, rule: Any) -> Rule:
        """From JSON. Raises FaultRuleError."""
        if not isinstance(rule, Mapping):
            raise FaultRuleError(f"a rule is an object, not {rule!r}")
        try:
            made = cls(**rule)
        except TypeError as error:  # at or do is missing, or something is unknown
            raise FaultRuleError(str(error).removeprefix("Rule.__init__() ")) from error
        numbers: tuple[Any, ...] = made.nth, made.times, made.after_pages, made.ms, made.code
        if any(not isinstance(n, (int, float)) or n < 0 for n in numbers):
            raise FaultRuleError("nth, times, after_pages, ms and code are numbers from 0 on")
        if made.at not in POINTS:
            raise FaultRuleError(f"unknown point {made.at!r}: one of {', '.join(POINTS)}")
        if made.do not in POINTS[made.at]:
            raise FaultRuleError(f"at {made.at} one of {', '.join(POINTS[made.at])}")
        if not isinstance(getattr(errno, str(made.errno), None), int):
            raise FaultRuleError(f"unknown errno {made.errno!r}")
        return made

    def hits(self) -> bool:
        """Counts one arrival at the point; True where the rule applies to it."""
        self.seen += 1
        if self.seen < self.nth or (self.times and self.applied >= self.times):
            return False
        self.applied += 1
        return True

    def os_error(self) -> OSError:
        """The failure that it simulates."""
        number: int = getattr(errno, self.errno)
        return OSError(number, os.strerror(number))


class Faults:
    """The rules in force."""

    def __init__(self, rules: list[Rule]) -> None:
        self.rules = rules

    @classmethod
    def of_environment(cls, environment: Mapping[str, str]) -> Faults:
        """Those of the environment variable. Raises FaultRuleError."""
        faults = cls([])
        if text := environment.get(ENVIRONMENT):
            try:
                faults.replace(json.loads(text))
            except json.JSONDecodeError as error:
                raise FaultRuleError(f"{ENVIRONMENT} is no JSON: {error}") from error
        return faults

    def replace(self, rules: Any) -> None:
        """Puts other rules in force. Raises FaultRuleError, changing nothing."""
        if not isinstance(rules, list):
            raise FaultRuleError("rules are a list")
        self.rules = [Rule.parse(rule) for rule in rules]

    def as_json(self) -> list[dict[str, Any]]:
        """The rules with how often each was reached (`seen`) and applied."""
        return [vars(rule) for rule in self.rules]

    def reach(self, point: str) -> Rule | None:
        """Does at this point what the rules say.

        Raises OSError for `error`, IgnoredRequest or RefusedRequest. At create.memory `error` and
        `short` are not raised: their rule is returned, for some pages are written first.
        """
        for rule in self.rules:
            if rule.at == point and rule.hits():
                self._apply(rule)
                if rule.do in ("error", "short"):
                    if point == "create.memory":
                        return rule
                    raise rule.os_error()
        return None

    def _apply(self, rule: Rule) -> None:
        match rule.do:
            case "delay":
                time.sleep(rule.ms / 1000)
            case "hang":
                while True:
                    signal.pause()
            case "exit":
                os._exit(rule.code)
            case "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            case "ignore":
                raise IgnoredRequest
            case "refuse":
                raise RefusedRequest(rule.message)
