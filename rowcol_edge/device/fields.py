"""A JSON object read key by key: each key known, present and of the stated type, or an error that names it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from math import isfinite
from typing import Any

from ..errors import BundleError, RowcolError


class Fields:
    """One JSON object being read. Take each key with the method of its type, then call :meth:`done`.

    ``where`` is the path of the object in its document (``manifest.arms[0]``); every error starts with it.
    """

    __slots__ = ("_error", "_left", "_values", "where")

    def __init__(self, values: object, where: str, error: type[RowcolError] = BundleError) -> None:
        if not isinstance(values, Mapping):
            raise error(where, expected="an object", got=describe(values))
        self._values = values
        self._left = set(values)
        self._error = error
        self.where = where

    def has(self, key: str) -> bool:
        return key in self._values

    def fail(self, key: str, expected: str, got: str) -> RowcolError:
        """The error to raise for a key whose value has the right type but not the right content."""
        return self._error(f"{self.where}.{key}", expected=expected, got=got)

    def _take(self, key: str, kinds: type | tuple[type, ...], expected: str) -> Any:
        if key not in self._values:
            raise self._missing(key, expected)
        self._left.discard(key)
        value = self._values[key]
        # JSON's true is an int for Python; no field here means it that way
        if not isinstance(value, kinds) or (isinstance(value, bool) and kinds is not bool):
            raise self.fail(key, expected, describe(value))
        return value

    def text(self, key: str, choices: Sequence[str] = ()) -> str:
        value: str = self._take(key, str, "text")
        if choices and value not in choices:
            raise self.fail(key, f"one of {', '.join(choices)}", repr(value))
        if not value:
            raise self.fail(key, "text", "an empty text")
        return value

    def optional_text(self, key: str) -> str | None:
        return None if self._is_null(key) else self.text(key)

    def integer(self, key: str, minimum: int = 0) -> int:
        value: int = self._take(key, int, "a whole number")
        if value < minimum:
            raise self.fail(key, f"a whole number ≥ {minimum}", str(value))
        return value

    def optional_integer(self, key: str, minimum: int = 0) -> int | None:
        return None if self._is_null(key) else self.integer(key, minimum)

    def number(self, key: str) -> float:
        value = self._take(key, (int, float), "a number")
        if not isfinite(value):
            raise self.fail(key, "a finite number", str(value))
        return float(value)

    def optional_number(self, key: str) -> float | None:
        return None if self._is_null(key) else self.number(key)

    def flag(self, key: str) -> bool:
        value: bool = self._take(key, bool, "true or false")
        return value

    def table(self, key: str) -> dict[str, Any]:
        return dict(self._take(key, dict, "an object"))

    def optional_table(self, key: str) -> dict[str, Any] | None:
        return None if self._is_null(key) else self.table(key)

    def text_table(self, key: str) -> dict[str, str]:
        values = self.table(key)
        for name, value in values.items():
            if not isinstance(value, str):
                raise self.fail(f"{key}.{name}", "text", describe(value))
        return values

    def child(self, key: str) -> Fields:
        return Fields(self.table(key), f"{self.where}.{key}", self._error)

    def items(self, key: str) -> list[Any]:
        return list(self._take(key, (list, tuple), "a list"))

    def children(self, key: str) -> list[Fields]:
        return [Fields(item, f"{self.where}.{key}[{i}]", self._error) for i, item in enumerate(self.items(key))]

    def texts(self, key: str) -> tuple[str, ...]:
        items = self.items(key)
        for i, item in enumerate(items):
            if not isinstance(item, str):
                raise self.fail(f"{key}[{i}]", "text", describe(item))
        return tuple(items)

    def done(self) -> None:
        """Every key has been taken; what is left is unknown."""
        if not self._left:
            return
        raise self.fail(str(min(self._left, key=str)), "no such key", "an unknown key")

    def _missing(self, key: str, expected: str) -> RowcolError:
        from difflib import get_close_matches  # only a broken document pays for this import

        near = get_close_matches(key, map(str, self._left), n=1)
        hint = f"is {near[0]!r} a misspelling of it?" if near else ""
        return self._error(f"{self.where}.{key}", expected=expected, got="no such key", hint=hint)

    def _is_null(self, key: str) -> bool:
        if key in self._values and self._values[key] is None:
            self._left.discard(key)
            return True
        return False


def describe(value: object) -> str:
    """A JSON value in few words, for an error message."""
    text = json.dumps(value, default=str)
    return text if len(text) <= 60 else f"{type(value).__name__} {text[:50]}…"


def parse_json(text: str | bytes, where: str, error: type[RowcolError] = BundleError) -> Any:
    """JSON without the leniencies of :mod:`json`: no NaN or Infinity, no key twice."""

    def constant(name: str) -> None:
        raise ValueError(f"{name} is not JSON")

    def pairs(items: list[tuple[str, Any]]) -> dict[str, Any]:
        values = dict(items)
        if len(values) != len(items):
            keys = [key for key, _ in items]
            raise ValueError(f"the key {next(k for k in keys if keys.count(k) > 1)!r} occurs twice")
        return values

    try:
        return json.loads(text, parse_constant=constant, object_pairs_hook=pairs)
    except (ValueError, RecursionError) as e:
        raise error(where, expected="a JSON document", got=str(e)) from e
