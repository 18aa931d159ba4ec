"""A TOML table read field by field: each key known, present and of its type, or an error that says where."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from packaging.requirements import InvalidRequirement, Requirement

from .errors import InputError, TargetError, did_you_mean


@dataclass(frozen=True, slots=True)
class Table:
    """A TOML table, read field by field; every error says where it is."""

    values: Mapping[str, Any]
    where: str
    error: type[InputError] = TargetError

    def keys(self, known: Mapping[str, bool]) -> None:
        check_keys(self.values, known, self.where, self.error)

    def text(self, key: str, pattern: re.Pattern[str] | None = None, expected: str = "text that is not empty") -> str:
        value = self.values[key]
        if not isinstance(value, str) or not value.strip() or (pattern and not pattern.fullmatch(value)):
            raise self._wrong(key, expected, value)
        return value.strip()

    def prose(self, key: str) -> str:
        """Text for people, its line breaks removed: whoever prints it wraps it."""
        return " ".join(self.text(key).split())

    def lines(self, key: str) -> tuple[str, ...]:
        """A list of shell lines, each one line."""
        return tuple(self._listed(key, "a list of lines", lambda v: isinstance(v, str) and len(v.splitlines()) == 1))

    def requirements(self, key: str) -> tuple[str, ...]:
        """What pip installs (PEP 508), each with a name, at most a range of versions, and no conditions."""
        for text in self.texts(key):
            try:
                found = Requirement(text)
            except InvalidRequirement as e:
                raise self._wrong(key, "requirements such as onnxruntime>=1.17", text) from e
            if found.marker or found.url or found.extras:
                hint = "what differs by Python version belongs into [[runtimes.alternatives]]"
                raise self._wrong(key, "a name and a range of versions, nothing else", text, hint)
        return self.texts(key)

    def whole(self, key: str) -> int:
        value = self.values[key]
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise self._wrong(key, "a whole number of 1 or more", value)
        return value

    def flag(self, key: str) -> bool:
        value = self.values[key]
        if not isinstance(value, bool):
            raise self._wrong(key, "true or false", value)
        return value

    def texts(self, key: str, choices: Iterable[str] = ()) -> tuple[str, ...]:
        allowed = tuple(choices)
        one = f"of {', '.join(allowed)}" if allowed else "of texts"
        values = self._listed(key, f"a list {one}, not empty", lambda v: isinstance(v, str) and bool(v.strip()))
        for value in values:
            if allowed and value not in allowed:
                raise self._wrong(key, f"a list {one}", value, did_you_mean(value, allowed))
        if len(set(values)) != len(values):
            raise self._wrong(key, "each value once", values)
        return tuple(values)

    def tables(self, key: str) -> list[Mapping[str, Any]]:
        return self._listed(key, f"at least one [[{key}]] table", lambda v: isinstance(v, dict))

    def strings_by_key(self, key: str) -> dict[str, str]:
        value = self.values[key]
        if not isinstance(value, dict) or not all(isinstance(v, str) and v.strip() for v in value.values()):
            raise self._wrong(key, "a table of texts", value)
        return dict(value)

    def _listed(self, key: str, expected: str, fits: Callable[[Any], bool]) -> list[Any]:
        value = self.values[key]
        if not isinstance(value, list) or not value or not all(fits(item) for item in value):
            raise self._wrong(key, expected, value)
        return value

    def _wrong(self, key: str, expected: str, got: object, hint: str = "") -> InputError:
        return self.error(f"{self.where}: {key}", expected=expected, got=repr(got), hint=hint)


def check_keys(
    values: Mapping[str, Any], known: Mapping[str, bool], where: str, error: type[InputError] = TargetError
) -> None:
    """Refuse keys that are not in ``known`` and the absence of those that ``known`` marks as required."""
    for key in values:
        if key not in known:
            hint = did_you_mean(key, known) or f"known keys: {', '.join(known)}"
            raise error(where, expected="known keys only", got=f"unknown key {key!r}", hint=hint)
    missing = [key for key, required in known.items() if required and key not in values]
    if missing:
        raise error(where, expected=f"the key {missing[0]!r}", got="no such key", hint=f"missing: {', '.join(missing)}")
