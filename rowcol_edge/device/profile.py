"""What a profile holds: plain frozen records, their JSON, and which two of them may be set side by side."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from math import isfinite
from pathlib import Path
from typing import Any

from ..errors import BudgetError, BundleError, NotComparableError
from .fields import parse_json
from .layer_times import LAYER_VERDICTS, LayerComparison, Operators
from .memory import STAGES, Curve, Usage
from .records import decode
from .stats import NOT_COMPARABLE, VERDICTS, median
from .system import EVIDENCE, Environment, Readings

SCHEMA = 4
"""Version of the profile's format. History:

1 – first one: every raw sample of every block, memory runs, comparisons, the null arm, environment and evidence.
2 – the runtime's settings (``properties``), which decide for instance in which precision openvino calculates.
3 – the machine's rails, power mode and held clocks, what it read after the measurement, energy of an inference by rail,
    the verdict on the target's memory budget, memory at each stage and by the runtime's settings (``footprints``).
4 – memory of the footprint's processes over time (``curve``); the time of operators, by layer, and the machine's peaks
    (``operators``, ``operators_note``). Version 3 is read as one without them.
"""
READABLE = (3, SCHEMA)

_SINCE = {4: {"operators": None, "operators_note": "the profile is older than that"}}
"""By schema, the keys that came with it, as they are in what is older."""

_MIB = 1 << 20
_LIMIT_BYTES = 256 * _MIB
"""A profile of a dozen arms with all its samples has some megabytes."""

NULL = "null"
"""Name of the null arm: the same file as its baseline, in processes of its own."""
TWICE = "default twice"
"""Of the runtime's settings the null arm: further processes without any."""
NOT_ASKED = "not asked for"
"""Why something was not measured that takes time of its own."""


@dataclass(frozen=True, slots=True)
class Block:
    """One timed process of an arm: ``round`` and ``position`` in it count from 0; times in ns, see :mod:`.worker`."""

    round: int
    position: int
    import_ns: int
    load_ns: int
    first_ns: int
    settled: bool
    warmups_ns: tuple[int, ...]
    samples_ns: tuple[int, ...]

    @property
    def median_ns(self) -> float:
        return median(self.samples_ns)


@dataclass(frozen=True, slots=True)
class Latency:
    """One inference, over the ``n`` samples of all blocks. A percentile that needs more samples than that is None."""

    median_ns: float
    p90_ns: float | None
    p99_ns: float | None
    n: int


@dataclass(frozen=True, slots=True)
class ColdStart:
    """From a started interpreter to the first result, medians over the blocks; the raw times are in the blocks."""

    import_ns: float
    load_ns: float
    first_ns: float

    @property
    def total_ns(self) -> float:
        return self.import_ns + self.load_ns + self.first_ns


@dataclass(frozen=True, slots=True)
class MemoryReading:
    """One memory run, see :class:`.worker.MemoryRun`."""

    baseline_bytes: int
    after_load_bytes: int
    peak_bytes: int
    peak_reset: bool


@dataclass(frozen=True, slots=True)
class Memory:
    """Medians over ``runs``. ``peak_bytes`` is of the whole process, the runtime included."""

    baseline_bytes: int
    after_load_bytes: int
    peak_bytes: int
    runs: tuple[MemoryReading, ...]

    @property
    def own_bytes(self) -> int:
        """What the model adds to a process that has the runtime imported, at the peak."""
        return self.peak_bytes - self.baseline_bytes


@dataclass(frozen=True, slots=True)
class Comparison:
    """Latency of ``arm`` over that of ``baseline``, paired by round; ratio and bounds are None where the verdict is
    ``not comparable``.

    ``reason`` says why a verdict is not the one that the interval alone would give.
    """

    arm: str
    baseline: str
    ratio: float | None
    ci_low: float | None
    ci_high: float | None
    verdict: str
    evidence: str
    rounds: int
    reason: str = ""


@dataclass(frozen=True, slots=True)
class FootprintReading:
    """One footprint run, see :class:`.worker.FootprintRun`; ``median_ns`` is that of its inferences.

    ``curve`` is None where the system does not tell, and in older profiles.
    """

    imported: Usage
    loaded: Usage
    first: Usage
    steady: Usage
    load_peak_bytes: int | None
    run_peak_bytes: int | None
    inferences: int
    median_ns: float
    curve: Curve | None = None

    @property
    def peak_bytes(self) -> int | None:
        """The most at any time, RSS."""
        return _most(self.load_peak_bytes, self.run_peak_bytes)


