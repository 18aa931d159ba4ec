"""Dense against factored over bundles: size and quality from the manifests, time and memory from their profiles.

Only arms measured in one session are set against each other here, by that session's paired interval. Two sessions of
one target, as before and after an upgrade, are another question with a weaker answer: `rowcol_edge.report.sessions`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from ..device.bundle import Bundle
from ..device.manifest import PROFILES_FOLDER, RUN, ArmEntry
from ..device.profile import OVER, Comparison, Profile, settings_text
from ..device.stats import NOT_COMPARABLE
from ..device.system import EVIDENCE, TARGET
from ..device.table import NONE, joules, mebibytes, milliseconds, ratio_text, size, times_count
from ..errors import BundleError, NotComparableError
from . import apart

_SPLITS = ("test", "selection")
_ORIGINAL = "dense@fp32"


@dataclass(frozen=True, slots=True)
class Row:
    """One arm of one bundle. Times, memory and ratios are None without a profile; ``split`` says which quality it is.

    ``checked`` is the manifest's word on how the arm was checked; a measurement on the target itself stands above it.
    ``over_memory``: the peak is more than the target grants. ``energy_joules`` is what an inference adds on
    ``energy_rail``, the profile's first.
    ``against_dense`` is the ratio to the dense arm of the same precision, ``against_original`` that to dense@fp32.
    """

    target: str
    bundle: str
    arm: str
    parameters: int
    size_bytes: int
    metric: str
    split: str
    quality: float | None
    drop_pp: float | None
    drop_ci_pp: tuple[float, float] | None
    latency_ns: float | None
    against_dense: Comparison | None
    against_original: Comparison | None
    cold_start_ns: float | None
    peak_bytes: int | None
    evidence: str
    checked: str = RUN
    over_memory: bool = False
    energy_joules: float | None = None
    energy_rail: str = ""


@dataclass(frozen=True, slots=True)
class ComparisonTable:
    """The rows, in the order of the bundles and their arms, and what has to be read beside them."""

    arms: tuple[Row, ...]
    notes: tuple[str, ...]

    def columns(self) -> tuple[str, ...]:
        metrics = dict.fromkeys(row.metric for row in self.arms if row.metric)
        return (
            "target",
            "bundle",
            "arm",
            "parameters",
            "size",
            " / ".join(metrics) or "quality",
            "drop, 95 %",
            "latency",
            "ratio to dense, same precision",
            f"ratio to {_ORIGINAL}",
            "cold start",
            "peak memory",
            "evidence",
            *(["energy, rail"] if self._has_energy else []),
            *(["checked"] if self._has_unrun else []),
        )

    def rows(self) -> tuple[tuple[str, ...], ...]:
        return tuple(
            _cells(row)
            + ((f"{joules(row.energy_joules)} {row.energy_rail}".rstrip(),) if self._has_energy else ())
            + ((row.checked,) if self._has_unrun else ())
            for row in self.arms
        )

    @property
    def _has_energy(self) -> bool:
        return any(row.energy_joules is not None for row in self.arms)

    @property
    def _has_unrun(self) -> bool:
        """Whether an arm never ran on what it is for: then how each was checked is shown."""
        return any(row.checked != RUN for row in self.arms)

    def markdown(self) -> str:
        """A GitHub table with its notes as a list below."""
        columns = self.columns()
        lines = [_pipes(columns), "|---|---|---|" + "--:|" * (len(columns) - 3), *(_pipes(row) for row in self.rows())]
        if self.notes:
            lines += ["", *(f"- {note}" for note in self.notes)]
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def compare(bundles: Sequence[Bundle]) -> ComparisonTable:
    """One table over bundles of the same task.

    NotComparableError: a bundle holds no dense or no factored arm, or the bundles were judged by different metrics.
    BundleError: no bundle.
    """
    if not bundles:
        raise BundleError("compare", expected="at least one bundle", got="none")
    for bundle in bundles:
        _check_arms(bundle)
    _check_same_task(bundles)
    rows: list[Row] = []
    notes: list[str] = []
    found: list[tuple[Bundle, Profile]] = []
    for bundle in bundles:
        profile, about = best_profile(bundle)
        notes += about
        rows += [_row(bundle, arm, profile) for arm in bundle.manifest.arms]
        notes += [
            f"{bundle.source}: {arm.name} keeps {', '.join(arm.kept_float)} in float"
            for arm in bundle.manifest.arms
            if arm.kept_float
        ]
        if profile is None:
            notes.append(f"{bundle.source} has no profile of this build: rowcol-edge profile {bundle.source}")
        else:
            notes += _profile_notes(bundle, profile)
            found.append((bundle, profile))
    notes += apart.notes([(str(bundle.source), profile) for bundle, profile in found])
    return ComparisonTable(tuple(rows), tuple(dict.fromkeys(notes)))


def best_profile(bundle: Bundle) -> tuple[Profile | None, list[str]]:
    """Of the profiles of exactly this build the newest of the strongest evidence, and why others were left out.

    One with the target's threads, and of those one of more arms, stands before a newer one.
    """
    notes = []
    matching: dict[str, Profile] = {}
    for path in sorted((bundle.root / PROFILES_FOLDER).glob("*.json")):
        try:
            profile = Profile.load(path)
        except BundleError as e:
            notes.append(f"{bundle.source}: {path.name} left out, {e}")
            continue
        if profile.digest == bundle.digest:
            matching[path.name] = profile
        else:
            notes.append(f"{bundle.source}: {path.name} left out, it measured another build")
    if not matching:
        return None, notes
    best = max(matching.values(), key=lambda one: (-EVIDENCE.index(one.evidence), *_whole(bundle, one), one.created))
    for name, profile in matching.items():
        if profile.evidence == best.evidence and profile.created > best.created:
            what = f"{len(profile.arms)} of {len(bundle.manifest.arms)} arms, {profile.threads} thread(s)"
            notes.append(f"{bundle.source}: {name} left out, newer but with {what}")
    return best, notes


def _whole(bundle: Bundle, profile: Profile) -> tuple[bool, int]:
    """Whether it has the target's threads, as far as the machine has cores; and how many arms."""
    wanted = bundle.manifest.runtime.threads
    return not wanted or profile.threads == min(wanted, profile.environment.cores_usable), len(profile.arms)


