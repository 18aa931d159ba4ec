"""Which channels to keep: columns chosen one after the other, each the one that explains most of what is still missing.

The channels of a set are read by several layers. With ``C`` the second moments of the channels at one of them and
``F`` those of the gradient of the loss, keeping the channels ``K`` and predicting the others from them by least squares
loses ``tr(F (C − C_K (C_KK)⁻¹ C_Kᵀ))``. Taking in channel ``j`` lowers that by ``(RᵀFR)_jj / R_jj``, with ``R`` the
residual of ``C`` after the channels so far: pivoted Cholesky with the pivot chosen in the metric of ``F`` (greedy
column subset selection, as in A. Farahat, A. Ghodsi and M. Kamel, Efficient greedy feature selection for unsupervised
learning, 2013).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from rowcol_edge.factoring.products import product

Array = NDArray[np.float64]

_AT_ONCE = 32  # channels a round: the whole residual is brought up to date once for them
_CANDIDATES = 4  # times as many are looked at
_CROWDED = 0.8  # share of the channels that is left when the others are put away
_FLOOR = 1e-10  # of the largest variance: what is left of a channel that others explain


def order(moments: Sequence[Array], metrics: Sequence[Array]) -> NDArray[np.int64]:
    """All channels, the most wanted first.

    Args:
        moments: (n, n) of the channels, where each of their readers sees them.
        metrics: (n, n) of the gradients there.

    Time: ``O(n³)`` for each reader, nearly all of it in matrix products; memory ``24 · n²`` bytes a reader.
    """
    count = len(moments[0])
    floors = [_FLOOR * max(float(each.diagonal().max()), 1e-300) for each in moments]
    readers = [
        _Reader(np.array(each, dtype=np.float64), metric, product(metric, each), floor)
        for each, metric, floor in zip(moments, metrics, floors, strict=True)
    ]
    places = np.arange(count)  # of what is left
    left = np.ones(count, dtype=bool)
    found: list[int] = []
    step = max(1, min(_AT_ONCE, count // 16))
    while left.any():
        gains = np.sum([each.gains() for each in readers], axis=0)
        gains[~left] = -1.0
        if gains.max() <= 0.0:  # nothing is missing any more
            found += places[left].tolist()
            break
        several = min(int(left.sum()), step * _CANDIDATES)
        candidates = np.argsort(-gains, kind="stable")[:several]
        taken = _among(candidates, readers, min(step, several))
        for each in readers:
            each.take(taken)
        left[taken] = False
        found += places[taken].tolist()
        if left.sum() < _CROWDED * len(left):  # of what is taken nothing is left to explain: rows of zeros
            for each in readers:
                each.only(left)
            places, left = places[left], left[left]
    return np.asarray(found, dtype=np.int64)


@dataclass(slots=True, eq=False)
class _Reader:
    """One reader of the channels that are left."""

    residual: Array  # R
    metric: Array  # F
    weighed: Array  # F R
    floor: float  # variance below which a channel is explained

    def gains(self) -> Array:
        return self.share(self.residual.diagonal(), np.einsum("ij,ij->j", self.residual, self.weighed))

    def share(self, variance: Array, product: Array) -> Array:
        """What taking in a channel would explain."""
        return np.where(variance > self.floor, product / np.maximum(variance, self.floor), 0.0)

    def take(self, channels: Sequence[int]) -> None:
        """Brings the residual up to date in place."""
        factor = np.zeros((len(self.residual), len(channels)))
        for place, channel in enumerate(channels):
            column = self.residual[channel] - factor[:, :place] @ factor[channel, :place]
            if column[channel] > self.floor:
                factor[:, place] = column / np.sqrt(column[channel])
        _subtract(self.residual, factor, factor)
        _subtract(self.weighed, product(self.metric, factor), factor)

    def only(self, left: NDArray[np.bool_]) -> None:
        """In place; one matrix after the other, as memory counts."""
        inside = np.ix_(left, left)
        self.residual = self.residual[inside]
        self.metric = self.metric[inside]
        self.weighed = self.weighed[inside]


def _subtract(matrix: Array, left: Array, right: Array) -> None:
    """``left · rightᵀ``, in one go over the matrix, which numpy would go over three times."""
    torch.from_numpy(matrix).addmm_(torch.from_numpy(left), torch.from_numpy(right).T, alpha=-1.0)


def _among(candidates: NDArray[np.int64], readers: Sequence[_Reader], count: int) -> list[int]:
    """The best ``count`` of a few channels, exactly: of what is between them a row is brought up to date when its
    channel is taken in."""
    inside = [_Inside(each, candidates) for each in readers]
    open_ = np.ones(len(candidates), dtype=bool)
    taken: list[int] = []
    for _ in range(count):
        gains = np.sum([each.gains() for each in inside], axis=0)
        gains[~open_] = -1.0
        best = int(gains.argmax())
        if gains[best] <= 0.0 and taken:
            break
        open_[best] = False
        taken.append(int(candidates[best]))
        for each in inside:
            each.take(best)
    return taken


class _Inside:
    """A reader's candidates: ``R`` and ``Rᵀ F R`` between them, as they were and what was taken off since."""

    def __init__(self, reader: _Reader, candidates: NDArray[np.int64]) -> None:
        self._reader = reader
        rows = reader.residual[candidates]
        self._residual = rows[:, candidates]
        self._seen = product(rows, reader.weighed[:, candidates])
        self._variances, self._products = self._residual.diagonal().copy(), self._seen.diagonal().copy()
        self._factor = np.zeros((0, len(candidates)))  # R has lost factorᵀ · factor,
        self._cross = np.zeros((0, len(candidates)))  # and Rᵀ F R crossᵀ · factor and its transpose

    def gains(self) -> Array:
        return self._reader.share(self._variances, self._products)

    def take(self, channel: int) -> None:
        if self._variances[channel] <= self._reader.floor:
            return
        factor, cross = self._factor, self._cross
        row = self._residual[channel] - factor[:, channel] @ factor
        row /= np.sqrt(row[channel])
        seen = self._seen[channel] - cross[:, channel] @ factor - factor[:, channel] @ cross
        seen = (seen - 0.5 * seen[channel] / row[channel] * row) / row[channel]
        self._variances -= row * row
        self._products -= 2.0 * seen * row
        self._factor, self._cross = np.vstack([factor, row]), np.vstack([cross, seen])


