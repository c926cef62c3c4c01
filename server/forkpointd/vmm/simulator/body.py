"""Request bodies, read as serde_json reads them into Firecracker's structures.

A body is taken field by field in the order in which it is written, so the first thing that is
wrong is the one that is told, with serde's wording and position (of the commoner mistakes: some
broken numbers and escapes are told in other words). `Struct` says what is expected.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from json.decoder import JSONDecoder
from typing import Any, Final

from .errors import Fault

_SPACE: Final = " \t\r\n"


def _no_constant(name: str) -> Any:
    raise json.JSONDecodeError(f"{name} is no JSON", name, 0)


_DECODER: Final = JSONDecoder(parse_constant=_no_constant)

Check = Callable[[Any], None]
"""Raises WrongValueError where a value does not fit."""


class WrongValueError(Exception):
    """What serde says of a value, without its position, which is the value's end."""


class WrongKindError(WrongValueError):
    """The same of a value that serde doesn't read on: told at the value's first character."""


class Field:
    """One field of a structure."""

    def __init__(
        self, check: Check | Struct, *, required: bool = True, nullable: bool = False
    ) -> None:
        self.check = check
        self.required = required
        self.nullable = nullable


def optional(check: Check | Struct) -> Field:
    """An Option: may be left out or null."""
    return Field(check, required=False, nullable=True)


def defaulted(check: Check | Struct) -> Field:
    """May be left out, but not null."""
    return Field(check, required=False)


class Struct:
    """A structure: its name in Firecracker and its fields in their order there."""

    def __init__(self, name: str, fields: Mapping[str, Field], *, closed: bool = True) -> None:
        self.name = name
        self.fields = fields
        self.closed = closed
        """It refuses unknown fields."""

    def parse(self, body: bytes) -> dict[str, Any]:
        """The fields that are given and not null. Raises Fault, worded as Firecracker words it."""
        reader = _Reader(body)
        try:
            values = reader.structure(self)
            reader.end()
        except _SyntaxError as error:
            raise Fault(deserializing(str(error))) from error
        return values

    def field(self, name: str) -> Field:
        """The field of this name. Raises WrongValueError where there is none."""
        if name in self.fields:
            return self.fields[name]
        if self.closed:
            raise WrongValueError(f"unknown field `{name}`, expected {one_of(self.fields)}")
        return optional(anything)

    def complete(self, values: Mapping[str, Any]) -> None:
        """Raises WrongValueError where a required field is missing."""
        for name, spec in self.fields.items():
            if spec.required and name not in values:
                raise WrongValueError(f"missing field `{name}`")


def deserializing(reason: str) -> str:
    """The fault_message for a body that can't be read."""
    return f"An error occurred when deserializing the json body of a request: {reason}."


class _SyntaxError(Exception):
    """Something is wrong with a body; the text has the position."""


