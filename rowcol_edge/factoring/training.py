"""What training a copy of a model takes: which parameters, in which precision, by which optimiser and rate."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable

import torch
from torch import nn

from rowcol_edge.errors import ModelError

_WARM_UP, _FLOOR = 0.05, 0.01  # share of the steps; share of the rate that is left at the end
_DECAY = 0.01
_HALF = (torch.float16, torch.bfloat16)


def schedule(step: int, total: int) -> float:
    """Factor on the learning rate: a linear warm-up, then half a cosine (Loshchilov and Hutter, SGDR, 2017)."""
    warm_up = max(1, round(_WARM_UP * total))
    if step < warm_up:
        return (step + 1) / warm_up
    return _FLOOR + (1 - _FLOOR) * 0.5 * (1 + math.cos(math.pi * (step - warm_up) / max(1, total - warm_up)))


def adam(parameters: Iterable[nn.Parameter], rate: float) -> torch.optim.AdamW:
    """AdamW, with weight decay on matrices and kernels only."""
    kinds: tuple[list[nn.Parameter], list[nn.Parameter]] = ([], [])
    for parameter in parameters:
        kinds[parameter.dim() >= 2].append(parameter)
    groups = [{"params": kinds[0], "weight_decay": 0.0}, {"params": kinds[1], "weight_decay": _DECAY}]
    return torch.optim.AdamW([group for group in groups if group["params"]], lr=rate)


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """By name, those that require a gradient; where none does, all, which are told to.

    Raises:
        ModelError: there are none.
    """
    floats = {name: p for name, p in model.named_parameters() if p.is_floating_point()}
    found = {name: p for name, p in floats.items() if p.requires_grad} or floats
    if not found:
        raise ModelError("the model to recover", expected="parameters to train", got="none")
    for parameter in found.values():
        parameter.requires_grad_(True)
    return found


def has_halves(model: nn.Module) -> bool:
    """Whether some of its numbers are in half precision."""
    return any(value.dtype in _HALF for value in [*model.parameters(), *model.buffers()])


def single(model: nn.Module) -> nn.Module:
    """A copy whose half-precision numbers are in single precision."""
    result = copy.deepcopy(model)
    for value in [*result.parameters(), *result.buffers()]:
        value.grad = None
        if value.dtype in _HALF:
            value.data = value.data.float()
    return result
