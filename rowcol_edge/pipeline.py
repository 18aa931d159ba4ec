"""The order of the stages, and the only module that knows it.

model + splits ─ study ─ search ─ apply ─┐
dense original ──────────────────────────┤ per arm: export ─ simplify ─ compile ─ judge ─▶ bundle
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

from . import bundling, config, evaluation, search
from .arms import Arm, Workbench
from .budgets import Budget
from .cache import Cache
from .config import BuildOptions
from .device import measure
from .device.bundle import Bundle
from .device.manifest import MANIFEST_NAME, Manifest
from .device.profile import Comparison, Profile
from .device.stats import FASTER
from .errors import BudgetError, BundleError, ConfigError, ModelError, RowcolError, StageError
from .evaluation import Judged
from .export.onnx import program
from .export.parity import torch_run
from .factoring.apply import apply
from .factoring.plan import FactorPlan
from .factoring.study import Study, study
from .job import Job, Progress, check_out, prepare, silent
from .models import LoadedModel
from .search import Choice, Trial
from .targets import RuntimeSpec, Target

_AUTO_BLOCKS = 6
_FITTINGS = 4


@dataclass(frozen=True, slots=True)
class Built:
    """A bundle that was built, or found unchanged (``reused``)."""

    path: Path
    manifest: Manifest
    reused: bool

    def to_dict(self) -> dict[str, Any]:
        return {"path": str(self.path), "reused": self.reused, "manifest": self.manifest.to_dict()}


@dataclass(frozen=True, slots=True)
class Factored:
    """A factored model: the module, its plan, what was tried, and where it was written (None: nowhere)."""

    model: str
    module: nn.Module
    plan: FactorPlan
    trials: tuple[Trial, ...]
    parameters_before: int
    parameters_after: int
    out: Path | None

    def to_dict(self) -> dict[str, Any]:
        return {
            "model": self.model,
            "plan": [
                {"name": p.name, "form": p.form, "rank": p.rank, "energy": p.energy, "reason": p.reason}
                for p in self.plan.layers
            ],
            "made_by": self.plan.made_by,
            "plan_digest": self.plan.digest,
            "trials": [t.to_dict() for t in self.trials],
            "parameters_before": self.parameters_before,
            "parameters_after": self.parameters_after,
            "out": None if self.out is None else str(self.out),
        }


def build(
    options: BuildOptions,
    model: LoadedModel | None = None,
    *,
    force: bool = False,
    cache: Cache | None = None,
    progress: Progress = silent,
) -> list[Built]:
    """Build a bundle for each target under ``options.out``.

    A bundle whose inputs, options and tools have not changed is kept as it is, unless ``force``; what other builds left
    in the cache is used again in any case.

    Raises:
        InputError: bad input; nothing is written.
        BudgetError: a budget that cannot be met; nothing is written.
    """
    out = Path(options.out)
    check_out(out)
    job = prepare(options, model, progress, cache)
    found: dict[str, Built] = {}
    for target in job.targets:
        kept = None if force else _unchanged(bundling.path(out, target, options.runtime), bundling.key(job, target))
        if kept is not None:
            found[target.name] = kept
    missing = [target for target in job.targets if target.name not in found]
    if missing:
        with tempfile.TemporaryDirectory(prefix="rowcol-build-") as work:
            line = _Line(job, Path(work), progress)
            # all arms of all targets first: a budget that one target misses leaves nothing written
            for ready in [line.ready(target) for target in missing]:
                found[ready.target.name] = line.write(ready, out)
    if model is None:
        config.write(options, out / "rowcol.toml")  # a module that was handed over cannot be named in a file
    return [found[target.name] for target in job.targets]


def factor(
    options: BuildOptions,
    model: LoadedModel | None = None,
    *,
    out: Path | None = None,
    cache: Cache | None = None,
    progress: Progress = silent,
) -> Factored:
    """Choose a plan and apply it; with ``out`` write ``plan.toml``, ``model.safetensors`` and ``model.pt2`` there.

    Raises:
        InputError, BudgetError: as for `build`; nothing is written.
    """
    if out is not None:
        check_out(out)
    job = prepare(options, model, progress, cache)
    if job.budgets.get("size"):
        raise ConfigError(
            "budget size", expected="a budget that factoring decides", got="bytes", hint="build judges it"
        )
    known = _study(job, progress)
    chooser = _Chooser(job, known, progress)
    choice = chooser.choice(job.targets[0].rank_multiple, "fp32")
    plan = choice.plans[-1]
    search.check_costs(known, plan, job.budgets)
    module = apply(known.folded, plan, known.spaces) if plan.projected else known.folded
    if out is not None:
        _write_factored(out, module, plan, job)
    return Factored(
        job.model.reference,
        module,
        plan,
        choice.trials,
        known.parameters,
        known.parameters - plan.saved_parameters,
        out,
    )


def _unchanged(path: Path, key: str) -> Built | None:
    """The bundle at ``path`` if it was built from the same inputs and is whole."""
    if not (path / MANIFEST_NAME).is_file():
        return None
    try:
        with Bundle.open(path) as bundle:
            manifest = bundle.manifest
    except BundleError:
        return None  # damaged or of an older schema: build it anew
    return Built(path, manifest, reused=True) if manifest.build.get("key") == key else None


def _study(job: Job, progress: Progress) -> Study:
    keep = partial(job.cache.arrays, job.stage_key("spaces", job.calibration.key))
    return study(job.model.module, job.calibration, keep=keep, progress=progress)


@dataclass(frozen=True, slots=True)
class _Ready:
    """A target's arms, all checked, the default one first."""

    target: Target
    runtime: RuntimeSpec
    arms: tuple[Arm, ...]
    choice: Choice
    notes: tuple[str, ...]


