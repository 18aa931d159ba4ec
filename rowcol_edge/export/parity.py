"""Do the outputs of a stage still agree with the dense PyTorch original, on real inputs?"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from ..calling import bind, evaluating, feed
from ..errors import DataError
from ..linears import convolved
from .capture import name_outputs

Batch = Mapping[str, npt.NDArray[Any]]
Outputs = Sequence[Mapping[str, npt.NDArray[Any]]]
"""For each batch, output name → array with the samples on the first axis."""


@dataclass(frozen=True, slots=True)
class Parity:
    """How far the outputs of a stage are from the reference.

    Attributes:
        relative_error: ‖a − b‖₂ / ‖b‖₂ over all samples, b the reference. With several outputs the largest, so that
            one with small numbers cannot hide. Infinite if an output is NaN or infinite where the reference is not.
        max_abs_error: largest difference of any one number.
        top1_agreement: share of samples with the same largest column, over outputs of shape (samples, columns ≥ 2),
            the lowest; None if there are none.
        samples: how many were compared.
    """

    stage: str
    relative_error: float
    max_abs_error: float
    top1_agreement: float | None
    samples: int
    tolerance: float

    @property
    def ok(self) -> bool:
        return self.relative_error <= self.tolerance

    def to_dict(self) -> dict[str, Any]:
        """As JSON values; an infinite error, which JSON cannot say, is None."""
        values = asdict(self) | {"ok": self.ok}
        return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}


def first_outside(stages: Iterable[Parity]) -> Parity | None:
    """The first stage that left its tolerance."""
    return next((stage for stage in stages if not stage.ok), None)


def torch_run(model: nn.Module) -> Callable[[Batch], dict[str, npt.NDArray[Any]]]:
    """The model as a function of named arrays, in eval mode and without gradients."""

    def run(batch: Batch) -> dict[str, npt.NDArray[Any]]:
        args, kwargs = bind(model, feed(model, batch))
        with evaluating(model), torch.no_grad(), convolved():
            return {name: value.detach().cpu().numpy() for name, value in name_outputs(model(*args, **kwargs)).items()}

    return run


def torch_outputs(model: nn.Module, batches: Iterable[Batch]) -> list[dict[str, npt.NDArray[Any]]]:
    """Outputs for each batch."""
    run = torch_run(model)
    return [run(batch) for batch in batches]


def compare(stage: str, reference: Iterable[Batch], outputs: Iterable[Batch], tolerance: float) -> Parity:
    """Compare outputs batch by batch; both may be generators, one pair is held at a time.

    Raises:
        DataError: another number of batches, other names or other shapes.
    """
    sums: dict[str, _Sums] = {}
    try:
        for expected, got in zip(reference, outputs, strict=True):
            if set(expected) != set(got):
                raise DataError(f"outputs of stage {stage}", expected=", ".join(expected), got=", ".join(got) or "none")
            for name in expected:
                sums.setdefault(name, _Sums()).add(f"{stage}, output {name!r}", expected[name], got[name])
    except ValueError as e:
        raise DataError(f"outputs of stage {stage}", expected="as many batches as the reference", got=str(e)) from e
    if not sums:
        raise DataError(f"outputs of stage {stage}", expected="at least one batch", got="none")
    top1 = [s.agreeing / s.samples for s in sums.values() if s.ranked and s.samples]
    return Parity(
        stage=stage,
        relative_error=max(s.relative_error for s in sums.values()),
        max_abs_error=max(s.max_abs for s in sums.values()),
        top1_agreement=min(top1) if top1 else None,
        samples=max(s.samples for s in sums.values()),
        tolerance=tolerance,
    )


@dataclass(slots=True)
class _Sums:
    """Running sums over the batches of one output, in float64."""

    error: float = 0.0
    reference: float = 0.0
    max_abs: float = 0.0
    agreeing: int = 0
    samples: int = 0
    ranked: bool = False

    def add(self, what: str, expected: npt.NDArray[Any], got: npt.NDArray[Any]) -> None:
        if expected.shape != got.shape:
            raise DataError(what, expected=f"shape {expected.shape}", got=str(got.shape))
        b = expected.astype(np.float64)
        with np.errstate(invalid="ignore"):  # equal infinities (a masked score) are no difference
            difference = np.where(got == expected, 0.0, got.astype(np.float64) - b)
        finite = bool(np.isfinite(difference).all())
        self.error += float(np.square(difference).sum()) if finite else math.inf
        self.reference += float(np.square(b[np.isfinite(b)]).sum())
        self.max_abs = max(self.max_abs, float(np.abs(difference).max(initial=0.0)) if finite else math.inf)
        self.samples += len(expected) if expected.ndim else 1
        if expected.ndim == 2 and expected.shape[1] > 1:
            self.ranked = True
            self.agreeing += int((expected.argmax(axis=1) == got.argmax(axis=1)).sum())

    @property
    def relative_error(self) -> float:
        if self.error == 0.0:
            return 0.0
        return math.sqrt(self.error / self.reference) if self.reference else math.inf
