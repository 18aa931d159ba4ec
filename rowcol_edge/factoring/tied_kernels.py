"""Two convolutions of one kernel, and the best such kernel for a pair that is there.

What `ties` does for matrices, for k×k convolutions between maps of one size: the second has the kernel of the first,
its two channel axes exchanged. A tie saves bytes, not time.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from rowcol_edge.errors import DataError, ModelError
from rowcol_edge.factoring.ties import ROUNDING, Tie, check_inputs, check_moments

Floats = NDArray[np.float64]
_BATCH = 8
"""Images that are unfolded at once: k² times their maps lie in memory, in double precision."""
_TOLERANCE = 1e-2
"""Of the gradient's norm over that at the start: what is left is small beside what fine-tuning moves."""
_MOST_STEPS = 200


class TiedKernels(nn.Module):
    """``W′ ∗ G(W ∗ x)`` on feature maps (N, channels, H, W), of stride 1 and with zeros around, so that sizes stay.

    ``weight`` is hidden × channels × k × k with an odd k, ``W′`` has its first two axes exchanged, and ``inner`` is
    ``G``, such as norm and ReLU.
    """

    def __init__(self, weight: Tensor, inner: nn.Module) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight.detach().clone())
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        padding = self.weight.shape[2] // 2
        hidden = self.inner(F.conv2d(x, self.weight, padding=padding))
        return F.conv2d(hidden, self.weight.transpose(0, 1), padding=padding)

    @classmethod
    def from_dense(
        cls, first: nn.Conv2d, inner: nn.Module, second: nn.Conv2d, inputs: Tensor
    ) -> tuple[TiedKernels, Tie]:
        """The nearest tied layer to ``second(inner(first(inputs)))`` on ``inputs`` (N, channels, H, W): a start for
        fine-tuning.

        Errors leave out what is constant over a channel's map: a batch norm behind it takes that away, once its
        statistics are taken anew. ``inner`` goes into the new layer as it is.

        Raises:
            ModelError: convolutions that one kernel cannot replace.
            DataError: no inputs, or of another shape, type or device than the first convolution takes.
        """
        size = _kernel_size(first, second)
        for conv in (first, second):
            check_inputs(inputs, conv.weight)
        if inputs.dim() != 4 or inputs.shape[1] != first.in_channels:
            expected = f"(samples, {first.in_channels}, height, width)"
            raise DataError("inputs for a tie", expected=expected, got=str(tuple(inputs.shape)))
        with torch.no_grad():
            seen = window_moments(inputs, size), window_moments(inner(first(inputs)), size)
        tie = tie_kernels_from_dense(_array(first.weight), _array(second.weight), *seen)
        layer = cls(torch.from_numpy(tie.weight).to(first.weight), inner)
        return layer.train(first.training), tie


def tie_kernels_from_dense(
    first: Floats, second: Floats, inputs: Floats, hidden: Floats, *, tolerance: float = _TOLERANCE
) -> Tie:
    """The kernel ``W`` that minimises ``E‖W₁∗x − W∗x‖² / E‖W₁∗x‖² + E‖W₂∗h − W′∗h‖² / E‖W₂∗h‖²``.

    Convex and quadratic in ``W``. Unlike a pair of matrices (`ties.tie_from_dense`, which this is for k = 1) it does
    not fall apart in eigenvectors: one kernel mixes the taps with the channels, the other with the hidden ones. The
    linear equations are solved by conjugate gradients instead, from the mean of the two kernels: where the data say
    nothing, that is what stays.

    Source: own derivation; M. R. Hestenes and E. Stiefel, "Methods of conjugate gradients for solving linear systems",
    Journal of Research of the National Bureau of Standards 49 (1952).

    Args:
        first: ``W₁``, hidden × channels × k × k.
        second: ``W₂``, channels × hidden × k × k.
        inputs: second moments of the windows that ``W₁`` sees, channels·k² × channels·k².
        hidden: those of ``W₂``, hidden·k² × hidden·k².
        tolerance: norm of the gradient, over that at the start, at which the steps end; after 200 they end anyway.

    Returns:
        The tie, whose weight is hidden × channels × k × k.

    Raises:
        ModelError: kernels that do not belong together.
        DataError: moments of another size, not finite, or not symmetric and positive semidefinite.
    """
    first, second, C, D = (np.asarray(given, np.float64) for given in (first, second, inputs, hidden))
    if first.ndim != 4 or second.shape != (first.shape[1], first.shape[0], *first.shape[2:]):
        got = f"{_shape(first)} and {_shape(second)}"
        raise ModelError("a pair of kernels to tie", expected="hidden × channels × k × k and its counterpart", got=got)
    for kernel, seen in ((first, C), (second, D)):
        _check_moments(seen, kernel[0].size)
    energies = [_energy(kernel, seen) for kernel, seen in ((first, C), (second, D))]
    shares = [1.0 / energy if energy else 1.0 for energy in energies]

    def gradient(a: Floats, b: Floats) -> Floats:
        """Half of it, for the differences ``a`` to the first kernel and ``b`` to the second."""
        found: Floats = shares[0] * _product(a, C) + shares[1] * _product(b, D).swapaxes(0, 1)
        return found

    W = (first + second.swapaxes(0, 1)) / 2.0
    residual = gradient(first - W, second - W.swapaxes(0, 1))
    step, squared = residual, float(np.sum(residual**2))
    enough = tolerance**2 * squared
    for _ in range(_MOST_STEPS):
        if squared <= enough:
            break
        curved = gradient(step, step.swapaxes(0, 1))
        length = squared / float(np.sum(step * curved))
        W, residual = W + length * step, residual - length * curved
        before, squared = squared, float(np.sum(residual**2))
        step = residual + squared / before * step
    errors = [_energy(first - W, C), _energy(second - W.swapaxes(0, 1), D)]
    first_error, second_error = (_relative(e, n) for e, n in zip(errors, energies, strict=True))
    return Tie(W, first_error, second_error, sum(e * share for e, share in zip(errors, shares, strict=True)))