@dataclass(frozen=True, slots=True)
class Footprint:
    """Memory of a process that runs an arm, at each stage: medians over ``runs``, one a round.

    ``variant`` is ``default``, the name of the ``properties`` that were set besides the target's, or TWICE. ``latency``
    is that with them over that of the default; of the default None, in older profiles that of the null arm, which has
    no entry of its own there.
    """

    variant: str
    properties: dict[str, str]
    imported: Usage
    loaded: Usage
    first: Usage
    steady: Usage
    load_peak_bytes: int | None
    run_peak_bytes: int | None
    latency: Comparison | None
    runs: tuple[FootprintReading, ...]

    @property
    def peak_bytes(self) -> int | None:
        """The most at any time, RSS."""
        return _most(self.load_peak_bytes, self.run_peak_bytes)

    def beyond(self, default: Footprint) -> tuple[int | None, int | None, int | None]:
        """Bytes beyond those of ``default``, below zero where it takes less: at the peak; and of many inferences, RSS
        and private ones. Medians over rounds, each process against the default's of its round: private bytes rise by
        all of a runtime's libraries when another process that has them ends."""
        pairs = list(zip(self.runs, default.runs, strict=False))
        return (
            _median_change([(a.peak_bytes, b.peak_bytes) for a, b in pairs]),
            _median_change([(a.steady.resident_bytes, b.steady.resident_bytes) for a, b in pairs]),
            _median_change([(a.steady.private_bytes, b.steady.private_bytes) for a, b in pairs]),
        )

    @property
    def running_bytes(self) -> int | None:
        """What inferences take at their peak beyond the loaded model, RSS: activations, and what a runtime keeps."""
        peak, loaded = self.run_peak_bytes, self.loaded.resident_bytes
        return None if peak is None or loaded is None else peak - loaded


WITHIN, OVER, NOT_MEASURED = "within", "over", "not measured"


@dataclass(frozen=True, slots=True)
class MemoryBudget:
    """The memory that the target grants the process, and whether the peak of each arm keeps to it: WITHIN, OVER or
    NOT_MEASURED.

    The arms that ``decide`` are the bundle's default one, or all where that was not measured: a dense arm is there to
    be compared with, and may well be too large for the board.
    """

    limit_bytes: int
    verdicts: dict[str, str]
    decide: tuple[str, ...]

    @property
    def over(self) -> tuple[str, ...]:
        """The arms that do not fit, of those that decide."""
        return tuple(name for name in self.decide if self.verdicts[name] == OVER)


@dataclass(frozen=True, slots=True)
class EnergyReading:
    """One energy run, see :class:`.worker.EnergyRun`: mean power of one rail at rest and at work, each for
    ``seconds``."""

    inferences: int
    seconds: float
    idle_watts: float
    watts: float
    samples: int

    @property
    def joules(self) -> float:
        """What one inference adds; below zero where noise is larger than that."""
        return (self.watts - self.idle_watts) * self.seconds / self.inferences


@dataclass(frozen=True, slots=True)
class RailEnergy:
    """Energy of one inference on one rail, idle power subtracted: the median over ``runs``, the least and the most."""

    rail: str
    source: str
    joules: float
    low: float
    high: float
    runs: tuple[EnergyReading, ...]


@dataclass(frozen=True, slots=True)
class ArmProfile:
    """One arm: ``artifact_bytes`` is its file on disk, ``memory`` is None where the system does not tell.

    ``footprints`` are the default and the variants of the runtime's settings; ``energy`` is by rail, the rail that
    stands for the most first. Both are empty where they were not measured. ``activation_bytes`` is the manifest's: what
    activations take by the graph.
    """

    name: str
    artifact: str
    sha256: str
    artifact_bytes: int
    latency: Latency
    cold: ColdStart
    memory: Memory | None
    activation_bytes: int | None
    footprints: tuple[Footprint, ...]
    energy: tuple[RailEnergy, ...]
    blocks: tuple[Block, ...]


