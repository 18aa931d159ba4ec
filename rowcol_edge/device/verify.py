"""Does a bundle compute here what it computed where it was built?"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from math import isfinite
from typing import Any

import numpy as np

from ..errors import BundleError, VerifyError
from .bundle import Arrays, Bundle, split_feeds
from .decode import decide, index_of, probabilities
from .manifest import ArmEntry, TensorSpec
from .predictor import load_checked, open_arm, runtime_options
from .runtimes import Session
from .system import saturates_only_here


@dataclass(frozen=True, slots=True)
class ArmReport:
    """One arm against its golden outputs.

    ``relative_error`` is ``‖a-b‖₂/‖b‖₂`` over all outputs and samples (None if there is none: another shape, NaN or
    Inf). ``reason`` says which of these, or why an error is too large where that is known. ``labels_same`` of
    ``samples`` answers are the golden ones (classify only): reported, not judged, since within the tolerance a sample
    on the threshold may fall either way.
    """

    name: str
    ok: bool
    relative_error: float | None
    max_abs_error: float | None
    tolerance: float
    samples: int
    labels_same: int | None = None
    reason: str = ""


@dataclass(frozen=True, slots=True)
class VerifyReport:
    """``ok`` if every arm is within its tolerance; sizes and digests were checked before."""

    bundle: str
    digest: str
    runtime: str
    runtime_version: str
    files: int
    arms: tuple[ArmReport, ...]

    @property
    def ok(self) -> bool:
        return all(arm.ok for arm in self.arms)

    def to_dict(self) -> dict[str, Any]:
        return {"ok": self.ok, **asdict(self)}

    def raise_if_failed(self) -> None:
        """VerifyError for the first arm that left its tolerance."""
        for arm in self.arms:
            if not arm.ok:
                got = arm.reason or f"{arm.relative_error:.2e}"
                hint = f"try another version of {self.runtime} than {self.runtime_version}, or another arm"
                raise VerifyError(
                    f"arm {arm.name}", expected=f"a relative error ≤ {arm.tolerance:g}", got=got, hint=hint
                )


def verify(
    bundle: Bundle,
    *,
    arms: Sequence[str] | None = None,
    threads: int | None = None,
    progress: Callable[[str, int, int], None] | None = None,
) -> VerifyReport:
    """Check every file, then run the golden inputs through each arm (or those named).

    ``progress`` is called with a label, the steps done and the steps in all.

    IntegrityError: a file that changed. BundleError: an arm that does not open here. An arm that runs but computes
    something else is in the report with ``ok`` False.
    """
    names = [arm.name for arm in bundle.manifest.arms] if arms is None else arms
    progress = progress or (lambda *_: None)
    progress("verify", 0, 1 + len(names))
    bundle.check()
    runtime = load_checked(bundle)
    reports = []
    for done, name in enumerate(names, start=1):
        progress("verify", done, 1 + len(names))
        reports.append(_verify_arm(bundle, bundle.arm(name), threads))
    progress("verify", 1 + len(names), 1 + len(names))
    return VerifyReport(
        bundle=bundle.manifest.name,
        digest=bundle.digest,
        runtime=runtime.name,
        runtime_version=runtime.version(),
        files=len(bundle.manifest.files),
        arms=tuple(reports),
    )


def golden_outputs(session: Session, specs: tuple[TensorSpec, ...], inputs: Arrays) -> Arrays:
    """Outputs for stacked inputs, run by run (see :func:`split_feeds`) and stacked again.

    The build makes the golden outputs with this same function: with dynamic quantization an output depends on what
    else is in the batch.
    """
    runs = [session.run(feeds) for feeds in split_feeds(specs, inputs)]
    return {name: np.concatenate([np.atleast_1d(run[name]) for run in runs]) for name in runs[0]}


def relative_error(outputs: Mapping[str, np.ndarray], golden: Mapping[str, np.ndarray]) -> float:
    """``‖a-b‖₂/‖b‖₂`` over all outputs together, in float64; the plain ``‖a-b‖₂`` where every golden value is 0."""
    difference = norm = 0.0
    for got, expected in _pairs(outputs, golden):
        difference += float(np.sum((got - expected) ** 2))
        norm += float(np.sum(expected**2))
    return float(np.sqrt(difference / norm if norm else difference))


def _verify_arm(bundle: Bundle, arm: ArmEntry, threads: int | None) -> ArmReport:
    inputs, golden = bundle.golden(arm)
    with open_arm(bundle, arm, threads=threads) as session:
        outputs = golden_outputs(session, bundle.manifest.inputs, inputs)
    samples = len(next(iter(golden.values())))
    reason = _unequal(outputs, golden)
    if reason:
        return ArmReport(arm.name, False, None, None, arm.tolerance, samples, reason=reason)
    error = relative_error(outputs, golden)
    if error > arm.tolerance and _saturates(bundle, arm):
        reason = f"relative error {error:.2e} on a processor whose 8-bit sums saturate, which the target's do not"
    largest = max(float(np.abs(got - expected).max(initial=0.0)) for got, expected in _pairs(outputs, golden))
    return ArmReport(
        name=arm.name,
        ok=error <= arm.tolerance,
        relative_error=error,
        max_abs_error=largest,
        tolerance=arm.tolerance,
        samples=samples,
        labels_same=_labels_same(bundle, arm, outputs, golden),
        reason=reason,
    )


def _saturates(bundle: Bundle, arm: ArmEntry) -> bool:
    """Whether sums of the arm's 8-bit products saturate here and not on the target."""
    # TFLite's kernels widen the products; exact sums leave only those whose activations are quantized as they come
    in_float = runtime_options(bundle).exact_sums and arm.precision != "int8-dynamic"
    quantized = "int8" in arm.precision and bundle.manifest.runtime.name != "tflite"
    return quantized and not in_float and saturates_only_here(bundle.manifest.target)


def _unequal(outputs: Mapping[str, np.ndarray], golden: Mapping[str, np.ndarray]) -> str:
    """Why no relative error can be given, or nothing."""
    for name, expected in golden.items():
        if outputs[name].shape != expected.shape:
            return f"{name} of shape {outputs[name].shape}, golden {expected.shape}"
    if any(not isfinite(float(np.sum(got))) for got, _ in _pairs(outputs, golden)):
        return "NaN or Inf"
    return ""


def _labels_same(bundle: Bundle, arm: ArmEntry, outputs: Arrays, golden: Arrays) -> int | None:
    manifest = bundle.manifest
    name = manifest.outputs[0].name
    if manifest.contract != "classify" or golden[name].ndim != 2:
        return None
    size = golden[name].shape[1]
    labels = manifest.labels or tuple(str(i) for i in range(max(size, 2)))
    if len(labels) != max(size, 2):
        raise BundleError(
            "manifest.labels", expected=f"{max(size, 2)} (the classes of output {name!r})", got=f"{len(labels)}"
        )
    place = index_of(manifest.positive, labels)
    both = [decide(probabilities(a[name], place), place, arm.threshold) for a in (outputs, golden)]
    return int(np.sum(both[0] == both[1]))


def _pairs(
    outputs: Mapping[str, np.ndarray], golden: Mapping[str, np.ndarray]
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    for name, expected in golden.items():
        yield outputs[name].astype(np.float64), expected.astype(np.float64)
