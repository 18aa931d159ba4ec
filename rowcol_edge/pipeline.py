"""The order of the stages, and the only module that knows it.

model + splits ─ study ─ search ─ apply (─ recover) ─┐
dense original ──────────────────────────────────────┤ per arm: export ─ simplify ─ compile ─ judge ─▶ bundle
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

from . import bundling, config, coverage, evaluation, keeping, limits, precision, search, wheelhouse
from .arms import Arm, Workbench
from .backends.base import LayerError
from .budgets import Budget
from .cache import Cache
from .calling import feed
from .config import BuildOptions
from .coverage import DataReport
from .device.bundle import Bundle
from .device.manifest import MANIFEST_NAME, Manifest
from .device.progress import silent
from .errors import BudgetError, BundleError, ConfigError, ModelError, StageError
from .evaluation import Judged
from .export.onnx import check_size, program
from .export.parity import torch_run
from .factoring import thin
from .factoring.apply import factored
from .factoring.equalize import equalize
from .factoring.graph import trace
from .factoring.plan import FactorPlan
from .factoring.study import Study, study
from .gauges import Gauged, Settler
from .job import Job, Progress, check_out, prepare
from .models import LoadedModel
from .precision import Selection
from .recovery import Recoverer, Recovery
from .search import Choice, Trial
from .targets import RuntimeSpec, Target

_FITTINGS = 4


@dataclass(frozen=True, slots=True)
class Built:
    """A bundle that was built, or found unchanged (``reused``), and the wheelhouse beside it if one was asked for."""

    path: Path
    manifest: Manifest
    reused: bool
    wheelhouse: Path | None = None

    def to_dict(self) -> dict[str, Any]:
        house = None if self.wheelhouse is None else str(self.wheelhouse)
        return {
            "path": str(self.path), "reused": self.reused, "wheelhouse": house, "manifest": self.manifest.to_dict(),
        }  # fmt: skip


@dataclass(frozen=True, slots=True)
class Factored:
    """A factored model: the module, its plan, what was tried, and where it was written (None: nowhere).

    ``size`` is what its weights are predicted to take, where a budget limits that: bytes, and at which precision.
    ``contract`` is what its outputs mean, ``assumed`` a note where only the default says so. ``second_pass`` says what
    came of it, or nothing where there was none.
    """

    model: str
    module: nn.Module
    plan: FactorPlan
    trials: tuple[Trial, ...]
    parameters_before: int
    parameters_after: int
    out: Path | None
    recovery: Recovery | None = None
    size: tuple[int, str] | None = None
    contract: str = "classify"
    assumed: str = ""
    second_pass: str = ""

    def to_dict(self) -> dict[str, Any]:
        return {
            "model": self.model,
            "plan": [
                {
                    "name": p.name,
                    "form": p.form,
                    "split": p.split if p.form == "project" else None,
                    "rank": p.rank,
                    "taken": p.taken,
                    "gauge": p.gauge or None,
                    "energy": p.energy,
                    "reason": p.reason,
                }
                for p in self.plan.layers
            ],
            "made_by": self.plan.made_by,
            "contract": self.contract,
            "predicted_loss": self.plan.loss,
            "gap": self.plan.gap,
            "note": "; ".join(filter(None, [self.plan.note, self.assumed])) or None,
            "plan_digest": self.plan.digest,
            "second_pass": self.second_pass or None,
            "trials": [t.to_dict() for t in self.trials],
            "parameters_before": self.parameters_before,
            "parameters_after": self.parameters_after,
            "out": None if self.out is None else str(self.out),
            **({} if self.size is None else {"predicted_bytes": self.size[0], "precision": self.size[1]}),
            **({} if self.recovery is None else {"recovered": dict(self.recovery.record)}),
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
    if options.dense:
        check_size(job.model.module)  # its dense arms cannot be written: no reason to factor first
    found: dict[str, Built] = {}
    for target in job.targets:
        kept = None if force else _unchanged(bundling.path(out, target, options.runtime), bundling.key(job, target))
        if kept is not None:
            found[target.name] = kept
    missing = [target for target in job.targets if target.name not in found]
    with tempfile.TemporaryDirectory(prefix="rowcol-build-") as work:
        # first, because it is the network that fails: it should not after an hour of work
        wheels = _wheelhouses(job, Path(work) / "wheelhouses", out, force=force, progress=progress)
        if missing:
            arms = Path(work) / "arms"
            arms.mkdir()
            line = _Line(job, arms, progress)
            for target in missing:
                line.try_out(target)
            # all arms of all targets first: a budget that one target misses leaves nothing written
            for ready in [line.ready(target) for target in missing]:
                found[ready.target.name] = line.write(ready, out)
        for name, collected in wheels.items():
            beside = wheelhouse.place(found[name].path)
            if collected is not None:
                wheelhouse.put(collected, beside)
            found[name] = replace(found[name], wheelhouse=beside)
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

    A budget in bytes is held by what the weights take at ``options.precision``; what a file takes besides, only `build`
    knows.

    Raises:
        InputError, BudgetError: as for `build`; nothing is written.
    """
    if out is not None:
        check_out(out)
    job = prepare(options, model, progress, cache)
    limit, precision = job.budgets.get("size"), options.precision
    if limit is not None and precision not in search.BYTES_PER_WEIGHT:
        hint = "build measures which one is the fastest"
        raise ConfigError("precision", expected="one that bytes can be predicted at", got=precision, hint=hint)
    known = _study(job, progress)
    chooser = _Chooser(job, known, progress)
    choice = chooser.choice(job.targets[0].rank_multiple, "fp32" if limit is None else precision)
    plan = choice.plans[-1]
    search.check_costs(known, plan, job.budgets, _remedy(job))
    size = None if limit is None else _predicted(job, known, plan, limit)
    recoverer = Recoverer(job, known, chooser.judge_trial, progress)
    recovery = recoverer.of(plan)
    gauged = Settler(job, known, progress).of(
        recovery.plan if recovery else plan,
        job.targets[0],
        lambda: recoverer.module(recovery) if recovery else factored(known, plan, progress),
    )
    plan, module = gauged.plan, gauged.module()
    second_pass = _second_pass(job, known, plan, progress)
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
        recovery,
        size,
        job.contract,
        job.assumed,
        second_pass,
    )


