"""From arms to a bundle: the manifest's content, the golden samples, and the key by which a build is known again."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy.typing as npt
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import Version

from . import evaluation, package, recipes
from .arms import Arm, runtime_options
from .backends import load_backend, operators
from .coverage import DataReport
from .device import layers
from .device.installed import PACKAGES
from .device.layers import LayerMap
from .device.manifest import GRAPH_CHECKED, PLAN_NAME, RUN, ArmEntry, Manifest, TensorSpec
from .device.progress import silent
from .device.runtimes import load_runtime
from .device.verify import golden_outputs
from .evaluation import Judged
from .factoring.layers import ALREADY_FACTORED
from .factoring.plan import FactorPlan
from .job import Job, Progress, tool_versions
from .search import Choice
from .targets import RuntimeSpec, Target, install_lines, runtime_entry

_GOLDEN_SAMPLES = 4
LICENCE_NAME = "LICENSE-weights.md"
#: what another machine may show against the golden outputs: other kernels round differently, int8 ones also clip
_TOLERANCE = {
    "fp32": 1e-3, "fp16": 2e-2, "int8": 0.15, "int8-io": 0.15, "int8-dynamic": 0.15,
    "int8-weights": 2e-2, "int4-weights": 2e-2,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Quality:
    """The dense PyTorch original, which every arm is paired with; None for a split that is not judged."""

    selection: Judged | None
    test: Judged | None


def path(out: Path, target: Target, runtime: str) -> Path:
    return out / f"{target.name}-{runtime}"


def key(job: Job, target: Target) -> str:
    """Digest of all that decides this bundle."""
    text = json.dumps([job.key, target.to_dict()], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def write(
    out: Path, job: Job, target: Target, runtime: RuntimeSpec, arms: Sequence[Arm], choice: Choice, original: Quality,
    *, data: DataReport | None = None, notes: Sequence[str] = (), precision: Mapping[str, Any] | None = None,
    recovered: Mapping[str, Any] | None = None, zip_too: bool = False, progress: Progress = silent,
) -> Path:  # fmt: skip
    """Judge the arms on the test split – the only time it is judged – and write the bundle.

    Args:
        arms: the default arm first.
        original: the dense PyTorch original; without its ``test`` the test split stays untouched.
        data: what the splits hold, for the record.
        notes: said in the manifest beside the arms' own.
        precision: how the precision was chosen, where it was not named.
        recovered: how the factored arm was recovered, where it was.
        zip_too: write ``out.zip`` as well.
    """
    inputs = job.calibration.spread(_GOLDEN_SAMPLES)
    golden: dict[str, dict[str, npt.NDArray[Any]]] = {}
    specs: tuple[tuple[TensorSpec, ...], tuple[TensorSpec, ...]] | None = None
    host = load_backend(runtime.name).host_runtime
    for arm in arms:
        options = runtime_options(target, runtime)
        with load_runtime(host).open(arm.artifact.path, options) as session:
            specs = (session.inputs, session.outputs)
            golden[arm.name] = golden_outputs(session, session.inputs, inputs)
    assert specs is not None  # a build always has arms
    oldest = _oldest(runtime, arms)
    manifest = Manifest(
        name=f"{job.model.name}-{target.name}-{runtime.name}",
        target=target.to_dict(),
        runtime=replace(runtime_entry(target, runtime), oldest=oldest, install=_install(runtime, oldest)),
        inputs=specs[0],
        outputs=specs[1],
        preprocess=job.preprocess.to_dict() if job.preprocess else None,
        frames=job.options.bake_preprocess,
        contract=job.contract,
        labels=job.labels,
        positive=None if job.positive is None else job.labels[job.positive],
        metric=job.metric.name if job.metric else None,
        default_arm=arms[0].name,
        arms=tuple(_entry(arm, job, target, runtime, original, progress) for arm in arms),
        golden_outputs={arm.name: f"golden/{arm.name}.npz" for arm in arms},
        tool_versions=tool_versions(),
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        build=_record(job, target, arms, choice, data, notes, {"precision": precision, "recovered": recovered}),
    )
    extra: dict[str, Path | bytes] = {
        f"arms/{arm.name}{companion.suffix}": companion for arm in arms for companion in arm.artifact.companions
    }
    extra.update(recipes.files(manifest))
    extra.update(_layer_maps(arms, runtime))
    manifest = replace(
        manifest, build=manifest.build | {"notes": [*manifest.build["notes"], *recipes.left_out(manifest)]}
    )
    if arms[0].plan is not None:
        extra[PLAN_NAME] = arms[0].plan.to_toml().encode()
    if (
        job.model.sample is not None and job.model.sample.licence is not None
    ):  # its weights, and the golden inputs taken from its data, have terms of their own
        extra[LICENCE_NAME] = job.model.sample.licence
    return package.write_bundle(
        out,
        manifest=manifest,
        artifacts={arm.name: arm.artifact.path for arm in arms},
        golden_inputs=inputs,
        golden_outputs=golden,
        readme=package.board_readme(manifest),
        zip_too=zip_too,
        extra=extra,
    )


def _entry(arm: Arm, job: Job, target: Target, runtime: RuntimeSpec, original: Quality, progress: Progress) -> ArmEntry:
    quality = {}
    if arm.selection is not None:
        quality["selection"] = evaluation.quality_record(job, arm.selection, original.selection)
        if job.test is not None and original.test is not None:
            host, options = load_backend(runtime.name).host_runtime, runtime_options(target, runtime)
            source, label = evaluation.source(arm.artifact, host, options), f"judge {arm.name} on the test split"
            with evaluation.opened(arm.artifact.path, host, options) as run:
                predictions = evaluation.predict(run, job.test, job, progress, label, source=source)
            judged = evaluation.judge(predictions, job, arm.selection.threshold)
            quality["test"] = evaluation.quality_record(job, judged, original.test)
    return ArmEntry(
        name=arm.name,
        variant=arm.variant,
        precision=arm.precision,
        artifact=f"arms/{arm.name}{arm.artifact.path.suffix}",
        parameters=arm.parameters,
        size_bytes=arm.artifact.size_bytes,
        weight_types=dict(arm.artifact.weight_types),
        tolerance=_TOLERANCE[arm.precision],
        quality=quality,
        threshold=arm.selection.threshold if arm.selection else None,
        plan_digest=arm.plan.digest if arm.plan else None,
        checked=RUN if runtime.runs_at_build else GRAPH_CHECKED,
        kept_float=tuple(layer.name for layer in arm.kept_float),
        activation_bytes=load_backend(runtime.name).activation_bytes(arm.artifact.path),
    )


def _layer_maps(arms: Sequence[Arm], runtime: RuntimeSpec) -> dict[str, bytes]:
    """By path in the bundle: which layer each operator of an arm's file belongs to. Every arm has those that the plan
    speaks of, so that a layer's parts are set against the layer, and together those that stand together in any arm."""
    plan = next((arm.plan for arm in arms if arm.plan is not None), None)
    planned = {layer.name: layer for layer in plan.layers} if plan else {}
    backend = load_backend(runtime.name)
    graphs = {arm.name: graph for arm in arms if (graph := backend.operators(arm.artifact.path)) is not None}
    together = operators.merged(graphs.values(), planned)
    found = {}
    for arm in arms:
        if arm.name in graphs:
            forms = {name: (layer.shape, layer.rank) for name, layer in planned.items()} if arm.plan else {}
            layer_map = LayerMap(*operators.by_layer(graphs[arm.name], planned, forms, together))
            found[layers.path(arm.name)] = layer_map.to_json().encode()
    return found


