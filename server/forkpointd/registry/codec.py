"""The words of the model as plain JSON data and back, by their type hints, strictly.

A dataclass is an object with exactly its fields, a tuple an array, a mapping of strings an object,
an enum its value, an instant ISO 8601 text in UTC with microseconds (of one length, so that text
order is the order of time), a path its text. What does not fit its hint is refused on the way in
as well as on the way out, so a wrong type never becomes durable; a field that a later release
added with a default may be missing in what an earlier one stored, an unknown field is refused.
"""

from __future__ import annotations

import json
import math
import types
import typing
from collections.abc import Callable, Mapping
from dataclasses import MISSING, dataclass, fields, is_dataclass
from datetime import UTC, datetime
from enum import StrEnum
from functools import cache
from pathlib import Path
from typing import Any

Plain = Any
"""None, bool, int, float, str, and lists and string-keyed dicts of these."""


class CodecError(ValueError):
    """A value does not fit its type; the message says where and how."""


@dataclass(frozen=True, slots=True)
class Codec:
    """Both directions for one type."""

    encode: Callable[[Any], Plain]
    decode: Callable[[Plain], Any]
    scalar: bool
    """Whether the plain form (or None) is a value that a column holds as it is."""

    def to_json(self, value: object) -> str:
        """The JSON text of a value. Raises `CodecError`."""
        return _ENCODER.encode(self.encode(value))

    def from_json(self, text: str) -> Any:
        """The value that `to_json` made `text` of. Raises `CodecError`."""
        try:
            plain = _DECODER.decode(text)
        except RecursionError as error:
            raise CodecError("nested too deeply") from error
        except json.JSONDecodeError as error:
            raise CodecError(f"not JSON: {error}") from error
        return self.decode(plain)


def instant_text(at: datetime) -> str:
    """An instant as `2025-01-31T12:00:00.000000Z`."""
    if at.tzinfo is None:
        raise CodecError(f"{at!r} has no time zone")
    return at.astimezone(UTC).isoformat(timespec="microseconds")[:26] + "Z"


def parse_instant(text: str) -> datetime:
    """The instant that `instant_text` wrote."""
    if len(text) != 27 or not text.endswith("Z"):
        raise CodecError(f"{text!r} is no instant in UTC")
    try:
        return datetime.fromisoformat(text)
    except ValueError as error:
        raise CodecError(f"{text!r} is no instant: {error}") from error


