"""A job: everything a build needs, loaded and checked before anything is written."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version

from . import datasets, models, quality, targets
from .budgets import Budgets
from .config import DEFAULT_BUDGET, BuildOptions
from .datasets import Split
from .device.preprocess import Preprocess
from .errors import ConfigError, DataError
from .models import LoadedModel
from .quality import Metric
from .targets import Target

#: called with a label, the steps done and the steps in all
Progress = Callable[[str, int, int], None]

TOOLS = ("rowcol-edge", "torch", "onnx", "onnxscript", "onnxsim", "onnxruntime", "numpy")


def silent(label: str, done: int, total: int) -> None:
    """The progress of someone who does not watch."""


@dataclass(frozen=True, slots=True)
class Job:
    """Checked inputs of a build.

    Attributes:
        selection, test: None where the user has none; then nothing is chosen by quality.
        metric: None where there are no labels.
        positive: index of the positive class among ``labels``.
        budgets: the user's, or the default where quality can be judged.
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

    @property
    def key(self) -> str:
        """Digest of all that decides the result: model, data, options, targets and tool versions."""
        splits = [s.digest if s else None for s in (self.calibration, self.selection, self.test)]
        options = {k: v for k, v in self.options.to_dict().items() if k not in ("out", "target")}
        text = json.dumps([self.model.digest, splits, options, tool_versions()], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()


def prepare(options: BuildOptions, model: LoadedModel | None = None, progress: Progress = silent) -> Job:
    """Load and check the model, the targets and the splits.

    Raises:
        InputError: whatever is wrong with what the user handed over; nothing has been written.
    """
    chosen = tuple(targets.load(name) for name in options.target)
    for target in chosen:
        _check_precision(target, options)
    progress("load model", 0, 4)
    model = model or models.load(options.model, options.weights)
    sample = model.sample
    preprocess = options.preprocess or (sample.preprocess if sample else None)
    labels = options.labels or (sample.labels if sample else ())
    splits: list[Split | None] = []
    for i, (name, reference) in enumerate(
        [("calibration", options.calib), ("selection", options.select), ("test", options.test)]
    ):
        progress(f"read {name} data", i + 1, 4)
        # a sample brings its own splits only as a set: one of the user's among them could overlap unseen
        own = sample if not (options.calib or options.select or options.test) else None
        splits.append(datasets.load(reference, name, model.inputs, sample=own, preprocess=preprocess, labels=labels))
    calibration, selection, test = splits
    if calibration is None:
        raise DataError(
            "calibration data", expected="some real inputs", got="none", hint="--calib FOLDER, .npz or module:callable"
        )
    datasets.check_disjoint([s for s in splits if s is not None])
    labels = labels or next((s.label_names for s in splits if s and s.label_names), ())
    metric = _metric(options, model, selection)
    positive_name = options.positive or (sample.positive if sample else None)
    progress("read test data", 4, 4)
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
        contract=options.contract or (sample.task if sample else "classify"),
        preprocess=preprocess,
        budgets=_budgets(options, metric),
    )


def tool_versions() -> dict[str, str]:
    found = {}
    for tool in TOOLS:
        try:
            found[tool] = version(tool)
        except PackageNotFoundError:
            continue
    return found


def _check_precision(target: Target, options: BuildOptions) -> None:
    runtime = target.runtime(options.runtime)
    if options.precision != "auto" and options.precision not in runtime.precisions:
        raise ConfigError(
            f"precision {options.precision} on {target.name} with {runtime.name}",
            expected=f"one of {', '.join(runtime.precisions)}",
            got=options.precision,
            hint=runtime.why,
        )


def _metric(options: BuildOptions, model: LoadedModel, selection: Split | None) -> Metric | None:
    name = options.metric or (model.sample.metric if model.sample else None)
    labelled = selection is not None and selection.labels is not None
    if name and not labelled:
        raise DataError(
            f"metric {name}",
            expected="labelled selection data",
            got="none",
            hint="--select FOLDER with a subfolder per class",
        )
    if not labelled:
        return None
    return quality.metric(name or "accuracy")


def _positive(name: str | None, labels: tuple[str, ...]) -> int | None:
    if name is None:
        return None
    if name not in labels:
        raise ConfigError(
            "positive", expected=f"one of the labels {list(labels)}", got=repr(name), hint="--labels good,defective"
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
