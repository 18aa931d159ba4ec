"""Gates on a profile: limits that a pipeline holds a bundle's arm to, each with what was found.

A gate that cannot be judged is not one that holds: a ratio without an interval or no larger than what the null arm of
its session shows, memory that nobody measured or a drop that no manifest states ends as not comparable. The target's
own memory budget needs no asking: `profile` has judged it, or could not.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..budgets import Budgets
from ..device.bundle import Bundle
from ..device.manifest import MANIFEST_NAME, PROFILES_FOLDER, Manifest
from ..device.profile import NOT_MEASURED, ArmProfile, Profile
from ..device.stats import NO_DIFFERENCE, NOT_COMPARABLE
from ..device.table import times_count
from ..errors import BudgetError, BundleError, ConfigError, NotComparableError, did_you_mean

HELD, MISSED = "held", "missed"
"""Verdicts of a gate, beside NOT_COMPARABLE."""


@dataclass(frozen=True, slots=True)
class Limits:
    """What is asked; None where nothing is. Ratio: latency over the baseline's; drop in percentage points."""

    latency_ratio: float | None = None
    drop_pp: float | None = None
    size_bytes: float | None = None
    memory_bytes: float | None = None

    @classmethod
    def parse(
        cls,
        *,
        max_latency_ratio: float | None = None,
        max_drop: str | float | None = None,
        max_bytes: str | int | None = None,
        max_memory: str | int | None = None,
    ) -> Limits:
        """From the words of the command line (``0.5pp``, ``4MB``); ConfigError: none given, or one that is no limit."""
        if max_latency_ratio is not None and not (math.isfinite(max_latency_ratio) and max_latency_ratio > 0):
            got = str(max_latency_ratio)
            raise ConfigError("--max-latency-ratio", expected="a finite number above 0, e.g. 0.8", got=got)
        limits = cls(
            max_latency_ratio,
            _limit("--max-drop", "drop", max_drop),
            _limit("--max-bytes", "size", max_bytes),
            _limit("--max-memory", "size", max_memory),
        )
        if limits == cls():
            hint = "--max-latency-ratio, --max-drop, --max-bytes or --max-memory"
            raise ConfigError("gate", expected="at least one limit", got="none", hint=hint)
        return limits


@dataclass(frozen=True, slots=True)
class Gate:
    """One limit and what was found; ``got`` is None where that cannot be judged, and ``found`` says why."""

    what: str
    unit: str
    limit: float
    got: float | None
    expected: str
    found: str

    @property
    def verdict(self) -> str:
        if self.got is None:
            return NOT_COMPARABLE
        return HELD if self.got <= self.limit else MISSED

    @property
    def line(self) -> str:
        return f"{self.verdict}: {self.what}: expected {self.expected}, got {self.found}"


@dataclass(frozen=True, slots=True)
class GateReport:
    """All gates of one arm. ``evidence`` is the profile's."""

    bundle: str
    target: str
    arm: str
    baseline: str
    evidence: str
    gates: tuple[Gate, ...]

    @property
    def held(self) -> bool:
        return all(gate.verdict == HELD for gate in self.gates)

    def text(self) -> str:
        """One line a gate."""
        return "\n".join(gate.line for gate in self.gates)

    def to_dict(self) -> dict[str, Any]:
        gates = [{**asdict(gate), "verdict": gate.verdict} for gate in self.gates]
        return {**asdict(self), "held": self.held, "gates": gates}

    def raise_if_failed(self) -> None:
        """BudgetError where a gate was missed; else NotComparableError where one could not be judged."""
        for verdict, error in ((MISSED, BudgetError), (NOT_COMPARABLE, NotComparableError)):
            if names := [gate.what for gate in self.gates if gate.verdict == verdict]:
                of = f"{len(names)} of {len(self.gates)}"
                raise error(f"gates of {self.bundle} for {self.target}", expected="all held", got=f"{of} {verdict}")


