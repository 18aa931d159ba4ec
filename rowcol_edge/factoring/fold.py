"""Batch norm folded into the layer before it, so that a layer's output is what the next one sees."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import cast

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd
from torch.nn.utils.fusion import fuse_conv_bn_weights, fuse_linear_bn_weights

from rowcol_edge.errors import ModelError
from rowcol_edge.factoring import norms
from rowcol_edge.factoring.graph import LayerGraph


def fold_batchnorm(model: nn.Module, graph: LayerGraph) -> nn.Module:
    """A copy in eval mode, with every pair of ``graph.batchnorms`` folded and in the place of its batch norm what that
    computes beside normalising: an ``nn.Identity`` where it is nothing (see `norms`).

    Folding is computed in float64 and cast back. Outputs equal the original's in eval mode up to rounding.

    Raises:
        ModelError: the graph is of another model.
    """
    found: list[tuple[str, _BatchNorm]] = []
    rests: dict[int, nn.Module] = {}
    for pair in graph.batchnorms:
        try:
            layer, norm = model.get_submodule(pair.layer), model.get_submodule(pair.norm)
        except AttributeError as error:
            raise ModelError("the layer graph is of another model", expected=f"module {pair.norm!r}") from error
        rest = norms.rest(norm, layer)
        if rest is None or not isinstance(norm, _BatchNorm):
            what = f"the layer graph is of another model: {pair.norm!r}"
            raise ModelError(what, expected="a batch norm that can be folded", got=type(norm).__name__)
        found.append((pair.layer, norm))
        rests[id(norm)] = rest
    # by the copy's memo, so that whatever refers to a norm, be it a list, refers to what is in its place
    folded = copy.deepcopy(model, rests).eval()
    for name, norm in found:
        _fold(folded.get_submodule(name), norm)
    return folded


def _fold(layer: nn.Module, norm: _BatchNorm) -> None:
    assert isinstance(layer, nn.Linear | _ConvNd)  # trace() pairs nothing else with a batch norm
    assert norm.running_mean is not None
    assert norm.running_var is not None
    weight, bias = layer.weight, layer.bias
    fuse: Callable[..., tuple[nn.Parameter, nn.Parameter]] = fuse_linear_bn_weights
    if isinstance(layer, _ConvNd):
        fuse = partial(fuse_conv_bn_weights, transpose=layer.transposed)
    # Both None where the batch norm is not affine.
    scale, shift = cast("torch.Tensor | None", norm.weight), cast("torch.Tensor | None", norm.bias)
    new_weight, new_bias = fuse(
        weight.detach().double(),
        None if bias is None else bias.detach().double(),
        norm.running_mean.double(),
        norm.running_var.double(),
        norm.eps,
        torch.ones_like(norm.running_var).double() if scale is None else scale.detach().double(),
        torch.zeros_like(norm.running_var).double() if shift is None else shift.detach().double(),
    )
    layer.weight = nn.Parameter(new_weight.to(weight.dtype), requires_grad=weight.requires_grad)
    layer.bias = nn.Parameter(new_bias.to(weight.dtype), requires_grad=weight.requires_grad)
