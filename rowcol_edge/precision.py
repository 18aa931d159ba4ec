"""``--precision auto``: the target's candidates that keep the quality budget, and the fastest measured one of them."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from . import bundling, evaluation, keeping
from .arms import Arm
from .device import measure
from .device.bundle import Bundle
from .device.profile import NULL, Comparison, Profile
from .device.stats import FASTER
from .device.verdicts import Judgement, judge
from .errors import BudgetError, ConfigError, RowcolError, StageError
from .evaluation import Judged
from .job import Job, Progress
from .search import Choice
from .targets import RuntimeSpec, Target

_BLOCKS = 6

Make = Callable[[str], tuple[Arm, Choice]]
"""The arm at a precision, within the budgets."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """A precision that was tried; ``left_out`` says why it was not measured and is empty where it was.

    The ratio is that of its latency to the smallest file's, paired, with its 95 % interval.
    """

    precision: str
    size_bytes: int | None = None
    drop_pp: float | None = None
    kept_float: tuple[str, ...] = ()
    latency_ns: float | None = None
    ratio: float | None = None
    ci_low: float | None = None
    ci_high: float | None = None
    verdict: str = ""
    left_out: str = ""


@dataclass(frozen=True, slots=True)
class Selection:
    """What ``auto`` chose and on which evidence; ``caps`` held this host to the target's instruction set, ``warnings``
    say what to know before believing the measurement."""

    chosen: str
    smallest: str
    evidence: str
    evidence_note: str
    caps: dict[str, str]
    candidates: tuple[Candidate, ...]
    warnings: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def check_measurable(target: Target, runtime: RuntimeSpec) -> None:
    """ConfigError where this host cannot run what the target runs, so that nothing can be measured."""
    if not runtime.runs_at_build:
        where = f"{runtime.name} with {', '.join(runtime.providers)}"
        raise ConfigError(
            f"precision auto on {target.name}",
            expected="a runtime and a device that this host has, to measure the candidates on",
            got=where,
            hint=f"name a precision ({', '.join(runtime.precisions)}), and measure on the board: profile BUNDLE",
        )


def fastest(
    make: Make, job: Job, target: Target, runtime: RuntimeSpec, reference: Judged | None, progress: Progress
) -> tuple[Arm, Choice, Selection]:
    """The smallest arm, unless a larger one is measurably faster.

    Raises:
        BudgetError, StageError: no precision of the target keeps the budgets; that of the first one.
    """
    made: dict[str, tuple[Arm, Choice]] = {}
    missed: dict[str, RowcolError] = {}
    for precision in runtime.precisions:
        try:
            made[precision] = _usable(*make(precision), job)
        except (BudgetError, StageError) as e:  # over the budget, or not for this kind of network
            missed[precision] = e
    if not made:
        raise next(iter(missed.values()))
    by_size = sorted((arm for arm, _ in made.values()), key=lambda arm: arm.artifact.size_bytes)
    measured = _measured(by_size, job, target, runtime, made[by_size[0].precision][1], reference, progress)
    found = _judged(measured, [arm.name for arm in by_size])
    ratios = {(c.arm, c.baseline): c for c in found.comparisons}
    best = by_size[0]
    for arm in by_size[1:]:  # a larger file has to be faster than the best of the smaller ones
        if ratios[arm.name, best.name].verdict == FASTER:
            best = arm
    candidates = {precision: Candidate(precision, left_out=_reason(error)) for precision, error in missed.items()}
    for arm in by_size:
        candidates[arm.precision] = _candidate(arm, job, reference, measured, ratios.get((arm.name, by_size[0].name)))
    selection = Selection(
        chosen=best.precision,
        smallest=by_size[0].precision,
        evidence=measured.evidence,
        evidence_note=measured.evidence_note,
        caps=measured.caps,
        candidates=tuple(candidates[precision] for precision in runtime.precisions),
        warnings=tuple(dict.fromkeys((*measured.warnings, *found.warnings))),
    )
    return best, made[best.precision][1], selection


def _usable(arm: Arm, choice: Choice, job: Job) -> tuple[Arm, Choice]:
    """Where no drop is judged, the outputs themselves have to be close to the arm's float source."""
    if job.budgets.get("drop") is None and arm.loss > keeping.TOLERANCE:
        raise StageError(
            f"{arm.name} without a budget for the drop",
            expected=f"outputs within {keeping.TOLERANCE:.0%} of its float source",
            got=f"{arm.loss:.1%}",
            hint="labelled selection data (--select) can judge it: --budget drop<=0.5pp",
        )
    return arm, choice


def _reason(error: RowcolError) -> str:
    return f"{error.what}: {error.got}" if error.got else error.what


def _measured(
    arms: Sequence[Arm], job: Job, target: Target, runtime: RuntimeSpec, choice: Choice, reference: Judged | None,
    progress: Progress,
) -> Profile:  # fmt: skip
    """As the board profiles a bundle: under the target's cap on the instruction set, where it has one."""
    with tempfile.TemporaryDirectory(prefix="rowcol-auto-") as folder:
        path = Path(folder) / "candidates"
        bundling.write(path, job, target, runtime, arms, choice, bundling.Quality(reference, None))
        with Bundle.open(path) as bundle:
            return measure.profile(bundle, baseline=arms[0].name, blocks=_BLOCKS, progress=progress)


def _judged(measured: Profile, names: Sequence[str]) -> Judgement:
    """Each arm against each smaller one, from the blocks of one session."""
    blocks = {name: arm.blocks for name, arm in measured.arms.items()} | {NULL: measured.null_arm.blocks}
    pairs = [(arm, smaller) for i, arm in enumerate(names) for smaller in names[:i]]
    return judge(blocks, pairs, measured.null.baseline, measured.evidence)


def _candidate(arm: Arm, job: Job, reference: Judged | None, measured: Profile, found: Comparison | None) -> Candidate:
    drop_pp = None
    if arm.selection is not None and reference is not None:
        drop_pp = evaluation.drop(job, reference, arm.selection)
    return Candidate(
        precision=arm.precision,
        size_bytes=arm.artifact.size_bytes,
        drop_pp=drop_pp,
        kept_float=tuple(layer.name for layer in arm.kept_float),
        latency_ns=measured.arms[arm.name].latency.median_ns,
        ratio=found.ratio if found else None,
        ci_low=found.ci_low if found else None,
        ci_high=found.ci_high if found else None,
        verdict=found.verdict if found else "",
    )
