"""Budgets: what the user allows a package to cost, ``drop<=0.5pp,size<=4MB,params<=0.5x,macs<=0.5x``."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from .errors import ConfigError, did_you_mean

_UNITS: dict[str, dict[str, float]] = {
    "drop": {"pp": 1.0, "": 1.0},
    "size": {"b": 1.0, "kb": 1e3, "mb": 1e6, "gb": 1e9, "kib": 2.0**10, "mib": 2.0**20, "gib": 2.0**30},
    "params": {"x": 0.0, "": 1.0, "k": 1e3, "m": 1e6},
    "macs": {"x": 0.0, "": 1.0, "k": 1e3, "m": 1e6, "g": 1e9},
}
_EXAMPLES = {"drop": "drop<=0.5pp", "size": "size<=4MB", "params": "params<=0.5x", "macs": "macs<=0.5x"}
_ENTRY = re.compile(r"\s*([a-z]+)\s*<=\s*([0-9]+(?:\.[0-9]+)?)\s*([a-zA-Z]*)\s*")


@dataclass(frozen=True, slots=True)
class Budget:
    """One limit. ``relative`` limits are fractions of the dense original.

    Attributes:
        kind: ``drop`` (percentage points on the selection split), ``size`` (artifact bytes), ``params``, ``macs``.
        limit: in the kind's base unit (points, bytes, counts), or a fraction where ``relative``.
    """

    kind: str
    limit: float
    relative: bool
    text: str

    def absolute(self, dense: float) -> float:
        return self.limit * dense if self.relative else self.limit


@dataclass(frozen=True, slots=True)
class Budgets:
    """All limits of a build; every one of them must hold."""

    entries: tuple[Budget, ...] = ()

    def get(self, kind: str) -> Budget | None:
        return next((b for b in self.entries if b.kind == kind), None)

    @classmethod
    def parse(cls, text: str) -> Budgets:
        """Raises ConfigError for anything but ``kind<=number unit`` entries separated by commas, and for a cost of
        nothing (a drop of nothing can be met)."""
        entries = tuple(_entry(part) for part in text.split(",") if part.strip())
        kinds = [b.kind for b in entries]
        for kind in kinds:
            if kinds.count(kind) > 1:
                raise ConfigError("budget", expected=f"one limit for {kind}", got=text)
        return cls(entries)

    def __str__(self) -> str:
        return ",".join(b.text for b in self.entries)


def _entry(text: str) -> Budget:
    found = _ENTRY.fullmatch(text)
    if not found:
        raise ConfigError("budget", expected="e.g. drop<=0.5pp, size<=4MB or params<=0.5x", got=repr(text.strip()))
    kind, number, unit = found[1], float(found[2]), found[3].lower()
    if kind not in _UNITS:
        raise ConfigError(
            "budget",
            expected=f"one of {sorted(_UNITS)}",
            got=repr(kind),
            hint=did_you_mean(kind, _UNITS),
        )
    if unit not in _UNITS[kind]:
        raise ConfigError(f"budget {kind}", expected=f"a unit out of {sorted(_UNITS[kind])}", got=repr(found[3]))
    relative = unit == "x"
    limit = number if relative else number * _UNITS[kind][unit]
    if not math.isfinite(limit) or (limit == 0.0 and kind != "drop"):
        raise ConfigError(
            f"budget {kind}",
            expected="a finite number above 0",
            got=repr(text.strip()),
            hint=f"e.g. {_EXAMPLES[kind]}",
        )
    return Budget(kind, limit, relative, text.strip())
