"""Zeros that convolutions pad with, as part of what they take: they are in the row space too."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import nn
from torch.nn.modules.conv import _ConvNd

from rowcol_edge.factoring import splits
from rowcol_edge.factoring.places import channel_axis


@contextlib.contextmanager
def padded(model: nn.Module, names: Iterable[str]) -> Iterator[None]:
    """Convolutions of these names that pad with zeros get them with their input: what is hooked on after that sees
    them, what was hooked on before does not."""
    layers = dict.fromkeys(model.get_submodule(name) for name in names)
    padding = [(layer, layer.padding) for layer in layers if isinstance(layer, _ConvNd) and _border(layer)]
    handles = [layer.register_forward_pre_hook(_pad(_border(layer)), with_kwargs=True) for layer, _ in padding]
    try:
        for layer, _ in padding:
            layer.padding = "valid"
        yield
    finally:
        for layer, own in padding:
            layer.padding = own
        for handle in handles:
            handle.remove()


@contextlib.contextmanager
def coverages(layers: Mapping[str, splits.Layer]) -> Iterator[dict[str, list[float]]]:
    """`splits.coverage` at each call, by layer."""
    seen: dict[str, list[float]] = {name: [] for name in layers}

    def observe(name: str, layer: splits.Layer) -> Callable[..., None]:
        axis = channel_axis(layer)

        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], result: torch.Tensor) -> None:
            taken = args[0] if args else kwargs["input"]
            before, behind = (values.shape[axis + 1 :] if axis < -1 else () for values in (taken, result))
            seen[name].append(splits.coverage(layer, before, behind))

        return hook

    handles = [layer.register_forward_hook(observe(name, layer), with_kwargs=True) for name, layer in layers.items()]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def _border(layer: _ConvNd) -> list[int]:
    """Zeros that the layer pads with, as `torch.nn.functional.pad` takes them; none for a transposed convolution."""
    if layer.transposed or layer.padding_mode != "zeros":
        return []
    zeros = list(layer._reversed_padding_repeated_twice)
    return zeros if any(zeros) else []


def _pad(border: list[int]) -> Callable[..., Any]:
    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if args:
            return (nn.functional.pad(args[0], border), *args[1:]), kwargs
        return args, {**kwargs, "input": nn.functional.pad(kwargs["input"], border)}

    return hook
