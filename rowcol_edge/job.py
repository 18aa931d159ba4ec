"""A job: everything a build needs, loaded and checked before anything is written."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from . import cache as caching
from . import datasets, frames, models, quality, targets, user_code
from .backends import load_backend
from .backends.base import ACCURACY_CONTROL
from .budgets import Budgets
from .cache import Cache
from .config import DEFAULT_BUDGET, BuildOptions
from .datasets import Split
from .device.preprocess import Frames, Preprocess
from .device.progress import silent
from .device.system import environment
from .errors import ConfigError, DataError, TargetError
from .export.onnx import OPSETS
from .factoring.plan import FactorPlan
from .models import LoadedModel
from .quality import Custom, Metric
from .targets import Target

#: called with a label, the steps done and the steps in all
Progress = Callable[[str, int, int], None]

TOOLS = (
    "rowcol-edge", "torch", "onnx", "onnxscript", "onnxsim", "onnxruntime", "openvino", "nncf", "litert-torch",
    "ai-edge-litert", "ai-edge-quantizer", "numpy", "torchvision", "timm", "transformers",
)  # fmt: skip


_NPU = "NPU"
"""OpenVINO's device that takes no dynamic shapes (its documentation, "Supported Devices", feature support)."""


_ASSUMED = "its outputs were taken for scores of classes; where they are none, say what they mean: --contract embed"


@dataclass(frozen=True, slots=True)
class Job:
    """Checked inputs of a build.

    Attributes:
        selection, test: None where the user has none; then nothing is chosen by quality.
        metric: None where there are no labels.
        positive: index of the positive class among ``labels``.
        budgets: the user's, or the default where quality can be judged.
        cache: keeps what stages made, see `stage_key`.
        recovery: what a factored model is distilled on; None where none was named.
    """

    options: BuildOptions
    model: LoadedModel
    targets: tuple[Target, ...]
    calibration: Split
    selection: Split | None
    test: Split | None
    metric: Metric | None
    labels: tuple[str, ...]
    positive: int | None
    contract: str
    preprocess: Preprocess | None
    budgets: Budgets
    cache: Cache
    recovery: Split | None = None

    @property
    def splits(self) -> tuple[Split, ...]:
        """Those that are there, the calibration split first."""
        return tuple(split for split in (self.calibration, self.selection, self.test) if split is not None)

    @property
    def assumed(self) -> str:
        """A note where nothing but the default says what the outputs mean; empty else."""
        labelled = bool(self.labels) or any(split.labels is not None for split in self.splits)
        return "" if self.options.contract or self.model.sample or labelled else _ASSUMED

    @property
    def key(self) -> str:
        """Digest of all that decides the result: model, data, resolved options, plan, metric, tools and this source."""
        parts = [
            self.model.digest,
            [s.digest if s else None for s in (self.calibration, self.selection, self.test)],
            {k: v for k, v in self.options.to_dict().items() if k not in ("out", "target", "plan", "model", "weights")},
            self._judgement,
            self.preprocess.to_dict() if self.preprocess else None,
            tool_versions(),
            own_source(),
            *([self.recovery.digest] if self.recovery else []),
        ]
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()

    @property
    def search_key(self) -> list[object]:
        """What decides a search besides the model and the target, for `stage_key`."""
        selection = self.selection.key if self.selection else None
        return [self.calibration.key, selection, self.options.energy, self.options.refit, self._judgement]

    @property
    def recovery_key(self) -> list[object]:
        """What decides how a factored model is recovered besides the model and the plan; empty where none is."""
        if not self.options.recover:
            return []
        data, selection = self.recovery or self.calibration, self.selection.key if self.selection else None
        judged = self._judgement[1:-1]  # neither the plan, which has a digest of its own, nor the budgets
        frozen = sorted(name for name, each in self.model.module.named_parameters() if not each.requires_grad)
        return [self.options.recover, data.key, self.calibration.key, selection, judged, frozen]

    @property
    def _judgement(self) -> list[object]:
        """What quality and costs are judged by, and the plan where it is given."""
        plan = Path(self.options.plan).read_bytes() if self.options.plan else b""
        return [
            hashlib.sha256(plan).hexdigest(),
            self.metric.name if self.metric else None,
            user_code.source(self.metric.function) if isinstance(self.metric, Custom) else None,
            self.labels,
            self.positive,
            self.contract,
            str(self.budgets),
        ]

    def stage_key(self, stage: str, *parts: object) -> str:
        """Key of what a stage makes of the model and ``parts``; tools, this source and the processor decide it too."""
        return caching.key([stage, self.model.digest, parts, tool_versions(), own_source(), _processor()])