class _Chooser:
    """Finds plans; a plan is searched once per rank multiple and precision, and shared by targets."""

    def __init__(self, job: Job, known: Study, progress: Progress) -> None:
        self.job = job
        self.study = known
        self.progress = progress
        self._found: dict[tuple[int, str], Choice] = {}
        self.reference: Judged | None = self._judge(job.model.module, "judge the original", None, source="original")

    def choice(self, multiple: int, precision: str) -> Choice:
        # the search itself is at fp32; only a limit in bytes depends on the precision
        key = (multiple, precision if self.job.budgets.get("size") else "")
        if key not in self._found:
            text = self.job.cache.text(
                self.job.stage_key("search", *key, self.job.search_key),
                lambda: search.choose(
                    self.study, self.job, multiple, precision, self.reference, self._judge_trial, self.progress
                ).to_json(),
            )
            self._found[key] = Choice.from_json(text)
        return self._found[key]

    def _judge(self, module: nn.Module, label: str, original: Judged | None, source: str = "") -> Judged | None:
        """A module on the selection split; None without labels."""
        if self.job.metric is None or self.job.selection is None:
            return None
        predictions = evaluation.predict(
            torch_run(module), self.job.selection, self.job, self.progress, label, source=source
        )
        return evaluation.judge_selection(predictions, self.job, original)

    def _judge_trial(self, module: nn.Module, label: str) -> Judged:
        judged = self._judge(module, label, self.reference)
        if judged is None:
            raise ConfigError("budget drop", expected="labelled selection data", got="none", hint="--select P")
        return judged


