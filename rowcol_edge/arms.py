"""An arm: a variant of the model at a precision, made the same way whichever it is.

    module ─ export (see `sources`) ─ compile ─▶ artifact, its stages' errors, its quality on the selection split

After each stage the outputs on real inputs are compared with the dense PyTorch original.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from torch import nn

from . import cache as caching
from . import evaluation, sources
from .backends import load_backend
from .backends.base import AccuracyControl, Artifact, LayerError, QuantSpec
from .datasets import Feeds
from .device import digests, system
from .device.runtimes import RuntimeOptions
from .errors import ParityError
from .evaluation import Judged
from .export.parity import Outputs, Parity, compare, first_outside, torch_outputs
from .factoring.plan import FactorPlan
from .job import Job, Progress
from .targets import RuntimeSpec, Target

_SAMPLES = 16
_SAID = "source.json"
_COMPILED = ("name", "oldest", "opset", "ir_version", "providers", "properties")
"""What of a runtime's entry in a target decides the compiled file."""
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
        repaired: whether its layers were equalised before the export, and its biases corrected by a backend that can.
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
    sha256: str
    outputs: Outputs
    held: Outputs
    stages: tuple[Parity, ...]
    notes: tuple[str, ...]

    def describe(self, folder: Path) -> None:
        """Write beside the model, which lies in ``folder``, what else is to be known of it."""
        said = {
            "model": self.path.name,
            "sha256": self.sha256,
            "stages": [asdict(stage) for stage in self.stages],
            "notes": self.notes,
        }
        (folder / _SAID).write_text(json.dumps(said), encoding="utf-8")
        (outputs,), (held,) = self.outputs, self.held
        both = {f"real {name}": array for name, array in outputs.items()}
        caching.write_arrays(folder, both | {f"held {name}": array for name, array in held.items()})

    @classmethod
    def read(cls, folder: Path) -> _Source:
        """The source that `describe` left there, or in a folder whose files were copied to this one."""
        said = json.loads((folder / _SAID).read_text(encoding="utf-8"))
        stages = tuple(Parity(**stage) for stage in said["stages"])
        both = caching.read_arrays(folder)
        outputs, held = (
            [{name.partition(" ")[2]: array for name, array in both.items() if name.startswith(kind)}]
            for kind in ("real ", "held ")
        )
        return cls(folder / said["model"], said["sha256"], outputs, held, stages, tuple(said["notes"]))