def prepare(
    options: BuildOptions, model: LoadedModel | None = None, progress: Progress = silent, cache: Cache | None = None,
    *, judges: bool = True,
) -> Job:  # fmt: skip
    """Load and check the model, the targets and the splits. ``cache``: None keeps nothing.

    Args:
        judges: quality will be judged, so test data without labels or a metric are refused.

    Raises:
        InputError: whatever is wrong with what the user handed over; nothing has been written.
    """
    chosen = tuple(targets.load(name) for name in dict.fromkeys(options.target))
    for target in chosen:
        _check_precision(target, options)
        _check_onnx(target, options)
        _check_batch(target, options)
    if options.plan is not None:
        FactorPlan.read(options.plan)  # refused now rather than after the calibration
    progress("load model", 0, 4)
    model = model or models.load(options.model, options.weights)
    sample = model.sample
    if options.calib is not None:
        model = with_inputs(model, options.calib)
    preprocess = options.preprocess or (sample.preprocess if sample else None)
    if options.bake_preprocess:
        preprocess, model = _baked(preprocess, model)
    references = {"calibration": options.calib, "selection": options.select, "test": options.test}
    labels = options.labels or (sample.labels if sample else ()) or datasets.class_names(list(references.values()))
    # a sample brings its own splits only as a set: one of the user's among them could overlap unseen
    own = sample if not any(references.values()) else None
    splits: dict[str, Split | None] = {}
    for i, (name, reference) in enumerate(references.items()):
        if reference or own:
            progress(f"read {name} data", i + 1, 4)
        split = datasets.load(reference, name, model.inputs, sample=own, preprocess=preprocess, labels=labels)
        splits[name] = frames.of_tensors(split, preprocess) if split and isinstance(preprocess, Frames) else split
    progress("check data", 4, 4)
    calibration, selection, test = splits.values()
    if calibration is None:
        raise DataError(
            "calibration data",
            expected="some real inputs",
            got=(sample and sample.alone) or "none",
            hint="--calib FOLDER, .npz or module:callable",
        )
    given = [s for s in splits.values() if s is not None]
    datasets.check_alike(given)
    datasets.check_disjoint(given)
    if preprocess is not None:
        datasets.check_preprocess(calibration, preprocess)
    contract = options.contract or (sample.task if sample else "classify")
    metric = _metric(options, model, selection, contract)
    if judges and options.test is not None and metric is None:
        raise DataError(
            "test data",
            expected="labelled selection data and a metric besides",
            got="none",
            hint="--select P --metric M",
        )
    budgets = _budgets(options, metric)
    if options.accuracy_control:
        _check_accuracy_control(options, metric, budgets)
    recovery = _recovery(options, model, calibration, [s for s in (selection, test) if s], preprocess)
    positive_name = options.positive or (sample.positive if sample else None)
    return Job(
        options=options,
        model=model,
        targets=chosen,
        calibration=calibration,
        selection=selection,
        test=test,
        metric=metric,
        labels=labels,
        positive=_positive(positive_name, labels),
        contract=contract,
        preprocess=preprocess,
        budgets=budgets,
        cache=cache or Cache(None),
        recovery=recovery,
    )


def with_inputs(model: LoadedModel, calib: str) -> LoadedModel:
    """The model with the inputs that the calibration data name, where its forward leaves that open."""
    return models.named(model, datasets.array_names(calib)) if models.may_be_named(model.module) else model


def _recovery(
    options: BuildOptions, model: LoadedModel, calibration: Split, judged: Sequence[Split],
    preprocess: Preprocess | None,
) -> Split | None:  # fmt: skip
    """The data that were named to recover on: alike the calibration data, which they may hold, and apart from those
    that quality is judged on."""
    # classes have no part in it: a folder may have them or not
    split = datasets.load(options.recover_data, "recovery", model.inputs, preprocess=preprocess)
    if split is None:
        return None
    if isinstance(preprocess, Frames):
        split = frames.of_tensors(split, preprocess)
    datasets.check_alike([calibration, split])
    for other in judged:
        datasets.check_disjoint([split, other])
    return split


def _baked(preprocess: Preprocess | None, model: LoadedModel) -> tuple[Frames, LoadedModel]:
    """Recipe and model for frames."""
    if preprocess is None:
        raise ConfigError(
            "bake_preprocess",
            expected="how a picture becomes a tensor",
            got="no preprocess",
            hint='e.g. --preprocess "mode=L,size=224x224,mean=0.5,std=0.25"',
        )
    recipe = Frames.from_dict(preprocess.to_dict())
    return recipe, frames.bake(model, recipe)


def tool_versions() -> dict[str, str]:
    found = {}
    for tool in TOOLS:
        try:
            found[tool] = version(tool)
        except PackageNotFoundError:
            continue
    return found


@cache
def own_source() -> str:
    """sha256 of this package's own files: between two releases a checkout changes under the same version."""
    here = Path(__file__).parent
    sha = hashlib.sha256()
    for file in sorted(here.rglob("*.py")):
        sha.update(file.read_bytes())
    return sha.hexdigest()


@cache
def _processor() -> str:
    """Kernels are picked by it, and round differently: a cache may lie in a home that machines share."""
    host = environment()
    return f"{host.machine} {host.cpu_model} {host.isa} {host.caps}"


