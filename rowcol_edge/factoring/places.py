"""Where a model's values are looked at, and what one place says of another."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.nn.modules.conv import _ConvNd

Array = NDArray[np.float64]

_FILLED = 0.9
"""Of the directions that so many rows can fill: rows that fill fewer have shown all that there are. Not all, as a few
samples may be there twice."""
_NOTHING = 1e-10  # of the largest variance


@dataclass(frozen=True, slots=True)
class Place:
    """Where values are looked at: what a layer gives or takes.

    Attributes:
        name: of the layer.
        given: its output; False: its input.
        channels: (groups, size, taps): the features to look at, each group by itself; None: all, as one group.
    """

    name: str
    given: bool = True
    channels: NDArray[np.int64] | None = field(default=None, compare=False)
    key: str = ""  # tells places of one layer apart
    border: bool = False  # an input with the zeros that a convolution pads it with


@dataclass(frozen=True, slots=True, eq=False)
class Moments:
    """First and second moments at a place, float64, on the model's device."""

    mean: torch.Tensor  # (groups, size)
    covariance: torch.Tensor  # (groups, size, size), biased
    samples: int  # rows counted

    def numpy(self) -> tuple[Array, Array]:
        """Mean and covariance."""
        return self.mean.cpu().numpy(), self.covariance.cpu().numpy()

    def through(self, matrix: torch.Tensor, bias: torch.Tensor | None) -> Moments:
        """Those of ``matrix · x + bias``; of one group."""
        mean = self.mean @ matrix.T
        return Moments(mean if bias is None else mean + bias, matrix @ self.covariance @ matrix.T, self.samples)

    def shrunk(self, rank: int | None = None, prior: Callable[[], torch.Tensor | None] | None = None) -> Moments:
        """These where they have a row for each direction that there can be (``rank``; None: each feature), or more rows
        than they fill directions; else with a share of what is known without any, as what few rows do not show is not
        nothing.

        The share is the oracle approximating shrinkage of Y. Chen, A. Wiesel, Y. Eldar and A. Hero, Shrinkage
        algorithms for MMSE covariance estimation, 2010; the variance in all stays.

        Args:
            prior: (size, size), up to a factor, made if it is needed; None, or if it makes none: all features alike.
        """
        size = self.covariance.shape[1]
        directions = size if rank is None else min(rank, size)
        if self.samples >= directions or self._filled(self.samples - 1) <= _FILLED * (self.samples - 1):
            return self
        made = None if prior is None else prior()
        known = (torch.eye(size) if made is None else made).to(self.covariance)
        total, square = self.covariance.diagonal(dim1=1, dim2=2).sum(1), self.covariance.square().sum((1, 2))
        above = (1.0 - 2.0 / directions) * square + total.square()
        below = (self.samples + 1.0 - 2.0 / directions) * (square - total.square() / directions)
        share = torch.where(above < below, above / below, 1.0).nan_to_num(0.0)[:, None, None]
        scale = (total / known.trace().clamp(min=1e-300))[:, None, None]
        return Moments(self.mean, (1.0 - share) * self.covariance + share * scale * known, self.samples)

    def _filled(self, most: int) -> int:
        """Directions that vary, in the group that has the most: of ``most`` at most, as many random combinations."""
        generator = torch.Generator().manual_seed(0)
        random = torch.randn(self.covariance.shape[1], max(1, most), generator=generator, dtype=torch.float64)
        sizes = torch.linalg.svdvals(self.covariance @ random.to(self.covariance))
        return int((sizes > _NOTHING * sizes[:, :1]).sum(1).max())

    def of(self, index: torch.Tensor) -> Moments:
        """Those of some features, (groups, size), each group by itself; of one group."""
        blocks = self.covariance[0][index.unsqueeze(2), index.unsqueeze(1)]
        return Moments(self.mean[0][index], blocks, self.samples)


