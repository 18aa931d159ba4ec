"""Before and after: two profiles of one target, each a session of its own, and what may be said of the change.

Within a session arms take turns, and their ratio is paired. Between two sessions nothing is: the machine may have
become warmer, busier or slower, and that is in neither of them. So the two must have been taken under the same
conditions, or they are refused; the interval is that of two independent samples of block medians; and a change counts
only beyond what files that are the same in both senses show: the null arm within each session, and arms whose file and
runtime did not change from one session to the other.

What a comparison is for, another build or another version of the runtime, may differ and is named.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Sequence
from dataclasses import replace
from pathlib import Path

from ..device.bundle import Bundle
from ..device.manifest import ArmEntry
from ..device.profile import Block, Comparison, Profile, conditions
from ..device.stats import MIN_ROUNDS, NO_DIFFERENCE, NOT_COMPARABLE, unpaired_interval
from ..device.system import counts
from ..device.table import ratio_text
from ..errors import ConfigError, NotComparableError, did_you_mean
from .change import ArmChange, Change, Session, Side
from .gate import bundle_beside, check_same_build, default_baseline

ALLOWED = ("bundle", "host", "usable cores", "threads", "settings", "power mode", "clocks held", "governor")
"""Conditions that may be what somebody wants to compare. No exception makes two targets, processors, runtimes,
instruction-set caps or kinds of evidence comparable."""

_SPLITS = ("test", "selection")
_BESIDE = ("kernel", "python", "numpy")
"""What of the machine's software is named where it differs, and no reason to refuse."""


def are_profiles(paths: Sequence[Path]) -> bool:
    """Whether two profiles are to be compared, and not bundles; ConfigError for anything in between."""
    found = [_is_profile(path) for path in paths]
    if not any(found):
        return False
    if found != [True, True]:
        got = f"{sum(found)} profile(s) and {len(found) - sum(found)} bundle(s)"
        raise ConfigError("compare", expected="two profiles, the older one first, or bundles only", got=got)
    return True


def compare(old: Path, new: Path, *, bundles: Sequence[Path] = (), allow: Collection[str] = ()) -> Change:
    """The change from one profile to another.

    Args:
        bundles: those that were measured, for quality; a profile in the ``profiles/`` of its bundle needs none.
        allow: conditions that differ on purpose, of ALLOWED.

    BundleError: no profile, or one of another schema version. ConfigError: an exception that does not exist.
    NotComparableError: every condition that differs, in one, and a session whose noise is not known; one session
    twice; no arm in both; a bundle that neither measured.
    """
    for name in allow:
        if name not in ALLOWED:
            expected, hint = f"one of {', '.join(ALLOWED)}", did_you_mean(name, ALLOWED)
            raise ConfigError("allow", expected=expected, got=repr(name), hint=hint)
    before, after = Profile.load(old), Profile.load(new)
    sides = f"{old} and {new}"
    if before == after:
        hint = "arms of one session are compared within it: rowcol-edge report"
        raise NotComparableError(sides, expected="two sessions", got="the same one twice", hint=hint)
    for place in bundles:
        with Bundle.open(place, check=False) as bundle:
            if bundle.digest != before.digest:
                check_same_build(after, bundle)
    entries = _entries(old, before, bundles), _entries(new, after, bundles)
    differing = _differences(before, after, *entries)
    _refuse(sides, before, after, {key: text for key, text in differing.items() if key not in allow})
    shared = [name for name in before.arms if name in after.arms]
    if not shared:
        got = f"{', '.join(before.arms) or 'none'} and {', '.join(after.arms) or 'none'}"
        raise NotComparableError(sides, expected="an arm that both measured", got=got)

    changed = (*_subjects(before, after), *(f"{key}: {text}" for key, text in differing.items()))
    measured = {name: _unpaired(name, before.arms[name].blocks, after.arms[name].blocks, after) for name in shared}
    same = {name: before.arms[name].sha256 == after.arms[name].sha256 for name in shared}
    # what else changed would be in the latency of a file that is the same
    checks = [name for name in shared if same[name] and not differing and _runtime(before) == _runtime(after)]
    within = max(_bound(before.null), _bound(after.null))
    noise = max([within, *(_bound(measured[name]) for name in checks)])
    arms = tuple(
        ArmChange(
            name,
            same[name],
            _side(before, name, entries[0]),
            _side(after, name, entries[1]),
            _judged(measured[name], within if name in checks else noise),
        )
        for name in shared
    )
    names = old.name, new.name
    notes = (*_notes(names, before, after, changed), *_about_noise(noise, arms, checks), *_left_out(before, after))
    return Change(_session(old, before), _session(new, after), changed, math.expm1(noise), arms, notes)