class _Line:
    """The production line of one job. What its targets share (study, search, exports) is made once."""

    def __init__(self, job: Job, work: Path, progress: Progress) -> None:
        self.job = job
        self.progress = progress
        self.study = _study(job, progress)
        self.chooser = _Chooser(job, self.study, progress)
        self.bench = Workbench(job, self.chooser.reference, work, progress)
        self._test: Judged | None = None

    def ready(self, target: Target) -> _Ready:
        """Every arm for a target, within the budgets, ready to be written."""
        job = self.job
        runtime = target.runtime(job.options.runtime)
        precision = job.options.precision
        notes: tuple[str, ...] = ()
        if precision == "auto":
            precision, notes = self._fastest(target, runtime)
        factored, choice = self._factored(target, runtime, precision)
        arms = [factored]
        if job.options.dense:
            arms += [self._arm("dense", None, target, runtime, p) for p in dict.fromkeys((precision, "fp32"))]
        return _Ready(target, runtime, tuple(arms), choice, notes)

    def write(self, ready: _Ready, out: Path) -> Built:
        """The bundle, and the only look at the test split."""
        path = bundling.path(out, ready.target, ready.runtime.name)
        bundling.write(
            path, self.job, ready.target, ready.runtime, ready.arms, ready.choice, self._original(),
            notes=ready.notes, progress=self.progress,
        )  # fmt: skip
        with Bundle.open(path) as bundle:
            return Built(path, bundle.manifest, reused=False)

    def _fastest(self, target: Target, runtime: RuntimeSpec) -> tuple[str, tuple[str, ...]]:
        """The precision of the factored arm that keeps the budgets: the smallest file, unless another one is
        measurably faster; and what was measured."""
        arms: list[Arm] = []
        choice: Choice | None = None
        missed: list[RowcolError] = []
        for precision in runtime.precisions:
            try:
                arm, choice = self._factored(target, runtime, precision)
            except (BudgetError, StageError) as e:  # over the budget, or not for this kind of network
                missed.append(e)
                continue
            arms.append(arm)
        if choice is None:
            raise missed[0]
        smallest = min(arms, key=lambda arm: arm.artifact.size_bytes)
        with tempfile.TemporaryDirectory(prefix="rowcol-auto-") as folder:
            path = Path(folder) / "candidates"
            bundling.write(
                path, self.job, target, runtime, arms, choice, bundling.Quality(self.chooser.reference, None)
            )
            with Bundle.open(path) as bundle:
                measured = measure.profile(bundle, baseline=smallest.name, blocks=_AUTO_BLOCKS, progress=self.progress)
        ratios = {c.arm: c for c in measured.comparisons if c.baseline == smallest.name}
        faster = [arm for arm in arms if arm.name in ratios and ratios[arm.name].verdict == FASTER]
        best = min(faster, key=lambda arm: ratios[arm.name].ratio or 1.0, default=smallest)
        figures = ", ".join(_figure(arm, measured, ratios) for arm in arms)
        said = [f"precision auto chose {best.precision}: {figures}; evidence {measured.evidence}"]
        said += [f"precision auto left out: {e.what}: {e.got}" for e in missed]
        return best.precision, tuple(said)

    def _arm(self, variant: str, plan: FactorPlan | None, target: Target, runtime: RuntimeSpec, precision: str) -> Arm:
        parameters = self.study.parameters - (plan.saved_parameters if plan else 0)

        def module() -> nn.Module:
            return apply(self.study.folded, plan, self.study.spaces) if plan and plan.projected else self.study.folded

        return self.bench.arm(variant, module, plan, parameters, target, runtime, precision)

    def _factored(self, target: Target, runtime: RuntimeSpec, precision: str) -> tuple[Arm, Choice]:
        """The factored arm; where quantization takes it over the drop, a more careful plan, until the budget holds."""
        choice = self.chooser.choice(target.rank_multiple, precision)
        limit = self.job.budgets.get("drop")
        index, stride = len(choice.plans) - 1, 1
        tried: list[tuple[float, str]] = []
        while True:
            arm = self._arm("factored", choice.plans[index], target, runtime, precision)
            lost = self._drop(arm)
            if limit is None or lost is None or lost <= limit.limit + 1e-9:
                break
            tried.append((lost, choice.plans[index].made_by))
            if index == 0:
                raise _missed(self.job, limit, precision, target, min(tried))
            index, stride = max(0, index - stride), stride + 1
        plan = choice.plans[index]
        if limit is None:
            arm, plan = self._fitted(arm, plan, target, runtime)
        search.check_costs(self.study, plan, self.job.budgets)
        _check_size(self.job, arm, target)
        return arm, replace(choice, plans=(*choice.plans[:index], plan))

    def _fitted(self, arm: Arm, plan: FactorPlan, target: Target, runtime: RuntimeSpec) -> tuple[Arm, FactorPlan]:
        """Smaller plans until the file is within its limit: what the graph weighs is known only once it is compiled."""
        size, options = self.job.budgets.get("size"), self.job.options
        if size is None or options.plan is not None or options.energy is not None:
            return arm, plan
        for _ in range(_FITTINGS):
            excess = arm.artifact.size_bytes - size.limit
            if excess <= 0:
                break
            try:
                plan = search.smaller(self.study, plan, excess, arm.precision)
            except BudgetError:
                break  # _check_size says by how much the smallest file misses the limit
            arm = self._arm("factored", plan, target, runtime, arm.precision)
        return arm, plan

    def _drop(self, arm: Arm) -> float | None:
        if arm.selection is None or self.chooser.reference is None:
            return None
        return evaluation.drop(self.job, self.chooser.reference, arm.selection)

    def _original(self) -> bundling.Quality:
        """The dense original; it meets the test split once, however many targets there are."""
        reference, test = self.chooser.reference, self.job.test
        if reference is not None and test is not None and test.labels is not None and self._test is None:
            predictions = evaluation.predict(
                torch_run(self.job.model.module), test, self.job, self.progress,
                "judge the original on the test split", source="original",
            )  # fmt: skip
            self._test = evaluation.judge(predictions, self.job, reference.threshold)
        return bundling.Quality(reference, self._test)


