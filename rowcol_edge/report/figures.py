"""What a report shows of profiles and their bundles: one record a profile, one an arm."""

from __future__ import annotations

import csv
import io
import json
from dataclasses import asdict, dataclass, fields
from typing import Any

from ..device import memory
from ..device.layer_times import Operators
from ..device.profile import Comparison

SCHEMA = 1
"""Version of the JSON that `Figures.to_dict` gives. History: 1 – first one."""

SHARES = (0, 1, 2, 5, 10, 20, 25, 30, 40, 50, 60, 70, 75, 80, 90, 95, 98, 99, 100)
"""Percentiles of the latency curve."""
TABLED = (10, 25, 50, 75, 90, 99)
"""Those that are also given as figures, where there are samples enough."""

PEAK = "peak"
STAGES = (*memory.STAGES, PEAK)
"""Points of a process' life at which its memory is told, in their order."""


@dataclass(frozen=True, slots=True)
class Stage:
    """Memory of a process at one point of its life, bytes; None where the system does not tell."""

    name: str
    resident_bytes: int | None
    proportional_bytes: int | None = None
    private_bytes: int | None = None


@dataclass(frozen=True, slots=True)
class MemoryMark:
    """RSS of a process at a time, in ns since it was started."""

    name: str
    time_ns: int
    resident_bytes: int


@dataclass(frozen=True, slots=True)
class MemoryVariant:
    """A setting of the runtime besides the target's, against the same arm without it.

    Bytes more, below zero where it takes less: at the peak, and RSS and private ones after many inferences; None where
    the system does not tell. ``latency`` is the paired ratio.
    """

    name: str
    properties: dict[str, str]
    peak_change_bytes: int | None
    resident_change_bytes: int | None
    private_change_bytes: int | None
    latency: Comparison | None


@dataclass(frozen=True, slots=True)
class ArmFigures:
    """One arm of one profile. Times, memory and energy are None where they are not the target's (an emulator's).

    ``against_dense`` is the paired ratio to the dense arm of the same precision, ``against_original`` to dense@fp32.
    ``quality``, ``drop_pp`` and its interval are the manifest's, on ``split``; None without a bundle.
    ``energy_joules`` is what an inference adds to the power at rest: the median over runs, beside the least and the
    most.
    ``curve`` holds (percent, ns) of all raw samples, ``percentiles`` those of TABLED. ``memory_curve`` holds (ns,
    bytes) of one process, of those of the footprint the one of middle length, and ``memory_marks`` its stages and its
    peak; empty without a footprint. ``memory_variants`` are of the runtime's settings that were tried, in the end
    ``default twice``, their null arm; ``memory_null`` is the latency of that.
    """

    arm: str
    default: bool
    size_bytes: int
    median_ns: float | None
    p90_ns: float | None
    p99_ns: float | None
    samples: int
    cold_start_ns: float | None
    peak_bytes: int | None
    own_bytes: int | None
    activation_bytes: int | None
    memory_verdict: str
    metric: str
    split: str
    quality: float | None
    drop_pp: float | None
    drop_low_pp: float | None
    drop_high_pp: float | None
    energy_joules: float | None
    energy_low_joules: float | None
    energy_high_joules: float | None
    energy_rail: str
    against_dense: Comparison | None
    against_original: Comparison | None
    curve: tuple[tuple[int, float], ...]
    percentiles: tuple[float | None, ...]
    stages: tuple[Stage, ...]
    memory_curve: tuple[tuple[int, int], ...] = ()
    memory_marks: tuple[MemoryMark, ...] = ()
    memory_variants: tuple[MemoryVariant, ...] = ()
    memory_null: Comparison | None = None

    def stage(self, name: str) -> Stage:
        """The memory at that stage; one of which nothing is known where it was not measured."""
        return next((stage for stage in self.stages if stage.name == name), Stage(name, None))


@dataclass(frozen=True, slots=True)
class LayerFigures:
    """One layer of the plan; counts are those of parameters and of multiply-accumulates a sample."""

    name: str
    form: str
    rank: int | None
    parameters_before: int
    parameters_after: int
    macs_before: int
    macs_after: int
    reason: str