def check_out(out: Path) -> None:
    """Raises ConfigError where nothing could be written at ``out``, before any work is done."""
    place = out.absolute()
    while not place.exists():
        place = place.parent
    if not place.is_dir():
        raise ConfigError(f"out {out}", expected="a folder", got=f"the file {place}")
    if not os.access(place, os.W_OK):
        raise ConfigError(f"out {out}", expected="a folder that can be written", got=f"no right to write in {place}")


def _check_precision(target: Target, options: BuildOptions) -> None:
    runtime = target.runtime(options.runtime)
    if options.precision != "auto" and options.precision not in runtime.precisions:
        raise ConfigError(
            f"precision {options.precision} on {target.name} with {runtime.name}",
            expected=f"one of {', '.join(runtime.precisions)}",
            got=options.precision,
            hint=runtime.why,
        )


def _check_onnx(target: Target, options: BuildOptions) -> None:
    """TargetError for an opset or IR version that is not written here, or that the oldest runtime does not read."""
    runtime = target.runtime(options.runtime)
    if runtime.opset is None or runtime.ir_version is None:
        return  # a backend that reads ONNX asks for them itself
    of = f"of target {target.name} with {runtime.name}"
    if runtime.opset not in OPSETS:
        raise TargetError(f"opset {of}", expected=f"{OPSETS[0]} to {OPSETS[-1]}", got=str(runtime.opset))
    newest = load_backend(runtime.name).newest_onnx(runtime.oldest)
    if newest is None:
        return
    for name, value, limit in zip(("opset", "ir_version"), (runtime.opset, runtime.ir_version), newest, strict=True):
        if limit is not None and value > limit:
            raise TargetError(
                f"{name} {of}",
                expected=f"at most {limit}, which {runtime.oldest} reads",
                got=str(value),
                hint="lower it, or promise a newer oldest version",
            )


def _check_batch(target: Target, options: BuildOptions) -> None:
    if not options.dynamic_batch:
        return
    if not load_backend(options.runtime).dynamic_batch:
        what, why = options.runtime, "the converter for this runtime fixes every size"
    elif any(device.partition(".")[0] == _NPU for device in target.runtime(options.runtime).providers):
        what, why = f"{options.runtime} on the {_NPU} of {target.name}", "it takes no free sizes"
    else:
        return
    raise ConfigError(
        f"dynamic-batch with {what}",
        expected=f"a fixed batch: {why}",
        got="a free one",
        hint="build it without --dynamic-batch, or for another runtime",
    )


def _metric(options: BuildOptions, model: LoadedModel, selection: Split | None, contract: str) -> Metric | None:
    """The metric that was named, or the sample's, or accuracy; None without labels or for what has no such metric."""
    labelled = selection is not None and selection.labels is not None
    if options.metric and not labelled:
        raise DataError(
            f"metric {options.metric}",
            expected="labelled selection data",
            got="none",
            hint="--select FOLDER with a subfolder per class",
        )
    if not labelled:
        return None
    chosen = quality.metric(options.metric or (model.sample.metric if model.sample else "accuracy"))
    if chosen.contract in (contract, ""):
        return chosen
    if options.metric:
        raise ConfigError(
            f"metric {chosen.name}",
            expected=f"a metric for contract {contract}",
            got=f"one for contract {chosen.contract}",
            hint="hand over your own: --metric module:function, called with (labels, outputs)",
        )
    return None


def _check_accuracy_control(options: BuildOptions, metric: Metric | None, budgets: Budgets) -> None:
    """ConfigError where the quantizer has nothing to judge itself by, or cannot."""
    what = "accuracy-control"
    if options.runtime not in ACCURACY_CONTROL:
        raise ConfigError(what, expected=f"runtime {' or '.join(ACCURACY_CONTROL)}", got=options.runtime)
    if options.precision not in ("int8", "auto"):
        raise ConfigError(what, expected="precision int8 or auto", got=options.precision)
    if metric is None:
        raise ConfigError(what, expected="labelled selection data to judge by", got="none", hint="--select P")
    if isinstance(metric, Custom):
        hint = "it runs in a process of its own, which does not load your code: take a built-in metric"
        raise ConfigError(what, expected="a built-in metric", got=metric.name, hint=hint)
    if budgets.get("drop") is None:
        raise ConfigError(what, expected="a budget for the drop", got=str(budgets) or "none", hint="add drop<=0.5pp")


def _positive(name: str | None, labels: tuple[str, ...]) -> int | None:
    if name is None:
        return None
    if name not in labels:
        raise ConfigError(
            "positive",
            expected=f"one of the labels {', '.join(labels)}" if labels else "labels, one of which it is",
            got=repr(name),
            hint="name the classes in the order of the outputs: --labels good,defective",
        )
    return labels.index(name)


def _budgets(options: BuildOptions, metric: Metric | None) -> Budgets:
    budgets = Budgets.parse(options.budget or "")
    if budgets.get("drop") and metric is None:
        raise ConfigError(
            "budget drop", expected="labelled selection data to judge it on", got="none", hint="--select P"
        )
    asked = options.budget is not None or options.energy is not None or options.plan is not None
    return budgets if asked or metric is None else Budgets.parse(DEFAULT_BUDGET)