def rows(values: torch.Tensor, layer: nn.Module, place: Place, limit: int | None = None) -> torch.Tensor:
    """(samples, positions, groups, size) of what a layer takes or gives.

    Of more than ``limit`` positions that many, spread evenly. A value without a batch axis is one sample.
    """
    axis = channel_axis(layer)
    if axis == -1:
        maps = values.flatten(1, -2) if values.dim() > 2 else values.reshape(-1, 1, values.shape[-1])
    else:
        maps = values.reshape(-1, *values.shape[axis:]).flatten(2).transpose(1, 2)
    if limit is not None and maps.shape[1] > limit:
        maps = maps.index_select(1, spread(maps.shape[1], limit).to(maps.device))
    if place.channels is None:
        return maps.unsqueeze(2)
    groups, size, taps = place.channels.shape
    index = torch.from_numpy(place.channels.transpose(2, 0, 1).reshape(-1)).to(maps.device)
    if taps == groups == 1 and size == maps.shape[2] and bool((index == torch.arange(size)).all()):
        return maps.unsqueeze(2)
    return maps.index_select(2, index).reshape(maps.shape[0], -1, groups, size)


def channel_axis(layer: nn.Module) -> int:
    """Where features are in a layer's output: the last axis, or before the spatial ones, batched or not."""
    return -1 - len(layer.kernel_size) if isinstance(layer, _ConvNd) else -1


def spread(positions: int, count: int) -> torch.Tensor:
    """``count`` distinct positions out of ``positions``, spread evenly and always the same ones.

    A stride coprime to ``positions`` visits every column and row of a map alike, where a plain stride would see only
    some columns.
    """
    step = max(1, positions // count)
    while math.gcd(step, positions) != 1:
        step += 1
    return torch.arange(count) * step % positions


def sources(watched: Mapping[str, nn.Module], places: Sequence[Place]) -> dict[Place, Place]:
    """Where each place is looked at: there, or at a place that says it as well."""
    plain = {name for name, layer in watched.items() if pointwise(layer) is not None}
    wholes = {place: _whole(place, watched[place.name]) for place in places}
    taken = {place.name for place, whole in wholes.items() if whole and not place.given}
    taken |= {place.name for place in places if place.given and place.name in plain and _widens(watched[place.name])}

    def source(place: Place) -> Place:
        single = wholes[place] or (place.channels is not None and place.channels.shape[2] == 1)
        if single and place.name in taken and (place.name in plain or not place.given):
            return Place(place.name, given=False)
        return Place(place.name, place.given) if wholes[place] else place

    return {place: source(place) for place in places}


def _whole(place: Place, layer: nn.Module) -> bool:
    """All features of the layer, in order and as one group."""
    if place.channels is None:
        return True
    features = _features(layer)[0 if place.given else 1]
    return place.channels.shape == (1, features, 1) and bool((place.channels[0, :, 0] == np.arange(features)).all())


def _features(layer: nn.Module) -> tuple[int, int]:
    """Given and taken."""
    if isinstance(layer, nn.Linear):
        return layer.out_features, layer.in_features
    assert isinstance(layer, _ConvNd)  # submodule gives no others
    return layer.out_channels, layer.in_channels


def _widens(layer: nn.Module) -> bool:
    given, taken = _features(layer)
    return taken <= given


def derived(layer: nn.Module, place: Place, source: Place, found: Moments) -> Moments:
    """The moments at a place from those at its source."""
    if place.given and not source.given:
        matrix, bias = pointwise(layer), layer._parameters.get("bias")
        assert matrix is not None
        found = found.through(matrix, None if bias is None else bias.detach().double())
    if source.channels is None and not _whole(place, layer):
        assert place.channels is not None
        found = found.of(torch.from_numpy(place.channels[:, :, 0]).to(found.mean.device))
    return found


def single(layer: nn.Module) -> torch.Tensor | None:
    """(out, in), float64: what a layer does to the features of single positions, if that is all it does; None for one
    that mixes positions, may not be what it seems, or holds NaN."""
    if type(layer) not in (nn.Linear, nn.Conv1d, nn.Conv2d) or "forward" in vars(layer):
        return None
    if layer._forward_hooks or layer._forward_pre_hooks:
        return None
    if isinstance(layer, _ConvNd):
        unpadded = layer.padding == "valid" or not any(layer.padding)
        if layer.groups != 1 or not unpadded or any(side != 1 for side in layer.kernel_size):
            return None
    weight = layer.weight
    assert isinstance(weight, torch.Tensor)
    matrix = weight.detach().flatten(1).double()
    return matrix if bool(torch.isfinite(matrix).all()) else None


def pointwise(layer: nn.Module) -> torch.Tensor | None:
    """`single` of a layer that looks at all positions."""
    strides = layer.stride if isinstance(layer, _ConvNd) else ()
    return single(layer) if all(stride == 1 for stride in strides) else None
