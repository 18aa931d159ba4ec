"""How a layer is split in two: its weight as a matrix, and the two layers that stand in for it.

There is one split, ``column``: the layer's own kernel to ``rank`` channels (``reduce``), then 1×1 to its outputs
(``expand``). It cuts down the column space and holds for any linear layer, because it only mixes what the layer gives.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.nn.modules.conv import _ConvNd

from rowcol_edge.factoring.layers import base

_POINTWISE: dict[int, type[nn.Conv1d | nn.Conv2d]] = {1: nn.Conv1d, 2: nn.Conv2d}


def matrix(layer: nn.Linear | _ConvNd) -> NDArray[np.float64]:
    """The weight as (out, in · kernel), float64; of a layer in one group."""
    weight = layer.weight.detach().double().cpu().numpy()
    if _inputs_first(layer):
        weight = weight.swapaxes(0, 1)
    return np.asarray(weight.reshape(weight.shape[0], -1))


def fill(layer: nn.Linear | _ConvNd, values: NDArray[np.float64], like: torch.Tensor) -> None:
    """Give a layer the weight that `matrix` would read as ``values``, trainable or not as ``like`` is."""
    shape = tuple(layer.weight.shape)
    if _inputs_first(layer):
        values = values.reshape(shape[1], shape[0], *shape[2:]).swapaxes(0, 1)
    put(layer.weight, values, like)


def put(parameter: torch.Tensor, values: NDArray[np.float64], like: torch.Tensor) -> None:
    """Values in the order of the parameter's own entries, in the type of ``like``, trainable or not as it is."""
    with torch.no_grad():
        parameter.copy_(torch.from_numpy(np.ascontiguousarray(values)).reshape(parameter.shape).to(like.dtype))
    parameter.requires_grad_(like.requires_grad)


def column(layer: nn.Linear | _ConvNd, rank: int) -> tuple[nn.Linear | _ConvNd, nn.Linear | _ConvNd]:
    """``reduce`` (no bias) and ``expand`` (with one), their values unset.

    A convolution's ``reduce`` keeps kernel, stride, padding and dilation, a transposed one's its output padding too.
    """
    # skip_init draws no random numbers, so the caller's generator stays where it is.
    skip_init = cast(Callable[..., Any], nn.utils.skip_init)
    options = {"device": layer.weight.device, "dtype": layer.weight.dtype}
    if isinstance(layer, nn.Linear):
        return (
            skip_init(nn.Linear, layer.in_features, rank, bias=False, **options),
            skip_init(nn.Linear, rank, layer.out_features, **options),
        )
    kept = ["stride", "padding", "dilation", "padding_mode", *(["output_padding"] if layer.transposed else [])]
    reduce = skip_init(
        base(layer),
        layer.in_channels,
        rank,
        layer.kernel_size,
        bias=False,
        **{name: getattr(layer, name) for name in kept},
        **options,
    )
    pointwise = _POINTWISE[len(layer.kernel_size)]
    return reduce, skip_init(pointwise, rank, layer.out_channels, 1, **options)


def _inputs_first(layer: nn.Linear | _ConvNd) -> bool:
    """torch keeps a transposed convolution's weight as (in, out, kernel)."""
    return isinstance(layer, _ConvNd) and layer.transposed
