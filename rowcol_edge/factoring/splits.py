"""How a layer is split: its weight as a matrix, and the layers that stand in for it, their values unset.

==========  =======================================================  ==============================================
`column`    the layer's own kernel to ``rank`` channels, then 1×1    cuts down the column space: what the layer gives
`row`       1×1 to ``rank`` channels, then the layer's own kernel    cuts down the row space: what the layer takes
`both`      1×1, the layer's own kernel in between, 1×1              Tucker-2
`spatial`   k×1 to ``rank`` channels, then 1×k, or 1×k then k×1      two dimensions, both sides above 1
==========  =======================================================  ==============================================

Only the last layer has a bias, and it always has one. The values are those of `projections`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.nn.modules.conv import _ConvNd

from rowcol_edge.factoring.layers import base

Layer = nn.Linear | _ConvNd
Planar = nn.Conv2d | nn.ConvTranspose2d

_POINTWISE: dict[int, type[nn.Conv1d | nn.Conv2d]] = {1: nn.Conv1d, 2: nn.Conv2d}


def matrix(layer: Layer) -> NDArray[np.float64]:
    """The weight as (out, in · kernel), float64; of a layer in one group."""
    weight = layer.weight.detach().double().cpu().numpy()
    if _inputs_first(layer):
        weight = weight.swapaxes(0, 1)
    return np.asarray(weight.reshape(weight.shape[0], -1))


def taps(layer: Layer) -> NDArray[np.float64]:
    """The weight as (out, in, taps of the kernel), float64; of a layer in one group."""
    found = matrix(layer)
    return found.reshape(len(found), _inputs(layer), -1)


def fill(layer: Layer, values: NDArray[np.float64], like: torch.Tensor) -> None:
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


def column(layer: Layer, rank: int) -> tuple[Layer, Layer]:
    """``reduce`` and ``expand``, which is 1×1.

    A convolution's ``reduce`` keeps kernel, stride, padding and dilation, a transposed one's its output padding too.
    """
    return _own(layer, _inputs(layer), rank, bias=False), _pointwise(layer, rank, _outputs(layer), bias=True)


def row(layer: Layer, rank: int) -> tuple[Layer, Layer]:
    """``reduce``, which is 1×1, and ``expand``, which keeps all that `column` has in its first layer."""
    return _pointwise(layer, _inputs(layer), rank, bias=False), _own(layer, rank, _outputs(layer), bias=True)


def both(layer: Layer, taken: int, given: int) -> tuple[Layer, Layer, Layer]:
    """``reduce`` to ``taken`` channels, ``core`` with the layer's own kernel to ``given``, ``expand``."""
    return (
        _pointwise(layer, _inputs(layer), taken, bias=False),
        _own(layer, taken, given, bias=False),
        _pointwise(layer, given, _outputs(layer), bias=True),
    )


def spatial(layer: Planar, rank: int, *, across_first: bool) -> tuple[Planar, Planar]:
    """``reduce`` (k×1; 1×k with ``across_first``) and ``expand`` (the other way); each has its own axis of stride,
    padding, dilation and output padding. Padding is separable in every mode, so that the border is the layer's own."""
    axis = 1 if across_first else 0
    own = {"stride": 1, "padding": 0, "dilation": 1} | ({"output_padding": 0} if layer.transposed else {})

    def part(inputs: int, outputs: int, axis: int, *, bias: bool) -> Planar:
        def one(value: Any, neutral: int) -> Any:
            return value if isinstance(value, str) else tuple(value[a] if a == axis else neutral for a in (0, 1))

        made = _skip_init()(
            base(layer),
            inputs,
            outputs,
            one(layer.kernel_size, 1),
            padding_mode=layer.padding_mode,
            bias=bias,
            **{name: one(getattr(layer, name), value) for name, value in own.items()},
            **_options(layer),
        )
        return cast(Planar, made)

    return part(layer.in_channels, rank, axis, bias=False), part(rank, layer.out_channels, 1 - axis, bias=True)


def coverage(layer: Layer, before: Sequence[int], behind: Sequence[int]) -> float:
    """The share of all taps of all outputs that read an input rather than a zero of the border, or nothing.

    1.0 for a linear layer. Above a half for convolutions whose padding is not larger than their map; for transposed
    ones about 1 over the product of the strides.

    Args:
        before, behind: sizes of the map that the layer takes and gives.
    """
    if isinstance(layer, nn.Linear) or (not layer.transposed and layer.padding_mode != "zeros"):
        return 1.0
    share = 1.0
    left = layer._reversed_padding_repeated_twice[-2::-2]  # torch fills it for "same" and "valid" too
    for axis, (taken, given) in enumerate(zip(before, behind, strict=True)):
        stride, reach = layer.stride[axis], np.arange(layer.kernel_size[axis]) * layer.dilation[axis]
        origins, most = (np.arange(taken), given) if layer.transposed else (np.arange(given), taken)
        meets = origins[:, None] * stride - left[axis] + reach
        share *= float(((meets >= 0) & (meets < most)).sum()) / (given * len(reach))
    return share


def _own(layer: Layer, inputs: int, outputs: int, *, bias: bool) -> Layer:
    """The layer for other channels."""
    if isinstance(layer, nn.Linear):
        return cast(Layer, _skip_init()(nn.Linear, inputs, outputs, bias=bias, **_options(layer)))
    kept = ["stride", "padding", "dilation", "padding_mode", *(["output_padding"] if layer.transposed else [])]
    made = _skip_init()(
        base(layer),
        inputs,
        outputs,
        layer.kernel_size,
        bias=bias,
        **{name: getattr(layer, name) for name in kept},
        **_options(layer),
    )
    return cast(Layer, made)


def _pointwise(layer: Layer, inputs: int, outputs: int, *, bias: bool) -> Layer:
    """A matrix over the channels."""
    if isinstance(layer, nn.Linear):
        return _own(layer, inputs, outputs, bias=bias)
    kind = _POINTWISE[len(layer.kernel_size)]
    return cast(Layer, _skip_init()(kind, inputs, outputs, 1, bias=bias, **_options(layer)))


def _inputs(layer: Layer) -> int:
    return layer.in_features if isinstance(layer, nn.Linear) else layer.in_channels


def _outputs(layer: Layer) -> int:
    return layer.out_features if isinstance(layer, nn.Linear) else layer.out_channels


def _skip_init() -> Callable[..., Any]:
    """Draws no random numbers, so the caller's generator stays where it is."""
    return cast(Callable[..., Any], nn.utils.skip_init)


def _options(layer: Layer) -> dict[str, Any]:
    return {"device": layer.weight.device, "dtype": layer.weight.dtype}


def _inputs_first(layer: Layer) -> bool:
    """torch keeps a transposed convolution's weight as (in, out, kernel)."""
    return isinstance(layer, _ConvNd) and layer.transposed