def _oldest(runtime: RuntimeSpec, arms: Sequence[Arm]) -> str:
    """The oldest runtime that opens every arm: the target's promise, or a newer one that a precision asks for."""
    versions = [runtime.oldest, *(arm.artifact.oldest for arm in arms if arm.artifact.oldest)]
    return max(versions, key=lambda version: [int(part) for part in version.split(".")])


def _install(runtime: RuntimeSpec, oldest: str) -> str:
    """The target's install lines, where the bundle needs a newer runtime than they ask for with its version."""
    if oldest == runtime.oldest:
        return install_lines(runtime)
    packages = [name for name in PACKAGES[runtime.name] if name != "ai-edge-litert"]  # any is new enough
    alternatives = tuple(
        replace(other, requirements=_raised(other.requirements, packages, oldest)) for other in runtime.alternatives
    )
    requirements = _raised(runtime.requirements, packages, oldest)
    return install_lines(replace(runtime, requirements=requirements, alternatives=alternatives))


def _raised(requirements: Sequence[str], packages: Sequence[str], oldest: str) -> tuple[str, ...]:
    """The requirements, those of a runtime's packages with no older version than ``oldest``."""
    raised = []
    for text in requirements:
        requirement = Requirement(text)
        if canonicalize_name(requirement.name) in packages:
            others = [str(one) for one in requirement.specifier if one.operator != ">="]
            floors = [one.version for one in requirement.specifier if one.operator == ">="]
            floor = max([*floors, oldest], key=Version)
            requirement.specifier = SpecifierSet(",".join([f">={floor}", *others]))
            text = str(requirement).replace('"', "'")  # the shell line has it between double quotes
        raised.append(text)
    return tuple(raised)


def _record(
    job: Job, target: Target, arms: Sequence[Arm], choice: Choice, data: DataReport | None, notes: Sequence[str],
    chosen: Mapping[str, Mapping[str, Any] | None],
) -> dict[str, Any]:  # fmt: skip
    """How the bundle came about, for people; ``chosen`` where there is something to say of it."""
    notes = [*notes, *(data.notes() if data is not None else ())]
    return {name: dict(said) for name, said in chosen.items() if said is not None} | {
        "key": key(job, target),
        "model": job.model.reference,
        "model_digest": job.model.digest,
        "options": job.options.to_dict(),
        "budget": str(job.budgets),
        "splits": {
            split.name: {"reference": split.reference, "samples": len(split), "digest": split.digest}
            for split in job.splits
        },
        "data": None if data is None else data.to_dict(),
        "trials": [trial.to_dict() for trial in choice.trials],
        "stages": {arm.name: [stage.to_dict() for stage in arm.stages] for arm in arms},
        "notes": [*notes, *dict.fromkeys(note for arm in arms for note in arm.notes), *_plan_notes(arms[0].plan)],
    }


def _plan_notes(plan: FactorPlan | None) -> list[str]:
    if plan is None:
        return []
    found = [layer.name for layer in plan.layers if layer.reason.startswith(ALREADY_FACTORED)]
    notes = [f"{ALREADY_FACTORED}, left as they are: {', '.join(found)}"] if found else []
    if not plan.changes:
        notes.append("no layer was factored: the factored arm equals the dense one")
    if plan.note:
        notes.append(f"factored: {plan.note}")
    return notes
