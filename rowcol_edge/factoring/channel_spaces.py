"""What the channels of a set are worth to the layers that read them, and how few of them stand in for all."""

from __future__ import annotations

from collections.abc import Mapping, MutableSequence, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.nn.modules.conv import _ConvNd

from rowcol_edge.factoring import pivots
from rowcol_edge.factoring.channels import ChannelSet
from rowcol_edge.factoring.places import Moments, Place
from rowcol_edge.factoring.products import product
from rowcol_edge.factoring.spaces import blended, directions

Array = NDArray[np.float64]

_SHRINKAGE = 1e-6
"""Ridge of the least squares, as a share of the mean variance: float32 activations have no digits below."""


@dataclass(frozen=True, slots=True, eq=False)
class Read:
    """Channels as one layer sees them: ``channels ≈ mean + basis_w · dual_wᵀ (channels − mean)`` for any width w."""

    mean: Array  # (groups, size); zeros where the layer pads with zeros or a product reads them
    basis: NDArray[np.float32]  # (groups, size, size); seven digits, as activations have no more
    dual: NDArray[np.float32]  # (groups, size, size)
    origin: Array | None = None  # (groups, size), the shift of a layer norm before the reader


@dataclass(frozen=True, slots=True, eq=False)
class ChannelSpaces:
    """A set's channels in the order of their worth.

    Attributes:
        order: (groups, size), the most wanted channel first; None where the set is rotated and not selected from.
        stream: (size, size), of a stream that layer norms look at: orthonormal directions, the last one the mean.
        reads: one for each of the set's uses, in their order; for a set that only a product reads, that of the query.
        losses: (size + 1,) predicted at the model's output, by width, falling to 0.
    """

    name: str
    order: NDArray[np.int64] | None
    reads: tuple[Read, ...]
    losses: Array
    stream: Array | None = None

    def take(self, width: int) -> Array:
        """(groups, width, size): what is kept of all channels. A rotation is that of the first reader.

        Of a stream ``width − 1`` directions are kept, laid out without a mean in ``width`` channels, so that a layer
        norm gives them what it gave before: ``LN(U Vᵀ x) = √(width / size) · U Vᵀ LN(x)`` for ``x`` in the span of V.
        """
        if self.stream is not None:
            return (_layout(width) @ self.stream[:, : width - 1].T)[None]
        if self.order is None:
            return self.reads[0].dual[:, :, :width].transpose(0, 2, 1).astype(np.float64)
        groups, size = self.order.shape
        return np.eye(size)[self.order[:, :width]].reshape(groups, width, size)

    def by_width(self, losses: Array) -> Array:
        """(size + 1,) by width what is given by direction: a stream has one direction less than channels."""
        if self.stream is None:
            return losses
        return np.concatenate([losses[:1], losses[:-2], [0.0]])

    def give(self, place: int, width: int) -> tuple[Array, Array]:
        """(groups, size, width), (groups, size): reader ``place`` sees the channels as ``matrix · kept + shift``."""
        read = self.reads[place]
        if self.stream is not None:
            assert read.origin is not None
            part, dual = (each[:, :, : width - 1].astype(np.float64) for each in (read.basis, read.dual))
            matrix = part @ _layout(width).T * (len(self.stream) / width) ** 0.5
            kept = part @ (dual.transpose(0, 2, 1) @ (read.mean - read.origin)[:, :, None])
            return matrix, read.mean - kept[:, :, 0]
        part = read.basis[:, :, :width].astype(np.float64)
        if self.order is None:
            take = self.take(width)
            matrix, mean = product(part, np.linalg.inv(product(take, part))), product(take, read.mean[:, :, None])
        else:  # rows, of which `pivots.innovations` makes a triangle
            lower, mean = (
                np.take_along_axis(each, self.order[:, :width, None], 1) for each in (part, read.mean[:, :, None])
            )
            matrix = torch.linalg.solve_triangular(
                torch.from_numpy(lower), torch.from_numpy(part), upper=False, left=False
            ).numpy()
        return matrix, read.mean - product(matrix, mean)[:, :, 0]


def _layout(width: int) -> Array:
    """(width, width − 1): orthonormal columns without a mean, those of the cosine transform, which spreads every
    direction over all channels (Ahmed, Natarajan and Rao, Discrete cosine transform, 1974)."""
    places, waves = np.arange(width)[:, None] + 0.5, np.arange(1, width)[None]
    return np.asarray(np.cos(np.pi * places * waves / width) * (2.0 / width) ** 0.5)


