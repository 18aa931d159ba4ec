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

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

_AT_ONCE = 32  # channels a round: the whole residual is brought up to date once for them
_CANDIDATES = 4  # times as many are looked at
_FLOOR = 1e-10  # of the largest variance: what is left of a channel that others explain


def order(moments: Sequence[Array], metrics: Sequence[Array]) -> NDArray[np.int64]:
    """All channels, the most wanted first.

    Args:
        moments: (n, n) of the channels, where each of their readers sees them.
        metrics: (n, n) of the gradients there.

    Time: ``O(n³)`` for each reader, nearly all of it in matrix products; memory ``16 · n²`` bytes a reader.
    """
    count = len(moments[0])
    residuals = [np.array(each, dtype=np.float64) for each in moments]
    weighed = [metric @ residual for metric, residual in zip(metrics, residuals, strict=True)]
    floors = [_FLOOR * max(float(each.diagonal().max()), 1e-300) for each in moments]
    left = np.ones(count, dtype=bool)
    found: list[int] = []
    step = max(1, min(_AT_ONCE, count // 16))
    while len(found) < count:
        gains = sum(
            _gains(residual, each, floor) for residual, each, floor in zip(residuals, weighed, floors, strict=True)
        )
        assert not isinstance(gains, int)
        gains[~left] = -1.0
        if gains.max() <= 0.0:  # nothing is missing any more
            found += [int(place) for place in np.flatnonzero(left)]
            break
        several = min(int(left.sum()), step * _CANDIDATES)
        candidates = np.argsort(-gains, kind="stable")[:several]
        taken = _among(candidates, residuals, weighed, floors, min(step, several))
        for residual, each, metric, floor in zip(residuals, weighed, metrics, floors, strict=True):
            factor = _take(residual, taken, floor)
            each -= (metric @ factor) @ factor.T
        left[taken] = False
        found += taken
    return np.asarray(found, dtype=np.int64)


def _gains(residual: Array, weighed: Array, floor: float) -> Array:
    variance = residual.diagonal()
    gains = np.einsum("ij,ij->j", residual, weighed)
    return np.where(variance > floor, gains / np.maximum(variance, floor), 0.0)


def _among(
    candidates: NDArray[np.int64],
    residuals: Sequence[Array],
    weighed: Sequence[Array],
    floors: Sequence[float],
    count: int,
) -> list[int]:
    """The best ``count`` of a few channels, exactly: only their own columns are brought up to date after each."""
    columns = [residual[:, candidates].copy() for residual in residuals]
    images = [each[:, candidates].copy() for each in weighed]
    open_ = np.ones(len(candidates), dtype=bool)
    taken: list[int] = []
    for _ in range(count):
        gains = np.zeros(len(candidates))
        for column, image, floor in zip(columns, images, floors, strict=True):
            variance = column[candidates, np.arange(len(candidates))]
            numerators = np.einsum("ij,ij->j", column, image)
            gains += np.where(variance > floor, numerators / np.maximum(variance, floor), 0.0)
        gains[~open_] = -1.0
        best = int(gains.argmax())
        if gains[best] <= 0.0 and taken:
            break
        open_[best] = False
        taken.append(int(candidates[best]))
        for column, image, floor in zip(columns, images, floors, strict=True):
            own, seen = column[:, best].copy(), image[:, best].copy()
            variance = own[candidates[best]]
            if variance > floor:
                row = column[candidates[best]] / variance
                column -= np.outer(own, row)
                image -= np.outer(seen, row)
    return taken


def _take(residual: Array, taken: Sequence[int], floor: float) -> Array:
    """Brings the residual up to date in place; the factor whose square was taken off."""
    factor = np.zeros((len(residual), len(taken)))
    for place, channel in enumerate(taken):
        column = residual[:, channel] - factor[:, :place] @ factor[channel, :place]
        if column[channel] > floor:
            factor[:, place] = column / np.sqrt(column[channel])
    residual -= factor @ factor.T
    return factor


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
    inside = moments[np.ix_(ordered, ordered)] + ridge * np.eye(len(moments))
    lower = np.linalg.cholesky(inside)
    lower = lower / lower.diagonal()
    basis, dual = np.empty_like(lower), np.empty_like(lower)
    basis[ordered] = lower
    dual[ordered] = np.linalg.inv(lower).T
    return basis, dual
