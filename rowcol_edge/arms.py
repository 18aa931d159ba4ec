"""An arm: a variant of the model at a precision, made the same way whichever it is.

    module ─ export ─ simplify ─ compile ─▶ artifact, its stages' errors, its quality on the selection split

After each stage the outputs on real inputs are compared with the dense PyTorch original.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from torch import nn

from . import cache as caching
from . import evaluation
from .backends import load_backend
from .backends.base import Artifact, QuantSpec
from .datasets import Feeds
from .device import digests
from .device.runtimes import RuntimeOptions
from .errors import ParityError
from .evaluation import Judged
from .export import onnx, simplify
from .export.parity import Outputs, Parity, compare, first_outside, torch_outputs
from .factoring.plan import FactorPlan
from .job import Job, Progress
from .targets import RuntimeSpec, Target

_SAMPLES = 16
_SAID = "source.json"
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
    sha256: str
    outputs: Outputs
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
        (outputs,) = self.outputs
        caching.write_arrays(folder, outputs)

    @classmethod
    def read(cls, folder: Path) -> _Source:
        said = json.loads((folder / _SAID).read_text(encoding="utf-8"))
        stages = tuple(Parity(**stage) for stage in said["stages"])
        outputs = [caching.read_arrays(folder)]
        return cls(folder / said["model"], said["sha256"], outputs, stages, tuple(said["notes"]))


class Workbench:
    """Makes the arms of one job. A variant is exported once per opset and IR version and shared by its precisions."""

    def __init__(self, job: Job, original: Judged | None, work: Path, progress: Progress) -> None:
        self._job = job
        self._original = original
        self._work = work
        self._places = 0
        self._progress = progress
        self._sources: dict[tuple[str, int, int], _Source] = {}
        self._real: Feeds = job.calibration.take(_SAMPLES)
        self._dense: Outputs = [
            job.cache.arrays(
                job.stage_key("dense outputs", job.calibration.key),
                lambda: torch_outputs(job.model.module, [self._real])[0],
            )
        ]
        evaluation.check_contract(job, {name: array[:1] for name, array in self._dense[0].items()})

    def arm(
        self, variant: str, module: Callable[[], nn.Module], plan: FactorPlan | None, parameters: int,
        target: Target, runtime: RuntimeSpec, precision: str,
    ) -> Arm:  # fmt: skip
        """Make one arm of what ``module`` returns, which is asked for only where the cache has no file of it.

        Raises:
            UnsupportedOpError: an operator the exporter cannot take; names the module.
            ParityError: a stage that must not change the outputs changed them.
            StageError: a stage failed, or the file does not hold the types it claims.
        """
        name = f"{variant}@{precision}"
        source = self._source(variant, module, plan, runtime)
        artifact = self._compiled(name, source, runtime, QuantSpec.for_target(precision, target), plan)
        host, options = load_backend(runtime.name).host_runtime, runtime_options(target, runtime)
        with evaluation.opened(artifact.path, host, options) as run:
            what = evaluation.source(artifact, host, options)
            key = self._job.stage_key("outputs", what, self._job.calibration.key)
            outputs = [self._job.cache.arrays(key, lambda: run(self._real))]
            stage = compare(f"compile {precision}", self._dense, outputs, _LOSSY)
            if precision == "fp32":
                _exact(f"{name}: compile", source.outputs, outputs)
            selection = self._judged(run, name, what)
        stages = (*source.stages, stage)
        notes = (*source.notes, *(f"{name}: {note}" for note in artifact.notes), *_left(name, stages))
        return Arm(variant, precision, artifact, stages, parameters, plan, selection, notes)

    def _compiled(
        self, name: str, source: _Source, runtime: RuntimeSpec, quant: QuantSpec, plan: FactorPlan | None
    ) -> Artifact:
        job, backend, metadata = self._job, load_backend(runtime.name), self._metadata(name, plan)

        def compiled(folder: Path) -> None:
            out = folder / f"artifact{backend.suffix}"
            backend.compile(source.path, runtime, quant, job.calibration.batches, out, metadata).describe(folder)

        self._progress(f"compile {name}", 0, 1)
        folder = self._place(name)
        asked = asdict(replace(runtime, install="", why="", precisions=()))
        key = job.stage_key("compile", source.sha256, asked, asdict(quant), job.calibration.key, metadata)
        job.cache.get(key, folder, compiled)
        self._progress(f"compile {name}", 1, 1)
        return Artifact.read(folder)

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

    def _source(
        self, variant: str, module: Callable[[], nn.Module], plan: FactorPlan | None, runtime: RuntimeSpec
    ) -> _Source:
        key = (plan.digest if plan else variant, runtime.opset, runtime.ir_version)
        if key not in self._sources:
            job, folder = self._job, self._place(variant)
            job.cache.get(
                job.stage_key("export", *key, job.options.dynamic_batch, job.calibration.key),
                folder,
                lambda folder: self._export(variant, module(), plan is not None, runtime, folder),
            )
            self._sources[key] = _Source.read(folder)
        return self._sources[key]

    def _export(self, variant: str, module: nn.Module, factored: bool, runtime: RuntimeSpec, folder: Path) -> None:
        """Export, simplify, and compare after each; leaves a `_Source` in ``folder``."""
        self._progress(f"export {variant}", 0, 2)
        rewritten = torch_outputs(module, [self._real])
        stages = [compare("factor" if factored else "fold", self._dense, rewritten, _LOSSY if factored else _EXACT)]
        raw = self._place(f"{variant}-raw").with_suffix(".onnx")
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
        simplified = simplify.simplify(raw, folder / "model.onnx")
        outputs = self._outputs(simplified.path)
        _exact(f"{variant}: simplify", exported, outputs)
        stages.append(compare("simplify", self._dense, outputs, _LOSSY if factored else _EXACT))
        self._progress(f"export {variant}", 2, 2)
        notes = () if simplified.applied else (f"{variant}: not simplified: {simplified.reason}",)
        digest, _ = digests.sha256_file(simplified.path)
        _Source(simplified.path, digest, outputs, tuple(stages), notes).describe(folder)

    def _outputs(self, path: Path) -> Outputs:
        """Of an ONNX file on the way, which onnxruntime runs whatever the target's runtime is."""
        with evaluation.opened(path, "onnxruntime", RuntimeOptions()) as run:
            return [run(self._real)]

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