def places(channels: ChannelSet) -> tuple[Place, ...]:
    """Where a set is looked at: at each of its uses, or at the query where only a product reads it."""
    if channels.contracted is not None:
        query = next(slot for slot in channels.producers if slot.name == channels.contracted[0])
        return (Place(query.name, True, query.index, channels.name),)
    return tuple(
        Place(slot.name, False, slot.index, f"{channels.name} {place}") for place, slot in enumerate(channels.uses)
    )


def choose(
    model: nn.Module, channels: ChannelSet, moments: Sequence[Moments], metrics: MutableSequence[Array]
) -> ChannelSpaces:
    """Order and frames of a set; its losses are not known yet (empty).

    Args:
        moments: at each of `places`; metrics: (groups, size, size) of the gradients there, used up, as memory counts.
    """
    if channels.norms:
        return _stream(model, channels, moments, metrics)
    means, seconds = zip(*(_second(model, channels, place, found) for place, found in enumerate(moments)), strict=True)
    if channels.turned:
        every = zip(seconds[0], metrics[0], _prior(model, channels, 0), strict=True)
        frames = [directions(*parts)[1:] for parts in every]
        basis, dual = (np.stack(parts, dtype=np.float32, casting="same_kind") for parts in zip(*frames, strict=True))
        return ChannelSpaces(channels.name, None, (Read(means[0], basis, dual),), np.zeros(0))
    worths = [list(map(blended, metrics.pop(0), _prior(model, channels, place))) for place in range(len(seconds))]
    order = np.stack(
        [
            pivots.order(
                [each[group] for each in seconds],
                [each[group] for each in worths],
            )
            for group in range(channels.groups)
        ]
    )
    del worths
    reads = []
    for mean, second in zip(means, seconds, strict=True):
        frames = [pivots.innovations(part, row, _SHRINKAGE) for part, row in zip(second, order, strict=True)]
        basis, dual = (np.stack(parts, dtype=np.float32, casting="same_kind") for parts in zip(*frames, strict=True))
        reads.append(Read(mean, basis, dual))
    return ChannelSpaces(channels.name, order, tuple(reads), np.zeros(0))


