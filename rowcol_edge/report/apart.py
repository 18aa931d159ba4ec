"""Which profiles' latencies must not stand side by side, in few words however many profiles there are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ..device.profile import Profile, conditions

_VALUES = 5
_NAMES = 3
"""What a note lists; the rest is counted."""


def notes(measured: Sequence[tuple[str, Profile]]) -> list[str]:
    """A note for each condition in which profiles, given by their names, differ: its values, and whose they are."""
    found = [(name, conditions(profile)) for name, profile in measured]
    said = []
    for key in found[0][1] if found else ():
        names: dict[str, list[str]] = {}
        for name, values in found:
            names.setdefault(values[key], []).append(name)
        if len(names) > 1:
            said.append(
                f"do not set latencies side by side that differ in {key}: {_listed(names)}; read the ratios of each"
            )
    return said


def _listed(names: Mapping[str, Sequence[str]]) -> str:
    """``2 (a.json, b.json), 4 (c.json)``: the values that most have first."""
    ranked = sorted(names.items(), key=lambda item: -len(item[1]))
    shown = [f"{value} ({_shortened(which)})" for value, which in ranked[:_VALUES]]
    if left := ranked[_VALUES:]:
        shown.append(f"and {len(left)} other values ({sum(len(which) for _, which in left)} profiles)")
    return ", ".join(shown)


def _shortened(names: Sequence[str]) -> str:
    left = len(names) - _NAMES
    return ", ".join([*names[:_NAMES], *([f"and {left} more"] if left > 0 else [])])