def window_moments(x: Tensor, size: int) -> Floats:
    """Second moments of the windows of ``size`` × ``size`` pixels of (N, channels, H, W), their mean taken off.

    The mean goes first and both are summed in double precision: where it is large beside what varies, the difference of
    two sums would be rounding.

    Raises:
        DataError: no samples.
    """
    if not x.numel():
        raise DataError("inputs for a tie", expected="at least one sample", got="none")
    width, count = x.shape[1] * size**2, 0
    mean, moments = np.zeros(width), np.zeros((width, width))
    for windows in _windows(x, size):
        mean += _array(windows.sum(1))
        count += windows.shape[1]
    mean /= count
    middle = torch.from_numpy(mean).to(x.device)[:, None]
    for windows in _windows(x, size):
        off = windows - middle
        moments += _array(off @ off.t())
    moments /= count
    # a place that varies by the rounding of what made it is constant
    still = np.sqrt(np.diag(moments)) <= 4 * torch.finfo(x.dtype).eps * np.abs(mean)
    moments[still] = moments[:, still] = 0.0
    return moments


def _windows(x: Tensor, size: int) -> Iterator[Tensor]:
    """Of some samples at a time: channels·size² × windows, with zeros around the maps."""
    for part in torch.split(x, _BATCH):
        yield F.unfold(part.double(), size, padding=size // 2).transpose(0, 1).flatten(1)


def _kernel_size(first: nn.Conv2d, second: nn.Conv2d) -> int:
    """Of convolutions that one kernel can replace."""
    for conv in (first, second):
        size, other = conv.kernel_size
        plain = size == other and size % 2 and conv.groups == 1 and {*conv.stride, *conv.dilation} == {1}
        if not plain or conv.padding != (size // 2, size // 2) or conv.padding_mode != "zeros" or conv.bias is not None:
            raise ModelError(
                "a convolution to tie",
                expected="a square odd kernel, stride 1, zeros around that keep the size, no groups, no bias",
                got=str(conv),
            )
    return first.kernel_size[0]


def _check_moments(seen: Floats, size: int) -> None:
    what = "moments of the windows"
    slack = max(ROUNDING * check_moments(what, seen, size), float(np.finfo(np.float64).tiny))
    try:
        np.linalg.cholesky((seen + seen.T) / 2.0 + slack * np.eye(size))
    except np.linalg.LinAlgError:
        raise DataError(what, expected="no negative eigenvalue", got="at least one") from None


def _product(kernel: Floats, seen: Floats) -> Floats:
    product: Floats = (kernel.reshape(len(kernel), -1) @ seen).reshape(kernel.shape)
    return product


def _energy(kernel: Floats, seen: Floats) -> float:
    """``E‖W∗x‖²``; rounding may bring it below zero."""
    return max(0.0, float(np.sum(_product(kernel, seen) * kernel)))


def _relative(error: float, energy: float) -> float:
    if energy == 0.0:
        return 0.0 if error == 0.0 else float("inf")
    return float(np.sqrt(error / energy))


def _shape(array: Floats) -> str:
    return "×".join(map(str, array.shape))


def _array(tensor: Tensor) -> Floats:
    array: Floats = tensor.detach().double().cpu().numpy()
    return array