def _check_arms(bundle: Bundle) -> None:
    names = ", ".join(arm.name for arm in bundle.manifest.arms)
    for variant in ("dense", "factored"):
        if not any(arm.variant == variant for arm in bundle.manifest.arms):
            hint = "build without --no-dense" if variant == "dense" else "build it with the factored model"
            raise NotComparableError(str(bundle.source), expected=f"a {variant} arm", got=f"only {names}", hint=hint)


def _check_same_task(bundles: Sequence[Bundle]) -> None:
    first = bundles[0]
    for other in bundles[1:]:
        for what in ("contract", "metric"):
            left, right = getattr(first.manifest, what), getattr(other.manifest, what)
            if left != right:
                raise NotComparableError(
                    f"{what} of {first.source} and {other.source}",
                    expected="the same",
                    got=f"{left} and {right}",
                    hint="compare them one by one",
                )


def _row(bundle: Bundle, arm: ArmEntry, profile: Profile | None) -> Row:
    split = next((name for name in _SPLITS if name in arm.quality), "")
    quality = arm.quality.get(split, {})
    bounds = quality.get("ci_low_pp"), quality.get("ci_high_pp")
    measured = profile.arms.get(arm.name) if profile else None
    shown = measured if profile is not None and times_count(profile) else None
    energy = shown.energy[0] if shown and shown.energy else None
    budget = profile.memory_budget if profile else None
    dense = next((a.name for a in bundle.manifest.arms if (a.variant, a.precision) == ("dense", arm.precision)), "")
    return Row(
        target=str(bundle.manifest.target.get("name", "")),
        bundle=bundle.source.name or bundle.root.name,
        arm=arm.name,
        parameters=arm.parameters,
        size_bytes=arm.size_bytes,
        metric=str(quality.get("metric") or bundle.manifest.metric or ""),
        split=split,
        quality=quality.get("value"),
        drop_pp=quality.get("drop_pp"),
        drop_ci_pp=bounds if None not in bounds else None,
        latency_ns=shown.latency.median_ns if shown else None,
        against_dense=paired(profile, arm.name, dense),
        against_original=paired(profile, arm.name, _ORIGINAL),
        cold_start_ns=shown.cold.total_ns if shown else None,
        peak_bytes=shown.memory.peak_bytes if shown and shown.memory else None,
        evidence=profile.evidence if profile and measured else "",
        checked=RUN if profile and measured and profile.evidence == TARGET else arm.checked,
        over_memory=bool(budget and budget.verdicts.get(arm.name) == OVER),
        energy_joules=energy.joules if energy else None,
        energy_rail=energy.rail if energy else "",
    )


def paired(profile: Profile | None, arm: str, baseline: str) -> Comparison | None:
    """The comparison of two arms; one that says why not where there is a profile without it."""
    if profile is None or arm == baseline:
        return None
    for found in profile.comparisons:
        if (found.arm, found.baseline) == (arm, baseline):
            return found
    reason = f"{baseline} was not measured with it" if baseline else "no dense arm of this precision"
    return Comparison(arm, baseline, None, None, None, NOT_COMPARABLE, profile.evidence, 0, reason)


def _profile_notes(bundle: Bundle, profile: Profile) -> list[str]:
    null = f"null arm ({profile.null.baseline} twice) {ratio_text(profile.null)}"
    runtime = f"{profile.runtime} {profile.runtime_version}, {profile.threads or 'default'} thread(s)"
    if settings := settings_text(profile):
        runtime += f", {settings}"
    head = (
        f"{bundle.source}, measured {profile.created}: {profile.evidence}, {profile.evidence_note}; {runtime}; {null}"
    )
    return [head, *(f"{bundle.source}: {warning}" for warning in profile.warnings)]


def _cells(row: Row) -> tuple[str, ...]:
    quality = NONE if row.quality is None else f"{row.quality:.4f}"
    drop = NONE if row.drop_pp is None else f"{row.drop_pp:+.2f} pp"
    if row.drop_ci_pp is not None:
        drop += f" [{row.drop_ci_pp[0]:+.2f}, {row.drop_ci_pp[1]:+.2f}]"
    return (
        row.target,
        row.bundle,
        row.arm,
        f"{row.parameters:,}",
        size(row.size_bytes),
        f"{quality} ({row.split})" if row.split == "selection" else quality,
        drop,
        milliseconds(row.latency_ns),
        ratio_text(row.against_dense) if row.against_dense else NONE,
        ratio_text(row.against_original) if row.against_original else NONE,
        milliseconds(row.cold_start_ns),
        mebibytes(row.peak_bytes) + (", over the target's budget" if row.over_memory else ""),
        row.evidence or NONE,
    )


def _pipes(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
