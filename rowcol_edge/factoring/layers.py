"""Which layers can be factored, what each costs, and why the others stay as they are."""

from __future__ import annotations

import copy
from collections import Counter
from dataclasses import replace
from typing import cast

import torch
from torch import nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.utils import parametrize

from rowcol_edge.factoring.costs import LayerInfo
from rowcol_edge.factoring.graph import GraphLayer, LayerGraph, computed
from rowcol_edge.factoring.openers import ClosedError, alike, called

SUPPORTED: dict[type[nn.Module], str] = {
    nn.Linear: "linear",
    nn.Conv1d: "conv1d",
    nn.Conv2d: "conv2d",
    nn.ConvTranspose1d: "convtranspose1d",
    nn.ConvTranspose2d: "convtranspose2d",
}
ALREADY_FACTORED = "already factored"  # how the reason of a layer of a bottleneck pair begins
_COMPUTES = ("__call__", "forward", "_conv_forward", "_output_padding")
"""Methods that decide what a layer computes."""
_ROUNDING = 1e-6


def survey(model: nn.Module, graph: LayerGraph) -> dict[str, LayerInfo]:
    """Shape, cost and skip reason of every linear layer and convolution, in call order.

    ``model`` is the one ``graph`` was traced from, or its batch-norm-folded copy.
    """
    static = skip_reasons(model)
    factored: dict[str, str] = {}
    for pair in graph.factored:
        factored.setdefault(pair.first, f"{ALREADY_FACTORED}: rank {pair.rank} with {pair.second}")
        factored.setdefault(pair.second, f"{ALREADY_FACTORED}: rank {pair.rank} with {pair.first}")
    found = {}
    for layer in graph.layers:
        module = model.get_submodule(layer.name)
        if isinstance(module, nn.Linear | _ConvNd):
            reason = static[layer.name] or _use_reason(layer) or factored.get(layer.name, "")
            info = describe(
                layer.name,
                module,
                positions=layer.positions,
                outputs=layer.outputs,
                calls=layer.calls,
                skip=reason,
                maps=layer.maps,
            )
            small = not reason and info.break_even < 1
            found[layer.name] = replace(info, skip="too small to factor") if small else info
    return found


def base(module: nn.Module) -> type[nn.Module] | None:
    """The kind of layer that it is, of those that can be factored."""
    return next((kind for kind in SUPPORTED if isinstance(module, kind)), None)


def describe(
    name: str,
    module: nn.Linear | _ConvNd,
    *,
    positions: int = 1,
    outputs: int | None = None,
    calls: int = 1,
    skip: str = "",
    maps: tuple[tuple[int, ...], tuple[int, ...]] | None = None,
) -> LayerInfo:
    """Shape and cost of one module; ``outputs`` and ``maps`` as in `LayerInfo`."""
    if isinstance(module, nn.Linear):
        return LayerInfo(
            name=name,
            kind="linear",
            in_features=module.in_features,
            out_features=module.out_features,
            bias=module.bias is not None,
            positions=positions,
            calls=calls,
            skip=skip,
        )
    kind = base(module)
    return LayerInfo(
        name=name,
        kind=SUPPORTED[kind] if kind else type(module).__name__.lower(),
        in_features=module.in_channels,
        out_features=module.out_channels,
        kernel=tuple(module.kernel_size),
        groups=module.groups,
        bias=module.bias is not None,
        positions=positions,
        outputs=outputs if module.transposed else None,
        calls=calls,
        skip=skip,
        maps=maps,
    )


def stored(module: nn.Module) -> int:
    """Parameters that a layer has as it is: none for a weight that is a buffer, those of its parametrization for one
    that is computed."""
    return sum(parameter.numel() for parameter in module.parameters())


def skip_reasons(model: nn.Module) -> dict[str, str]:
    """What can be told without running the model: layer name → reason to leave it, ``""`` if there is none."""
    holders = _holders(model)
    return {
        name: _module_reason(module) or _tied_reason(module, holders)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | _ConvNd)
    }


def held(model: nn.Module, graph: LayerGraph) -> dict[str, str]:
    """Layer → why its weights cannot be replaced by narrower ones, ``""`` if they can."""
    holders = _holders(model)
    found = {}
    for layer in graph.layers:
        module = model.get_submodule(layer.name)
        if isinstance(module, nn.Linear | _ConvNd):
            found[layer.name] = _held(module) or _tied_reason(module, holders) or _use_reason(layer)
    return found


def _holders(model: nn.Module) -> Counter[int]:
    """How many modules hold each parameter."""
    holders: Counter[int] = Counter()
    for module in model.modules():
        holders.update({id(parameter) for parameter in module._parameters.values() if parameter is not None})
    return holders


def _module_reason(module: nn.Module) -> str:
    reason = _held(module)
    if not reason and isinstance(module, _ConvNd) and module.groups != 1:
        depthwise = module.groups == module.in_channels
        return "depthwise convolution" if depthwise else f"grouped convolution ({module.groups} groups)"
    return reason


def _held(module: nn.Module) -> str:
    kind = base(module)
    if kind is None:
        return f"{type(module).__name__} is not factored"
    if parametrize.is_parametrized(module) or module._parameters.get("weight") is None or computed(module):
        which = computed(module) or "weight"
        return f"its {which} is {'a buffer' if which in module._buffers else 'parametrized'}"
    own = any(getattr(type(module), name, None) is not getattr(kind, name, None) for name in _COMPUTES)
    if (own and not computes_alike(module, kind)) or "forward" in vars(module):
        return f"{type(module).__name__} has a forward of its own"
    # A replacement would lose them silently.
    if module._forward_hooks or module._forward_pre_hooks:
        return "hooks are attached to it"
    weight = module._parameters["weight"]
    if weight is None or not weight.is_floating_point() or not bool(torch.isfinite(weight).all()):
        return "its weight is not finite floating point"
    return ""


def computes_alike(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether a forward of its own gives what its kind's does, on random inputs, from the weight and bias alone: timm's
    linear layers are such."""
    if set(module._parameters) != {"weight", "bias"} or module._buffers or module._modules:
        return False
    trial = copy.deepcopy(module).double().cpu()
    plain = copy.copy(trial)
    plain.__class__ = kind
    if isinstance(trial, _ConvNd):
        spans = zip(trial.dilation, trial.kernel_size, trial.stride, strict=True)
        shape = (2, trial.in_channels, *(2 * dilation * size + step + 1 for dilation, size, step in spans))
    else:
        shape = (2, cast(nn.Linear, trial).in_features)
    values = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    try:
        return alike(called(plain, (values,), {}), called(trial, (values,), {}), _ROUNDING)
    except ClosedError:
        return False


def _tied_reason(module: nn.Module, holders: Counter[int]) -> str:
    tied = (name for name, part in module._parameters.items() if part is not None and holders[id(part)] > 1)
    which = next(tied, "")
    return f"its {which} is tied to another module" if which else ""


def _use_reason(layer: GraphLayer) -> str:
    if layer.calls == 0 and layer.own_calls == 0:
        return "never called"
    if layer.own_calls == 0 or layer.elsewhere or layer.own_calls < layer.calls:
        return f"its {layer.elsewhere or 'weight'} is used without calling it"
    if layer.resized:
        return "called with an output size beside its input"
    if layer.own_calls > 1:
        return f"shared: called {layer.own_calls} times"
    return ""
