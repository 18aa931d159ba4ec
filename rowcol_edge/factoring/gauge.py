"""The free gauge between two factors.

``B A = (B M⁻¹)(M A)`` for any invertible ``M``: the float product is the same, its int8 errors are not (`settle` tells
which is best). One scale holds for the whole latent tensor, so channels of little range lose their bits to those of
much; what evens the latent out makes the second weight's columns uneven in turn. The rotation is that of S. Ashkboos
et al., "QuaRot: outlier-free 4-bit inference in rotated LLMs", 2024, with an orthogonal matrix of any size; sharing a
scale out between two layers by an exponent is G. Xiao et al., "SmoothQuant", 2023, equation 4.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import nn
from torch.nn.modules.conv import _ConvNd

from rowcol_edge.errors import PlanError
from rowcol_edge.factoring import splits
from rowcol_edge.factoring.layers import base
from rowcol_edge.factoring.places import channel_axis

Array = NDArray[np.float64]

_FLOOR = 1e-6  # variances are floored at this share of the largest: what calibration never showed is not blown up
_RIDGE = 1e-10  # share of the mean variance added to each latent channel's: one that is idle can be divided by


@dataclass(frozen=True, slots=True)
class Gauge:
    """``M = S^(−β) Q Λ^(−α/2) T``, in the order in which it is applied to the latent.

    ``T`` makes the latent's channels uncorrelated and the second weight's columns orthonormal (in the metric of the
    output's error, see `settle`), which leaves them variances ``Λ``.
    """

    alpha: float = 0.5  # 0 leaves the channels their variances, 1 makes them equal
    rotation: int | None = None  # seed of the orthogonal matrix Q; None: the identity
    beta: float = 0.0  # S are the ranges (largest less smallest) that the channels have then
    centred: bool = False  # take the latent's mean out, with a bias that the first layer gets for it

    def __str__(self) -> str:
        parts = [f"alpha {self.alpha:g}"]
        parts += [] if self.rotation is None else [f"rotation {self.rotation}"]
        parts += [f"beta {self.beta:g}"] if self.beta else []
        return ", ".join([*parts, *(["centred"] if self.centred else [])])


def turn(pair: nn.Sequential, gauge: Gauge, latent: Array, metric: Array | None = None) -> nn.Sequential:
    """A copy of the pair with ``M`` between its layers: its float product is the same up to rounding.

    Args:
        pair: two layers that multiply, as `parts` takes them.
        latent: (positions, rank), what the first layer gives on real inputs.
        metric: (out, out), what errors of the output are weighed with; None: the identity.

    Raises:
        PlanError: no such pair; a centred gauge where the second layer pads.
    """
    first, second = parts(pair)
    rank = latent.shape[1]
    behind = splits.matrix(second).reshape(-1, rank, int(np.prod(second.weight.shape[2:], dtype=np.int64)))
    mean = latent.mean(axis=0)
    forward, back = _gauge(gauge, latent - mean, behind, metric)
    biases = [np.zeros(len(forward)), np.zeros(len(behind))]
    for place, layer in enumerate((first, second)):
        if layer.bias is not None:
            biases[place] = layer.bias.detach().double().cpu().numpy()
    biases[0] = forward @ biases[0]
    if gauge.centred:
        biases[1] = biases[1] + behind.sum(axis=2) @ mean
        biases[0] = biases[0] - forward @ mean
        _check_centred(second)
    names = [name for name, _ in pair.named_children()]
    with_bias = first.bias is not None or gauge.centred, second.bias is not None or gauge.centred
    made = [_copy(layer, bias) for layer, bias in zip((first, second), with_bias, strict=True)]
    splits.fill(made[0], forward @ splits.matrix(first), first.weight)
    splits.fill(made[1], np.einsum("ort,rs->ost", behind, back).reshape(len(behind), -1), second.weight)
    for layer, values in zip(made, biases, strict=True):
        if layer.bias is not None:
            splits.put(layer.bias, values, layer.weight)
    return nn.Sequential(OrderedDict(zip(names, made, strict=True))).train(pair.training)


def _gauge(gauge: Gauge, latent: Array, behind: Array, metric: Array | None) -> tuple[Array, Array]:
    """``M`` and its inverse. ``latent``: (positions, rank), centred; ``behind``: (out, rank, taps)."""
    rank = latent.shape[1]
    covariance = latent.T @ latent / len(latent)
    level = float(np.trace(covariance)) / rank
    root = np.linalg.cholesky(covariance + max(_RIDGE * level, 1e-30) * np.eye(rank))
    weighed = behind if metric is None else np.einsum("op,prt->ort", metric, behind)
    worth = np.einsum("ort,ost->rs", behind, weighed)
    values, vectors = np.linalg.eigh(root.T @ worth @ root)
    values, vectors = values[::-1], vectors[:, ::-1]
    scales = np.sqrt(np.maximum(values, max(_FLOOR * float(values[0]), 1e-30)))
    # T and its inverse; the floor only leaves channels that are worth nothing a little more than that
    forward = np.linalg.solve(root.T, vectors).T * (scales ** (1.0 - gauge.alpha))[:, None]
    back = (root @ vectors) * scales ** (gauge.alpha - 1.0)
    if gauge.rotation is not None:
        drawn = rotation(rank, gauge.rotation)
        forward, back = drawn @ forward, back @ drawn.T
    if gauge.beta:
        given = latent @ forward.T
        ranges = np.maximum(np.ptp(given, axis=0), 1e-30) ** gauge.beta
        forward, back = forward / ranges[:, None], back * ranges
    return forward, back


def rotation(size: int, seed: int) -> Array:
    """A random orthogonal (size, size), uniformly distributed: QR of a normal matrix with the signs of R's diagonal
    (F. Mezzadri, How to generate random matrices from the classical compact groups, 2007)."""
    drawn, upper = np.linalg.qr(np.random.default_rng(seed).normal(size=(size, size)))
    return np.asarray(drawn * np.sign(np.diag(upper)))


def _check_centred(second: nn.Linear | _ConvNd) -> None:
    if not splits.constant_fits(second):
        raise PlanError(
            "a centred gauge",
            expected="a second layer that adds no zeros to what it gets",
            got=str(second),
            hint="a constant cannot be taken out where the border pads",
        )


def _copy(layer: nn.Linear | _ConvNd, bias: bool) -> nn.Linear | _ConvNd:
    """The layer, with a bias or without."""
    made = copy.deepcopy(layer)
    if bias and made._parameters.get("bias") is None:
        rows = made.out_features if isinstance(made, nn.Linear) else made.out_channels
        made.bias = nn.Parameter(made.weight.new_zeros(rows), requires_grad=made.weight.requires_grad)
    return made


def parts(pair: nn.Module, name: str = "") -> tuple[nn.Linear | _ConvNd, nn.Linear | _ConvNd]:
    """Both layers of a pair, of which the second takes what the first gives; PlanError for anything else."""
    what = f"layer {name!r}" if name else "a factored layer"
    layers = list(pair.children()) if isinstance(pair, nn.Sequential) else []
    kinds = [base(layer) for layer in layers]
    if len(layers) != 2 or None in kinds:
        got = type(pair).__name__ + (f" of {', '.join(type(layer).__name__ for layer in layers)}" if layers else "")
        raise PlanError(what, expected="two linear layers or convolutions in a row", got=got)
    first, second = layers
    assert isinstance(first, nn.Linear | _ConvNd)
    assert isinstance(second, nn.Linear | _ConvNd)
    given = first.out_features if isinstance(first, nn.Linear) else first.out_channels
    taken = second.in_features if isinstance(second, nn.Linear) else second.in_channels
    grouped = any(isinstance(layer, _ConvNd) and layer.groups != 1 for layer in (first, second))
    if given != taken or grouped or channel_axis(first) != channel_axis(second):
        raise PlanError(what, expected="two layers without groups that multiply", got=f"{first}, {second}")
    return first, second
