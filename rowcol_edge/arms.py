"""An arm: a variant of the model at a precision, made the same way whichever it is.

    module ─ export (see `sources`) ─ compile ─▶ artifact, its stages' errors, its quality on the selection split

After each stage the outputs on real inputs are compared with the dense PyTorch original.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from torch import nn

from . import evaluation, sources
from .backends import load_backend
from .backends.base import AccuracyControl, Artifact, LayerError, QuantSpec
from .datasets import Feeds
from .device.runtimes import RuntimeOptions
from .errors import ParityError
from .evaluation import Judged
from .export.parity import Outputs, Parity, compare, first_outside, torch_outputs
from .factoring.plan import FactorPlan
from .job import Job, Progress
from .targets import RuntimeSpec, Target

_SAMPLES = 16
#: relative error against the stage before; a stage that only rewrites the graph must stay within
_EXACT = 1e-3
#: relative error against the dense original from which the report names a stage that is allowed to lose
_LOSSY = 0.3


@dataclass(frozen=True, slots=True)
class Arm:
    """One arm, ready to be packaged.

    Attributes:
        stages: error of each stage against the dense original, in order.
        selection: quality on the selection split, with the threshold tuned there; None without labels.
        loss: relative error of its outputs against its own float source, on inputs that no range has seen.
        kept_float: layers that stayed in float, worst first.
        repaired: whether its layers were equalised before the export, and its biases corrected.
        notes: what a person should know, such as a simplifier that crashed.
    """

    variant: str
    precision: str
    artifact: Artifact
    stages: tuple[Parity, ...]
    parameters: int
    plan: FactorPlan | None
    selection: Judged | None
    notes: tuple[str, ...]
    loss: float = 0.0
    kept_float: tuple[LayerError, ...] = ()
    repaired: bool = False

    @property
    def name(self) -> str:
        return f"{self.variant}@{self.precision}"


@dataclass(frozen=True, slots=True)
class _Source:
    """An exported variant, from which every precision is compiled; ``outputs`` are its own on the real inputs, ``held``
    those on the held-out ones."""

    path: Path
    outputs: Outputs
    held: Outputs
    stages: tuple[Parity, ...]
    notes: tuple[str, ...]


class Workbench:
    """Makes the arms of one job. A variant is exported once per kind of file and shared by its precisions."""

    def __init__(
        self, job: Job, original: Judged | None, chosen: Sequence[int], work: Path, progress: Progress
    ) -> None:
        self._job = job
        self._original = original
        self._work = work
        self._progress = progress
        self._sources: dict[tuple[object, ...], _Source] = {}
        self._real: Feeds = job.calibration.take(_SAMPLES)
        self._ranges, self._held = evaluation.held_out(job, chosen)
        self._dense: Outputs = torch_outputs(job.model.module, [self._real])
        evaluation.check_contract(job, {name: array[:1] for name, array in self._dense[0].items()})

    def arm(
        self, variant: str, module: nn.Module, plan: FactorPlan | None, parameters: int,
        target: Target, runtime: RuntimeSpec, precision: str, keep_float: Sequence[LayerError] = (),
        repaired: bool = False,
    ) -> Arm:  # fmt: skip
        """Make one arm, with the layers ``keep_float`` not quantized.

        ``repaired`` says that the layers of ``module`` are equalised; the biases are corrected too then.

        Raises:
            UnsupportedOpError: an operator the exporter cannot take; names the module.
            ParityError: a stage that must not change the outputs changed them.
            StageError: a stage failed, or the file does not hold the types it claims.
        """
        name = f"{variant}@{precision}"
        source = self._source(variant, module, plan, runtime, repaired)
        self._progress(f"compile {name}", 0, 1)
        backend = load_backend(runtime.name)
        artifact = backend.compile(
            source.path,
            runtime,
            replace(
                self._quant(precision, target),
                keep_float=tuple(layer.name for layer in keep_float),
                correct_bias=repaired,
            ),
            self._ranges,
            self._file(name, backend.suffix),
            self._metadata(name, plan),
        )
        self._progress(f"compile {name}", 1, 1)
        with evaluation.opened(artifact.path, backend.host_runtime, runtime_options(target, runtime)) as run:
            outputs = [run(self._real)]
            stage = compare(f"compile {precision}", self._dense, outputs, _LOSSY)
            if precision == "fp32":
                _exact(f"{name}: compile", source.outputs, outputs)
            loss = compare(name, source.held, [run(self._held)], _LOSSY).relative_error
            selection = self._judged(run, name)
        stages = (*source.stages, stage)
        notes = (*source.notes, *(f"{name}: {note}" for note in artifact.notes), *_left(name, stages))
        return Arm(
            variant, precision, artifact, stages, parameters, plan, selection, notes, loss, tuple(keep_float), repaired
        )

    def layer_errors(self, arm: Arm, runtime: RuntimeSpec) -> tuple[LayerError, ...]:
        """What quantization does to each layer of an int8 arm, worst first."""
        self._progress(f"layer errors {arm.name}", 0, 1)
        source = self._sources[_key(arm.variant, arm.plan, runtime, arm.repaired)]
        errors = load_backend(runtime.name).layer_errors(source.path, arm.artifact.path, self._ranges)
        self._progress(f"layer errors {arm.name}", 1, 1)
        return errors

    def _quant(self, precision: str, target: Target) -> QuantSpec:
        job, spec = self._job, QuantSpec.for_target(precision, target)
        drop = job.budgets.get("drop")
        if not job.options.accuracy_control or precision != "int8" or job.metric is None or drop is None:
            return spec
        assert job.selection is not None  # a job has a metric only with labelled selection data
        assert job.selection.labels is not None
        accuracy = AccuracyControl(
            job.selection.batches, job.selection.labels, job.metric.name, job.positive, drop.limit
        )
        return replace(spec, accuracy=accuracy)

    def _metadata(self, name: str, plan: FactorPlan | None) -> dict[str, str]:
        """What a file of this arm says of itself, by key; structured values as JSON."""
        job = self._job
        said = {
            "rowcol_edge.model": job.model.name,
            "rowcol_edge.arm": name,
            "rowcol_edge.contract": job.contract,
            "rowcol_edge.labels": json.dumps(job.labels, ensure_ascii=False),
        }
        if job.preprocess is not None:
            said["rowcol_edge.preprocess"] = json.dumps(job.preprocess.to_dict())
            said["rowcol_edge.frames"] = json.dumps(job.options.bake_preprocess)
        if plan is not None:
            said["rowcol_edge.plan_digest"] = plan.digest
        return said

    def _source(
        self, variant: str, module: nn.Module, plan: FactorPlan | None, runtime: RuntimeSpec, repaired: bool
    ) -> _Source:
        key = _key(variant, plan, runtime, repaired)
        if key not in self._sources:
            self._sources[key] = self._exported(variant, module, plan is not None, runtime)
        return self._sources[key]

    def _exported(self, variant: str, module: nn.Module, factored: bool, runtime: RuntimeSpec) -> _Source:
        """Make the file the backend starts from, and compare after each step."""
        self._progress(f"export {variant}", 0, 1)
        tolerance = _LOSSY if factored else _EXACT
        outputs: Outputs = torch_outputs(module, [self._real])
        stages = [compare("factor" if factored else "fold", self._dense, outputs, tolerance)]
        notes: list[str] = []
        last: sources.Step | None = None
        request = sources.Request(
            module,
            self._job.calibration.example(),
            runtime,
            self._job.options.dynamic_batch,
            lambda suffix: self._file(variant, suffix),
        )
        for step in sources.steps(load_backend(runtime.name).consumes, request):
            found = step.run(self._real)
            _exact(f"{variant}: {step.stage}", outputs, found)
            stages.append(compare(step.stage, self._dense, found, tolerance))
            notes += [f"{variant}: {step.note}"] if step.note else []
            outputs, last = found, step
        assert last is not None  # every kind of source takes a step
        self._progress(f"export {variant}", 1, 1)
        return _Source(last.path, outputs, last.run(self._held), tuple(stages), tuple(notes))

    def _judged(self, run: evaluation.Run, name: str) -> Judged | None:
        job = self._job
        if job.metric is None or job.selection is None:
            return None
        predictions = evaluation.predict(run, job.selection, job, self._progress, f"judge {name}")
        return evaluation.judge_selection(predictions, job, self._original)

    def _file(self, stem: str, suffix: str) -> Path:
        """A path in the work folder that no other stage has."""
        return self._work / f"{len(list(self._work.iterdir())):03d}-{stem}{suffix}"


def _key(variant: str, plan: FactorPlan | None, runtime: RuntimeSpec, repaired: bool) -> tuple[object, ...]:
    consumes = load_backend(runtime.name).consumes
    return (plan.digest if plan else variant, repaired, *sources.key(consumes, runtime))


def runtime_options(target: Target, runtime: RuntimeSpec) -> RuntimeOptions:
    """How the build opens an artifact: on this machine's CPU, as the target asks for otherwise."""
    own = load_backend(runtime.name).host_runtime == runtime.name
    # a folder of compiled models is for the board's own starts
    properties = {key: value for key, value in runtime.properties.items() if own and key != "CACHE_DIR"}
    return RuntimeOptions(threads=target.threads, properties=properties)


def _exact(what: str, before: Outputs, after: Outputs) -> None:
    """Raises ParityError where a stage that only rewrites the graph changed what it computes."""
    found = compare(what, before, after, _EXACT)
    if not found.ok:
        raise ParityError(
            what,
            expected=f"outputs as before the stage, within a relative error of {_EXACT:g}",
            got=f"{found.relative_error:.2e}",
            hint="the exported graph computes something else: report the model's operators",
        )


def _left(name: str, stages: tuple[Parity, ...]) -> tuple[str, ...]:
    """A note naming the first stage that left its tolerance against the dense original, if one did."""
    outside = first_outside(stages)
    if outside is None:
        return ()
    error = f"relative error {outside.relative_error:.3f} against the dense original, tolerance {outside.tolerance:g}"
    return (f"{name}: outputs leave the tolerance at stage {outside.stage} ({error})",)