def _predicted(job: Job, known: Study, plan: FactorPlan, limit: Budget) -> tuple[int, str]:
    """Bytes of the weights at the precision of the job; BudgetError where they exceed the limit."""
    precision = job.options.precision
    size = int((known.parameters - plan.saved_parameters) * search.BYTES_PER_WEIGHT[precision])
    if size > limit.limit:
        raise BudgetError(
            f"budget {limit.text}, predicted at {precision}",
            expected=f"at most {limit.limit:,.0f} bytes",
            got=f"{size:,} bytes ({size / limit.limit:.2f} times the limit)",
            hint=_remedy(job, job.targets[0], precision),
        )
    return size, precision


def _wheelhouses(job: Job, work: Path, out: Path, *, force: bool, progress: Progress) -> dict[str, Path | None]:
    """By target, the wheelhouse that was collected in ``work``; None where the one at its place is as it should be."""
    found: dict[str, Path | None] = {}
    for target in job.targets if job.options.wheelhouse else ():
        runtime = target.runtime(job.options.runtime)
        beside = wheelhouse.place(bundling.path(out, target, runtime.name))
        kept = not force and wheelhouse.is_current(beside, target, runtime)
        found[target.name] = None if kept else wheelhouse.collect(target, runtime, work / target.name, progress)
    return found


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
    classify = job.contract == "classify"
    keep = partial(job.cache.arrays, job.stage_key("spaces", job.calibration.key, classify))
    known = study(job.model.module, job.calibration, classify=classify, keep=keep, progress=progress)
    limits.check(known, job.budgets)
    return known