class _Reader:
    def __init__(self, body: bytes) -> None:
        self.text = body.decode("utf-8", "replace")
        self.at = 0

    def fail(self, reason: str, at: int | None = None) -> _SyntaxError:
        before = self.text[: self.at if at is None else at]
        line = before.count("\n") + 1
        column = len(before[before.rfind("\n") + 1 :].encode())
        return _SyntaxError(f"{reason} at line {line} column {column}")

    def peek(self) -> str:
        while self.at < len(self.text) and self.text[self.at] in _SPACE:
            self.at += 1
        return self.text[self.at : self.at + 1]

    def structure(self, struct: Struct) -> dict[str, Any]:
        if self.peek() != "{":
            value = self.value()
            if isinstance(value, list):
                raise self.fail(
                    f"invalid length {len(value)}, expected struct {struct.name} "
                    f"with {len(struct.fields)} elements"
                )
            raise self.fail(f"invalid type: {unexpected(value)}, expected struct {struct.name}")
        self.at += 1
        values: dict[str, Any] = {}
        try:
            while self._more(first=not values):
                name = self._name()
                spec = struct.field(name)
                if name in values:
                    raise WrongValueError(f"duplicate field `{name}`")
                values[name] = self._field_value(spec)
            struct.complete(values)
        except WrongValueError as error:
            raise self.fail(str(error)) from error
        return {name: value for name, value in values.items() if value is not None}

    def _more(self, *, first: bool) -> bool:
        """Steps to the next field; False past the closing brace."""
        found = self.peek()
        if found == "}":
            self.at += 1
            return False
        if not first and found == ",":
            self.at += 1
            if self.peek() == "}":
                raise self.fail("trailing comma", self.at + 1)
        elif not first and found:
            raise self.fail("expected `,` or `}`", self.at + 1)
        if not self.peek():
            raise self.fail("EOF while parsing an object", len(self.text.rstrip(_SPACE)))
        if self.peek() != '"':
            raise self.fail("key must be a string", self.at + 1)
        return True

    def _name(self) -> str:
        try:
            name, self.at = _DECODER.raw_decode(self.text, self.at)
        except json.JSONDecodeError as error:
            raise self.fail("EOF while parsing a string", len(self.text)) from error
        return str(name)

    def _field_value(self, spec: Field) -> Any:
        found = self.peek()
        if not found:
            raise self.fail("EOF while parsing an object", len(self.text))
        if found != ":":
            raise self.fail("expected `:`", self.at + 1)
        self.at += 1
        if isinstance(spec.check, Struct):
            return None if spec.nullable and self._null() else self.structure(spec.check)
        self.peek()
        start = self.at
        value = self.value()
        if value is None and spec.nullable:
            return None
        try:
            spec.check(value)
        except WrongKindError as error:
            raise self.fail(str(error), start + 1) from error
        except WrongValueError:
            if isinstance(value, (list, dict)):
                self.at = start
            raise
        return value

    def _null(self) -> bool:
        self.peek()
        null = self.text.startswith("null", self.at)
        self.at += 4 * null
        return null

    def value(self) -> Any:
        if not self.peek():
            raise self.fail("EOF while parsing a value", len(self.text))
        try:
            value, self.at = _DECODER.raw_decode(self.text, self.at)
        except json.JSONDecodeError as error:
            if error.msg.startswith("Unterminated string"):
                raise self.fail("EOF while parsing a string", len(self.text)) from error
            raise self.fail("expected value", self.at + 1) from error
        return value

    def end(self) -> None:
        if self.peek():
            raise self.fail("trailing characters", self.at + 1)


# --- checks ------------------------------------------------------------------------------------


def unexpected(value: Any) -> str:
    """A value as serde names it in `invalid type`."""
    match value:
        case None:
            return "null"
        case bool():
            return f"boolean `{str(value).lower()}`"
        case int():
            return f"integer `{value}`"
        case float():
            return f"floating point `{value}`"
        case str():
            return f"string {json.dumps(value, ensure_ascii=False)}"
        case list():
            return "sequence"
        case _:
            return "map"


def one_of(names: Mapping[str, Any] | tuple[str, ...]) -> str:
    """serde's list of what would have been right."""
    quoted = [f"`{name}`" for name in names]
    if len(quoted) == 1:
        return quoted[0]
    if len(quoted) == 2:
        return f"{quoted[0]} or {quoted[1]}"
    return f"one of {', '.join(quoted)}"


def anything(value: Any) -> None:
    """Whatever it is."""


def string(value: Any) -> None:
    """A String."""
    if not isinstance(value, str):
        raise WrongValueError(f"invalid type: {unexpected(value)}, expected a string")


def boolean(value: Any) -> None:
    """A bool."""
    if not isinstance(value, bool):
        raise WrongValueError(f"invalid type: {unexpected(value)}, expected a boolean")


def unsigned(kind: str, bits: int) -> Check:
    """A u8, u32, usize and so on."""

    def check(value: Any) -> None:
        if isinstance(value, int) and not isinstance(value, bool) and -(1 << 63) <= value < 1 << 64:
            if not 0 <= value < 1 << bits:
                raise WrongValueError(f"invalid value: integer `{value}`, expected {kind}")
            return
        given = float(value) if isinstance(value, int) and not isinstance(value, bool) else value
        text = unexpected(given).replace("e+", "e")
        raise WrongValueError(f"invalid type: {text}, expected {kind}")

    return check


def variant(*names: str) -> Check:
    """One of an enum's names."""

    def check(value: Any) -> None:
        if not isinstance(value, str):
            raise WrongKindError("expected value")
        if value not in names:
            raise WrongValueError(f"unknown variant `{value}`, expected {one_of(names)}")

    return check


def sequence(value: Any) -> None:
    """A Vec, of whatever."""
    if not isinstance(value, list):
        raise WrongValueError(f"invalid type: {unexpected(value)}, expected a sequence")