@dataclass(frozen=True, slots=True)
class Protocol:
    """How it was measured; ``order`` holds the arms of each round as they ran (the null arm by the name ``null``)."""

    rounds: int
    order: tuple[tuple[str, ...], ...]
    confidence: float
    resamples: int
    seed: int
    run_seconds: float
    warmup_seconds: float
    budget_seconds: float
    elapsed_seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Profile:
    """What one session found. ``null_arm`` is a second copy of ``null.baseline``; ``caps`` were set for the workers,
    ``properties`` for the runtime. ``after`` is what the machine said when all was measured; ``memory_budget``
    is None where the target states none; ``energy_note`` and ``operators_note`` say why no energy, or no time of
    operators, was measured, and are empty where it was.
    """

    schema: int = SCHEMA
    bundle: str
    digest: str
    target: str
    runtime: str
    runtime_version: str
    threads: int
    properties: dict[str, str]
    created: str
    evidence: str
    evidence_note: str
    caps: dict[str, str]
    environment: Environment
    after: Readings
    protocol: Protocol
    arms: dict[str, ArmProfile]
    comparisons: tuple[Comparison, ...]
    null: Comparison
    null_arm: ArmProfile
    memory_budget: MemoryBudget | None
    energy_note: str
    operators: Operators | None
    operators_note: str
    warnings: tuple[str, ...]

    def comparison(self, arm: str, baseline: str) -> Comparison:
        """The ratio of two arms of this profile; NotComparableError if they were not compared or must not be."""
        for found in self.comparisons:
            if (found.arm, found.baseline) == (arm, baseline):
                if found.verdict == NOT_COMPARABLE:
                    raise NotComparableError(
                        f"{arm} against {baseline}", expected="a valid paired measurement", got=found.reason
                    )
                return found
        pairs = ", ".join(f"{c.arm} against {c.baseline}" for c in self.comparisons) or "none"
        hint = "profile again with that baseline"
        raise NotComparableError(
            f"{arm} against {baseline}", expected=f"a measured pair ({pairs})", got="not measured", hint=hint
        )

    def raise_if_over_budget(self) -> None:
        """BudgetError names the arms that decide and take more memory than the target grants."""
        budget = self.memory_budget
        if budget is None or not budget.over:
            return
        peaks = [(name, memory.peak_bytes) for name in budget.over if (memory := self.arms[name].memory)]
        raise BudgetError(
            f"memory on {self.target} ({self.evidence})",
            expected=f"a peak of at most {budget.limit_bytes / _MIB:.0f} MiB",
            got=", ".join(f"{name} {peak / _MIB:.0f} MiB" for name, peak in peaks),
            hint="profile --memory says what the runtime's settings save; or build with a smaller budget of parameters",
        )

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def to_json(self) -> str:
        """Readable, but the raw samples of a block on one line each."""
        return _compact(self.to_dict()) + "\n"

    @classmethod
    def from_json(cls, text: str | bytes, where: str = "profile") -> Profile:
        return cls.from_dict(parse_json(text, where), where)

    @classmethod
    def load(cls, path: Path) -> Profile:
        try:
            with path.open("rb") as stream:
                data = stream.read(_LIMIT_BYTES + 1)
        except OSError as e:
            raise BundleError(str(path), expected="a readable profile", got=e.strerror or str(e)) from e
        if len(data) > _LIMIT_BYTES:
            raise BundleError(str(path), expected=f"a profile of at most {_LIMIT_BYTES >> 20} MiB", got="more")
        return cls.from_json(data, path.name)

    @classmethod
    def from_dict(cls, values: object, where: str = "profile") -> Profile:
        """Strict: BundleError names the first key that is unknown, missing or of the wrong kind, or the first record
        that does not agree with the others: an arm or a layer that nobody measured, a ratio without its interval."""
        # before anything else, so that another format is refused by its version and not by some key
        schema = values.get("schema") if isinstance(values, Mapping) else None
        if not isinstance(values, Mapping) or schema not in READABLE:
            hint = "measure again with this version"
            expected = " or ".join(map(str, READABLE))
            raise BundleError(f"{where}.schema", expected=expected, got=repr(schema), hint=hint)
        added = {key: value for since, keys in _SINCE.items() if since > schema for key, value in keys.items()}
        profile = decode(cls, {**values, **added, "schema": SCHEMA}, where)
        for arm in (*profile.arms.values(), profile.null_arm):
            _check_arm(arm, f"{where}: arm {arm.name}")
        for level in (profile.evidence, profile.null.evidence, *(c.evidence for c in profile.comparisons)):
            if level not in EVIDENCE:
                raise BundleError(f"{where}: evidence", expected=f"one of {', '.join(EVIDENCE)}", got=repr(level))
        for comparison in (profile.null, *profile.comparisons):
            _check_comparison(comparison, where)
        if profile.memory_budget:
            _check_budget(profile.memory_budget, profile.arms, where)
        if profile.operators:
            _check_operators(profile.operators, profile.arms, where)
        return profile


def _most(*peaks: int | None) -> int | None:
    """None where one of them is not known."""
    return None if None in peaks else max(filter(None, peaks), default=0)


def _median_change(pairs: Sequence[tuple[int | None, int | None]]) -> int | None:
    """None where one of them is not known, or there are none."""
    changes = [a - b for a, b in pairs if a is not None and b is not None]
    return int(median(changes)) if changes and len(changes) == len(pairs) else None


def _check_arm(arm: ArmProfile, where: str) -> None:
    for block in arm.blocks:
        if min(block.samples_ns, default=0) <= 0:
            raise BundleError(f"{where}, block {block.round}", expected="times above 0", got="none, or another value")
    if not isfinite(arm.cold.total_ns):
        raise BundleError(f"{where}: cold", expected="times whose sum is a finite number", got=str(arm.cold.total_ns))
    for found in arm.footprints:
        if found.latency is not None:
            _check_comparison(found.latency, f"{where}, footprint {found.variant}")
        for curve in (reading.curve for reading in found.runs):
            if curve is not None:
                _check_curve(curve, where)


