"""Layers that use one matrix twice, as ``W`` and as ``Wᵀ``, and the best such matrix for a pair that is there.

A tie saves bytes, not time: both products are still calculated.

Source of the layers: O. C. Koyun and B. U. Töreyin, "HaLViT: Half of the Weights are Enough", CVPR Workshops 2024
(FFN ``Wᵀσ(Wx + b₁) + b₂``; attention of ``Q = W_q x``, ``K = Wx``, ``V = Wᵀx``, projected by ``W_qᵀ``; bottleneck
``WᵀG(Wx)``).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from rowcol_edge.errors import DataError, ModelError

Floats = NDArray[np.float64]
_NULL = 1e-12
"""Sums of eigenvalues below this share of the largest one are taken for zero: no calibration input says anything."""
ROUNDING = 1e-6
"""Of the largest value of moments: what they may lack in symmetry, and their eigenvalues be below zero."""


class TiedFeedForward(nn.Module):
    """``Wᵀσ(Wx + b₁) + b₂`` on the last axis: (…, width) → (…, width). ``weight`` is hidden × width."""

    def __init__(self, width: int, hidden: int, activation: Callable[[Tensor], Tensor] = F.gelu) -> None:
        super().__init__()
        self.weight = _matrix(hidden, width)
        self.hidden_bias = nn.Parameter(torch.zeros(hidden))
        self.bias = nn.Parameter(torch.zeros(width))
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(self.activation(F.linear(x, self.weight, self.hidden_bias)), self.weight.t(), self.bias)

    @classmethod
    def from_dense(
        cls, expand: nn.Linear, contract: nn.Linear, inputs: Tensor, activation: Callable[[Tensor], Tensor] = F.gelu
    ) -> tuple[TiedFeedForward, Tie]:
        """The nearest tied layer to ``contract(σ(expand(x)))`` on ``inputs`` (…, width), of the type and on the device
        of ``expand``: a start for fine-tuning. Biases make good what the tie moves on average.

        Raises:
            ModelError: layers that do not follow one another, or inputs of another width.
            DataError: no inputs, or of another type or device than the layers.
        """
        _check_chain(inputs, {"expand": expand, "contract": contract})
        with torch.no_grad():
            hidden = activation(expand(inputs))
            wanted = contract(hidden)
        tie = tie_from_dense(
            _array(expand.weight), _array(contract.weight), _covariance(inputs), _covariance(hidden), relative=True
        )
        layer = cls(expand.in_features, expand.out_features, activation).to(expand.weight)
        _fill(layer.weight, tie.weight)
        _fill(layer.hidden_bias, _bias(expand, tie.weight, inputs))
        error = _level(layer, layer.bias, inputs, wanted)
        return layer.train(expand.training), replace(tie, layer_error=error)


class TiedAttention(nn.Module):
    """Self-attention with two matrices instead of four: (N, tokens, width) → (N, tokens, width).

    ``Q = W_q x``, ``K = Wx``, ``V = Wᵀx``, split into heads; what they mix is projected by ``W_qᵀ``. Both matrices are
    width × width. HaLViT's has no biases; ``bias`` gives each of the four products one of its own.
    """

    def __init__(self, width: int, heads: int, *, bias: bool = False) -> None:
        super().__init__()
        if heads < 1 or width % heads:
            raise ModelError("heads of a tied attention", expected=f"a divisor of width {width}", got=str(heads))
        self.heads = heads
        self.query, self.weight = _matrix(width, width), _matrix(width, width)
        self.query_bias, self.key_bias, self.value_bias, self.bias = (
            nn.Parameter(torch.zeros(width)) if bias else None for _ in range(4)
        )

    def forward(self, x: Tensor) -> Tensor:
        mixed = _mixed(
            F.linear(x, self.query, self.query_bias),
            F.linear(x, self.weight, self.key_bias),
            F.linear(x, self.weight.t(), self.value_bias),
            self.heads,
        )
        return F.linear(mixed, self.query.t(), self.bias)

    @classmethod
    def from_dense(
        cls, query: nn.Linear, key: nn.Linear, value: nn.Linear, output: nn.Linear, heads: int, inputs: Tensor
    ) -> tuple[TiedAttention, Tie, Tie]:
        """The nearest tied layer to dense attention on ``inputs`` (N, tokens, width), of the type and on the device of
        ``query``, with the ties of query and output, and of key and value. Biases make good what ties move on average.

        Raises:
            ModelError: the width is no multiple of ``heads``, or layers or inputs have another one.
            DataError: no inputs, or of another type or device than the layers.
        """
        layer = cls(query.in_features, heads, bias=True).to(query.weight)
        if inputs.dim() != 3:
            raise DataError("inputs for a tie", expected="(samples, tokens, width)", got=str(tuple(inputs.shape)))
        for name, one in {"query": query, "key": key, "value": value, "output": output}.items():
            _check_chain(inputs, {name: one})
        with torch.no_grad():
            mixed = _mixed(query(inputs), key(inputs), value(inputs), heads)
            wanted = output(mixed)
        seen = _covariance(inputs)
        outer = tie_from_dense(_array(query.weight), _array(output.weight), seen, _covariance(mixed), relative=True)
        inner = tie_from_dense(_array(key.weight), _array(value.weight), seen, seen, relative=True)
        _fill(layer.query, outer.weight)
        _fill(layer.weight, inner.weight)
        for bias, dense, weight in (
            (layer.query_bias, query, outer.weight),
            (layer.key_bias, key, inner.weight),
            (layer.value_bias, value, inner.weight.T),
        ):
            assert bias is not None
            _fill(bias, _bias(dense, weight, inputs))
        assert layer.bias is not None
        error = _level(layer, layer.bias, inputs, wanted)
        return layer.train(query.training), replace(outer, layer_error=error), replace(inner, layer_error=error)


class TiedBottleneck(nn.Module):
    """``WᵀG(Wx)`` on feature maps (N, channels, H, W), with 1×1 convolutions that have no biases.

    ``weight`` is inner × channels × 1 × 1; ``inner`` is ``G``, such as norm, ReLU, 3×3 convolution, norm, ReLU. From a
    dense pair: `tied_kernels.TiedKernels.from_dense`, for which a kernel of one pixel is one of many.
    """

    def __init__(self, channels: int, inner_channels: int, inner: nn.Module) -> None:
        super().__init__()
        self.weight = nn.Parameter(_matrix(inner_channels, channels).data[:, :, None, None])
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return tied_bottleneck(x, self.weight, self.inner)


def tied_bottleneck(x: Tensor, weight: Tensor, inner: nn.Module) -> Tensor:
    """``WᵀG(Wx)``: for a ``weight`` (inner × channels × 1 × 1) that several bottlenecks share."""
    return F.conv2d(inner(F.conv2d(x, weight)), weight.transpose(0, 1))


@dataclass(frozen=True, slots=True, eq=False)
class Tie:
    """One matrix in the place of a pair.

    Attributes:
        weight: hidden × width.
        first_error: ‖W₁x − Wx‖ / ‖W₁x‖ over the calibration inputs, predicted from their moments.
        second_error: ‖W₂h − Wᵀh‖ / ‖W₂h‖, as predicted.
        loss: what was minimised, ``E‖W₁x − Wx‖² + E‖W₂h − Wᵀh‖²``, or the sum of the squared relative errors.
        layer_error: of a whole layer made from dense ones, ‖dense(x) − tied(x)‖ / ‖dense(x)‖ over the inputs, both
            about their mean: the error of its start, with what the first tie does to the second's input.
    """

    weight: Floats
    first_error: float
    second_error: float
    loss: float
    layer_error: float | None = None


def tie_from_dense(first: Floats, second: Floats, inputs: Floats, hidden: Floats, *, relative: bool = False) -> Tie:
    """The matrix ``W`` that minimises ``E‖W₁x − Wx‖² + E‖W₂h − Wᵀh‖²``.

    With ``C = E[xxᵀ]`` and ``D = E[hhᵀ]`` the sum is ``tr (W₁−W)C(W₁−W)ᵀ + tr (W₂ᵀ−W)ᵀD(W₂ᵀ−W)``, convex in ``W``; its
    gradient is zero where::

        W C + D W = W₁ C + D W₂ᵀ

    a Sylvester equation. In the eigenvectors ``C = P Λ Pᵀ`` and ``D = Q M Qᵀ`` it falls apart into single numbers,
    ``(QᵀWP)ᵢⱼ = (Qᵀ(W₁C + DW₂ᵀ)P)ᵢⱼ / (μᵢ + λⱼ)``. Where both are zero the data say nothing, every value is a
    minimiser, and the mean of ``W₁`` and ``W₂ᵀ`` is taken. ``relative`` divides each term by ``E‖W₁x‖²`` or ``E‖W₂h‖²``
    first: the larger outputs would else decide alone, and what a network makes of both is no matter of their size.

    Source: own derivation; for the Sylvester equation R. H. Bartels and G. W. Stewart, "Solution of the matrix equation
    AX + XB = C", Communications of the ACM 15 (1972), here for symmetric A and B.

    Args:
        first: ``W₁``, hidden × width.
        second: ``W₂``, width × hidden.
        inputs: ``C``, width × width, the second moments of what ``W₁`` takes.
        hidden: ``D``, hidden × hidden, those of what ``W₂`` takes.

    Raises:
        ModelError: matrices that do not belong together.
        DataError: moments of another size, not finite, or not symmetric and positive semidefinite.
    """
    first, second, inputs, hidden = (np.asarray(given, np.float64) for given in (first, second, inputs, hidden))
    if first.ndim != 2 or second.shape != first.shape[::-1]:
        raise ModelError("a pair to tie", expected="hidden × width and width × hidden", got=_shapes(first, second))
    (lam, P), C = _eigen("moments of the inputs", inputs, first.shape[1]), inputs
    (mu, Q), D = _eigen("moments of the hidden units", hidden, first.shape[0]), hidden
    energies = _energy(first, C), _energy(second, D)
    if relative:
        weights = [1.0 / energy if energy else 1.0 for energy in energies]
        C, lam, D, mu = C * weights[0], lam * weights[0], D * weights[1], mu * weights[1]
    sums = mu[:, None] + lam[None, :]
    mean = Q.T @ (first + second.T) @ P / 2.0
    known = sums > _NULL * max(float(sums.max()), np.finfo(np.float64).tiny)
    right = Q.T @ (first @ C + D @ second.T) @ P
    W = Q @ np.where(known, right / np.where(known, sums, 1.0), mean) @ P.T
    errors = _energy(first - W, inputs), _energy(second - W.T, hidden)
    first_error, second_error = (_relative(e, n) for e, n in zip(errors, energies, strict=True))
    return Tie(W, first_error, second_error, _energy(first - W, C) + _energy(second - W.T, D))


def check_moments(what: str, moments: Floats, size: int) -> float:
    """Their largest value, in relation to which rounding counts.

    Raises:
        DataError: moments of another size, not finite or not symmetric.
    """
    if moments.shape != (size, size):
        raise DataError(what, expected=f"{size}×{size}", got=_shapes(moments))
    if not np.isfinite(moments).all():
        raise DataError(what, expected="finite values", got="NaN or infinity", hint="clean the calibration data first")
    scale = float(np.abs(moments).max(initial=0.0))
    if not np.allclose(moments, moments.T, rtol=0.0, atol=ROUNDING * scale):
        raise DataError(what, expected="a symmetric matrix", got="another", hint="E[xxᵀ] over the calibration inputs")
    return scale


def check_inputs(inputs: Tensor, like: Tensor) -> None:
    """Raises DataError where there are none, or the layer of this weight does not take their type or device."""
    if not inputs.numel():
        raise DataError("inputs for a tie", expected="at least one sample", got="none")
    if (inputs.dtype, inputs.device) != (like.dtype, like.device):
        expected, got = (f"{str(x.dtype).removeprefix('torch.')} on {x.device}" for x in (like, inputs))
        raise DataError("inputs for a tie", expected=expected, got=got, hint="those of the layer: inputs.to(weight)")


def _eigen(what: str, moments: Floats, size: int) -> tuple[Floats, Floats]:
    """Eigenvalues, not below zero, and eigenvectors."""
    scale = check_moments(what, moments, size)
    values, vectors = np.linalg.eigh((moments + moments.T) / 2.0)
    if values.min(initial=0.0) < -ROUNDING * scale:
        raise DataError(what, expected="no negative eigenvalue", got=f"{values.min():.3g}")
    return np.maximum(values, 0.0), vectors


def _energy(matrix: Floats, moments: Floats) -> float:
    """``E‖Mx‖²``; rounding may bring it below zero."""
    return max(0.0, float(np.sum((matrix @ moments) * matrix)))


def _relative(error: float, energy: float) -> float:
    if energy == 0.0:
        return 0.0 if error == 0.0 else float("inf")
    return float(np.sqrt(error / energy))


def _shapes(*matrices: Floats) -> str:
    return " and ".join("×".join(map(str, matrix.shape)) for matrix in matrices)


def _mixed(query: Tensor, key: Tensor, value: Tensor, heads: int) -> Tensor:
    q, k, v = (x.view(*x.shape[:-1], heads, -1).transpose(-3, -2) for x in (query, key, value))
    return F.scaled_dot_product_attention(q, k, v).transpose(-3, -2).flatten(-2)


def _matrix(rows: int, columns: int) -> nn.Parameter:
    """Variance 2 / (rows + columns), which keeps that of signals in both directions (Glorot and Bengio, 2010)."""
    return nn.Parameter(nn.init.xavier_uniform_(torch.empty(rows, columns)))


def _array(tensor: Tensor) -> Floats:
    array: Floats = tensor.detach().double().cpu().numpy()
    return array


def _check_chain(inputs: Tensor, layers: Mapping[str, nn.Linear]) -> None:
    """Layers one behind the other, of which the last gives the width that the first takes."""
    for layer in layers.values():
        check_inputs(inputs, layer.weight)
    width = taken = inputs.shape[-1] if inputs.dim() else 0
    for place, (name, layer) in enumerate(layers.items()):
        given = width if place == len(layers) - 1 else layer.out_features
        if (layer.in_features, layer.out_features) != (taken, given):
            got = f"{layer.in_features} → {layer.out_features}"
            hint = f"the inputs have width {width}"
            raise ModelError(f"layer {name} of a tie", expected=f"{taken} → {given}", got=got, hint=hint)
        taken = given


def _covariance(x: Tensor) -> Floats:
    centred = _centred(x)
    moments: Floats = centred.T @ centred / len(centred)
    return moments


def _centred(x: Tensor) -> Floats:
    """(rows, width), without columns that vary by rounding alone."""
    flat = _array(x).reshape(-1, x.shape[-1])
    mean = flat.mean(0)
    centred: Floats = flat - mean
    rounding = 4 * torch.finfo(x.dtype).eps * np.abs(mean)
    centred[:, np.sqrt(np.square(centred).mean(0)) <= rounding] = 0.0
    return centred


def _bias(dense: nn.Linear, weight: Floats, inputs: Tensor) -> Floats:
    """With which ``weight`` gives the same as the dense layer on average."""
    moved: Floats = (_array(dense.weight) - weight) @ _array(inputs).reshape(-1, inputs.shape[-1]).mean(0)
    bias: Tensor | None = getattr(dense, "bias", None)
    return moved if bias is None else moved + _array(bias)


def _level(layer: nn.Module, bias: Tensor, inputs: Tensor, wanted: Tensor) -> float:
    """Set the last bias so that the layer gives the wanted mean; its error then, about that mean."""
    with torch.no_grad():
        apart = (_array(wanted) - _array(layer(inputs))).reshape(-1, len(bias))
    mean, energy = apart.mean(0), float(np.square(_centred(wanted)).sum())
    _fill(bias, _array(bias) + mean)
    return float(np.sqrt(np.square(apart - mean).sum() / energy)) if energy else 0.0


def _fill(parameter: Tensor, value: Floats) -> None:
    with torch.no_grad():
        parameter.copy_(torch.as_tensor(value))
