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

from collections.abc import Iterable, Mapping, Sequence
from typing import cast

import numpy as np
import torch
from torch import nn

from rowcol_edge.factoring import borders, sensitivity, spaces, splits
from rowcol_edge.factoring.places import Moments, Place
from rowcol_edge.factoring.sensitivity import Feeds
from rowcol_edge.factoring.spaces import LayerSpaces, Progress


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
    with borders.coverages(layers) as seen:
        found = spaces.measure(model, batches, places, max_positions=max_positions, progress=report)
    return {p.name: spaces.decompose(p.name, with_border(found.pop(p), seen[p.name])) for p in places}


def weigh(
    model: nn.Module,
    samples: Feeds,
    found: Mapping[str, LayerSpaces],
    *,
    classify: bool,
    progress: Progress | None = None,
) -> dict[str, LayerSpaces]:
    """`sensitivity.weigh_all` of the layers' inputs only: directions by their worth at the model's output through the
    layer, and what cutting off the others costs there. One half of the samples finds the directions, the other judges
    them."""
    parts = sensitivity.halves(samples)
    report = _as("input sensitivity", progress)
    moments = {name: space.moments for name, space in found.items()}
    weighed = sensitivity.weigh_all(model, *parts, {}, {}, (), inputs=moments, classify=classify, progress=report)
    return {name: weighed.inputs.get(name, space) for name, space in found.items()}


def with_border(moments: Moments, coverages: Sequence[float]) -> Moments:
    """What was measured inside, with what the border adds; ``coverages``: share of taps that read an input, by call."""
    share = float(np.mean(coverages))
    if share == 1.0:
        return moments
    about_mean = share > 0.5
    weight = (1.0 - share) / share if about_mean else 1.0
    square = moments.mean.unsqueeze(2) * moments.mean.unsqueeze(1)
    mean = moments.mean if about_mean else torch.zeros_like(moments.mean)
    return Moments(mean, moments.covariance + weight * square, moments.samples)


def _as(stage: str, progress: Progress | None) -> Progress | None:
    """Reports under a name of its own."""
    return None if progress is None else lambda _, done, total: progress(stage, done, total)
