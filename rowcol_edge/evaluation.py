"""Running a model or an artifact over a split, and judging what comes out."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from .backends.base import Artifact, Calibration
from .datasets import Feeds, Split
from .device.bundle import split_feeds
from .device.decode import decode
from .device.progress import silent
from .device.runtimes import RuntimeOptions, Session, load_runtime
from .errors import BundleError, ConfigError, DataError
from .job import Job, Progress
from .quality import Metric, Predictions, paired_drop

HELD = 32
"""Inputs that quantized outputs are held against the float ones on; none of them set a range."""

#: takes a batch of inputs, returns the named outputs
Run = Callable[[Feeds], dict[str, npt.NDArray[Any]]]


@dataclass(frozen=True, slots=True)
class Judged:
    """An arm on a split: its predictions, the threshold it decides with and the metric's value."""

    predictions: Predictions
    threshold: float | None
    value: float


def predict(
    run: Run, split: Split, job: Job, progress: Progress = silent, label: str = "evaluate", *, source: str = ""
) -> Predictions:
    """Outputs for every sample of a labelled split; the first output is the one that is judged.

    ``source`` says what ``run`` runs and how, all of it: then outputs are kept in the cache.
    """

    def outputs() -> dict[str, npt.NDArray[Any]]:
        made = []
        done = 0
        for feeds in split.batches():
            made.append(next(iter(run(feeds).values())))
            done += len(made[-1])
            progress(label, done, len(split))
        return {"outputs": np.concatenate(made)}

    if split.labels is None:
        raise DataError(f"{split.name} data", expected="labels", got="none")
    known = job.cache.arrays(job.stage_key("predict", source, split.key), outputs) if source else outputs()
    joined = known["outputs"]
    if job.contract == "classify":
        _check_classes(joined, split, job)
    return Predictions(joined, split.labels, job.positive)


def _check_classes(outputs: npt.NDArray[Any], split: Split, job: Job) -> None:
    if outputs.ndim != 2:
        raise DataError("model output", expected="(samples, classes) for contract classify", got=str(outputs.shape))
    if split.labels is not None and split.labels.ndim != 1:
        raise DataError(f"{split.name} labels", expected="one per sample", got=str(split.labels.shape))
    classes = max(outputs.shape[1], 2)  # one logit decides between two
    highest = int(split.labels.max()) if split.labels is not None else 0
    if highest >= classes:
        raise DataError(
            f"{split.name} labels",
            expected=f"classes 0 to {classes - 1} as the model returns",
            got=str(highest),
        )


def check_contract(job: Job, outputs: Mapping[str, npt.NDArray[Any]]) -> None:
    """Raises ConfigError where the board could not decode what the model returns; ``outputs`` are of one sample."""
    positive = None if job.positive is None else job.labels[job.positive]
    try:
        decode(job.contract, outputs, job.labels, positive, None)
    except BundleError as e:
        raise ConfigError(
            f"contract {job.contract}: {e.what}",
            expected=e.expected,
            got=e.got,
            hint="say what the outputs mean with --contract, and name every class with --labels",
        ) from e


def judge_selection(predictions: Predictions, job: Job, original: Judged | None = None) -> Judged:
    """Value of the job's metric on the selection split, with the threshold found there: the original's by tuning,
    an arm's from the original's."""
    metric = _metric(job)
    if original is None:
        threshold = metric.tune(predictions)
    else:
        threshold = metric.transfer(original.predictions, original.threshold, predictions)
    return judge(predictions, job, threshold)


def judge(predictions: Predictions, job: Job, threshold: float | None) -> Judged:
    """Value of the job's metric with a threshold found before."""
    return Judged(predictions, threshold, _metric(job).value(predictions, threshold))


def _metric(job: Job) -> Metric:
    if job.metric is None:
        raise DataError("metric", expected="labelled data", got="none")
    return job.metric


def drop(job: Job, reference: Judged, other: Judged) -> float:
    """How much worse ``other`` is, in the metric's points."""
    return _metric(job).drop(reference.value, other.value)


def quality_record(job: Job, judged: Judged, reference: Judged | None) -> dict[str, Any]:
    """What the manifest says of an arm on a split: value and, paired with the dense original, drop and flips."""
    metric = _metric(job)
    record: dict[str, Any] = {
        "metric": metric.name,
        "value": judged.value,
        "n": len(judged.predictions.labels),
    }
    if reference is not None:
        paired = paired_drop(metric, reference.predictions, judged.predictions, (reference.threshold, judged.threshold))
        record |= {
            "drop_pp": paired.drop,
            "ci_low_pp": paired.low,
            "ci_high_pp": paired.high,
        }
        if paired.flips is not None:
            record |= {"flips": paired.flips, "flips_bad": paired.flips_bad}
    return record


def held_out(job: Job, chosen: Sequence[int]) -> tuple[Calibration, Feeds]:
    """Batches that ranges are calibrated on, and up to 32 inputs that are not among them.

    They are from the selection split, or else what `coverage` has left of the calibration data; of so few samples that
    it has left none, they are the same.

    Args:
        chosen: places of the calibration samples that ranges are calibrated on.
    """
    pool = job.calibration
    ranges = functools.partial(pool.only, chosen)
    if job.selection is not None:
        return ranges, job.selection.spread(HELD)
    others = sorted(set(range(len(pool))).difference(chosen))
    return ranges, pool.spread(HELD, others or chosen)


def source(artifact: Artifact, runtime: str, options: RuntimeOptions) -> str:
    """What an opened artifact runs and how, for `predict`."""
    return json.dumps([artifact.sha256, runtime, asdict(options)])


@contextmanager
def opened(artifact: Path, runtime: str, options: RuntimeOptions) -> Iterator[Run]:
    """The artifact as the device opens it, at the first run, taking batches of any size: they are cut to the batch the
    model has."""
    with ExitStack() as stack:

        @functools.cache
        def session() -> Session:
            return stack.enter_context(load_runtime(runtime).open(artifact, options))

        def run(feeds: Feeds) -> dict[str, npt.NDArray[Any]]:
            inputs = session().inputs
            free = all(spec.shape and spec.shape[0] is None for spec in inputs)
            parts = [feeds] if free else list(split_feeds(inputs, feeds))
            outputs = [session().run(part) for part in parts]
            return {name: np.concatenate([o[name] for o in outputs]) for name in outputs[0]}

        yield run