def _is_profile(path: Path) -> bool:
    return not path.is_dir() and (path.suffix == ".json" or (path.is_file() and path.suffix != ".zip"))


def _entries(path: Path, profile: Profile, bundles: Sequence[Path]) -> dict[str, ArmEntry]:
    """The arms of the bundle that was measured, by name; none where it is not at hand, as after another build."""
    beside = bundle_beside(path)
    for place in (*bundles, *([beside] if beside else [])):
        with Bundle.open(place, check=False) as bundle:
            if bundle.digest == profile.digest:
                return {arm.name: arm for arm in bundle.manifest.arms}
    return {}


def _runtime(profile: Profile) -> tuple[str, str]:
    return profile.runtime, profile.runtime_version


def _differences(
    old: Profile, new: Profile, old_arms: dict[str, ArmEntry], new_arms: dict[str, ArmEntry]
) -> dict[str, str]:
    """Conditions in which two sessions differ: key and both values. The runtime's version is not one of them."""
    left, right = (
        {
            "bundle": profile.bundle,
            "target": profile.target,
            **conditions(profile),
            "runtime": profile.runtime,
            "metric": ", ".join(dict.fromkeys(metric for arm in arms.values() if (metric := _stated(arm)[1]))),
        }
        for profile, arms in ((old, old_arms), (new, new_arms))
    )
    if not (left["metric"] and right["metric"]):
        del left["metric"]
    return {key: f"{left[key]} and {right[key]}" for key in left if left[key] != right[key]}


def _refuse(sides: str, old: Profile, new: Profile, differing: dict[str, str]) -> None:
    """NotComparableError with all that is in the way."""
    found = [f"{key}: {text}" for key, text in differing.items()]
    found += [f"{level} times, which are no latency" for level in {old.evidence, new.evidence} if not counts(level)]
    found += [
        f"null arm of the {which} one: {profile.null.reason or 'no interval'}, so that its noise is not known"
        for which, profile in (("old", old), ("new", new))
        if counts(profile.evidence) and profile.null.verdict == NOT_COMPARABLE
    ]
    if not found:
        return
    hint = "measure again under the same conditions"
    if all(key in ALLOWED for key in differing) and len(found) == len(differing):
        options = " ".join(f"--allow {key!r}" if " " in key else f"--allow {key}" for key in differing)
        hint += f"; or, where that is what you compare, {options}"
    raise NotComparableError(sides, expected="the same conditions", got="; ".join(found), hint=hint)


def _subjects(old: Profile, new: Profile) -> Iterable[str]:
    """What two sessions are compared for."""
    if old.digest != new.digest:
        yield f"build: {old.digest[:12]} and {new.digest[:12]}"
    if old.runtime_version != new.runtime_version:
        yield f"{old.runtime}: {old.runtime_version} and {new.runtime_version}"


def _unpaired(arm: str, old: Sequence[Block], new: Sequence[Block], profile: Profile) -> Comparison:
    names, evidence, fewest = (arm, f"{arm}, old"), profile.evidence, min(len(old), len(new))
    if fewest < MIN_ROUNDS:
        reason = f"{fewest} blocks, an interval needs {MIN_ROUNDS}"
        return Comparison(*names, None, None, None, NOT_COMPARABLE, evidence, fewest, reason)
    found = unpaired_interval([block.median_ns for block in new], [block.median_ns for block in old])
    return Comparison(*names, found.ratio, found.low, found.high, found.verdict, evidence, fewest)


