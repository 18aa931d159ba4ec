"""Frozen dataclasses out of JSON, strictly: the field types are the schema, an error names the key that is wrong."""

from __future__ import annotations

import types
import typing
from collections.abc import Mapping
from dataclasses import MISSING, fields, is_dataclass
from functools import lru_cache
from math import isfinite
from typing import Any, TypeVar

from ..errors import BundleError, RowcolError

T = TypeVar("T")

_LIMIT = 1 << 63


def decode(kind: type[T], value: object, where: str, error: type[RowcolError] = BundleError) -> T:
    """``value`` (what :func:`json.loads` gave) as a ``kind``; ``where`` is its path in the document, for the error.

    A field that has a default may be missing: one that a format got later has.
    Knows dataclasses, ``str``, ``bool``, ``int``, ``float``, ``X | None``, ``tuple[X, ...]`` and ``dict[str, X]``.
    """
    found: T = _decode(kind, value, where, error)
    return found


def _decode(kind: Any, value: Any, where: str, error: type[RowcolError]) -> Any:
    if is_dataclass(kind):
        return _record(kind, value, where, error)
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if origin is types.UnionType:
        return None if value is None else _decode(inner[0], value, where, error)
    if origin is tuple:
        if not isinstance(value, (list, tuple)):
            raise error(where, expected="a list", got=_kind(value))
        # raw samples are most of a profile: no call for each of them
        if inner[0] is int and all(type(item) is int and -_LIMIT < item < _LIMIT for item in value):
            return tuple(value)
        return tuple(_decode(inner[0], item, f"{where}[{i}]", error) for i, item in enumerate(value))
    if origin is dict:
        if not isinstance(value, Mapping):
            raise error(where, expected="an object", got=_kind(value))
        return {str(key): _decode(inner[1], item, f"{where}.{key}", error) for key, item in value.items()}
    return _plain(kind, value, where, error)


def _record(kind: Any, value: Any, where: str, error: type[RowcolError]) -> Any:
    if not isinstance(value, Mapping):
        raise error(where, expected="an object", got=_kind(value))
    hints, needed = _hints(kind)
    for key in needed:
        if key not in value:
            raise error(f"{where}.{key}", expected="a value", got="no such key")
    for key in value:
        if key not in hints:
            raise error(f"{where}.{key}", expected="no such key", got="an unknown key")
    given = {key: hint for key, hint in hints.items() if key in value}
    return kind(**{key: _decode(hint, value[key], f"{where}.{key}", error) for key, hint in given.items()})


def _plain(kind: Any, value: Any, where: str, error: type[RowcolError]) -> Any:
    if type(value) is int and not -_LIMIT < value < _LIMIT:
        raise error(where, expected="a number of 64 bits", got=f"one of {value.bit_length()}")
    if kind is float and type(value) in (int, float) and isfinite(value):
        return float(value)
    if kind in (str, bool, int) and type(value) is kind:
        return value
    names = {str: "text", bool: "true or false", int: "a whole number", float: "a finite number"}
    raise error(where, expected=names[kind], got=_kind(value))


@lru_cache(maxsize=32)
def _hints(kind: Any) -> tuple[dict[str, Any], tuple[str, ...]]:
    """The type of each field, and the fields that have no default."""
    hints = typing.get_type_hints(kind)
    needed = tuple(f.name for f in fields(kind) if f.default is MISSING and f.default_factory is MISSING)
    return {field.name: hints[field.name] for field in fields(kind)}, needed


def _kind(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{type(value).__name__} {text[:50]}…"
