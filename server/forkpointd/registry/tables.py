"""How a model object lies in a table: one column a field, under the field's name.

Scalars (text, numbers, enums, instants) are columns as they are; whatever is nested is JSON text.
`Table` writes the statements, so that a column is named in two places only: the model and the
schema (a test compares them).
"""

from __future__ import annotations

import sqlite3
import typing
from collections.abc import Iterable, Sequence
from dataclasses import fields
from typing import Any, Generic, TypeVar

from forkpointd.registry.codec import Codec, CodecError, codec_of
from forkpointd.registry.errors import RegistryDamaged

T = TypeVar("T")

Connection = sqlite3.Connection


class Table(Generic[T]):
    """The rows of one model type, under the key `key`."""

    def __init__(
        self, name: str, kind: type[T], key: str, *, elsewhere: frozenset[str] = frozenset()
    ) -> None:
        """`elsewhere` are fields that another table holds, or none."""
        hints = typing.get_type_hints(kind)
        self.name = name
        self.key = key
        self.columns = tuple(
            each.name
            for each in fields(kind)  # type: ignore[arg-type]  # all our kinds are dataclasses
            if each.name not in elsewhere
        )
        self._kind = kind
        self._converters = tuple(_Column(hints[column]) for column in self.columns)
        names = ", ".join(self.columns)
        self.select = f"SELECT {names} FROM {name}"
        """Without a condition; rows of it are what `decode` takes."""

    def encode(self, item: T) -> dict[str, Any]:
        """The values of the columns. Raises `CodecError`."""
        values = {}
        for column, converter in zip(self.columns, self._converters, strict=True):
            try:
                values[column] = converter.encode(getattr(item, column))
            except CodecError as error:
                raise CodecError(f"{self.name}.{column}: {error}") from error
        return values

    def decode(self, row: Sequence[Any], **elsewhere: Any) -> T:
        """The object of a row of `select`. Raises `RegistryDamaged`."""
        values = {}
        for column, converter, value in zip(self.columns, self._converters, row, strict=True):
            try:
                values[column] = converter.decode(value)
            except CodecError as error:
                key = row[self.columns.index(self.key)]
                raise RegistryDamaged(
                    f"column {column} of {key!r} in table {self.name} can't be read: {error}"
                ) from error
        return self._kind(**values, **elsewhere)

    def insert(self, connection: Connection, items: Iterable[T], **more: Any) -> None:
        """New rows; `more` are further columns of each."""
        for item in items:
            values = self.encode(item) | more
            names, marks = ", ".join(values), ", ".join("?" * len(values))
            connection.execute(
                f"INSERT INTO {self.name} ({names}) VALUES ({marks})", tuple(values.values())
            )

    def update(self, connection: Connection, item: T, **more: Any) -> bool:
        """Replaces a whole row; whether there was one."""
        values = self.encode(item) | more
        key = values.pop(self.key)
        changes = ", ".join(f"{column} = ?" for column in values)
        cursor = connection.execute(
            f"UPDATE {self.name} SET {changes} WHERE {self.key} = ?", (*values.values(), key)
        )
        return cursor.rowcount == 1

    def get(self, connection: Connection, key: str, condition: str = "1") -> T | None:
        """The object with this key, if its row fulfils `condition`."""
        row = connection.execute(
            f"{self.select} WHERE {self.key} = ? AND {condition}", (key,)
        ).fetchone()
        return None if row is None else self.decode(row)

    def all(self, connection: Connection, condition: str = "1") -> list[T]:
        """All objects that fulfil `condition`, in order of creation."""
        rows = connection.execute(
            f"{self.select} WHERE {condition} ORDER BY create_time, {self.key}"
        )
        return [self.decode(row) for row in rows]


class _Column:
    """How one field's value lies in its column."""

    def __init__(self, hint: Any) -> None:
        self._codec: Codec = codec_of(hint)
        self._optional = type(None) in typing.get_args(hint)
        self._bool = hint is bool

    def encode(self, value: Any) -> Any:
        if self._bool:
            return int(self._codec.encode(value))
        if not self._codec.scalar:
            return None if value is None and self._optional else self._codec.to_json(value)
        plain = self._codec.encode(value)
        if isinstance(plain, int) and not -(2**63) <= plain < 2**63:
            raise CodecError(f"{plain} is beyond 64 bits")
        if isinstance(plain, str) and not plain.isascii():
            # Lone surrogates (of a path that is no UTF-8, in a message) have no place in TEXT.
            return plain.encode("utf-8", "backslashreplace").decode("utf-8")
        return plain

    def decode(self, value: Any) -> Any:
        if self._bool:
            if value not in (0, 1):
                raise CodecError(f"{value!r} is neither 0 nor 1")
            return bool(value)
        if self._codec.scalar or (value is None and self._optional):
            return self._codec.decode(value)
        if not isinstance(value, str):
            raise CodecError(f"{value!r} is no JSON text")
        return self._codec.from_json(value)