@cache
def codec_of(hint: Any) -> Codec:
    """The codec of a type. Raises `TypeError` for one that has none."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return _optional(hint, arguments)
    if origin is tuple:
        if len(arguments) != 2 or arguments[1] is not Ellipsis:
            raise TypeError(f"{hint} has no codec: only tuple[X, ...]")
        return _sequence(codec_of(arguments[0]))
    if origin is not None and isinstance(origin, type) and issubclass(origin, Mapping):
        if arguments != (str, str):
            raise TypeError(f"{hint} has no codec: only Mapping[str, str]")
        return Codec(_encode_mapping, _decode_mapping, scalar=False)
    if not isinstance(hint, type):
        raise TypeError(f"{hint} has no codec")
    if issubclass(hint, StrEnum):
        return _enum(hint)
    if is_dataclass(hint):
        return _object(hint)
    if hint is datetime:
        return Codec(_encode_instant, lambda plain: parse_instant(_text(plain)), scalar=True)
    if issubclass(hint, Path):
        return Codec(_encode_path, lambda plain: Path(_text(plain)), scalar=False)
    if hint is float:
        return Codec(_number, _number, scalar=True)
    if hint in (str, int, bool):
        return _exact(hint)
    raise TypeError(f"{hint} has no codec")


def _exact(kind: type) -> Codec:
    def check(value: Any) -> Any:
        if type(value) is kind:
            return value
        if kind is str and isinstance(value, str):
            return str(value)
        raise CodecError(f"{value!r} is no {kind.__name__}")

    return Codec(check, check, scalar=True)


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise CodecError(f"{value!r} is no text")
    return value


def _number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise CodecError(f"{value!r} is no number")
    if not math.isfinite(value):
        raise CodecError(f"{value!r} is not finite")
    return float(value)


def _encode_instant(value: Any) -> str:
    if not isinstance(value, datetime):
        raise CodecError(f"{value!r} is no instant")
    return instant_text(value)


def _encode_path(value: Any) -> str:
    if not isinstance(value, Path):
        raise CodecError(f"{value!r} is no path")
    return str(value)


def _encode_mapping(value: Any) -> dict[str, str]:
    if not isinstance(value, Mapping):
        raise CodecError(f"{value!r} is no mapping")
    return {_text(key): _text(item) for key, item in value.items()}


def _decode_mapping(plain: Plain) -> dict[str, str]:
    if not isinstance(plain, dict):
        raise CodecError(f"{plain!r} is no object")
    return {key: _text(item) for key, item in plain.items()}


def _enum(kind: type[StrEnum]) -> Codec:
    members = {member.value: member for member in kind}

    def encode(value: Any) -> str:
        if not isinstance(value, kind):
            raise CodecError(f"{value!r} is no {kind.__name__}")
        return value.value

    def decode(plain: Plain) -> StrEnum:
        try:
            return members[_text(plain)]
        except KeyError:
            raise CodecError(f"{plain!r} is no {kind.__name__}") from None

    return Codec(encode, decode, scalar=True)


def _optional(hint: Any, arguments: tuple[Any, ...]) -> Codec:
    others = [argument for argument in arguments if argument is not types.NoneType]
    if len(others) != 1 or len(arguments) != 2:
        raise TypeError(f"{hint} has no codec: only X | None")
    inner = codec_of(others[0])
    return Codec(
        lambda value: None if value is None else inner.encode(value),
        lambda plain: None if plain is None else inner.decode(plain),
        inner.scalar,
    )


def _sequence(item: Codec) -> Codec:
    def encode(value: Any) -> list[Plain]:
        if not isinstance(value, tuple):
            raise CodecError(f"{value!r} is no tuple")
        return [item.encode(each) for each in value]

    def decode(plain: Plain) -> tuple[Any, ...]:
        if not isinstance(plain, list):
            raise CodecError(f"{plain!r} is no array")
        return tuple(item.decode(each) for each in plain)

    return Codec(encode, decode, scalar=False)


def _object(kind: type[Any]) -> Codec:
    hints = typing.get_type_hints(kind)
    codecs = {each.name: codec_of(hints[each.name]) for each in fields(kind)}
    required = {
        each.name
        for each in fields(kind)
        if each.default is MISSING and each.default_factory is MISSING
    }

    def encode(value: Any) -> dict[str, Plain]:
        if type(value) is not kind:
            raise CodecError(f"{value!r} is no {kind.__name__}")
        plain = {}
        for name, codec in codecs.items():
            try:
                plain[name] = codec.encode(getattr(value, name))
            except CodecError as error:
                raise CodecError(f"{kind.__name__}.{name}: {error}") from error
        return plain

    def decode(plain: Plain) -> Any:
        if not isinstance(plain, dict):
            raise CodecError(f"{plain!r} is no {kind.__name__}")
        unknown, missing = plain.keys() - codecs.keys(), required - plain.keys()
        if unknown or missing:
            raise CodecError(
                f"{kind.__name__}: unknown fields {sorted(unknown)}, missing {sorted(missing)}"
            )
        values = {}
        for name, item in plain.items():
            try:
                values[name] = codecs[name].decode(item)
            except CodecError as error:
                raise CodecError(f"{kind.__name__}.{name}: {error}") from error
        return kind(**values)

    return Codec(encode, decode, scalar=False)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    plain = dict(pairs)
    if len(plain) != len(pairs):
        raise CodecError("an object names a field twice")
    return plain


def _no_constant(text: str) -> Any:
    raise CodecError(f"{text} is no number")


# Made once: `json.dumps` and `json.loads` make one a call when anything is asked of them. Non-ASCII
# is escaped, so a path whose bytes are no UTF-8 (lone surrogates) can be stored too.
_ENCODER = json.JSONEncoder(separators=(",", ":"), allow_nan=False)
_DECODER = json.JSONDecoder(object_pairs_hook=_unique, parse_constant=_no_constant)
