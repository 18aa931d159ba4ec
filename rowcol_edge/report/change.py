"""What changed from one profile to another: records, and their table."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from ..device.profile import Comparison
from ..device.table import NONE, mebibytes, milliseconds, ratio_text, size

SCHEMA = 1
"""Version of the JSON that `Change.to_dict` gives. History: 1 – first one."""


@dataclass(frozen=True, slots=True)
class Side:
    """An arm in one session. ``quality`` is None without its bundle; ``against_dense`` is the session's own paired
    ratio to the dense arm of the same precision (of that arm itself: to dense@fp32)."""

    median_ns: float
    blocks: int
    size_bytes: int
    peak_bytes: int | None
    metric: str
    split: str
    quality: float | None
    against_dense: Comparison | None


@dataclass(frozen=True, slots=True)
class ArmChange:
    """One arm before and after. ``latency`` is that of the new session over that of the old one, not paired.

    ``same_file``: the artifact has the digest that it had.
    """

    arm: str
    same_file: bool
    old: Side
    new: Side
    latency: Comparison


@dataclass(frozen=True, slots=True)
class Session:
    """What one profile says of itself."""

    file: str
    bundle: str
    digest: str
    target: str
    runtime: str
    runtime_version: str
    created: str
    evidence: str
    null: Comparison


@dataclass(frozen=True, slots=True)
class Change:
    """``changed`` is what differs on purpose, ``noise`` the share up to which a change counts as none."""

    old: Session
    new: Session
    changed: tuple[str, ...]
    noise: float
    arms: tuple[ArmChange, ...]
    notes: tuple[str, ...]

    def columns(self) -> tuple[str, ...]:
        return ("", *(arm.arm for arm in self.arms))

    def rows(self) -> tuple[tuple[str, ...], ...]:
        """A row a figure, old → new, its arms side by side; without figures that no arm has."""
        metrics = dict.fromkeys(side.metric for arm in self.arms for side in (arm.old, arm.new) if side.metric)
        table: list[tuple[str, ...]] = [
            # without its change in per cent: that is the ratio below, with its interval
            ("latency", *(f"{milliseconds(a.old.median_ns)} → {milliseconds(a.new.median_ns)}" for a in self.arms)),
            ("new / old, by blocks [95 %]", *(ratio_text(arm.latency) for arm in self.arms)),
            ("ratio to dense, old", *(_ratio(arm.old) for arm in self.arms)),
            ("ratio to dense, new", *(_ratio(arm.new) for arm in self.arms)),
            ("file", *(_file(arm) for arm in self.arms)),
            ("peak memory", *(_step(mebibytes, arm.old.peak_bytes, arm.new.peak_bytes) for arm in self.arms)),
            (" / ".join(metrics) or "quality", *(f"{_quality(a.old)} → {_quality(a.new)}" for a in self.arms)),
        ]
        return tuple(row for row in table if any(cell not in (NONE, f"{NONE} → {NONE}") for cell in row[1:]))

    def markdown(self) -> str:
        """A GitHub table with its notes as a list below."""
        rows = [self.columns(), ("---", *("--:" for _ in self.arms)), *self.rows()]
        lines = ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows]
        return "\n".join([*lines, "", *(f"- {note}" for note in self.notes)])

    def to_dict(self) -> dict[str, Any]:
        return {"schema": SCHEMA, **asdict(self)}


def _step(text: Callable[[float | None], str], old: float | None, new: float | None) -> str:
    """Both, and by how much where both are known and look different."""
    shown = f"{text(old)} → {text(new)}"
    return shown if not old or new is None or text(old) == text(new) else f"{shown} ({new / old - 1:+.1%})"


def _file(arm: ArmChange) -> str:
    if arm.same_file:
        return f"{size(arm.new.size_bytes)}, the same"
    return _step(size, arm.old.size_bytes, arm.new.size_bytes)


def _ratio(side: Side) -> str:
    return ratio_text(side.against_dense) if side.against_dense else NONE


def _quality(side: Side) -> str:
    if side.quality is None:
        return NONE
    where = " (selection)" if side.split == "selection" else ""
    return f"{side.quality:.4f}{where}"
