"""A layer rewritten through fewer directions: the layers of `splits` with their values.

With ``x ≈ μ + B Dᵀ(x − μ)`` for what a layer takes and ``y ≈ ν + U Vᵀ(y − ν)`` for what it gives (`LayerSpaces`: mean,
leading columns of basis and dual), and ``W`` its weight, a matrix for each tap of the kernel::

    column    Vᵀ W,  then U                                   bias  U Vᵀ b + (I − U Vᵀ) ν
    row       Dᵀ,    then W B                                 bias  b + Σ W (I − B Dᵀ) μ, over the taps
    both      Dᵀ,    then Vᵀ W B,  then U                     bias  that of row as b in that of column

Where a layer pads with zeros the sum over the taps is another one at the border. The bias is that of the inside, where
it is exact; at the border every tap that reads a zero adds ``W (I − B Dᵀ) μ`` too much. `input_spaces` counts those
taps when it chooses ``B``, so that little of the mean is beyond the kept directions where borders are much; of
transposed convolutions it gives spaces about zero, ``μ = 0``, and nothing has to be corrected anywhere. A map of
constants as a latent channel of its own would be exact at the border, for a channel.

``both`` is the truncated higher-order SVD on the two channel modes (L. De Lathauwer et al., A multilinear singular
value decomposition, 2000; Y.-D. Kim et al., Compression of deep convolutional neural networks for fast and low power
mobile applications, 2016), each in its own metric. ``spatial`` is that of M. Jaderberg et al., Speeding up
convolutional neural networks with low rank expansions, 2014, in the closed form of C. Tai et al., Convolutional neural
networks with low-rank regularization, 2016: the SVD of the weight as (in · k) × (out · k'), here between roots of
``C``, the second moment of the input's channels, and ``F``, the metric of the output.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from rowcol_edge.errors import PlanError
from rowcol_edge.factoring import splits
from rowcol_edge.factoring.costs import Form, LayerInfo, Split
from rowcol_edge.factoring.gauge import levels
from rowcol_edge.factoring.layers import describe
from rowcol_edge.factoring.spaces import LayerSpaces, root_of
from rowcol_edge.factoring.splits import Layer

Array = NDArray[np.float64]

_FLOOR = 1e-6  # latent scales are floored at this fraction of the largest variance
_UNSEEN = 1e-10  # of the largest variance: what is below is not told from nothing, see `spaces`
_RIDGE = 1e-8
"""Share of the mean of ``C``'s diagonal in it: channels that calibration did not show come last, and are not lost."""


def project(
    layer: Layer,
    split: Split,
    *,
    inputs: LayerSpaces | None = None,
    outputs: LayerSpaces | None = None,
    name: str = "layer",
) -> nn.Sequential:
    """The layers that stand in for ``layer``: ``reduce``, (``core``,) ``expand``.

    Computed in float64, stored in the layer's own type on its own device, trainable as its weight is. The layer is left
    as it was. The latent's channels are divided by the roots of their standard deviations, which leaves as much
    unevenness to them as to the weights behind: a start for training and for `settle`, which evens out both.

    Args:
        inputs: spaces of what the layer takes, as `input_spaces` gives them; `ROW` and `BOTH` need them, `SPATIAL`
            takes the identity without.
        outputs: those of what it gives, weighed or not; `COLUMN` and `BOTH` need them, `SPATIAL` as above.

    Raises:
        PlanError: a form that the layer cannot take, a rank out of range, spaces that are missing or of another layer.
    """
    info = describe(name, layer)
    info.check(split)
    _check_spaces(info, "input", inputs, info.in_features, needed=split.form in (Form.ROW, Form.BOTH))
    _check_spaces(info, "output", outputs, info.out_features, needed=split.form in (Form.COLUMN, Form.BOTH))
    if split.form is Form.COLUMN:
        assert outputs is not None
        found = _column(layer, split.rank, outputs)
    elif split.form is Form.SPATIAL:
        assert isinstance(layer, nn.Conv2d | nn.ConvTranspose2d)
        found = _spatial(layer, split, inputs, outputs)
    elif split.form is Form.ROW:
        assert inputs is not None
        found = _row(layer, split.rank, inputs)
    else:
        assert inputs is not None
        assert outputs is not None
        found = _both(layer, split, inputs, outputs)
    return _made(layer, *_levelled(found))


# ---------------------------------------------------------------- the forms

#: the layers, their weights as `splits.matrix` reads them, and the bias of the last
_Found = tuple[Sequence[Layer], Sequence[Array], Array]


def _column(layer: Layer, rank: int, outputs: LayerSpaces) -> _Found:
    basis, dual, scale = _leading(layer, outputs, rank)
    bias = outputs.mean + basis @ (dual.T @ (_bias(layer) - outputs.mean))
    values = (dual.T @ splits.matrix(layer)) / scale[:, None], basis * scale
    return splits.column(layer, rank), values, bias