def innovations(moments: Array, ordered: NDArray[np.int64], shrinkage: float) -> tuple[Array, Array]:
    """``(basis, dual)`` of what each channel adds to those before it: ``dualᵀ · basis = I``.

    ``dual[:, k]`` takes from channel ``ordered[k]`` its best prediction from the channels before it, ``basis[:, k]``
    says what that adds to all channels. So the first ``r`` columns are the least-squares prediction from the first
    ``r`` channels (the modified Cholesky factor).

    Args:
        moments: (n, n); rank deficient is fine.
        shrinkage: ridge, as a share of the mean variance.
    """
    ridge = shrinkage * max(float(np.trace(moments)) / len(moments), 1e-300)
    inside = torch.from_numpy(moments[np.ix_(ordered, ordered)])
    inside.diagonal().add_(ridge)
    lower = torch.linalg.cholesky(inside)
    del inside  # a wide set's matrices are what takes the most memory
    lower /= lower.diagonal().clone()
    even = torch.eye(len(lower), dtype=torch.float64)
    inverse = torch.linalg.solve_triangular(lower, even, upper=False, unitriangular=True)
    del even
    basis, dual = np.empty(lower.shape), np.empty(lower.shape)
    basis[ordered], dual[ordered] = lower.numpy(), inverse.T.numpy()
    return basis, dual