def _stream(
    model: nn.Module, channels: ChannelSet, moments: Sequence[Moments], metrics: Sequence[Array]
) -> ChannelSpaces:
    """Directions that all readers of a stream share: orthonormal, since a layer norm keeps lengths, and without a mean.

    With ``C`` and ``F`` at each reader, before the scale and shift of its norm, ``tr(F (I − P) C (I − P))`` is to be
    small. Of two guesses, the axes of ``Σ C`` and those of ``Σ (F C + C F)``, the one that loses less at half of the
    width is taken.
    """
    size = channels.size
    parts = []
    for slot, found, metric in zip(channels.uses, moments, metrics, strict=True):
        scale, shift = affine(model, channels, slot.name)
        mean, covariance = (each[0] for each in found.numpy())
        safe = _safe(scale)
        second = covariance / np.outer(safe, safe)
        parts.append((mean, second, metric[0] * np.outer(scale, scale), scale, shift))
    # without the mean: a layer norm takes it away
    centre = np.eye(size) - 1.0 / size
    weights = [float(np.trace(metric)) / max(float(np.trace(second)), 1e-300) for _, second, metric, *_ in parts]
    guesses = (
        sum(weight * second for weight, (_, second, *_) in zip(weights, parts, strict=True)),
        sum((both := product(metric, second)) + both.T for _, second, metric, *_ in parts),
    )

    def axes(guess: Array | int) -> Array:
        values, vectors = np.linalg.eigh(product(centre, np.asarray(guess), centre))
        flat = np.abs(vectors.sum(0)).argmax()  # the mean is an axis of its own
        order = [i for i in np.argsort(-values, kind="stable") if i != flat]
        return np.asarray(vectors[:, [*order, flat]])

    def lost(frame: Array) -> float:
        rest = frame[:, size // 2 :]
        seen = [(product(rest.T, second, rest), product(rest.T, metric, rest)) for _, second, metric, *_ in parts]
        return sum(float((second * metric).sum()) for second, metric in seen)

    frame = min(map(axes, guesses), key=lost)
    reads = tuple(_seen(frame, mean, scale, shift) for mean, _, _, scale, shift in parts)
    return ChannelSpaces(channels.name, None, reads, np.zeros(0), frame)


def unmeasured(model: nn.Module, channels: ChannelSet) -> ChannelSpaces:
    """A stream whose directions are all alike: those of the cosine transform."""
    frame = np.concatenate([_layout(channels.size), np.full((channels.size, 1), channels.size**-0.5)], axis=1)
    found = [affine(model, channels, slot.name) for slot in channels.uses]
    reads = tuple(_seen(frame, shift, scale, shift) for scale, shift in found)
    return ChannelSpaces(channels.name, None, reads, np.zeros(0), frame)


def _seen(frame: Array, mean: Array, scale: Array, shift: Array) -> Read:
    """Directions of a stream as a reader sees them behind its norm."""
    basis, dual = scale[:, None] * frame, frame / _safe(scale)[:, None]
    return Read(mean[None], basis[None].astype(np.float32), dual[None].astype(np.float32), shift[None])


def _safe(scale: Array) -> Array:
    """Scales to divide by: what hardly gets through is not made up for."""
    return np.where(np.abs(scale) > 1e-4 * np.abs(scale).max(), scale, np.inf)


def affine(model: nn.Module, channels: ChannelSet, reader: str) -> tuple[Array, Array]:
    """Scale and shift of the layer norm before a reader of a stream."""
    norm = model.get_submodule(channels.norms[channels.normed[reader]])
    assert isinstance(norm, nn.LayerNorm)  # coupling finds no other
    scale = _array(norm.weight)
    return scale, np.zeros_like(scale) if norm._parameters.get("bias") is None else _array(norm.bias)


def _second(model: nn.Module, channels: ChannelSet, place: int, found: Moments) -> tuple[Array, Array]:
    """Mean and the second moments around it; around zero where no bias can take up a mean.

    A convolution that pads with zeros sees no mean at its border, and a product of query and key has no bias.
    """
    mean, covariance = found.numpy()
    if channels.contracted is None and not _pads(model.get_submodule(channels.uses[place].name)):
        return mean, covariance
    return np.zeros_like(mean), covariance + mean[:, :, None] * mean[:, None, :]


def _prior(model: nn.Module, channels: ChannelSet, place: int) -> Array:
    """(groups, size, size): what the reader's weights make of the channels; what they do not read is worthless."""
    if channels.contracted is not None:
        slot = next(slot for slot in channels.producers if slot.name == channels.contracted[1])
        key = model.get_submodule(slot.name)
        weight = _array(key.weight)
        if key.bias is not None:
            weight = np.concatenate([weight, _array(key.bias)[:, None]], axis=1)
        parts = weight[slot.index[:, :, 0]]
        return product(parts, parts.transpose(0, 2, 1))
    slot = channels.uses[place]
    layer = model.get_submodule(slot.name)
    weight = _array(layer.weight)
    if isinstance(layer, _ConvNd) and layer.transposed:
        weight = weight.swapaxes(0, 1)
    columns = weight.swapaxes(0, 1)[slot.index]  # (groups, size, taps, out, kernel …)
    parts = columns.reshape(channels.groups, channels.size, -1)
    return product(parts, parts.transpose(0, 2, 1))


def _array(values: object) -> Array:
    assert isinstance(values, torch.Tensor)
    return np.asarray(values.detach().double().cpu().numpy())


def _pads(layer: nn.Module) -> bool:
    if not isinstance(layer, _ConvNd):
        return False
    # a transposed convolution does not see all taps at its border
    return layer.transposed or layer.padding == "same" or (layer.padding != "valid" and any(layer.padding))


_PARTS = ("mean", "basis", "dual", "origin")


def to_arrays(spaces: Mapping[str, ChannelSpaces]) -> dict[str, NDArray[Any]]:
    """All numbers, by ``field place name``, for a file."""
    found: dict[str, NDArray[Any]] = {}
    for name, space in spaces.items():
        found[f"losses 0 {name}"] = space.losses
        if space.order is not None:
            found[f"order 0 {name}"] = space.order
        for place, read in enumerate(space.reads):
            found |= {f"{part} {place} {name}": value for part in _PARTS if (value := getattr(read, part)) is not None}
        if space.stream is not None:
            found[f"stream 0 {name}"] = space.stream
    return found


def from_arrays(arrays: Mapping[str, NDArray[Any]]) -> dict[str, ChannelSpaces]:
    """What `to_arrays` was given."""
    parts: dict[str, dict[tuple[str, int], NDArray[Any]]] = {}
    for key, array in arrays.items():
        field, place, name = key.split(" ", 2)
        parts.setdefault(name, {})[field, int(place)] = array
    found = {}
    for name, values in parts.items():
        count = sum(field == "mean" for field, _ in values)
        reads = tuple(Read(**{part: values[part, i] for part in _PARTS if (part, i) in values}) for i in range(count))
        order, stream = (values.get((key, 0)) for key in ("order", "stream"))
        found[name] = ChannelSpaces(name, order, reads, values["losses", 0], stream)
    return found
