"""The row space each layer uses: `spaces` and `sensitivity` for what a layer takes instead of what it gives.

The records are the same, `LayerSpaces` with ``y`` read as the input ``x`` (features or channels at one position).
Gradients are those that arrive through the layer itself, ``Wᵀ g``: what else reads the same tensor does not see that
the layer takes less of it.

A convolution that pads with zeros has those in its row space too: of the share ``1 − s`` of its taps that read one
(`splits.coverage`) the projection about the mean makes ``(I − P) E[x]``, while it is exact inside. What is decomposed
is ``cov(x) + (1 − s)/s · E[x] E[x]ᵀ``, the second moment of what goes wrong, per input that is read, if a direction is
cut off. Where that is more than without a mean (``s ≤ ½``: transposed convolutions, most of whose taps reach other
outputs) it is ``E[xxᵀ]``, with a mean of 0 in the record.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, cast

import numpy as np
import torch
from torch import nn
from torch.nn.modules.conv import _ConvNd

from rowcol_edge.factoring import sensitivity, spaces, splits
from rowcol_edge.factoring.sensitivity import Feeds
from rowcol_edge.factoring.spaces import LayerSpaces, Moments, Place, Progress, channel_axis


def collect(
    model: nn.Module,
    batches: Iterable[Mapping[str, np.ndarray]],
    names: Sequence[str],
    *,
    max_positions: int = 1024,
    progress: Progress | None = None,
) -> dict[str, LayerSpaces]:
    """`spaces.collect` of the named layers' inputs: one pass, float64 sums, ``8 · in²`` bytes a layer and no activation
    held. Positions are those of the input, as many of them and spread alike.

    Raises:
        ModelError: no such layer, or the model fails on a batch.
        DataError: no batch, NaN or infinity in an input or in what a layer takes, a layer that was never reached.
    """
    layers = {name: cast(splits.Layer, spaces.submodule(model, name)) for name in names}
    places = [Place(name, given=False) for name in layers]
    report = _as("row spaces", progress)
    with _coverages(layers) as seen:
        found = spaces.measure(model, batches, places, max_positions=max_positions, progress=report)
    return {
        place.name: spaces.decompose(place.name, _with_border(found.pop(place), float(np.mean(seen[place.name]))))
        for place in places
    }


def weigh(
    model: nn.Module,
    samples: Feeds,
    found: Mapping[str, LayerSpaces],
    *,
    classify: bool,
    progress: Progress | None = None,
) -> dict[str, LayerSpaces]:
    """`sensitivity.weigh` of the layers' inputs: directions by their worth at the model's output through the layer, and
    what cutting off the others costs there.

    Deterministic; the model is left as it was. Spaces are returned as they are where no gradient comes back. Memory:
    ``16 · in²`` bytes a layer, and the activations of 4 samples.
    """
    report = _as("input sensitivity", progress)
    with bordered(model, found):
        return sensitivity.weigh(model, samples, found, classify=classify, given=False, progress=report)


@contextlib.contextmanager
def bordered(model: nn.Module, names: Iterable[str]) -> Iterator[None]:
    """Convolutions of these names that pad with zeros get them with their input, where `sensitivity` sees them."""
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


def _with_border(moments: Moments, share: float) -> Moments:
    if share == 1.0:
        return moments
    about_mean = share > 0.5
    weight = (1.0 - share) / share if about_mean else 1.0
    square = moments.mean.unsqueeze(2) * moments.mean.unsqueeze(1)
    mean = moments.mean if about_mean else torch.zeros_like(moments.mean)
    return Moments(mean, moments.covariance + weight * square, moments.samples)


@contextlib.contextmanager
def _coverages(layers: Mapping[str, splits.Layer]) -> Iterator[dict[str, list[float]]]:
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


def _as(stage: str, progress: Progress | None) -> Progress | None:
    """Reports under a name of its own."""
    return None if progress is None else lambda _, done, total: progress(stage, done, total)
