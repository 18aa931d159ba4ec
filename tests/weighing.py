"""Spaces of layers alone, measured and weighed by what `study` uses for a whole model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import cast

import numpy as np
import torch
from torch import nn

from rowcol_edge.factoring import borders, input_spaces, spaces, splits
from rowcol_edge.factoring.places import Moments, Place
from rowcol_edge.factoring.sensitivity import Feeds, halves, weigh_all
from rowcol_edge.factoring.spaces import LayerSpaces


def taken(
    model: nn.Module, batches: Iterable[Mapping[str, np.ndarray]], names: Sequence[str], *, max_positions: int = 1024
) -> dict[str, LayerSpaces]:
    """The row spaces of these layers."""
    places = [Place(name, given=False) for name in names]
    with borders.coverages({name: cast(splits.Layer, spaces.submodule(model, name)) for name in names}) as seen:
        found = spaces.measure(model, batches, places, max_positions=max_positions)
    return {p.name: spaces.decompose(p.name, input_spaces.with_border(found[p], seen[p.name])) for p in places}


def weighed(
    model: nn.Module, samples: Feeds, plain: Mapping[str, LayerSpaces], *, classify: bool
) -> dict[str, LayerSpaces]:
    """Column spaces, one half of the samples for the directions and the other to judge them; as they are where there is
    nothing to weigh them by."""
    moments = {name: _moments(space) for name, space in plain.items()}
    found = weigh_all(model, *halves(samples), moments, {}, (), classify=classify).layers
    return {name: found.get(name, space) for name, space in plain.items()}


def weighed_inputs(
    model: nn.Module, samples: Feeds, plain: Mapping[str, LayerSpaces], *, classify: bool
) -> dict[str, LayerSpaces]:
    """Row spaces, likewise."""
    moments = {name: _moments(space) for name, space in plain.items()}
    found = weigh_all(model, *halves(samples), {}, {}, (), inputs=moments, classify=classify).inputs
    return {name: found.get(name, space) for name, space in plain.items()}


def _moments(space: LayerSpaces) -> Moments:
    """What the spaces were made from."""
    return Moments(torch.from_numpy(space.mean)[None], torch.from_numpy(space.covariance)[None], space.samples)