def _figure(arm: Arm, measured: Profile, ratios: Mapping[str, Comparison]) -> str:
    text = f"{arm.name} {measured.arms[arm.name].latency.median_ns / 1e6:.2f} ms"
    found = ratios.get(arm.name)
    if found is None or found.ratio is None:
        return text
    return f"{text} ({found.ratio:.2f} [{found.ci_low:.2f}, {found.ci_high:.2f}] of {found.baseline}, {found.verdict})"


def _missed(job: Job, budget: Budget, precision: str, target: Target, best: tuple[float, str]) -> BudgetError:
    given = job.options.plan is not None or job.options.energy is not None
    return BudgetError(
        f"budget {budget.text} at {precision} on {target.name}",
        expected=f"a drop of at most {budget.limit:g} pp on the selection split",
        got=f"{best[0]:.2f} pp at best ({best[1]})",
        hint="leave out --plan and --energy to have a plan searched"
        if given
        else "even the unfactored model misses it at this precision: allow a larger drop or another precision",
    )


def _check_size(job: Job, arm: Arm, target: Target) -> None:
    budget = job.budgets.get("size")
    if budget is not None and arm.artifact.size_bytes > budget.limit:
        raise BudgetError(
            f"budget {budget.text}: {arm.name} on {target.name}",
            expected=f"at most {budget.limit:,.0f} bytes",
            got=f"{arm.artifact.size_bytes:,} bytes ({arm.artifact.size_bytes / budget.limit:.2f} times the limit)",
            hint="allow a larger drop, or build at a lower precision",
        )


def _program(module: nn.Module, job: Job) -> torch.export.ExportedProgram:
    """With a free batch where the model allows it, for single samples elsewhere; both can be handed to build again."""
    try:
        return program(module, job.calibration.example(), dynamic_batch=True)
    except ModelError:
        return program(module, job.calibration.example())


def _write_factored(folder: Path, module: nn.Module, plan: FactorPlan, job: Job) -> None:
    """The three files, each replaced in one step."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".factored-", dir=folder) as building:
        work = Path(building)
        plan.write(work / "plan.toml")
        state = {name: value.detach().clone().contiguous() for name, value in module.state_dict().items()}
        save_file(state, work / "model.safetensors")
        torch.export.save(_program(module, job), work / "model.pt2")
        for file in sorted(work.iterdir()):
            file.replace(folder / file.name)