class Workbench:
    """Makes the arms of one job. A variant is exported once per kind of file and shared by its precisions."""

    def __init__(
        self, job: Job, original: Judged | None, chosen: Sequence[int], work: Path, progress: Progress
    ) -> None:
        self._job = job
        self._original = original
        self._work = work
        self._places = 0
        self._progress = progress
        self._sources: dict[tuple[object, ...], _Source] = {}
        self._real: Feeds = job.calibration.spread(_SAMPLES)
        self._chosen = tuple(map(int, chosen))
        self._ranges, self._held = evaluation.held_out(job, chosen)
        self._dense: Outputs = [
            job.cache.arrays(
                job.stage_key("dense outputs", job.calibration.key),
                lambda: torch_outputs(job.model.module, [self._real])[0],
            )
        ]
        evaluation.check_contract(job, {name: array[:1] for name, array in self._dense[0].items()})

    def arm(
        self, variant: str, module: Callable[[], nn.Module], plan: FactorPlan | None, parameters: int,
        target: Target, runtime: RuntimeSpec, precision: str, keep_float: Sequence[LayerError] = (),
        repaired: bool = False,
    ) -> Arm:  # fmt: skip
        """Make one arm of what ``module`` returns, which is asked for only where the cache has no file of it.

        The layers ``keep_float`` are not quantized. ``repaired`` says that the layers of the module are equalised; the
        biases are corrected too then, where the backend does that.

        Raises:
            UnsupportedOpError: an operator the exporter cannot take; names the module.
            ParityError: a stage that must not change the outputs changed them.
            StageError: a stage failed, or the file does not hold the types it claims.
        """
        name = f"{variant}@{precision}"
        source = self._source(variant, module, plan, runtime, repaired)
        quant = replace(
            self._quant(precision, target),
            keep_float=tuple(layer.name for layer in keep_float),
            correct_bias=repaired,
        )
        artifact = self._compiled(name, source, runtime, quant, plan)
        host, options = load_backend(runtime.name).host_runtime, runtime_options(target, runtime)
        with evaluation.opened(artifact.path, host, options) as run:
            what = evaluation.source(artifact, host, options)
            outputs = self._kept(what, "real", lambda: run(self._real))
            stage = compare(f"compile {precision}", self._dense, outputs, _LOSSY)
            if precision == "fp32":
                _exact(f"{name}: compile", source.outputs, outputs)
            held = self._kept(what, "held out", lambda: run(self._held))
            loss = compare(name, source.held, held, _LOSSY).relative_error
            selection = self._judged(run, name, what)
        stages = (*source.stages, stage)
        notes = (*source.notes, *(f"{name}: {note}" for note in artifact.notes), *_left(name, stages))
        return Arm(
            variant, precision, artifact, stages, parameters, plan, selection, notes, loss, tuple(keep_float), repaired
        )

    def _compiled(
        self, name: str, source: _Source, runtime: RuntimeSpec, quant: QuantSpec, plan: FactorPlan | None
    ) -> Artifact:
        job, backend, metadata = self._job, load_backend(runtime.name), self._metadata(name, plan)

        def compiled(folder: Path) -> None:
            out = folder / f"artifact{backend.suffix}"
            backend.compile(source.path, runtime, quant, self._ranges, out, metadata).describe(folder)

        self._progress(f"compile {name}", 0, 1)
        folder = self._place(name)
        asked = {field: value for field, value in asdict(runtime).items() if field in _COMPILED}
        judged = None if quant.accuracy is None else [job.search_key, quant.accuracy.metric, quant.accuracy.max_drop_pp]
        settings = asdict(replace(quant, accuracy=None))
        key = job.stage_key("compile", source.sha256, asked, settings, judged, self._inputs_key, metadata)
        job.cache.get(key, folder, compiled)
        self._progress(f"compile {name}", 1, 1)
        return Artifact.read(folder)

    def _kept(self, what: str, kind: str, make: Callable[[], Feeds]) -> Outputs:
        """Outputs of an artifact on some of this job's inputs, from the cache where it has them."""
        return [self._job.cache.arrays(self._job.stage_key("outputs", what, kind, self._inputs_key), make)]

    @property
    def _inputs_key(self) -> list[object]:
        """What decides the inputs that ranges, stages and held-out errors are taken on."""
        selection = self._job.selection
        return [self._job.calibration.key, None if selection is None else selection.key, self._chosen]

    @property
    def outputs(self) -> tuple[str, ...]:
        """Names of the model's outputs."""
        return tuple(self._dense[0])

    def layer_errors(self, arm: Arm, runtime: RuntimeSpec) -> tuple[LayerError, ...]:
        """What quantization does to each layer of an int8 arm, worst first."""
        source = self._sources[_key(arm.variant, arm.plan, runtime, arm.repaired)]

        def found() -> str:
            errors = load_backend(runtime.name).layer_errors(source.path, arm.artifact.path, self._ranges)
            return json.dumps([asdict(layer) for layer in errors])

        self._progress(f"layer errors {arm.name}", 0, 1)
        job = self._job
        key = job.stage_key("layer errors", runtime.name, source.sha256, arm.artifact.sha256, self._inputs_key)
        errors = tuple(LayerError(**layer) for layer in json.loads(job.cache.text(key, found)))
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
        self, variant: str, module: Callable[[], nn.Module], plan: FactorPlan | None, runtime: RuntimeSpec,
        repaired: bool,
    ) -> _Source:  # fmt: skip
        key = _key(variant, plan, runtime, repaired)
        if key not in self._sources:
            job, folder = self._job, self._place(variant)
            recovered = job.recovery_key if plan else []  # a plan alone does not decide a recovered model
            job.cache.get(
                job.stage_key("export", *map(str, key), job.options.dynamic_batch, self._inputs_key, *recovered),
                folder,
                lambda folder: self._export(variant, module(), plan is not None, runtime, folder),
            )
            self._sources[key] = _Source.read(folder)
        return self._sources[key]

    def _export(self, variant: str, module: nn.Module, factored: bool, runtime: RuntimeSpec, folder: Path) -> None:
        """Make the file the backend starts from, and compare after each step; leaves a `_Source` in ``folder``."""
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
            lambda suffix: self._place(variant).with_suffix(suffix),
        )
        for step in sources.steps(load_backend(runtime.name).consumes, request):
            found = step.run(self._real)
            _exact(f"{variant}: {step.stage}", outputs, found)
            stages.append(compare(step.stage, self._dense, found, tolerance))
            notes += [f"{variant}: {step.note}"] if step.note else []
            outputs, last = found, step
        assert last is not None  # every kind of source takes a step
        held = last.run(self._held)
        path = last.path.replace(folder / f"model{last.path.suffix}")
        sha256, _ = digests.sha256_file(path)
        self._progress(f"export {variant}", 1, 1)
        _Source(path, sha256, outputs, held, tuple(stages), tuple(notes)).describe(folder)

    def _judged(self, run: evaluation.Run, name: str, source: str) -> Judged | None:
        job = self._job
        if job.metric is None or job.selection is None:
            return None
        predictions = evaluation.predict(run, job.selection, job, self._progress, f"judge {name}", source=source)
        return evaluation.judge_selection(predictions, job, self._original)

    def _place(self, stem: str) -> Path:
        """A path in the work folder that no other stage has."""
        self._places += 1
        return self._work / f"{self._places:03d}-{stem}"


def _key(variant: str, plan: FactorPlan | None, runtime: RuntimeSpec, repaired: bool) -> tuple[object, ...]:
    consumes = load_backend(runtime.name).consumes
    gauges = [layer.gauge for layer in plan.projected] if plan else []
    return (plan.digest if plan else variant, *gauges, repaired, *sources.key(consumes, runtime))


def runtime_options(target: Target, runtime: RuntimeSpec) -> RuntimeOptions:
    """How the build opens an artifact: on this machine's CPU, as the target asks for otherwise, with the sums that the
    target's processor gives."""
    own = runtime.runs_at_build
    # a folder of compiled models is for the board's own starts, and another device's settings are for that device
    properties = {key: value for key, value in runtime.properties.items() if own and key != "CACHE_DIR"}
    exact_sums = system.saturates_only_here(target.to_dict())
    return RuntimeOptions(threads=target.threads, properties=properties, exact_sums=exact_sums)


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