@dataclass(frozen=True, slots=True)
class ProfileFigures:
    """One profile. ``comparisons`` are the headline: the default arm against dense at its precision and dense@fp32.
    ``operators`` is None where their times were not asked for, not the target's or not to be had: ``operators_note``.
    """

    file: str
    bundle: str
    digest: str
    target: str
    runtime: str
    created: str
    evidence: str
    evidence_note: str
    default_arm: str
    comparisons: tuple[Comparison, ...]
    null: Comparison
    memory_limit_bytes: int | None
    arms: tuple[ArmFigures, ...]
    layers: tuple[LayerFigures, ...]
    operators: Operators | None
    operators_note: str
    environment: dict[str, str]
    protocol: dict[str, str]
    warnings: tuple[str, ...]

    @property
    def default(self) -> ArmFigures:
        return next(arm for arm in self.arms if arm.default)

    @property
    def has_energy(self) -> bool:
        return any(arm.energy_joules is not None for arm in self.arms)

    @property
    def has_variants(self) -> bool:
        return any(arm.memory_variants for arm in self.arms)

    @property
    def stage_names(self) -> tuple[str, ...]:
        """Of all arms: one may have been measured at more stages than another."""
        found = {stage.name for arm in self.arms for stage in arm.stages}
        return tuple(name for name in STAGES if name in found)


@dataclass(frozen=True, slots=True)
class Figures:
    """All that a report shows. ``notes`` say which profiles' latencies must not stand side by side, and why."""

    profiles: tuple[ProfileFigures, ...]
    notes: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        return {"schema": SCHEMA, **asdict(self)}

    def json(self) -> str:
        return json.dumps(self.to_dict(), indent=1, ensure_ascii=False, allow_nan=False) + "\n"

    def csv(self) -> str:
        """One row an arm and profile, with columns for each setting of a runtime that was tried; an empty cell is not
        known."""
        table = io.StringIO()
        writer = csv.writer(table, lineterminator="\n")
        plain = [f.name for f in fields(ArmFigures) if f.name not in _NESTED]
        ratios = [f"{against}_{what}" for against in _AGAINST for what in _RATIO]
        shown = [arm for profile in self.profiles for arm in profile.arms]
        tried = list(dict.fromkeys(variant.name for arm in shown for variant in arm.memory_variants))
        settings = [f"{name.replace(' ', '_')}_{what}" for name in tried for what in (*_CHANGES, *_RATIO)]
        heading = ["target", "bundle", "runtime", "created", "evidence", *plain, *ratios, *settings]
        writer.writerow(map(_cell, heading))
        for profile in self.profiles:
            head = [profile.target, profile.bundle, profile.runtime, profile.created, profile.evidence]
            for arm in profile.arms:
                found = [getattr(arm, against) for against in _AGAINST]
                ratio = [getattr(each, what, None) for each in found for what in _RATIO]
                variants = {variant.name: variant for variant in arm.memory_variants}
                setting = [value for name in tried for value in _setting(variants.get(name))]
                writer.writerow(map(_cell, [*head, *(getattr(arm, name) for name in plain), *ratio, *setting]))
        return table.getvalue()


_AGAINST = ("against_dense", "against_original")
_RATIO = ("ratio", "ci_low", "ci_high", "verdict")
_CHANGES = ("peak_change_bytes", "resident_change_bytes", "private_change_bytes")
_NESTED = (
    *_AGAINST, "curve", "percentiles", "stages", "memory_curve", "memory_marks", "memory_variants", "memory_null"
)  # fmt: skip


def _setting(variant: MemoryVariant | None) -> list[Any]:
    """The cells of one setting; empty ones where the arm was not run with it."""
    latency = variant.latency if variant else None
    return [getattr(variant, what, None) for what in _CHANGES] + [getattr(latency, what, None) for what in _RATIO]


def _cell(value: Any) -> Any:
    """What a spreadsheet would take for a formula becomes text."""
    return f"'{value}" if isinstance(value, str) and value[:1] in ("=", "+", "-", "@", "\t", "\r") else value
