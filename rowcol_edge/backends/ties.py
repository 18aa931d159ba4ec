"""Weights of one model that are one array: as they are, transposed, or with their rows scaled.

Tool chains make several constants of a matrix that a network uses as ``W`` and ``Wᵀ``: they transpose it beforehand,
and multiply what follows, such as a batch norm, into its rows. `find` sees what they come from, whatever the chain.
A kernel, outputs × inputs × …, is taken as a matrix whose entries are taps: transposed, its first two axes are
exchanged.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
_Number = TypeVar("_Number", bound=np.generic)

_LEAST_ROWS = 8
"""Narrower weights are proportional by chance; they hold few bytes anyway."""
_LEAST_VALUES = 1024
_TOLERANCE = 1e-5
"""Relative: what float32 loses where a tool chain multiplies a scale into a weight."""
_CORNER = 8


@dataclass(frozen=True, slots=True, eq=False)
class Use:
    """One constant: ``diag(factors) · W``, or ``diag(factors) · Wᵀ`` if ``transposed``."""

    name: str
    transposed: bool
    factors: Floats

    @property
    def plain(self) -> bool:
        """Whether it is the weight itself, transposed or not."""
        return bool(np.all(self.factors == 1.0))


@dataclass(frozen=True, slots=True, eq=False)
class Tie:
    """A weight ``W``, outputs × inputs (× kernel), and all constants that are made of it, two or more."""

    weight: Floats
    uses: tuple[Use, ...]

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(use.name for use in self.uses)

    def quantized(self, limit: int) -> tuple[npt.NDArray[np.int8], float]:
        """The weight in whole numbers from -limit to limit with one scale, which both of its orientations can have."""
        largest = float(np.abs(self.weight).max())
        scale = largest / limit if largest else 1.0
        return np.rint(self.weight / scale).astype(np.int8), scale


def find(weights: Mapping[str, npt.NDArray[np.floating]]) -> tuple[Tie, ...]:
    """The ties among weights given as outputs × inputs (× kernel, see `compact`); each weight is in one at most."""
    left = {name: w for name, w in weights.items() if min(w.shape[:2]) >= _LEAST_ROWS and w.size >= _LEAST_VALUES}
    found = []
    while left:
        name, first = next(iter(left.items()))
        alike = [(other, *pair) for other, w in left.items() if other != name for pair in _related(first, w)]
        tie = _tie(name, first.astype(np.float64), alike)
        if tie is not None:
            found.append(tie)
        for used in {name, *(tie.names if tie else ())}:
            del left[used]
    return tuple(found)


def compact(weight: npt.NDArray[_Number]) -> npt.NDArray[_Number]:
    """A kernel without its last axes if it is 1×1: a convolution then is the linear layer of the same weight."""
    return weight.reshape(weight.shape[:2]) if math.prod(weight.shape[2:]) == 1 else weight


def turned(weight: npt.NDArray[_Number]) -> npt.NDArray[_Number]:
    """Inputs × outputs (× kernel)."""
    return weight.swapaxes(0, 1)


def _related(first: npt.NDArray[np.floating], other: npt.NDArray[np.floating]) -> Iterator[tuple[bool, Floats, Floats]]:
    """Whether transposed, r and c, so that ``other``, set upright, is ``diag(r) · first · diag(c)``."""
    for transposed, upright in ((False, other), (True, turned(other))):
        if upright.shape != first.shape:
            continue
        corner = np.s_[:_CORNER, :_CORNER]
        if _scales(first[corner], upright[corner]) is None:  # rules out nearly all without reading them whole
            continue
        found = _scales(first, upright)
        if found is not None:
            yield (transposed, *found)
            return


def _scales(a: npt.NDArray[np.floating], b: npt.NDArray[np.floating]) -> tuple[Floats, Floats] | None:
    """r and c of ``b = diag(r) · a · diag(c)``, for each tap of a kernel; None if there are none."""
    a, b = (w.reshape(*w.shape[:2], -1).astype(np.float64) for w in (a, b))
    if not np.array_equal(a != 0.0, b != 0.0):
        return None
    if np.array_equal(a, b):
        return np.ones(a.shape[0]), np.ones(a.shape[1])
    largest = np.abs(a).argmax(2, keepdims=True)
    of_a, of_b = (np.take_along_axis(w, largest, 2)[..., 0] for w in (a, b))
    there = of_a != 0.0
    row, column = int(there.sum(1).argmax()), int(there.sum(0).argmax())
    if (there.any(0) & ~there[row]).any() or (there.any(1) & ~there[:, column]).any() or not there[row, column]:
        return None
    ratio = np.divide(of_b, of_a, out=np.ones_like(of_a), where=there)
    r, c = ratio[:, column], ratio[row] / ratio[row, column]
    made = r[:, None, None] * a * c[:, None]
    near = np.abs(made - b) <= _TOLERANCE * np.abs(b)
    return (r, c) if bool(near.all()) else None


def _tie(name: str, first: Floats, alike: Iterable[tuple[str, bool, Floats, Floats]]) -> Tie | None:
    """The weight behind ``first`` and what is like it.

    With ``first = diag(a) W``, another is ``diag(b) W`` where only its rows differ, and where it is transposed
    ``(diag(b) Wᵀ)ᵀ = W diag(b) = diag(1/a) · first · diag(b)``.
    """
    rows: Floats | None = None
    uses: list[tuple[str, bool, Floats]] = []
    for other, transposed, r, c in alike:
        if not transposed:
            if _constant(c):
                uses.append((other, transposed, r * c[0]))
            continue
        own = 1.0 / r
        own = own / np.exp(np.log(np.abs(own)).mean()) * np.sign(own[0])
        if _constant(own):
            own = np.ones_like(own)
        if rows is None:
            rows = own
        if np.allclose(own, rows, rtol=10 * _TOLERANCE, atol=0.0):
            uses.append((other, transposed, c * r[0] * rows[0]))
    if not uses:
        return None
    rows = np.ones(first.shape[0]) if rows is None else rows
    members = [Use(name, False, rows)]
    members += [Use(n, t, _exact(f if t else f * rows)) for n, t, f in uses]
    return Tie(first / rows.reshape(-1, *[1] * (first.ndim - 1)), tuple(members))


def _constant(values: Floats) -> bool:
    return bool(np.allclose(values, values[0], rtol=_TOLERANCE, atol=0.0))


def _exact(factors: Floats) -> Floats:
    """Ones, where they are nothing else but rounding."""
    return np.ones_like(factors) if np.allclose(factors, 1.0, rtol=_TOLERANCE, atol=0.0) else factors
