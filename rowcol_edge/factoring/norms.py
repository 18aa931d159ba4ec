"""What a batch norm computes beside normalising: a norm that is folded into the layer before it leaves that behind."""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

from rowcol_edge.factoring.openers import ClosedError, alike, called

_ROUNDING = 1e-6


def rest(norm: nn.Module, layer: nn.Module) -> nn.Module | None:
    """What stays of a norm behind ``layer``: nothing of a plain one, the activation of one that has its own (as timm's
    ``BatchNormAct2d``). None where it cannot be folded: no running statistics, hooks that folding would lose, or more
    than normalising and then calling the modules that it holds, one after the other, as random inputs tell.
    """
    if not isinstance(norm, _BatchNorm) or norm.running_mean is None or norm.running_var is None:
        return None
    hooks = (norm._forward_hooks, norm._forward_pre_hooks, norm._backward_hooks, norm._backward_pre_hooks)
    if any(hooks):
        return None
    if type(norm).forward is _BatchNorm.forward and "forward" not in vars(norm):
        return nn.Identity()
    behind = nn.Sequential(*copy.deepcopy(list(norm.children())))
    axes = len(layer.kernel_size) if isinstance(layer, _ConvNd) else 0
    shape = (2, norm.num_features, *[4] * axes)
    values = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    try:
        wanted = called(copy.deepcopy(norm).double().cpu(), (values.clone(),), {})
        got = called(copy.deepcopy(behind).double().cpu(), (_normalised(norm, values),), {})
    except ClosedError:
        return None
    return behind if alike(wanted, got, _ROUNDING) else None


def _normalised(norm: _BatchNorm, values: Tensor) -> Tensor:
    mean, variance, scale, shift = (
        None if each is None else each.detach().double().cpu()
        for each in (norm.running_mean, norm.running_var, norm.weight, norm.bias)
    )
    return F.batch_norm(values, mean, variance, scale, shift, eps=norm.eps)
