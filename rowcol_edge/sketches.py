"""How alike two inputs are, told from small sketches of them.

A picture's sketch is its grey average at no more than 64×64, each at mean 0 and variance 1, so that brightness and
contrast do not count. Two are compared by phase: their spectra are divided by the data's own mean spectrum, so that
what all pictures share (bars, borders, the outline of the part) weighs little and what tells them apart weighs much,
and the likeness is the highest normalised correlation over small shifts and the mirror images (matched filter in
coloured noise; C. D. Kuglin and D. C. Hines, "The phase correlation image alignment method", 1975). Any other input
is compared by its distance, entry by entry: of numbers in units of each entry's standard deviation, of whole numbers
(tokens) by how many differ.

Likeness is 1 for equal inputs and about 0 for unrelated ones.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from .datasets import Feeds

_SIDE = 64
_SMALLEST_SIDE = 8
_ENTRIES = 1024
_SHIFT = 0.03  # of a side: how far a copy may be moved
_DETAIL = 0.3  # cycles a pixel: finer detail is lost when a picture is re-encoded or resampled
_NOISE = 0.02  # of the standard deviation: frequencies that hold less are noise, not detail
_BLOCK = 256  # pairs compared at a time

Array = npt.NDArray[Any]
Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int64]
#: input name → (samples, …): float16 pictures (n, h, w), float32 entries (n, k) or whole numbers (n, k)
Sketches = dict[str, Array]


def sketch(feeds: Feeds) -> Sketches:
    """Sketches of one batch."""
    return {name: _picture(array) if is_picture(array) else _entries(array) for name, array in feeds.items()}


def stack(parts: Sequence[Mapping[str, Array]]) -> Sketches:
    """The sketches of several batches as one."""
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def is_picture(array: Array) -> bool:
    if array.ndim != 4 or array.dtype.kind not in "fu":
        return False
    return bool(min(_planes(array[:1]).shape[2:]) >= _SMALLEST_SIDE)


def _planes(array: Array) -> Array:
    """(n, channels, h, w); frames of a camera have their channels last."""
    return np.moveaxis(array, -1, 1) if array.shape[-1] <= 4 < array.shape[1] else array


def _picture(array: Array) -> Array:
    grey = _planes(array).astype(np.float32).mean(axis=1)
    for axis in (1, 2):
        size = grey.shape[axis]
        if size > _SIDE:
            starts = np.arange(_SIDE) * size // _SIDE
            widths = np.diff(np.append(starts, size)).astype(np.float32)
            grey = np.add.reduceat(grey, starts, axis) / np.expand_dims(widths, tuple({0, 1, 2} - {axis}))
    grey = grey - grey.mean(axis=(1, 2), keepdims=True)
    evened: Array = (grey / (grey.std(axis=(1, 2), keepdims=True) + 1e-6)).astype(np.float16)
    return evened


def _entries(array: Array) -> Array:
    flat = array.reshape(len(array), -1)
    if flat.shape[1] > _ENTRIES:  # spread evenly, the same ones of every sample
        flat = flat[:, np.arange(_ENTRIES) * flat.shape[1] // _ENTRIES]
    entries: Array = flat.astype(np.float32) if flat.dtype.kind == "f" else flat
    return entries


@dataclass(frozen=True, slots=True, eq=False)
class Likeness:
    """Compares sketches in the measure that the data themselves give."""

    scales: Mapping[str, Array]

    @classmethod
    def of(cls, sketches: Sketches) -> Likeness:
        """Measured on all samples there are."""
        return cls({name: _scale(array) for name, array in sketches.items()})

    def pairs(self, first: Sketches, second: Sketches, rows: Ints, columns: Ints) -> Floats:
        """Likeness of ``first[rows[i]]`` and ``second[columns[i]]``: with several inputs that of the least alike."""
        found = np.full(len(rows), -np.inf, np.float32)
        for start in range(0, len(rows), _BLOCK):
            part = slice(start, start + _BLOCK)
            scores = [
                _compare(array[rows[part]], second[name][columns[part]], self.scales[name])
                for name, array in first.items()
            ]
            found[part] = np.min(scores, axis=0)
        return found


def _scale(array: Array) -> Array:
    """What `_compare` weighs the entries of an input with."""
    if array.ndim == 3:
        power = np.zeros((array.shape[1], array.shape[2] // 2 + 1))
        for start in range(0, len(array), _BLOCK):
            power += (np.abs(np.fft.rfft2(_windowed(array[start : start + _BLOCK]))) ** 2).sum(axis=0)
        noise = _NOISE**2 * float((_windowed(np.ones((1, *array.shape[1:]))) ** 2).sum())
        power += np.roll(power[::-1], 1, axis=0)  # a picture and its mirror image are weighed alike
        return _filter(power / (2 * len(array)) + noise)
    if array.dtype.kind == "f":
        deviations: Array = array.std(axis=0, dtype=np.float64)
        return deviations
    chance = np.zeros(array.shape[1])  # that two samples differ in an entry
    for i in range(array.shape[1]):
        _, counts = np.unique(array[:, i], return_counts=True)
        chance[i] = 1.0 - ((counts / len(array)) ** 2).sum()
    return chance


def _windowed(pictures: Array) -> Array:
    """Faded out towards the border, whose jump would be read as detail."""
    window = [np.sqrt(np.hanning(size + 2)[1:-1]) for size in pictures.shape[1:]]
    faded: Array = pictures.astype(np.float32) * window[0][:, None] * window[1][None, :]
    return faded


def _filter(power: Array) -> Array:
    height, width = power.shape[0], 2 * (power.shape[1] - 1)
    radius = np.fft.fftfreq(height)[:, None] ** 2 + np.fft.rfftfreq(max(width, 1))[None, : power.shape[1]] ** 2
    weights: Array = np.exp(-radius / (2 * _DETAIL**2)) / np.sqrt(power)
    weights[0, 0] = 0.0
    return weights


def _compare(first: Array, second: Array, scale: Array) -> Floats:
    if first.ndim == 3:
        return _correlation(first, second, scale)
    if first.dtype.kind != "f":
        differ = (first != second).sum(axis=1) / max(scale.sum(), 1e-12)
        return 1.0 - differ.astype(np.float32) if scale.any() else np.zeros(len(first), np.float32)
    used = scale > 1e-6 * scale.max(initial=0.0)
    if not used.any():
        return np.zeros(len(first), np.float32)
    squares = (((first - second)[:, used] / scale[used]) ** 2).mean(axis=1)
    likeness: Floats = np.asarray(1.0 - squares / 2.0, np.float32)  # two unrelated samples are 2 variances apart
    return likeness


def _correlation(first: Array, second: Array, scale: Array) -> Floats:
    shape = (first.shape[1], first.shape[2])
    one, other = (np.fft.rfft2(_windowed(pictures)) * scale for pictures in (first, second))
    down, across = (_steps(size) for size in shape)
    doubled = np.where(np.arange(one.shape[2]) % (shape[1] / 2) == 0, 1.0, 2.0)  # rfft2 gives one half of the rest
    to_rows, to_columns = down / shape[0], across[:, : one.shape[2]].T * doubled[:, None] / shape[1]
    sizes = [
        np.sqrt((np.abs(spectrum) ** 2 * doubled).sum(axis=(1, 2)) / math.prod(shape)) for spectrum in (one, other)
    ]
    best = np.zeros(len(first), np.float32)
    for mirrored in _mirrored(other, shape):
        near = np.real(to_rows @ (one * np.conj(mirrored)) @ to_columns)
        peak = _peak(near) / np.maximum(sizes[0] * sizes[1], 1e-12)
        best = np.maximum(best, peak.astype(np.float32))
    return np.minimum(best, np.float32(1.0))


def _steps(size: int) -> Array:
    """(shifts, frequencies): the inverse Fourier transform at the small shifts only."""
    reach = 1 + max(1, round(_SHIFT * size))
    steps: Array = np.exp(2j * np.pi * np.outer(np.arange(-reach, reach + 1), np.arange(size)) / size)
    return steps


def _mirrored(spectrum: Array, shape: tuple[int, int]) -> Iterator[Array]:
    """Spectra of the picture itself, upside down, left for right, and both: frequencies change their sign."""
    turned = np.roll(spectrum[:, ::-1], 1, axis=1)
    down = np.exp(2j * np.pi * np.arange(shape[0]) / shape[0])[:, None]
    across = np.exp(2j * np.pi * np.arange(spectrum.shape[2]) / shape[1])[None, :]
    yield from (spectrum, turned * down, np.conj(turned) * across, np.conj(spectrum) * down * across)


def _peak(near: Array) -> Array:
    """The highest value between the whole shifts too: of a parabola through it and its neighbours, in both axes."""
    count, height, width = near.shape
    place = near.reshape(count, -1).argmax(axis=1)
    row, column, each = place // width, place % width, np.arange(count)
    top = near[each, row, column]
    gain = np.zeros(count)
    for before, after, inside in (
        (near[each, np.maximum(row - 1, 0), column], near[each, np.minimum(row + 1, height - 1), column],
         (row > 0) & (row < height - 1)),
        (near[each, row, np.maximum(column - 1, 0)], near[each, row, np.minimum(column + 1, width - 1)],
         (column > 0) & (column < width - 1)),
    ):  # fmt: skip
        bend = 2 * top - before - after
        gain += np.where(inside & (bend > 0), (after - before) ** 2 / np.maximum(8 * bend, 1e-12), 0.0)
    found: Array = top + gain
    return found