def _check_comparison(found: Comparison, where: str) -> None:
    if found.verdict not in VERDICTS:
        expected = f"one of {', '.join(VERDICTS)}"
        raise BundleError(f"{where}: verdict", expected=expected, got=repr(found.verdict))
    _check_interval(found, f"{where}: ratio of {found.arm}")


def _check_interval(found: Comparison | LayerComparison, where: str) -> None:
    values = found.ratio, found.ci_low, found.ci_high
    if values == (None, None, None):
        return
    if any(value is None or value <= 0 for value in values):
        raise BundleError(where, expected="numbers above 0, all three or none", got=", ".join(map(str, values)))


def _check_budget(budget: MemoryBudget, arms: Collection[str], where: str) -> None:
    for key, names, known in (("verdicts", budget.verdicts, arms), ("decide", budget.decide, budget.verdicts)):
        if unknown := [name for name in names if name not in known]:
            expected = f"arms out of {', '.join(known) or 'none'}"
            raise BundleError(f"{where}: memory_budget.{key}", expected=expected, got=", ".join(map(repr, unknown)))


def _check_operators(found: Operators, arms: Collection[str], where: str) -> None:
    for name, arm in found.arms.items():
        if name not in arms:
            raise BundleError(f"{where}: operators", expected=f"arms out of {', '.join(arms)}", got=repr(name))
        for layer in arm.layers:
            if not layer.rounds_ns:
                what = f"{where}: layer {layer.layer} of {name}"
                raise BundleError(what, expected="a time of each process", got="none")
    layers = {name: {layer.layer for layer in arm.layers} for name, arm in found.arms.items()}
    for each in found.comparisons:
        if each.verdict not in LAYER_VERDICTS:
            expected = f"one of {', '.join(LAYER_VERDICTS)}"
            raise BundleError(f"{where}: verdict on {each.layer}", expected=expected, got=repr(each.verdict))
        _check_interval(each, f"{where}: ratio of {each.layer}")
        for name in (each.arm, each.baseline):
            if each.layer not in layers.get(name, ()):
                expected = f"a layer that {name} has"
                raise BundleError(f"{where}: comparison of layers", expected=expected, got=repr(each.layer))


def _check_curve(curve: Curve, where: str) -> None:
    lengths = len(curve.times_ns), len(curve.resident_bytes), len(curve.marks_ns)
    rising = all(a <= b for a, b in zip(curve.times_ns, curve.times_ns[1:], strict=False))
    if not curve.times_ns or lengths[0] != lengths[1] or lengths[2] != len(STAGES) or not rising:
        expected = f"readings in the order of their times, and {len(STAGES)} marks"
        raise BundleError(f"{where}: memory curve", expected=expected, got=f"{lengths} times, readings and marks")
    if min(curve.resident_bytes) < 0:
        raise BundleError(f"{where}: memory curve", expected="bytes ≥ 0", got=str(min(curve.resident_bytes)))


def conditions(profile: Profile) -> dict[str, str]:
    """What has to be the same in two profiles before their latencies may stand side by side."""
    host = profile.environment
    return {
        "host": host.host_id or f"{host.board} {host.cpu_model}".strip(),
        "processor": f"{host.machine} {host.cpu_model}".strip(),
        "usable cores": str(host.cores_usable),
        "runtime": f"{profile.runtime} {profile.runtime_version}",
        "threads": str(profile.threads),
        "settings": settings_text(profile) or "none",
        "power mode": host.power_mode or "none",
        "clocks held": "not told" if host.clocks_held is None else "yes" if host.clocks_held else "no",
        "governor": host.governor or "none",
        "caps": " ".join(f"{k}={v}" for k, v in sorted({**host.caps, **profile.caps}.items())) or "none",
        "evidence": profile.evidence,
    }


def settings_text(profile: Profile) -> str:
    """The runtime's settings, as ``INFERENCE_PRECISION_HINT=f32``; empty without any."""
    return " ".join(f"{key}={value}" for key, value in sorted(profile.properties.items()))


def _compact(value: Any, indent: int = 0) -> str:
    pad = " " * (indent + 1)
    if isinstance(value, Mapping) and value:
        rows = [f"{pad}{json.dumps(str(k), ensure_ascii=False)}: {_compact(v, indent + 1)}" for k, v in value.items()]
        return "{\n" + ",\n".join(rows) + f"\n{' ' * indent}}}"
    if isinstance(value, (list, tuple)) and value and isinstance(value[0], (Mapping, list, tuple)):
        rows = [pad + _compact(v, indent + 1) for v in value]
        return "[\n" + ",\n".join(rows) + f"\n{' ' * indent}]"
    return json.dumps(value, ensure_ascii=False, allow_nan=False)