def _bound(check: Comparison) -> float:
    """How far from 1, as a logarithm, a comparison of the same with the same may lie; 0 without an interval, as of an
    arm with too few blocks."""
    return max((abs(math.log(value)) for value in (check.ci_low, check.ci_high) if value), default=0.0)


def _judged(found: Comparison, bound: float) -> Comparison:
    if found.ratio is None or found.verdict == NO_DIFFERENCE or abs(math.log(found.ratio)) > bound:
        return found
    return replace(found, verdict=NO_DIFFERENCE, reason=f"no more than the noise of {math.expm1(bound):.1%}")


def _side(profile: Profile, name: str, entries: dict[str, ArmEntry]) -> Side:
    arm = profile.arms[name]
    split, metric, quality = _stated(entries[name]) if name in entries else ("", "", None)
    baseline = default_baseline(profile, name)
    own = next((c for c in profile.comparisons if (c.arm, c.baseline) == (name, baseline)), None)
    peak = arm.memory.peak_bytes if arm.memory else None
    return Side(arm.latency.median_ns, len(arm.blocks), arm.artifact_bytes, peak, metric, split, quality, own)


def _stated(arm: ArmEntry) -> tuple[str, str, float | None]:
    """Split, metric and quality by the manifest."""
    split = next((name for name in _SPLITS if name in arm.quality), "")
    found = arm.quality.get(split, {})
    return split, str(found.get("metric", "")), found.get("value")


def _session(path: Path, profile: Profile) -> Session:
    return Session(
        path.name, profile.bundle, profile.digest, profile.target, profile.runtime, profile.runtime_version,
        profile.created, profile.evidence, profile.null,
    )  # fmt: skip


def _notes(names: tuple[str, str], old: Profile, new: Profile, changed: Sequence[str]) -> Iterable[str]:
    """What has to be read beside the figures."""
    for what, name, profile in zip(("old", "new"), names, (old, new), strict=True):
        yield (
            f"{what}: {name}, measured {profile.created}, {profile.evidence}, {profile.runtime} "
            f"{profile.runtime_version}, build {profile.digest[:12]}; null arm ({profile.null.baseline} twice) "
            f"{ratio_text(profile.null)}"
        )
    if old.created > new.created:
        yield "the old one was measured after the new one: is that the order you mean?"
    yield "two sessions: what changed on the machine in between is in neither"
    if changed:
        at_once = ": the figures are of all of it at once" if len(changed) > 1 else ""
        yield f"what differs: {'; '.join(changed)}{at_once}"
    else:
        yield "the same build and runtime: what differs is the machine's"
    pairs = [(what, getattr(old.environment, what), getattr(new.environment, what)) for what in _BESIDE]
    if others := [f"{what} {one} and {other}" for what, one, other in pairs if one != other]:
        yield f"also another: {', '.join(others)}"


def _left_out(old: Profile, new: Profile) -> Iterable[str]:
    """Arms of one session alone, and what each session warned of."""
    for what, one, other in (("old", old, new), ("new", new, old)):
        if missing := [name for name in one.arms if name not in other.arms]:
            yield f"only in the {what} one: {', '.join(missing)}"
        yield from (f"{what}: {warning}" for warning in one.warnings)


def _about_noise(noise: float, arms: Sequence[ArmChange], checks: Sequence[str]) -> Iterable[str]:
    """What the arms that did not change say of the machine."""
    yield f"a change of latency up to {math.expm1(noise):.1%} counts as none: so much is shown by what did not change"
    moved = [arm for arm in arms if arm.arm in checks and arm.latency.verdict not in (NO_DIFFERENCE, NOT_COMPARABLE)]
    if moved:
        said = ", ".join(f"{arm.arm} {ratio_text(arm.latency)}" for arm in moved)
        yield f"the machine is not what it was: the same file under the same runtime: {said}"
    elif not checks:
        yield "no arm is the same file under the same runtime: nothing tells the change from one of the machine"
