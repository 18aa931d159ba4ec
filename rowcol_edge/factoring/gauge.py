"""The free gauge between two factors.

``B A = (B M⁻¹)(M A)`` for any invertible ``M``: the float product is the same, its int8 errors are not (`settle` tells
which is best). One scale holds for the whole latent tensor, so channels of little range lose their bits to those of
much; what evens the latent out makes the second weight's columns uneven in turn. The rotation is that of S. Ashkboos
et al., "QuaRot: outlier-free 4-bit inference in rotated LLMs", 2024, with an orthogonal matrix of any size; sharing a
scale out between two layers by an exponent is G. Xiao et al., "SmoothQuant", 2023, equation 4.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from rowcol_edge.factoring import splits
from rowcol_edge.factoring.splits import Layer

Array = NDArray[np.float64]

_FLOOR = 1e-6  # variances are floored at this share of the largest: what calibration never showed is not blown up
_RIDGE = 1e-10  # share of the mean variance added to each latent channel's: one that is idle can be divided by


@dataclass(frozen=True, slots=True)
class Gauge:
    """``M = S^(−½) Q Λ^(−α/2) T``, in the order in which it is applied to the latent.

    ``T`` makes the latent's channels uncorrelated and the second weight's columns orthonormal (in the metric of the
    output's error, see `settle`), which leaves them variances ``Λ``. ``S`` are the ranges, largest less smallest value,
    that the channels have in the end: those of a longer tail share it with the weight behind them.
    """

    alpha: float = 0.5  # 0 leaves the channels their variances, 1 makes them equal
    rotation: int | None = None  # seed of the orthogonal matrix Q; None: the identity

    def __str__(self) -> str:
        return f"alpha {self.alpha:g}" + ("" if self.rotation is None else f", rotation {self.rotation}")


class Pair:
    """Two layers that multiply, and what is the same for any gauge between them."""

    def __init__(self, first: Layer, second: Layer, latent: Array, metric: Array | None = None) -> None:
        """
        Args:
            latent: (positions, rank), what the first layer gives on real inputs.
            metric: (out, out), what errors of the second's output are weighed with; None: the identity.
        """
        self._layers = first, second
        self._front, self._behind = splits.matrix(first), splits.taps(second)
        rank, self._mean = latent.shape[1], latent.mean(axis=0)
        self._latent = latent - self._mean
        covariance = self._latent.T @ self._latent / len(latent)
        level = float(np.trace(covariance)) / rank
        root = np.linalg.cholesky(covariance + max(_RIDGE * level, 1e-30) * np.eye(rank))
        behind = self._behind
        weighed = behind if metric is None else np.einsum("op,prt->ort", metric, behind, optimize=True)
        worth = np.einsum("ort,ost->rs", behind, weighed, optimize=True)
        values, vectors = np.linalg.eigh(root.T @ worth @ root)
        values, vectors = values[::-1], vectors[:, ::-1]
        # the floor only leaves channels that are worth nothing a little more than that
        self._scales = np.sqrt(np.maximum(values, max(_FLOOR * float(values[0]), 1e-30)))
        self._forward, self._back = np.linalg.solve(root.T, vectors).T, root @ vectors

    def turned(self, gauge: Gauge) -> tuple[Layer, Layer]:
        """Copies with ``M`` between them: their float product is the same up to rounding."""
        forward, back = self._matrices(gauge)
        turned = np.einsum("ort,rs->ost", self._behind, back, optimize=True)
        values = forward @ self._front, turned.reshape(len(turned), -1)
        level = levels(values)[0]
        made = copy.deepcopy(self._layers)
        for layer, value, power in zip(made, values, (level, -level), strict=True):
            splits.fill(layer, np.ldexp(value, power), layer.weight)
        bias = made[0].bias
        if bias is not None:
            splits.put(bias, np.ldexp(forward @ bias.detach().double().cpu().numpy(), level), made[0].weight)
        return made

    def _matrices(self, gauge: Gauge) -> tuple[Array, Array]:
        """``M`` and its inverse."""
        forward = self._forward * (self._scales ** (1.0 - gauge.alpha))[:, None]
        back = self._back * self._scales ** (gauge.alpha - 1.0)
        if gauge.rotation is not None:
            drawn = _spread(rotation(len(forward), gauge.rotation), forward @ self._mean)
            forward, back = drawn @ forward, back @ drawn.T
        roots = np.sqrt(np.maximum(np.ptp(self._latent @ forward.T, axis=0), 1e-30))
        return forward / roots[:, None], back * roots


def levels(weights: Sequence[Array]) -> list[int]:
    """Powers of two that bring factors to one size and change nothing together, being 0 in all.

    Spaces that are worth next to nothing, or were hardly filled, would leave one part far outside of float16 and the
    other one vanishing.
    """
    sizes = [float(np.abs(each).max()) for each in weights]
    if min(sizes) <= 0.0:
        return [0] * len(sizes)
    logs = [math.log2(size) for size in sizes]
    found = [round(sum(logs) / len(logs) - log) for log in logs[:-1]]
    return [*found, -sum(found)]


def rotation(size: int, seed: int) -> Array:
    """A random orthogonal (size, size), uniformly distributed: QR of a normal matrix with the signs of R's diagonal
    (F. Mezzadri, How to generate random matrices from the classical compact groups, 2007)."""
    drawn, upper = np.linalg.qr(np.random.default_rng(seed).normal(size=(size, size)))
    return np.asarray(drawn * np.sign(np.diag(upper)))


def _spread(turned: Array, mean: Array) -> Array:
    """The rotation, reflected so that it gives every channel the same share of the latent's mean: what is common to
    all goes into the zero point, and what one channel has more than others into the range of all."""
    arrives = turned @ mean
    size = float(np.linalg.norm(arrives))
    if size <= 0.0:
        return turned
    normal = arrives / size - 1.0 / math.sqrt(len(mean))
    length = float(normal @ normal)
    if length < 1e-20:
        return turned
    return np.asarray(turned - np.outer(2.0 / length * normal, normal @ turned))