def _row(layer: Layer, rank: int, inputs: LayerSpaces) -> _Found:
    basis, dual, scale = _leading(layer, inputs, rank, taken=True)
    values = dual.T / scale[:, None], _flat(splits.taps(layer), basis * scale)
    return splits.row(layer, rank), values, _row_bias(layer, inputs, basis, dual)


def _both(layer: Layer, split: Split, inputs: LayerSpaces, outputs: LayerSpaces) -> _Found:
    taken = split.taken or 0
    before, before_dual, before_scale = _leading(layer, inputs, taken, taken=True)
    behind, behind_dual, behind_scale = _leading(layer, outputs, split.rank)
    core = (behind_dual.T @ _flat(splits.taps(layer), before * before_scale)) / behind_scale[:, None]
    bias = _row_bias(layer, inputs, before, before_dual)
    bias = outputs.mean + behind @ (behind_dual.T @ (bias - outputs.mean))
    values = before_dual.T / before_scale[:, None], core, behind * behind_scale
    return splits.both(layer, taken, split.rank), values, bias


def _spatial(layer: splits.Planar, split: Split, inputs: LayerSpaces | None, outputs: LayerSpaces | None) -> _Found:
    across, rank = split.across_first, split.rank
    matrix, energies, vectors = _spatial_svd(layer, inputs, outputs, across)
    root, inverse = _root(outputs, layer.out_channels)
    # no inverse of the input's: M F½ V Vᵀ F^(−½) is the projection of what the taps of the second layer are given
    height, width = layer.kernel_size[::-1] if across else layer.kernel_size
    leading = vectors[:, :rank].reshape(layer.out_channels, width, rank)
    scale = _scale(np.square(energies[:rank]))
    reduce = matrix @ np.einsum("op,pwr->owr", root, leading).reshape(-1, rank) / scale
    expand = np.einsum("po,pwr->orw", inverse, leading) * scale[:, None]
    bias = _bias(layer)
    if inputs is not None and inputs.mean.any():
        first = reduce.reshape(layer.in_channels, height, rank).sum(1)
        bias = bias + (splits.taps(layer).sum(2) - expand.sum(2) @ first.T) @ inputs.mean
    values = reduce.T, expand.reshape(layer.out_channels, -1)
    return splits.spatial(layer, rank, across_first=across), values, bias


def _spatial_svd(
    layer: splits.Planar, inputs: LayerSpaces | None, outputs: LayerSpaces | None, across_first: bool
) -> tuple[Array, Array, Array]:
    """The weight as (in · k, out · k'), singular values and right vectors of it between the roots."""
    taps = splits.taps(layer).reshape(layer.out_channels, layer.in_channels, *layer.kernel_size)
    taps = taps.transpose(1, 3, 0, 2) if across_first else taps.transpose(1, 2, 0, 3)  # (in, k, out, k')
    shape = taps.shape
    before: Array = np.eye(shape[0])
    if inputs is not None:
        moment = inputs.covariance
        moment += max(_RIDGE * float(np.trace(moment)) / shape[0], 1e-30) * np.eye(shape[0])
        before = np.asarray(np.linalg.cholesky(moment), np.float64)
    weighed = np.einsum("ij,ihow,op->jhpw", before, taps, _root(outputs, shape[2])[0], optimize=True)
    _, values, rows = np.linalg.svd(weighed.reshape(shape[0] * shape[1], -1), full_matrices=False)
    peaks = rows[np.arange(len(rows)), np.abs(rows).argmax(axis=1)]
    rows = rows * np.where(peaks < 0, -1.0, 1.0)[:, None]  # a sign per direction makes the factors reproducible
    return taps.reshape(shape[0] * shape[1], -1), values, rows.T


def _root(outputs: LayerSpaces | None, features: int) -> tuple[Array, Array]:
    """A root of the output's metric ``F``, and its inverse: the dual directions and the transposed basis, where those
    are all there are."""
    even: Array = np.eye(features)
    if outputs is None or outputs.dual is None:
        return even, even
    if outputs.metric is None:
        return outputs.dual, outputs.basis.T
    if not outputs.metric.any():  # nothing that it gives is worth anything, as what follows takes none of it
        return even, even
    root = root_of(torch.from_numpy(outputs.worth))
    return root.numpy(), torch.linalg.solve_triangular(root, torch.from_numpy(even), upper=False).numpy()


# ---------------------------------------------------------------- parts