def _second_pass(job: Job, known: Study, plan: FactorPlan, progress: Progress) -> str:
    """What came of a plan's second pass, in one line; nothing where none was asked for."""
    if not plan.changes or not plan.refit:
        return ""

    def said() -> str:
        if plan.digest not in known.second_passes:  # the model was made in another run
            factored(known, plan, progress)
        found = known.second_passes[plan.digest]
        nothing = "not made, as there was no layer to fit or there were too few inputs to judge it by"
        return f"factored: second pass {nothing if found is None else found.note}"

    return job.cache.text(job.stage_key("second pass", plan.digest, job.calibration.key, job.contract), said)


@dataclass(frozen=True, slots=True)
class _Ready:
    """A target's arms, all checked, the default one first."""

    target: Target
    runtime: RuntimeSpec
    arms: tuple[Arm, ...]
    choice: Choice
    selected: Selection | None
    """How its precision was chosen; None where it was named."""


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
                lambda: self._chosen(multiple, precision).to_json(),
            )
            self._found[key] = Choice.from_json(text)
        return self._found[key]

    def _chosen(self, multiple: int, precision: str) -> Choice:
        """With what is too thin for each plan as its note."""
        choice = search.choose(
            self.study, self.job, multiple, precision, self.reference, self.judge_trial, self.progress
        )
        plans = (thin.noted(self.study, plan) for plan in choice.plans)
        return replace(choice, plans=tuple(plans))

    def _judge(self, module: nn.Module, label: str, original: Judged | None, source: str = "") -> Judged | None:
        """A module on the selection split; None without labels."""
        if self.job.metric is None or self.job.selection is None:
            return None
        predictions = evaluation.predict(
            torch_run(module), self.job.selection, self.job, self.progress, label, source=source
        )
        return evaluation.judge_selection(predictions, self.job, original)

    def judge_trial(self, module: nn.Module, label: str) -> Judged:
        """A factored module on the selection split, which has labels."""
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
        self.recoverer = Recoverer(job, self.study, self.chooser.judge_trial, progress)
        self.settler = Settler(job, self.study, progress)
        # the quantizer gets a diverse subset; the spaces got the whole pool, since a covariance gains from each sample
        splits = [(split.name, split.key) for split in job.splits]
        self.data = DataReport.from_json(
            job.cache.text(
                job.stage_key("data", splits, job.options.calib_size, job.labels),
                lambda: coverage.survey(job, self.study.folded, self.study.graph, progress).to_json(),
            )
        )
        self.bench = Workbench(job, self.chooser.reference, self.data.chosen, work, progress)
        self._test: Judged | None = None
        self._dense: dict[tuple[str, str], Arm] = {}

    def _notes(self) -> list[str]:
        """Where weights are random: bytes and times hold, quality does not. And what the outputs were taken for."""
        sample = self.job.model.sample
        alone = sample.alone if sample and self.job.options.weights is None else ""
        return [note for note in (alone, self.job.assumed) if note]

    def try_out(self, target: Target) -> None:
        """Make the dense arm at the precision that was named: a model that cannot have it is found before a search."""
        precision = self.job.options.precision
        if self.job.options.dense and precision != "auto":
            self._dense_arm(target, target.runtime(self.job.options.runtime), precision)

    def ready(self, target: Target) -> _Ready:
        """Every arm for a target, within the budgets, ready to be written."""
        job = self.job
        runtime = target.runtime(job.options.runtime)
        selected: Selection | None = None
        if job.options.precision == "auto":
            precision.check_measurable(target, runtime)
            factored, choice, selected = precision.fastest(
                lambda name: self._factored(target, runtime, name),
                job, target, runtime, self.chooser.reference, self.progress,
            )  # fmt: skip
        else:
            factored, choice = self._factored(target, runtime, job.options.precision)
        arms = [factored]
        if job.options.dense:
            for name in dict.fromkeys((factored.precision, "fp32")):
                arm = self._dense_arm(target, runtime, name)
                arms.append(self._kept(arm, target, runtime) or arm)
        return _Ready(target, runtime, tuple(arms), choice, selected)

    def write(self, ready: _Ready, out: Path) -> Built:
        """The bundle; this is the only time that the test split is judged."""
        job, path = self.job, bundling.path(out, ready.target, ready.runtime.name)
        plan = ready.arms[0].plan
        recovery = self.recoverer.of(plan)
        notes = [_second_pass(job, self.study, plan, self.progress)] if plan else []
        notes += [recovery.note] if recovery else []
        notes += [self._gauged(plan, ready.target).note] if plan and plan.projected else []
        bundling.write(
            path, job, ready.target, ready.runtime, ready.arms, ready.choice, self._original(),
            data=self.data, recovered=None if recovery is None else recovery.record,
            notes=[*self._notes(), *filter(None, notes), *(note for arm in ready.arms for note in keeping.notes(arm))],
            precision=None if ready.selected is None else ready.selected.to_dict(), zip_too=job.options.zip,
            progress=self.progress,
        )  # fmt: skip
        with Bundle.open(path) as bundle:
            return Built(path, bundle.manifest, reused=False)

    def _dense_arm(self, target: Target, runtime: RuntimeSpec, precision: str) -> Arm:
        """As the backend makes it by itself, without a repair; made once."""
        key = (target.name, precision)
        if key not in self._dense:
            self._dense[key] = self._arm("dense", None, target, runtime, precision)
        return self._dense[key]

    def _arm(
        self, variant: str, plan: FactorPlan | None, target: Target, runtime: RuntimeSpec, precision: str,
        keep_float: Sequence[LayerError] = (), repaired: bool = False,
    ) -> Arm:  # fmt: skip
        parameters = self.study.parameters - (0 if plan is None else plan.saved_parameters)
        gauged = None if plan is None else self._gauged(plan, target)

        def module() -> nn.Module:
            made = gauged.module() if gauged else self.study.dense
            if not repaired:
                return made
            settled = [layer.name for layer in gauged.plan.projected] if gauged else []
            return equalize(made, trace(made, feed(made, self.job.calibration.example())), settled)

        plan = gauged.plan if gauged else None
        return self.bench.arm(variant, module, plan, parameters, target, runtime, precision, keep_float, repaired)

    def _gauged(self, plan: FactorPlan, target: Target) -> Gauged:
        """The factored model that arms are made from."""
        recovery = self.recoverer.of(plan)
        return self.settler.of(
            recovery.plan if recovery else plan,
            target,
            lambda: self.recoverer.module(recovery) if recovery else factored(self.study, plan, self.progress),
        )

    def _factored(self, target: Target, runtime: RuntimeSpec, precision: str) -> tuple[Arm, Choice]:
        """The factored arm, within the budgets.

        Where quantization takes it over the drop, either its worst layers stay in float or the plan becomes more
        careful, whichever is smaller. A layer in float costs three more bytes for each of its weights, a careful plan
        all the weights that it adds, and both cost time in proportion to that: so bytes decide for both. A layer is
        tried first, because the worst ones are often small (the first convolution, the head).
        """
        choice = self.chooser.choice(target.rank_multiple, precision)
        limit = self.job.budgets.get("drop")
        index, stride = len(choice.plans) - 1, 1
        found: list[tuple[int, int, Arm]] = []
        tried: list[tuple[float, str]] = []
        while True:
            arm = self._arm("factored", choice.plans[index], target, runtime, precision)
            held = self._kept(arm, target, runtime)
            if held is not None:
                found.append((held.artifact.size_bytes, -index, held))
            else:
                tried.append((self._drop(arm) or 0.0, choice.plans[index].made_by))
            careful = max(0, index - stride)
            more = choice.plans[index].saved_parameters - choice.plans[careful].saved_parameters
            size = arm.artifact.size_bytes + more * search.BYTES_PER_WEIGHT[precision]
            if index == 0 or (found and min(found)[0] <= size):
                break
            index, stride = careful, stride + 1
        if not found:
            assert limit is not None  # without it the first arm holds
            raise _missed(self.job, limit, precision, target, min(tried))
        _, index, arm = min(found, key=lambda entry: entry[:2])
        index, plan = -index, choice.plans[-index]
        arm, plan = self._fitted(arm, plan, target, runtime)
        search.check_costs(self.study, plan, self.job.budgets, _remedy(self.job))
        _check_size(self.job, arm, target)
        return arm, replace(choice, plans=(*choice.plans[:index], plan))

    def _kept(self, arm: Arm, target: Target, runtime: RuntimeSpec) -> Arm | None:
        """The arm, if need be repaired or with its worst layers in float; None where it does not hold the drop then.

        The need is a missed drop, or outputs that are off by more than `keeping.TOLERANCE` where that can be changed.
        A repair (equalised layers, corrected biases) costs nothing on the board, so it comes first. The number of
        layers in float is found by halving: it is less than twice the fewest that would do. What fails on the way is
        noted.
        """
        said: list[str] = []
        found = self._mended(arm, target, runtime, said)
        return found and replace(found, notes=(*found.notes, *(f"{arm.name}: {note}" for note in said)))

    def _mended(self, arm: Arm, target: Target, runtime: RuntimeSpec, said: list[str]) -> Arm | None:
        within = self._within(arm)
        if (within and arm.loss <= keeping.TOLERANCE) or arm.precision not in keeping.PRECISIONS:
            return arm if within else None

        def made(layers: Sequence[LayerError] = (), *, repaired: bool, precision: str = arm.precision) -> Arm:
            return self._arm(arm.variant, arm.plan, target, runtime, precision, layers, repaired)

        def holds(other: Arm) -> bool:
            return self._within(other) and (not within or other.loss <= keeping.TOLERANCE)

        base = keeping.better(arm, keeping.made(lambda: made(repaired=True), "repair", said))
        if holds(base):
            return base
        try:
            static = base if base.precision == "int8" else made(repaired=base.repaired, precision="int8")
            errors = self.bench.layer_errors(static, runtime)
        except StageError as e:
            if not within:
                raise
            said.append(keeping.failed("layers in float", e))
            return arm
        if arm.precision == "int8-io":  # what gives an output has its name, and gives it in int8
            errors = tuple(layer for layer in errors if layer.name not in self.bench.outputs)
        found = keeping.fewest(errors, lambda layers: made(layers, repaired=base.repaired), holds, said)
        return found or (arm if within else None)

    def _within(self, arm: Arm) -> bool:
        limit, lost = self.job.budgets.get("drop"), self._drop(arm)
        return limit is None or lost is None or lost <= limit.limit + 1e-9

    def _fitted(self, arm: Arm, plan: FactorPlan, target: Target, runtime: RuntimeSpec) -> tuple[Arm, FactorPlan]:
        """Smaller plans that hold the drop until the file is within its limit: what the graph weighs is known only once
        it is compiled."""
        size, options = self.job.budgets.get("size"), self.job.options
        if size is None or options.plan is not None or options.energy is not None:
            return arm, plan
        for _ in range(_FITTINGS):
            excess = arm.artifact.size_bytes - size.limit
            if excess <= 0:
                break
            try:
                less = search.smaller(self.study, plan, excess, arm.precision, self.job.budgets, self.progress)
            except BudgetError:
                break  # _check_size says by how much the smallest file misses the limit
            less = thin.noted(self.study, less)
            made = self._kept(self._arm("factored", less, target, runtime, arm.precision), target, runtime)
            if made is None:
                break
            arm, plan = made, less
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
            hint=_remedy(job, target, arm.precision),
        )


def _remedy(job: Job, target: Target | None = None, precision: str | None = None) -> str:
    """What would make a plan that costs too much smaller, of what was asked for; with ``precision`` also the file."""
    said = []
    if job.options.plan is not None:
        said.append("give the plan smaller ranks, or leave out --plan to have one made for the budget")
    elif job.options.energy is not None:
        said.append("lower the energy, or leave out --energy to have a plan made for the budget")
    elif job.budgets.get("drop") is not None:
        said.append("the smallest plan within the other limits is still too large: allow a larger drop")
    if target is not None and precision is not None:
        weights = search.BYTES_PER_WEIGHT
        if any(weights[other] < weights[precision] for other in target.runtime(job.options.runtime).precisions):
            said.append("take a lower precision")
    return "; or ".join(said)


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
