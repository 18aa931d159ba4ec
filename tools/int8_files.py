"""A module's file in each runtime, for benchmarks of what int8 makes of it.

As a build compiles it at first, for a batch of one: what that does where a file is too far off (equalised channels,
corrected biases, layers left in float) is not done.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path

import numpy as np
from torch import nn

from rowcol_edge import evaluation, sources, targets
from rowcol_edge.backends import load_backend
from rowcol_edge.backends.base import Batch, QuantSpec, Source
from rowcol_edge.datasets import Feeds, Split

TARGET = "generic-x86"
RUNTIMES = ("onnxruntime", "openvino", "tflite")
_RANGES = 64  # calibration inputs that ranges are taken on
_AT_ONCE = 8


def compiled(
    model: nn.Module,
    runtimes: Sequence[str],
    calibration: Split,
    folder: Path,
    progress: Callable[[int, int], None] = lambda done, total: None,
    precision: str = "int8",
) -> Iterator[tuple[str, Path]]:
    """(runtime, file); files are overwritten by the next model's unless the folder is another one."""
    target = targets.load(TARGET)
    exported: dict[tuple[object, ...], Path] = {}
    for done, name in enumerate(runtimes):
        progress(done, len(runtimes))
        backend, runtime = load_backend(name), target.runtime(name)
        key = sources.key(backend.consumes, runtime)
        if key not in exported:
            exported[key] = _exported(model, calibration.example(), backend.consumes, runtime, folder)
        path = folder / f"{name}{backend.suffix}"
        backend.compile(
            exported[key], runtime, QuantSpec.for_target(precision, target), partial(_ranges, calibration), path
        )
        yield name, path


def _exported(model: nn.Module, example: Feeds, source: Source, runtime: targets.RuntimeSpec, folder: Path) -> Path:
    place = Path(tempfile.mkdtemp(dir=folder))
    count = iter(range(100))
    request = sources.Request(
        module=model,
        example=example,
        runtime=runtime,
        dynamic_batch=False,
        file=lambda ending: place / f"{next(count)}{ending}",
    )
    return [step.path for step in sources.steps(source, request)][-1]


def _ranges(calibration: Split) -> Iterator[Batch]:
    samples = calibration.spread(_RANGES)
    for start in range(0, _RANGES, _AT_ONCE):
        yield {name: array[start : start + _AT_ONCE] for name, array in samples.items()}


def logits(run: evaluation.Run, batches: Iterable[Feeds]) -> np.ndarray:
    return np.concatenate([next(iter(run(feeds).values())) for feeds in batches])


def scores(got: np.ndarray, reference: np.ndarray) -> dict[str, float]:
    """How far (samples, classes) are from those of another model: KL in nats, relative error, agreement."""
    got, reference = got.astype(np.float64), reference.astype(np.float64)
    logs, given = (values - np.logaddexp.reduce(values, 1, keepdims=True) for values in (got, reference))
    return {
        "kl": float((np.exp(given) * (given - logs)).sum(1).mean()),
        "error": float(np.linalg.norm(got - reference) / np.linalg.norm(reference)),
        "agreement": float((got.argmax(1) == reference.argmax(1)).mean()),
    }