def gate(
    path: Path, limits: Limits, *, arm: str | None = None, baseline: str | None = None, bundle: Path | None = None
) -> GateReport:
    """Judge one arm of a profile.

    Args:
        arm: by default the bundle's default one, see `judged_arm`.
        baseline: by default the dense arm of the same precision; without one, dense@fp32.
        bundle: states the default arm and the quality; by default the one in whose ``profiles/`` the profile lies.
            Only a drop needs it.

    BundleError: no profile, one of another schema version, an arm that it does not hold, or none named where the
    bundle's default one was not measured; no bundle, or a damaged one. NotComparableError: the profile measured another
    build than the bundle, as where that was built anew and not measured again.
    """
    profile = Profile.load(path)
    manifest = None
    if source := bundle or bundle_beside(path):
        with Bundle.open(source, check=False) as opened:  # nothing but the manifest is read, and its digest compared
            check_same_build(profile, opened)
            manifest = opened.manifest
    measured = find_arm(profile, arm or judged_arm(profile, manifest))
    baseline = baseline or default_baseline(profile, measured.name)
    gates = []
    if limits.latency_ratio is not None:
        gates.append(_latency(profile, measured.name, find_arm(profile, baseline).name, limits.latency_ratio))
    if limits.drop_pp is not None:
        gates.append(_drop(manifest, measured.name, limits.drop_pp))
    if limits.size_bytes is not None:
        got, limit = measured.artifact_bytes, limits.size_bytes
        gates.append(Gate(f"file of {measured.name}", "bytes", limit, got, f"at most {_bytes(limit)}", _bytes(got)))
    if limits.memory_bytes is not None:
        gates.append(_memory(profile, measured, limits.memory_bytes))
    budget = profile.memory_budget
    if budget and budget.verdicts.get(measured.name, NOT_MEASURED) != NOT_MEASURED:
        gates.append(_memory(profile, measured, budget.limit_bytes, of="the target's budget"))
    return GateReport(profile.bundle, profile.target, measured.name, baseline, profile.evidence, tuple(gates))


def find_arm(profile: Profile, name: str) -> ArmProfile:
    """BundleError, with the nearest names, for an arm that was not measured."""
    if name not in profile.arms:
        expected = f"one of {', '.join(profile.arms)}"
        raise BundleError("arm", expected=expected, got=repr(name), hint=did_you_mean(name, profile.arms))
    return profile.arms[name]


def judged_arm(profile: Profile, manifest: Manifest | None) -> str:
    """The default arm of the bundle that was measured; without that, what the profile shows of it (`default_arm`).

    BundleError: it was not measured.
    """
    default = manifest.default_arm if manifest else ""
    # several arms decide about memory only where the default one is not among them
    unknown = not default and profile.memory_budget and len(profile.memory_budget.decide) > 1
    if unknown or (default and default not in profile.arms):
        expected = f"the bundle's default one{f', {default}' if default else ''}"
        raise BundleError("arm", expected=expected, got="not measured", hint=f"--arm with {' or '.join(profile.arms)}")
    return default or default_arm(profile)


def default_arm(profile: Profile) -> str:
    """The arm that decides about memory, where one does; else the first, for arms stand as in their bundle.

    BundleError for a profile without arms.
    """
    if not profile.arms:
        raise BundleError(f"profile of {profile.bundle}", expected="at least one arm", got="none")
    decide = profile.memory_budget.decide if profile.memory_budget else ()
    return decide[0] if len(decide) == 1 and decide[0] in profile.arms else next(iter(profile.arms))


def default_baseline(profile: Profile, arm: str) -> str:
    """The dense arm of the same precision where it was measured; else, and for that arm itself, dense@fp32."""
    dense = f"dense@{arm.partition('@')[2]}"
    return dense if dense in profile.arms and dense != arm else "dense@fp32"


def bundle_beside(path: Path) -> Path | None:
    """The bundle in whose ``profiles/`` a profile lies."""
    folder = path.resolve().parent
    beside = folder.name == PROFILES_FOLDER and (folder.parent / MANIFEST_NAME).is_file()
    return folder.parent if beside else None


