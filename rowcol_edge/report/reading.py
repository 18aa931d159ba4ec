"""From profiles and their bundles to the figures of a report."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np

from ..device.bundle import Bundle
from ..device.manifest import PLAN_NAME, ArmEntry
from ..device.memory import STAGES as MARKS
from ..device.memory import Curve
from ..device.profile import TWICE, ArmProfile, Profile
from ..device.stats import MIN_SAMPLES, percentile
from ..device.system import counts
from ..errors import BundleError, NotComparableError
from . import apart
from .compare import paired
from .facts import environment_facts, protocol_facts
from .figures import (
    PEAK,
    SHARES,
    STAGES,
    TABLED,
    ArmFigures,
    Figures,
    LayerFigures,
    MemoryMark,
    MemoryVariant,
    ProfileFigures,
    Stage,
)
from .gate import bundle_beside, check_same_build, default_arm

_ORIGINAL = "dense@fp32"


def load(profiles: Sequence[Path], bundles: Sequence[Path] = ()) -> Figures:
    """Read profiles, each with the bundle of ``bundles`` that it measured, or the one in whose ``profiles/`` it lies.

    BundleError: no profile, or a file that is none or damaged. NotComparableError: one session twice, or no profile
    measured one of ``bundles``.
    """
    if not profiles:
        raise BundleError("report", expected="at least one profile", got="none")
    read = [(path, Profile.load(path)) for path in profiles]
    for (one, before), (other, after) in combinations(read, 2):
        if before == after:
            raise NotComparableError(f"{one} and {other}", expected="sessions that differ", got="the same one twice")
    for given in bundles:
        with Bundle.open(given, check=False) as bundle:
            if all(profile.digest != bundle.digest for _, profile in read):
                check_same_build(read[0][1], bundle)
    notes = apart.notes([(path.name, profile) for path, profile in read])
    return Figures(tuple(_profile(path, profile, bundles) for path, profile in read), tuple(notes))


def _profile(path: Path, profile: Profile, bundles: Sequence[Path]) -> ProfileFigures:
    beside = bundle_beside(path)
    for place in [*bundles, *([beside] if beside else [])]:
        with Bundle.open(place, check=False) as bundle:
            if bundle.digest == profile.digest:
                bundle.check()
                return _figures(path, profile, bundle)
            if place not in bundles:
                check_same_build(profile, bundle)
    return _figures(path, profile, None)


def _figures(path: Path, profile: Profile, bundle: Bundle | None) -> ProfileFigures:
    entries = {arm.name: arm for arm in bundle.manifest.arms} if bundle else {}
    default = default_arm(profile)
    if bundle and bundle.manifest.default_arm in profile.arms:
        default = bundle.manifest.default_arm
    arms = tuple(_arm(profile, name, entries.get(name), name == default) for name in profile.arms)
    shown = next(arm for arm in arms if arm.default)
    budget = profile.memory_budget
    return ProfileFigures(
        file=path.name,
        bundle=profile.bundle,
        digest=profile.digest,
        target=profile.target,
        runtime=f"{profile.runtime} {profile.runtime_version}",
        created=profile.created,
        evidence=profile.evidence,
        evidence_note=profile.evidence_note,
        default_arm=default,
        comparisons=tuple(dict.fromkeys(c for c in (shown.against_dense, shown.against_original) if c)),
        null=profile.null,
        memory_limit_bytes=budget.limit_bytes if budget else None,
        arms=arms,
        layers=_layers(bundle) if bundle else (),
        operators=profile.operators if counts(profile.evidence) else None,
        operators_note=profile.operators_note,
        environment=environment_facts(profile),
        protocol=protocol_facts(profile),
        warnings=profile.warnings,
    )


def _arm(profile: Profile, name: str, entry: ArmEntry | None, default: bool) -> ArmFigures:
    arm, real = profile.arms[name], counts(profile.evidence)
    latency, memory = arm.latency, arm.memory if real else None
    samples = np.concatenate([np.asarray(block.samples_ns, np.float64) for block in arm.blocks]) if arm.blocks else ()
    quality = entry.quality if entry else {}
    split = next((name for name in ("test", "selection") if name in quality), "")
    stated = quality.get(split, {})
    energy = arm.energy[0] if real and arm.energy else None
    over = _over_time(arm) if real else None
    variants = _variants(arm) if real else ()
    dense = f"dense@{name.partition('@')[2]}"
    return ArmFigures(
        arm=name,
        default=default,
        size_bytes=arm.artifact_bytes,
        median_ns=latency.median_ns if real else None,
        p90_ns=latency.p90_ns if real else None,
        p99_ns=latency.p99_ns if real else None,
        samples=latency.n,
        cold_start_ns=arm.cold.total_ns if real else None,
        peak_bytes=memory.peak_bytes if memory else None,
        own_bytes=memory.own_bytes if memory else None,
        activation_bytes=arm.activation_bytes,
        memory_verdict=profile.memory_budget.verdicts.get(name, "") if profile.memory_budget else "",
        metric=stated.get("metric", ""),
        split=split,
        quality=stated.get("value"),
        drop_pp=stated.get("drop_pp"),
        drop_low_pp=stated.get("ci_low_pp"),
        drop_high_pp=stated.get("ci_high_pp"),
        energy_joules=energy.joules if energy else None,
        energy_low_joules=energy.low if energy else None,
        energy_high_joules=energy.high if energy else None,
        energy_rail=energy.rail if energy else "",
        against_dense=paired(profile, name, dense) if dense in profile.arms else None,
        against_original=paired(profile, name, _ORIGINAL) if _ORIGINAL in profile.arms else None,
        curve=tuple((share, float(np.percentile(samples, share))) for share in SHARES) if real and len(samples) else (),
        percentiles=tuple(_percentile(samples, share) for share in TABLED) if real and len(samples) else (),
        stages=_stages(arm) if real else (),
        memory_curve=tuple(zip(over.times_ns, over.resident_bytes, strict=True)) if over else (),
        memory_marks=_marks(over) if over else (),
        memory_variants=variants,
        memory_null=next((variant.latency for variant in variants if variant.name == TWICE), None),
    )


def _percentile(samples: Any, share: int) -> float | None:
    return percentile(samples, share) if share in MIN_SAMPLES else float(np.percentile(samples, share))


def _stages(arm: ArmProfile) -> tuple[Stage, ...]:
    """Of the footprint where one was taken; else what the memory runs told, RSS alone."""
    if arm.footprints:
        found = arm.footprints[0]  # the runtime as the target has it
        stages = [(name, getattr(found, name)) for name in STAGES[:-1]]
        return (
            *(Stage(name, use.resident_bytes, use.proportional_bytes, use.private_bytes) for name, use in stages),
            Stage(PEAK, found.peak_bytes),
        )
    if arm.memory is None:
        return ()
    memory = arm.memory
    pairs = ("imported", memory.baseline_bytes), ("loaded", memory.after_load_bytes), ("peak", memory.peak_bytes)
    return tuple(Stage(name, value) for name, value in pairs)


def _variants(arm: ArmProfile) -> tuple[MemoryVariant, ...]:
    if not arm.footprints[1:]:
        return ()
    default, *others = arm.footprints
    variants = [MemoryVariant(each.variant, each.properties, *each.beyond(default), each.latency) for each in others]
    if default.latency:  # of an older profile, which has no memory of its null arm
        variants.append(MemoryVariant(TWICE, {}, None, None, None, default.latency))
    return tuple(variants)


def _over_time(arm: ArmProfile) -> Curve | None:
    """Of one process with the runtime as the target has it: the one of middle length."""
    runs = arm.footprints[0].runs if arm.footprints else ()
    curves = sorted((run.curve for run in runs if run.curve), key=lambda curve: curve.times_ns[-1])
    return curves[len(curves) // 2] if curves else None


def _marks(curve: Curve) -> tuple[MemoryMark, ...]:
    most = max(curve.resident_bytes)
    return (
        *(MemoryMark(name, at, curve.at(at)) for name, at in zip(MARKS, curve.marks_ns, strict=True)),
        MemoryMark(PEAK, curve.times_ns[curve.resident_bytes.index(most)], most),
    )


def _layers(bundle: Bundle) -> tuple[LayerFigures, ...]:
    if all(entry.path != PLAN_NAME for entry in bundle.manifest.files):
        return ()
    from ..factoring.plan import FactorPlan

    return tuple(
        LayerFigures(
            layer.name, layer.shape, layer.rank,
            layer.parameters_before, layer.parameters_after, layer.macs_before, layer.macs_after, layer.reason,
        )
        for layer in FactorPlan.read(bundle.root / PLAN_NAME).layers
    )  # fmt: skip
