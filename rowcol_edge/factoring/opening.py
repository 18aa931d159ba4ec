"""Modules that hide their layers, opened: attention with one fused weight or with head sizes in its code, convolutions
that pad by themselves.

What takes their place computes the same from plain layers, whose channels can then be followed and made fewer. A module
is known by what it holds and takes, never by its package, and is opened only if its own outputs, on random inputs in
float64 and, with an example, in the model, are those of what would take its place.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from rowcol_edge.calling import bind, evaluating, quiet
from rowcol_edge.factoring.openers import ClosedError, alike, called, holders, made, outermost


@dataclass(frozen=True, slots=True)
class Opening:
    """A model with modules opened.

    Attributes:
        model: a copy; the model itself where nothing was opened.
        names: modules that were opened.
        closed: those that might have been → why they stay.
    """

    model: nn.Module
    names: tuple[str, ...]
    closed: Mapping[str, str]


def opened(model: nn.Module, example: Mapping[str, Tensor] | None = None) -> nn.Module:
    """A copy of ``model`` (batch norms folded) that computes the same from plain layers; see `open_all`."""
    return open_all(model, example).model


def reasons(model: nn.Module, example: Mapping[str, Tensor] | None = None) -> dict[str, str]:
    """Modules that hide their layers and cannot be opened → why."""
    return dict(open_all(model, example).closed)


def open_all(model: nn.Module, example: Mapping[str, Tensor] | None = None) -> Opening:
    """Open what can be opened.

    Attention modules get query, key, value and output layers under their own names where they have some, else
    ``query``, ``key`` and ``value``; a padding that is not symmetric becomes ``pad`` beside ``conv``.

    Args:
        example: the model's inputs; then every opened module is also compared in the model itself, with the masks and
            arguments it gets there, and the outputs of the whole.
    """
    held = holders(model)
    found: dict[nn.Module, tuple[str, nn.Module]] = {}
    closed: dict[str, str] = {}
    for name, module in outermost(model):
        try:
            found[module] = name, made(module, held)
        except ClosedError as reason:
            closed[name] = str(reason)
    if example is not None and found:
        for module, why in _compared(model, found, example).items():
            closed[found.pop(module)[0]] = why
    if not found:
        return Opening(model, (), closed)
    result = copy.deepcopy(model, {id(module): new for module, (_, new) in found.items()})
    names = tuple(name for name, _ in found.values())
    leave_fused_paths(result, names)
    if example is not None and not same_whole(model, result, example):
        whole = "the model gives other outputs with it opened"
        return Opening(model, (), {**closed, **dict.fromkeys(names, whole)})
    return Opening(result, names, closed)


def leave_fused_paths(model: nn.Module, changed: Sequence[str] | set[str]) -> None:
    """In place: ``nn.TransformerEncoder(Layer)`` reads weights of ``changed`` for a fused operator: not any more."""
    for name, module in model.named_modules():
        prefix = f"{name}." if name else ""
        if any(layer.startswith(prefix) for layer in changed):
            if isinstance(module, nn.TransformerEncoderLayer):
                module.activation_relu_or_gelu = 0
            elif isinstance(module, nn.TransformerEncoder):
                module.use_nested_tensor = False
                module.enable_nested_tensor = False


def _rounding(dtype: torch.dtype) -> float:
    return max(1e-4, 16 * torch.finfo(dtype).eps)


def _compared(
    model: nn.Module, found: Mapping[nn.Module, tuple[str, nn.Module]], example: Mapping[str, Tensor]
) -> dict[nn.Module, str]:
    """Modules that give something else in the model than what would take their place, or are not called → why."""
    wrong = dict.fromkeys(found, "never called")

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: object) -> None:
        name, new = found[module]
        try:
            got = called(new, args, kwargs)
        except ClosedError:
            wrong[module] = f"the model calls {name!r} in a way that what would take its place does not know"
            return
        dtype = next((p.dtype for p in module.parameters()), torch.float32)
        if not alike(output, got, _rounding(dtype)):
            wrong[module] = f"{type(module).__name__} gives something else in the model"
        elif wrong.get(module) == "never called":
            del wrong[module]

    handles = [module.register_forward_hook(hook, with_kwargs=True) for module in found]
    try:
        args, kwargs = bind(model, example)
        with evaluating(model), torch.no_grad(), quiet():
            model(*args, **kwargs)
    finally:
        for handle in handles:
            handle.remove()
    return wrong


def same_whole(model: nn.Module, result: nn.Module, example: Mapping[str, Tensor]) -> bool:
    """Whether both give the same on the example, up to rounding."""
    args, kwargs = bind(model, example)
    try:
        wanted, got = (called(each, args, kwargs) for each in (model, result))
    except ClosedError:
        return False
    dtype = next((p.dtype for p in model.parameters()), torch.float32)
    return alike(wanted, got, 10 * _rounding(dtype))
