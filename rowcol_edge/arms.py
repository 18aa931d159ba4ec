"""An arm: a variant of the model at a precision, made the same way whichever it is.

    module ─ export ─ simplify ─ compile ─▶ artifact, its stages' errors, its quality on the selection split

After each stage the outputs on real inputs are compared with the dense PyTorch original.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from . import evaluation
from .backends import load_backend
from .backends.base import Artifact, Calibration, QuantSpec
from .datasets import Feeds
from .device.runtimes import RuntimeOptions
from .errors import ParityError
from .evaluation import Judged
from .export import onnx, simplify
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

    @property
    def name(self) -> str:
        return f"{self.variant}@{self.precision}"


@dataclass(frozen=True, slots=True)
class _Source:
    """An exported variant, from which every precision is compiled; ``outputs`` are its own on the real inputs."""

    path: Path
    outputs: Outputs
    stages: tuple[Parity, ...]
    notes: tuple[str, ...]


class Workbench:
    """Makes the arms of one job. A variant is exported once per opset and IR version and shared by its precisions."""

    def __init__(
        self, job: Job, original: Judged | None, calibration: Calibration, work: Path, progress: Progress
    ) -> None:
        self._job = job
        self._calibration = calibration
        self._original = original
        self._work = work
        self._progress = progress
        self._sources: dict[tuple[str, int, int], _Source] = {}
        self._real: Feeds = job.calibration.take(_SAMPLES)
        self._dense: Outputs = torch_outputs(job.model.module, [self._real])
        evaluation.check_contract(job, {name: array[:1] for name, array in self._dense[0].items()})

    def arm(
        self, variant: str, module: nn.Module, plan: FactorPlan | None, parameters: int,
        target: Target, runtime: RuntimeSpec, precision: str,
    ) -> Arm:  # fmt: skip
        """Make one arm.

        Raises:
            UnsupportedOpError: an operator the exporter cannot take; names the module.
            ParityError: a stage that must not change the outputs changed them.
            StageError: a stage failed, or the file does not hold the types it claims.
        """
        name = f"{variant}@{precision}"
        source = self._source(variant, module, plan, runtime)
        self._progress(f"compile {name}", 0, 1)
        backend = load_backend(runtime.name)
        artifact = backend.compile(
            source.path,
            runtime,
            QuantSpec.for_target(precision, target),
            self._calibration,
            self._file(name, backend.suffix),
            self._metadata(name, plan),
        )
        self._progress(f"compile {name}", 1, 1)
        with evaluation.opened(artifact.path, backend.host_runtime, runtime_options(target, runtime)) as run:
            outputs = [run(self._real)]
            stage = compare(f"compile {precision}", self._dense, outputs, _LOSSY)
            if precision == "fp32":
                _exact(f"{name}: compile", source.outputs, outputs)
            selection = self._judged(run, name)
        stages = (*source.stages, stage)
        notes = (*source.notes, *(f"{name}: {note}" for note in artifact.notes), *_left(name, stages))
        return Arm(variant, precision, artifact, stages, parameters, plan, selection, notes)

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
        if plan is not None:
            said["rowcol_edge.plan_digest"] = plan.digest
        return said

    def _source(self, variant: str, module: nn.Module, plan: FactorPlan | None, runtime: RuntimeSpec) -> _Source:
        key = (plan.digest if plan else variant, runtime.opset, runtime.ir_version)
        if key not in self._sources:
            self._sources[key] = self._exported(variant, module, plan is not None, runtime)
        return self._sources[key]

    def _exported(self, variant: str, module: nn.Module, factored: bool, runtime: RuntimeSpec) -> _Source:
        """Export, simplify, and compare after each."""
        self._progress(f"export {variant}", 0, 2)
        rewritten = torch_outputs(module, [self._real])
        stages = [compare("factor" if factored else "fold", self._dense, rewritten, _LOSSY if factored else _EXACT)]
        raw = self._file(variant)
        onnx.export(
            module,
            self._job.calibration.example(),
            raw,
            opset=runtime.opset,
            ir_version=runtime.ir_version,
            dynamic_batch=self._job.options.dynamic_batch,
        )
        exported = self._outputs(raw)
        _exact(f"{variant}: export", rewritten, exported)
        stages.append(compare("export", self._dense, exported, _LOSSY if factored else _EXACT))
        self._progress(f"export {variant}", 1, 2)
        simplified = simplify.simplify(raw, self._file(variant))
        outputs = self._outputs(simplified.path)
        _exact(f"{variant}: simplify", exported, outputs)
        stages.append(compare("simplify", self._dense, outputs, _LOSSY if factored else _EXACT))
        self._progress(f"export {variant}", 2, 2)
        notes = () if simplified.applied else (f"{variant}: not simplified: {simplified.reason}",)
        return _Source(simplified.path, outputs, tuple(stages), notes)

    def _outputs(self, path: Path) -> Outputs:
        """Of an ONNX file on the way, which onnxruntime runs whatever the target's runtime is."""
        with evaluation.opened(path, "onnxruntime", RuntimeOptions()) as run:
            return [run(self._real)]

    def _judged(self, run: evaluation.Run, name: str) -> Judged | None:
        job = self._job
        if job.metric is None or job.selection is None:
            return None
        predictions = evaluation.predict(run, job.selection, job, self._progress, f"judge {name}")
        return evaluation.judge_selection(predictions, job, self._original)

    def _file(self, stem: str, suffix: str = ".onnx") -> Path:
        """A path in the work folder that no other stage has."""
        return self._work / f"{len(list(self._work.iterdir())):03d}-{stem}{suffix}"


def runtime_options(target: Target, runtime: RuntimeSpec) -> RuntimeOptions:
    """How the build opens an artifact: on this machine's CPU, as the target asks for otherwise."""
    own = load_backend(runtime.name).host_runtime == runtime.name
    return RuntimeOptions(threads=target.threads, properties=runtime.properties if own else {})


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