def _made(layer: Layer, parts: Sequence[Layer], values: Sequence[Array], bias: Array) -> nn.Sequential:
    for part, value in zip(parts, values, strict=True):
        splits.fill(part, value, layer.weight)
    last = parts[-1].bias
    assert last is not None
    splits.put(last, bias, layer.weight)
    names = ("reduce", "expand") if len(parts) == 2 else ("reduce", "core", "expand")
    return nn.Sequential(OrderedDict(zip(names, parts, strict=True))).train(layer.training)


def _levelled(found: _Found) -> _Found:
    """Weights of one size in all parts."""
    parts, values, bias = found
    return parts, [np.ldexp(each, level) for each, level in zip(values, levels(values), strict=True)], bias


def _flat(taps: Array, mixed: Array) -> Array:
    """(out, rank · taps): the weight behind a matrix over its input channels."""
    return np.asarray(np.einsum("oit,ir->ort", taps, mixed).reshape(len(taps), -1))


def _bias(layer: Layer) -> Array:
    found: torch.Tensor | None = layer._parameters.get("bias")
    if found is None:
        return np.zeros(layer.out_features if isinstance(layer, nn.Linear) else layer.out_channels)
    return np.asarray(found.detach().double().cpu().numpy())


def _row_bias(layer: Layer, inputs: LayerSpaces, basis: Array, dual: Array) -> Array:
    lost = inputs.mean - basis @ (dual.T @ inputs.mean)
    return np.asarray(_bias(layer) + splits.taps(layer).sum(axis=2) @ lost)


def _read(layer: Layer) -> Array:
    """(in, out · taps): what a layer reads of its input."""
    taps = splits.taps(layer)
    return taps.swapaxes(0, 1).reshape(taps.shape[1], -1)


def _leading(layer: Layer, spaces: LayerSpaces, rank: int, *, taken: bool = False) -> tuple[Array, Array, Array]:
    """Basis, dual and latent scales of the directions that are kept of what a layer gives, or of what is taken; see
    `_unseen` for those beyond what varied."""
    basis = spaces.basis[:, :rank]
    dual = basis if spaces.dual is None else spaces.dual[:, :rank]
    values = spaces.eigenvalues[:rank]
    least = max(_UNSEEN, torch.finfo(layer.weight.dtype).eps ** 2)  # half precision makes more of nothing
    seen = min(int(np.count_nonzero(values > least * values[0])), basis.shape[1])
    if seen < rank and not rank == basis.shape[1] == len(basis):  # all that there are hold everything
        weight = _read(layer) if taken else splits.matrix(layer)
        basis, dual = basis[:, :seen], dual[:, :seen]
        root, inverse = _root(spaces, len(basis))
        metric = inverse if taken else np.asarray(root.T)
        left = _without(weight, dual, basis) if taken else _without(weight, basis, dual)
        more = _unseen(metric @ left, rank - seen, _UNSEEN * float(np.linalg.norm(metric @ weight)))
        behind, ahead = _without(inverse.T @ more, basis, dual), _without(root @ more, dual, basis)
        # the metric is kept in single precision, so that the two do not fit to the last digit
        ahead = np.asarray(np.linalg.solve(ahead.T @ behind, ahead.T).T, np.float64)
        rest = np.zeros((len(basis), rank - seen - more.shape[1]))
        basis, dual = np.hstack([basis, behind, rest]), np.hstack([dual, ahead, rest])
    return basis, dual, _scale(values)


def _without(columns: Array, basis: Array, dual: Array) -> Array:
    return np.asarray(columns - basis @ (dual.T @ columns))


def _unseen(left: Array, most: int, least: float) -> Array:
    """(size, ≤ most) directions of what a weight does beyond those that calibration saw, by how much it does of each.
    With as many as its rank a layer is whole for inputs of another kind too. ``least`` is rounding."""
    vectors, sizes, _ = np.linalg.svd(left, full_matrices=False)
    vectors = vectors[:, : min(most, int(np.count_nonzero(sizes > least)))]
    peaks = vectors[np.abs(vectors).argmax(axis=0), np.arange(vectors.shape[1])]
    return np.asarray(vectors * np.where(peaks < 0, -1.0, 1.0))


def _scale(variances: Array) -> Array:
    largest = float(variances[0])
    if largest <= 0.0:
        return np.ones_like(variances)
    return np.asarray(np.maximum(variances, _FLOOR * largest) ** 0.25)


def _check_spaces(info: LayerInfo, what: str, spaces: LayerSpaces | None, features: int, *, needed: bool) -> None:
    if spaces is None and needed:
        raise PlanError(f"layer {info.name!r}: the spaces of its {what} were not collected")
    if spaces is not None and len(spaces.mean) != features:
        raise PlanError(
            f"layer {info.name!r}: the spaces of its {what} are of another layer",
            expected=str(features),
            got=str(len(spaces.mean)),
        )