def check_same_build(profile: Profile, bundle: Bundle) -> None:
    """NotComparableError where the profile is not of exactly this build."""
    if profile.digest != bundle.digest:
        raise NotComparableError(
            f"profile of {profile.bundle} and bundle {bundle.source}",
            expected="the same build",
            got=f"digests {profile.digest[:12]}… and {bundle.digest[:12]}…",
            hint="profile this build, or name the bundle that was measured",
        )


def _limit(option: str, kind: str, given: str | float | None) -> float | None:
    """A number with its unit, read as in a budget."""
    if given is None:
        return None
    unit = "B" if kind == "size" and str(given)[-1:].isdigit() else ""
    try:
        (entry,) = Budgets.parse(f"{kind}<={given}{unit}").entries
    except (ConfigError, ValueError) as e:
        example = "a number of percentage points, e.g. 0.5pp" if kind == "drop" else "a size above 0, e.g. 4MB or 64MiB"
        raise ConfigError(option, expected=example, got=repr(given)) from e
    return entry.limit


def _latency(profile: Profile, arm: str, baseline: str, limit: float) -> Gate:
    what = f"latency of {arm} over {baseline} ({profile.evidence})"
    expected = f"an interval that ends at {limit:g} or below"
    try:
        found = profile.comparison(arm, baseline)
    except NotComparableError as e:
        return Gate(what, "ratio", limit, None, expected, f"{e.got} – {e.hint}" if e.hint else e.got)
    if found.ratio is None or found.ci_low is None or found.ci_high is None:
        return Gate(what, "ratio", limit, None, expected, "no interval")
    text = f"{found.ratio:.4f} [{found.ci_low:.4f}, {found.ci_high:.4f}]"
    # a disturbed session shows differences that are not there, and hides some that are
    disturbed = found.verdict == NO_DIFFERENCE and profile.null.verdict not in (NO_DIFFERENCE, NOT_COMPARABLE)
    if reason := found.reason or ("in a session whose null arm shows a difference" if disturbed else ""):
        return Gate(what, "ratio", limit, None, expected, f"{text}, {reason}")
    return Gate(what, "ratio", limit, found.ci_high, expected, text)


def _drop(manifest: Manifest | None, arm: str, limit: float) -> Gate:
    what, expected = f"drop of {arm} from the original, test split", f"an estimate of at most {limit:g} pp"
    if manifest is None:
        return Gate(what, "pp", limit, None, expected, "no bundle that states it – name it with --bundle")
    test = manifest.arm(arm).quality.get("test", {})
    drop, low, high = (test.get(key) for key in ("drop_pp", "ci_low_pp", "ci_high_pp"))
    if drop is None:
        return Gate(what, "pp", limit, None, expected, "none stated in the manifest – build with --test")
    interval = "" if low is None or high is None else f" [{low:+.3f}, {high:+.3f}]"
    return Gate(what, "pp", limit, drop, expected, f"{drop:+.3f} pp{interval} of {test['metric']}, n = {test['n']}")


def _memory(profile: Profile, arm: ArmProfile, limit: float, of: str = "") -> Gate:
    what = f"peak memory of {arm.name} ({profile.evidence})"
    expected = f"at most {_mebibytes(limit)}{f', {of}' if of else ''}"
    if not times_count(profile):
        return Gate(what, "bytes", limit, None, expected, f"{profile.evidence} memory, which is not the target's")
    if arm.memory is None:
        return Gate(what, "bytes", limit, None, expected, "no measurement")
    return Gate(what, "bytes", limit, arm.memory.peak_bytes, expected, _mebibytes(arm.memory.peak_bytes))


# finer than tables have it: what misses a limit by little has to look different from it
def _bytes(count: float) -> str:
    return f"{count:,.0f} bytes"


def _mebibytes(count: float) -> str:
    return f"{count / (1 << 20):,.2f} MiB"
