"""Rewrite a model by a plan."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray
from torch import nn
from torch.nn.modules.conv import _ConvNd

from rowcol_edge.errors import PlanError
from rowcol_edge.factoring import splits
from rowcol_edge.factoring.channel_spaces import ChannelSpaces
from rowcol_edge.factoring.channels import ChannelSet, Slot
from rowcol_edge.factoring.gauge import rotation
from rowcol_edge.factoring.layers import held, skip_reasons
from rowcol_edge.factoring.narrow import Narrowing, narrow, narrowing
from rowcol_edge.factoring.opening import leave_fused_paths
from rowcol_edge.factoring.plan import FactorPlan, LayerPlan, nearest
from rowcol_edge.factoring.refit import refit
from rowcol_edge.factoring.spaces import LayerSpaces, Progress, directions
from rowcol_edge.factoring.study import Study

Array = NDArray[np.float64]

_FLOOR = 1e-6  # latent scales are floored at this fraction of the largest eigenvalue


def factored(study: Study, plan: FactorPlan, progress: Progress | None = None) -> nn.Module:
    """The studied model by a plan, with the second pass if it asks for one; the dense model itself where the plan
    changes nothing. Errors as `apply`."""
    if not plan.changes:
        return study.dense
    channels = study.channels if plan.channels else ()
    found = study.channel_spaces if plan.channels else {}
    model = apply(study.folded, plan, study.spaces, channels=channels, channel_spaces=found)
    if not plan.refit:
        return model
    kept = {
        slot.name: _whole(each.rows(slot), slot, study.infos[slot.name].out_features)
        for each in _narrowings(plan, channels, found)
        for slot in each.channels.producers
    }
    reasons = held(study.folded, study.graph)
    names = [name for name in study.infos if not reasons[name]]
    return refit(study.folded, model, study.samples(), names, kept, classify=study.classify, progress=progress)


def apply(
    model: nn.Module,
    plan: FactorPlan,
    spaces: Mapping[str, LayerSpaces],
    *,
    channels: Sequence[ChannelSet] = (),
    channel_spaces: Mapping[str, ChannelSpaces] | None = None,
    alpha: float = 0.5,
    rotated: int | None = 0,
) -> nn.Module:
    """A copy of ``model`` with the plan's channels, each ``project`` layer ``nn.Sequential(reduce=…, expand=…)``.

    Channels come first (see `narrow`); a layer is then split in the spaces of the channels that are left to it. With
    ``U`` the leading ``r`` directions of the spaces' basis, ``V`` those of its dual, ``D = diag(λ^(α/2))``::

        reduce = Q D⁻¹ Vᵀ W      (no bias; a convolution keeps its kernel, stride, padding and dilation)
        expand = U D Qᵀ          (1×1 for a convolution, transposed or not; bias  U Vᵀ b + (I − U Vᵀ) E[y])

    the best rank-``r`` layer on the calibration inputs, centred: in mean square, or where the spaces are weighed (see
    `sensitivity`) at the model's output. ``alpha`` and ``Q``, an orthogonal matrix drawn with the seed ``rotated``,
    only change what passes between the two (the product is the same): 0 leaves the latent channels their own ranges, 1
    makes them equal, ``Q`` spreads what is large in one over all. 0.5 and rotated did well at int8 in every runtime on
    the Fashion-MNIST sample (tools/benchmark_gauge.py; see `gauge`). Computed in float64, stored in the layer's own
    type on its own device.

    Args:
        model: the model ``spaces`` was collected from (batch norms folded), left as it is.
        channels, channel_spaces: its sets of channels and what they are worth, for a plan that narrows some.

    Raises:
        PlanError: a layer or set that the model has not or that cannot be changed, a rank out of range, missing spaces.
    """
    if not 0.0 <= alpha <= 1.0:
        raise PlanError("alpha", expected="0 to 1", got=str(alpha))
    reasons = skip_reasons(model)
    narrowings = _narrowings(plan, channels, channel_spaces or {})
    taken = {slot.name: (slot, each) for each in narrowings for slot in each.channels.producers}
    for layer in plan.projected:
        _check(layer, reasons, spaces)
    result = narrow(model, narrowings)
    for layer in plan.projected:
        module = result.get_submodule(layer.name)
        assert isinstance(module, nn.Linear | _ConvNd)  # skip_reasons lists no other kind without a reason
        seen = spaces[layer.name]
        if layer.name in taken:
            slot, each = taken[layer.name]
            seen = _through(seen, _whole(each.rows(slot), slot, len(seen.mean)))
        if layer.rank is None or layer.rank > len(seen.mean):
            raise PlanError(f"layer {layer.name!r}: rank", expected=f"1 to {len(seen.mean)}", got=str(layer.rank))
        result.set_submodule(layer.name, _project(module, layer, seen, alpha, rotated))
    changed = {layer.name for layer in plan.projected} | {name for each in narrowings for name in each.channels.layers}
    leave_fused_paths(result, changed)
    return result


def _narrowings(
    plan: FactorPlan, channels: Sequence[ChannelSet], channel_spaces: Mapping[str, ChannelSpaces]
) -> list[Narrowing]:
    known = {each.name: each for each in channels}
    found = []
    for each in plan.channels:
        if each.name not in known:
            raise PlanError(f"the plan names unknown channels {each.name!r}", hint=nearest(each.name, known))
        channel_set = known[each.name]
        if each.width == channel_set.size:
            continue
        if channel_set.fixed:
            raise PlanError(f"channels {each.name!r} cannot be narrowed: {channel_set.fixed}")
        if each.width > channel_set.size:
            raise PlanError(f"channels {each.name!r}: width", expected=f"1 to {channel_set.size}", got=str(each.width))
        if each.name not in channel_spaces:
            raise PlanError(f"channels {each.name!r}: what they are worth was not measured")
        found.append(narrowing(channel_set, channel_spaces[each.name], each.width))
    return found


def _whole(take: Array | None, slot: Slot, outputs: int) -> Array:
    """(kept outputs, outputs) of a layer whose channels ``take`` keeps, in the order that `narrow` leaves them."""
    assert take is not None  # only `plain` narrowings have none
    whole = np.eye(outputs)
    dropped = []
    for rows, part in zip(slot.index[:, :, 0], take, strict=True):
        width = len(part)
        whole[rows[:width]] = 0.0
        whole[np.ix_(rows[:width], rows)] = part
        dropped.append(rows[width:])
    return np.delete(whole, np.concatenate(dropped), axis=0)


def _through(spaces: LayerSpaces, take: Array) -> LayerSpaces:
    """The spaces of ``take · y``: what is dropped is predicted from what is kept, and gradients come back that way."""
    covariance = (spaces.basis * spaces.eigenvalues) @ spaces.basis.T
    dual = spaces.basis if spaces.dual is None else spaces.dual
    kept = take @ covariance @ take.T
    ridge = _FLOOR * max(float(np.trace(kept)) / len(kept), 1e-300) * np.eye(len(kept))
    back = covariance @ take.T @ np.linalg.inv(kept + ridge)
    values, basis, dual = directions(kept, back.T @ (dual @ dual.T) @ back)
    return replace(spaces, eigenvalues=values, basis=basis, dual=dual, mean=take @ spaces.mean, losses=None)


def _check(layer: LayerPlan, reasons: Mapping[str, str], spaces: Mapping[str, LayerSpaces]) -> None:
    if layer.name not in reasons:
        raise PlanError(f"the plan names unknown layer {layer.name!r}", hint=nearest(layer.name, reasons))
    if reasons[layer.name]:
        what = f"layer {layer.name!r} cannot be factored: {reasons[layer.name]}"
        raise PlanError(what, hint='set its form to "dense"')
    if layer.name not in spaces:
        raise PlanError(f"layer {layer.name!r}: its spaces were not collected")
    size = len(spaces[layer.name].mean)
    if layer.rank is None or not 1 <= layer.rank <= size:
        raise PlanError(f"layer {layer.name!r}: rank", expected=f"1 to {size}", got=str(layer.rank))


def _project(
    module: nn.Linear | _ConvNd, layer: LayerPlan, spaces: LayerSpaces, alpha: float, rotated: int | None
) -> nn.Sequential:
    rank = layer.rank or 0
    weight = module.weight
    dense = splits.matrix(module)
    if len(spaces.mean) != dense.shape[0]:
        raise PlanError(
            f"layer {layer.name!r}: its spaces are of another model",
            expected=str(dense.shape[0]),
            got=str(len(spaces.mean)),
        )
    basis = spaces.basis[:, :rank]
    dual = basis if spaces.dual is None else spaces.dual[:, :rank]
    scale = _latent_scale(spaces.eigenvalues[:rank], alpha)
    bias = np.zeros(dense.shape[0]) if module.bias is None else module.bias.detach().double().cpu().numpy()
    bias = spaces.mean + basis @ (dual.T @ (bias - spaces.mean))
    reduce, expand = splits.column(module, rank)
    turn = np.eye(rank) if rotated is None else rotation(rank, rotated)
    splits.fill(reduce, turn @ ((dual.T @ dense) / scale[:, None]), weight)
    splits.fill(expand, (basis * scale) @ turn.T, weight)
    assert expand.bias is not None
    splits.put(expand.bias, bias, weight)
    return nn.Sequential(OrderedDict(reduce=reduce, expand=expand)).train(module.training)


def _latent_scale(eigenvalues: NDArray[np.float64], alpha: float) -> NDArray[np.float64]:
    """λ^(α/2); an eigenvalue near zero would blow up what the calibration data never showed, so they are floored."""
    largest = float(eigenvalues[0])
    if largest <= 0.0:
        return np.ones_like(eigenvalues)
    return np.asarray(np.maximum(eigenvalues, _FLOOR * largest) ** (alpha / 2.0), dtype=np.float64)
