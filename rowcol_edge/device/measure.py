"""The profiler: arms of a bundle measured on this machine, with a null arm, and what can be said of them."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np

from ..errors import MeasurementError, RowcolError
from . import schedule, stats, system
from .bundle import Bundle
from .energy import by_rail, energy_runs
from .engines import prepare
from .footprint import Runs, footprint_runs, footprints
from .layer_times import Operators
from .manifest import ArmEntry, RuntimeEntry
from .operators import operators
from .predictor import load_checked
from .processes import Processes
from .profile import (
    NOT_ASKED,
    NOT_MEASURED,
    NULL,
    OVER,
    WITHIN,
    ArmProfile,
    Block,
    ColdStart,
    Latency,
    Memory,
    MemoryBudget,
    MemoryReading,
    Profile,
    Protocol,
)
from .runtimes import load_runtime
from .session import Executor, Progress, Session, run_session
from .verdicts import judge
from .worker import TIME, EnergyRun, MemoryRun, Request

T = TypeVar("T")

_TIMEOUT_SECONDS = 120.0
_ON_PROCESSOR = ("CPU", "Xnnpack")
"""How the names of providers begin that run on the processor; all others take memory that is in no process's count, a
Jetson's GPU too, though it shares the board's."""
_MIB = 1 << 20
_TITLES = {"memory": "memory at each stage", "energy": "energy", "operators": "operators"}


def profile(
    bundle: Bundle,
    *,
    arms: Sequence[str] | None = None,
    baseline: str | None = None,
    blocks: int = schedule.DEFAULT_ROUNDS,
    seconds: float | None = None,
    threads: int | None = None,
    evidence: str | None = None,
    memory: bool = False,
    energy: bool = False,
    ops: bool = False,
    progress: Progress | None = None,
    executor: Executor | None = None,
) -> Profile:
    """Measure arms of a bundle on this machine.

    ``arms``: names, default all. ``baseline``: the arm all others are set against; by default the dense arm of the
    same precision, and dense@fp32 beside it. ``blocks``: processes an arm, rounded to a whole number of balanced
    cycles. ``seconds``: time for everything, as far as the fewest useful blocks allow. ``threads``: default what the
    target asks for, at most the usable cores; 0: all of those. ``evidence`` can only weaken what this machine would
    count as.
    ``memory``: also memory at each stage and by the runtime's settings, up to 30 processes an arm of about a second.
    ``energy``: also the energy of an inference, where a rail can be read; half a minute an arm. ``ops``: also the time
    of operators by the runtime's own profiler, six processes an arm of about a second. All three are beyond
    ``seconds``, and one that fails costs a warning. MeasurementError: a process of the session itself failed. Engines
    that a runtime builds on the board are built first.
    """
    budget_seconds = schedule.time_budget(seconds)
    chosen = _arms(bundle, arms, baseline)
    pairs = default_pairs(chosen, baseline)
    null_of = _null_of(chosen, pairs, baseline, bundle.manifest.default_arm)
    rounds = schedule.balanced_rounds(len(chosen) + 1, blocks)
    host = system.environment()
    level, note = _evidence(system.evidence_for(bundle.manifest.target, host), evidence)
    caps = dict(bundle.manifest.target.get("proxy_env") or {}) if level == system.PROXY else {}
    # more threads than cores wait for one another, and would be timed waiting
    asked = min(bundle.manifest.runtime.threads, host.cores_usable) if threads is None else threads
    used = asked or host.cores_usable
    requests = {arm.name: _request(bundle, arm, used) for arm in chosen}
    requests[NULL] = requests[null_of]

    if executor is None:
        load_checked(bundle)  # a runtime that is missing or too old is told here, not by a process that failed
        prepare(bundle, [arm.name for arm in chosen])
        executor = Processes(caps, _TIMEOUT_SECONDS)
    tell = progress or _silent
    session = run_session(requests, executor, rounds, budget_seconds, tell)
    requests = {name: _of_latency(request, session.blocks[name]) for name, request in requests.items()}
    why_not = {
        "memory": _no_memory(level) if memory else NOT_ASKED,
        "energy": _no_energy(host, level) if energy else NOT_ASKED,
        "operators": _no_operators(bundle, level) if ops else NOT_ASKED,
    }
    extras = _measured_too(why_not, bundle, requests, pairs, null_of, session.blocks, executor, tell)
    after = system.readings(system.environment())
    obstacle = (
        "" if len(session.versions) == 1 else f"the runtime changed in between: {', '.join(sorted(session.versions))}"
    )
    found = judge(session.blocks, pairs, null_of, level, obstacle)
    runtime = bundle.manifest.runtime.name
    profiles = {
        name: replace(
            _arm_profile(bundle, arm, name, session),
            footprints=footprints(runtime, extras.stages[name], level) if name in extras.stages else (),
            energy=by_rail(extras.spent.get(name, ())),
        )
        for name, arm in ((arm.name, arm) for arm in chosen)
    }
    unread = extras.spent and not any(arm.energy for arm in profiles.values())
    energy_note = f"{', '.join(host.rails)} could not be read throughout" if unread else extras.notes["energy"]
    warnings = [
        *_warnings(host, after, bundle.manifest.runtime, used, profiles),
        *session.warnings,
        *found.warnings,
        *extras.warnings,
    ]
    return Profile(
        bundle=bundle.manifest.name,
        digest=bundle.digest,
        target=str(bundle.manifest.target.get("name", "")),
        runtime=bundle.manifest.runtime.name,
        runtime_version=" / ".join(sorted(session.versions)),
        threads=used,
        properties=dict(bundle.manifest.runtime.properties),
        created=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        evidence=level,
        evidence_note=note,
        caps=caps,
        environment=host,
        after=after,
        protocol=_protocol(session, budget_seconds),
        arms=profiles,
        comparisons=found.comparisons,
        null=found.null,
        null_arm=_arm_profile(bundle, bundle.arm(null_of), NULL, session),
        memory_budget=_memory_budget(bundle, profiles, level),
        energy_note=energy_note,
        operators=extras.operators,
        operators_note=extras.notes["operators"],
        warnings=tuple(dict.fromkeys(warnings)),
    )


def _of_latency(request: Request, blocks: Sequence[Block]) -> Request:
    return replace(request, inference_seconds=stats.median([block.median_ns for block in blocks]) * 1e-9)


@dataclass(frozen=True, slots=True)
class _Extras:
    """What was measured beside latency.

    Attributes:
        stages: memory at each stage, by arm.
        spent: energy, by arm.
        operators: their time by the runtime's own profiler.
        notes: by what was to be measured, why it was not; empty where it was.
        warnings: of those that were tried and failed, and of memory that cannot be measured.
    """

    stages: Mapping[str, Runs]
    spent: Mapping[str, Sequence[EnergyRun]]
    operators: Operators | None
    notes: Mapping[str, str]
    warnings: tuple[str, ...]


def _measured_too(
    why_not: Mapping[str, str],
    bundle: Bundle,
    requests: Mapping[str, Request],
    pairs: Sequence[tuple[str, str]],
    null_of: str,
    blocks: Mapping[str, Sequence[Block]],
    executor: Executor,
    tell: Progress,
) -> _Extras:
    """All for which ``why_not`` holds no reason; the session stands without what fails."""
    notes, warnings = dict(why_not), []
    if notes["memory"] not in ("", NOT_ASKED):
        warnings.append(f"{_TITLES['memory']}: not measured, {notes['memory']}")

    def attempt(what: str, measure: Callable[[], T], nothing: T) -> T:
        if notes[what]:
            return nothing
        try:
            return measure()
        except RowcolError as e:
            notes[what] = str(e)
            warnings.append(f"{_TITLES[what]}: not measured, {e}")
            return nothing

    none: Mapping[str, Runs] = {}
    unspent: Mapping[str, Sequence[EnergyRun]] = {}
    return _Extras(
        attempt("memory", lambda: footprint_runs(requests, executor, tell), none),
        attempt("energy", lambda: energy_runs(requests, executor, tell), unspent),
        attempt("operators", lambda: operators(bundle, requests, pairs, null_of, blocks, executor, tell), None),
        notes,
        tuple(warnings),
    )


def default_pairs(arms: Sequence[ArmEntry], baseline: str | None = None) -> list[tuple[str, str]]:
    """(arm, baseline): all against ``baseline``; or each against the dense arm of its precision and dense@fp32."""
    if baseline is not None:
        return [(arm.name, baseline) for arm in arms if arm.name != baseline]
    dense = {arm.precision: arm.name for arm in arms if arm.variant == "dense"}
    own = [(arm.name, dense[arm.precision]) for arm in arms if arm.precision in dense]
    original = [(arm.name, dense["fp32"]) for arm in arms] if "fp32" in dense else []
    return [pair for pair in dict.fromkeys(own + original) if pair[0] != pair[1]]


def _arms(bundle: Bundle, names: Sequence[str] | None, baseline: str | None) -> list[ArmEntry]:
    if names is not None and not names:
        raise MeasurementError("arms", expected="at least one arm", got="none")
    wanted = list(names) if names is not None else [arm.name for arm in bundle.manifest.arms]
    if baseline is not None:
        wanted.append(baseline)
    return [bundle.arm(name) for name in dict.fromkeys(wanted)]


def _null_of(arms: Sequence[ArmEntry], pairs: Sequence[tuple[str, str]], baseline: str | None, default_arm: str) -> str:
    """The arm to run twice: the one the default arm is set against, for it stands behind the figure people read."""
    if baseline is not None:
        return baseline
    if default := [pair[1] for pair in pairs if pair[0] == default_arm]:
        return default[0]
    names = [arm.name for arm in arms]
    return default_arm if default_arm in names else names[0]


def _evidence(found: system.Evidence, asked: str | None) -> system.Evidence:
    if asked is None or asked == found.level:
        return found
    if asked not in (system.PROXY, system.EMULATED):
        hint = "target is what the machine itself shows, predicted is not measured"
        raise MeasurementError("evidence", expected=f"{system.PROXY} or {system.EMULATED}", got=repr(asked), hint=hint)
    if not system.weaker(asked, found.level):
        hint = "evidence can be weakened, never raised"
        raise MeasurementError("evidence", expected=f"at most {found.level} ({found.note})", got=asked, hint=hint)
    return system.Evidence(asked, f"{found.note}; declared {asked} by whoever measured")


def _request(bundle: Bundle, arm: ArmEntry, threads: int) -> Request:
    manifest = bundle.manifest
    return Request(
        mode=TIME,
        arm=arm.name,
        runtime=manifest.runtime.name,
        artifact=str(bundle.artifact(arm)),
        golden_inputs=str(bundle.root / manifest.golden_inputs),
        # a free batch counts as 1, an input of rank 0 goes in whole
        batch={spec.name: (spec.shape[0] or 1) if spec.shape else 0 for spec in manifest.inputs},
        threads=threads,
        providers=manifest.runtime.providers,
        properties=manifest.runtime.properties,
        min_samples=schedule.MIN_SAMPLES,
        max_samples=schedule.MAX_SAMPLES,
        stamps=bundle.stamps(arm),
    )


def _no_memory(level: str) -> str:
    """Why memory at each stage cannot be measured here; empty where it can."""
    return "" if system.counts(level) else f"{level} runs take another machine's memory"


def _no_energy(host: system.Environment, level: str) -> str:
    """Why the energy of an inference cannot be measured here; empty where it can."""
    if not system.counts(level):
        return f"{level} runs take another machine's energy"
    return "" if host.rails else host.rails_unread


def _no_operators(bundle: Bundle, level: str) -> str:
    """Why the time of operators cannot be measured here; empty where it can."""
    if not system.counts(level):
        return f"{level} runs take another machine's time"
    return load_runtime(bundle.manifest.runtime.name).unprofiled()


def _arm_profile(bundle: Bundle, arm: ArmEntry, label: str, session: Session) -> ArmProfile:
    blocks = session.blocks[label]
    samples = np.concatenate([np.asarray(block.samples_ns, np.float64) for block in blocks])
    sha256 = next((entry.sha256 for entry in bundle.manifest.files if entry.path == arm.artifact), "")
    return ArmProfile(
        name=label,
        artifact=arm.artifact,
        sha256=sha256,
        artifact_bytes=sum(entry.size_bytes for entry in bundle.manifest.files if arm.owns(entry.path)),
        latency=Latency(
            float(np.median(samples)), stats.percentile(samples, 90), stats.percentile(samples, 99), len(samples)
        ),
        cold=ColdStart(
            stats.median([block.import_ns for block in blocks]),
            stats.median([block.load_ns for block in blocks]),
            stats.median([block.first_ns for block in blocks]),
        ),
        memory=_memory(session.memory.get(label, [])),
        activation_bytes=arm.activation_bytes,
        footprints=(),
        energy=(),
        blocks=tuple(blocks),
    )


def _memory(runs: Sequence[MemoryRun]) -> Memory | None:
    readings = tuple(
        MemoryReading(run.baseline_bytes, run.after_load_bytes, run.peak_bytes, run.peak_reset)
        for run in runs
        if run.baseline_bytes is not None and run.after_load_bytes is not None and run.peak_bytes is not None
    )
    if not readings:
        return None
    return Memory(
        int(stats.median([reading.baseline_bytes for reading in readings])),
        int(stats.median([reading.after_load_bytes for reading in readings])),
        int(stats.median([reading.peak_bytes for reading in readings])),
        readings,
    )


def _memory_budget(bundle: Bundle, arms: Mapping[str, ArmProfile], level: str) -> MemoryBudget | None:
    limit_mb = bundle.manifest.target.get("memory_mb")
    if not isinstance(limit_mb, int):
        return None
    limit_bytes = limit_mb * _MIB
    verdicts = {}
    for name, arm in arms.items():
        known = arm.memory is not None and system.counts(level)
        fits = WITHIN if arm.memory and arm.memory.peak_bytes <= limit_bytes else OVER
        verdicts[name] = fits if known else NOT_MEASURED
    default = bundle.manifest.default_arm
    return MemoryBudget(limit_bytes, verdicts, (default,) if default in arms else tuple(arms))


def _protocol(session: Session, budget_seconds: float) -> Protocol:
    return Protocol(
        rounds=len(session.order),
        order=session.order,
        confidence=stats.CONFIDENCE,
        resamples=stats.RESAMPLES,
        seed=stats.SEED,
        run_seconds=session.plan.run_seconds,
        warmup_seconds=session.plan.warmup_seconds,
        budget_seconds=budget_seconds,
        elapsed_seconds=session.elapsed_seconds,
    )


def _warnings(
    before: system.Environment,
    after: system.Readings,
    runtime: RuntimeEntry,
    threads: int,
    arms: Mapping[str, ArmProfile],
) -> list[str]:
    """What of the machine has to be known beside the figures."""
    warnings = system.host_warnings(before, threads)
    if after.throttled != before.throttled:
        warnings.append(
            f"throttling changed while measuring ({before.throttled or 'none'} to {after.throttled or 'none'}): "
            "cool the board, mind its supply and power mode, then measure again"
        )
    for what in ("power_mode", "governor"):
        was, now = getattr(before, what), getattr(after, what)
        if was != now:
            warnings.append(
                f"{what.replace('_', ' ')} changed while measuring ({was or 'none'} to {now or 'none'}): measure again"
            )
    if runtime.threads not in (0, threads):
        warnings.append(f"measured with {threads} thread(s), the target asks for {runtime.threads}")
    memory = {name: arm.memory for name, arm in arms.items() if arm.memory is not None}
    if len(memory) < len(arms):
        warnings.append("memory was not measured: this system has no /proc/self/status")
    if memory and (beside := [name for name in runtime.providers if not name.startswith(_ON_PROCESSOR)]):
        warnings.append(f"memory is the process's as Linux counts it: what {', '.join(beside)} takes is not in it")
    if any(not reading.peak_reset for found in memory.values() for reading in found.runs):
        warnings.append("the peak of memory could not be reset (/proc/self/clear_refs): it may stem from the imports")
    warnings += [
        f"energy of {name} on {rail.rail} does not stand out from the power at rest (least {rail.low:.2g} J): "
        "end other work, then measure again"
        for name, arm in arms.items()
        for rail in arm.energy[:1]
        if rail.low <= 0
    ]
    return warnings


def _silent(what: str, done: int, total: int) -> None:
    pass
