"""Cross-layer equalisation: channels between two layers scaled so that the weights on both sides use their range alike.

``W₂ relu(W₁x + b₁) = W₂ S relu(S⁻¹W₁x + S⁻¹b₁)`` for any positive diagonal S. With ``s = √(r₁r₂) / r₂`` for each
channel, r₁ and r₂ the largest weight before and behind it, both become ``√(r₁r₂)``.

Source: M. Nagel, M. van Baalen, T. Blankevoort and M. Welling, "Data-free quantization through weight equalization and
bias correction", ICCV 2019, section 4.1.
"""

from __future__ import annotations

import copy
from collections.abc import Collection

import torch
from torch import nn
from torch.nn.modules.conv import _ConvNd

from rowcol_edge.errors import ModelError
from rowcol_edge.factoring.graph import LayerGraph

_ROUNDS = 40
_SETTLED = 1e-3


def equalize(model: nn.Module, graph: LayerGraph, settled: Collection[str] = ()) -> nn.Module:
    """A copy whose coupled layers (``graph.couplings``) are equalised. Outputs stay the same up to rounding.

    A layer can stand behind one coupling and before the next, so they are gone through until nothing changes any more.
    Parts of the factored layers ``settled`` have a gauge that is better than this one (see `settle`) and keep it.

    Raises:
        ModelError: the graph is of another model.
    """
    equal = copy.deepcopy(model).eval()
    free = [(pair.first, pair.second) for pair in graph.couplings if _holder(pair.first, pair.second) not in settled]
    try:
        pairs = [(equal.get_submodule(first), equal.get_submodule(second)) for first, second in free]
    except AttributeError as error:
        raise ModelError("the layer graph is of another model", expected="its coupled layers") from error
    with torch.no_grad():
        for _ in range(_ROUNDS):
            if not pairs or max(_scale(first, second) for first, second in pairs) < _SETTLED:
                break
    return equal


def _holder(*names: str) -> str:
    """The module that all of them are parts of, if they are of one."""
    found = {name.rpartition(".")[0] for name in names}
    return found.pop() if len(found) == 1 else ""


def _scale(first: nn.Module, second: nn.Module) -> float:
    """Equalise one coupling in place; how far the scales were from 1."""
    assert isinstance(first, nn.Linear | _ConvNd)  # trace() couples nothing else
    assert isinstance(second, nn.Linear | _ConvNd)
    weight = first.weight.double()
    behind = _by_input(second)
    before_range = weight.abs().flatten(1).amax(1)
    behind_range = behind.abs().flatten(3).amax((1, 3)).flatten()
    scale = (before_range / behind_range).sqrt()
    scale[(before_range == 0) | (behind_range == 0)] = 1.0  # a channel that is never used
    first.weight.copy_(weight / scale.view(-1, *[1] * (weight.dim() - 1)))
    if first.bias is not None:
        first.bias.copy_(first.bias.double() / scale)
    groups, _, width = behind.shape[:3]
    scaled = behind * scale.view(groups, 1, width, *[1] * (behind.dim() - 3))
    second.weight.copy_(scaled.reshape(second.weight.shape))
    return float((scale.log().abs()).max())


def _by_input(layer: nn.Linear | _ConvNd) -> torch.Tensor:
    """The weight in float64 as (groups, outputs of a group, inputs of a group, …, 1)."""
    weight = layer.weight.double()
    groups = layer.groups if isinstance(layer, _ConvNd) else 1
    return weight.reshape(groups, weight.shape[0] // groups, *weight.shape[1:], 1)
