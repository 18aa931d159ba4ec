"""Rewrite a model by a plan."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.nn.modules.conv import _ConvNd

from rowcol_edge.errors import PlanError
from rowcol_edge.factoring.channel_spaces import ChannelSpaces
from rowcol_edge.factoring.channels import ChannelSet, Slot
from rowcol_edge.factoring.layers import held, skip_reasons
from rowcol_edge.factoring.narrow import Narrowing, narrow, narrowing
from rowcol_edge.factoring.opening import leave_fused_paths
from rowcol_edge.factoring.plan import FactorPlan, LayerPlan, nearest
from rowcol_edge.factoring.products import product
from rowcol_edge.factoring.projections import project
from rowcol_edge.factoring.refit import SecondPass, refit
from rowcol_edge.factoring.spaces import LayerSpaces, Progress, blended, directions
from rowcol_edge.factoring.standins import put
from rowcol_edge.factoring.study import Study

Array = NDArray[np.float64]

_Kept = tuple[Array, Slot]  # (groups, width, size) of a slot's channels
_RIDGE = 1e-6  # share of the mean variance: what is kept may not vary in every direction


def factored(study: Study, plan: FactorPlan, progress: Progress | None = None) -> nn.Module:
    """The studied model by a plan, with the second pass if it asks for one; the dense model itself where the plan
    changes nothing. Errors as `apply`. One that there is in `Study.made` or `Study.tried` is handed out, once."""
    if not plan.changes:
        return study.dense
    if (made := study.made.pop(plan.digest, None)) is not None:
        return made
    channels = study.channels if plan.channels else ()
    found = study.channel_spaces if plan.channels else {}
    model = study.tried.pop(replace(plan, refit=False).digest, None)
    if model is None:
        spaces, inputs = study.spaces, study.input_spaces
        model = apply(study.folded, plan, spaces, inputs=inputs, channels=channels, channel_spaces=found)
    if not plan.refit:
        return model
    gives, _ = _kept(_narrowings(plan, channels, found))
    kept = {name: _whole(narrowed, study.infos[name].out_features) for name, narrowed in gives.items()}
    reasons = held(study.folded, study.graph)
    names = [name for name in study.infos if not reasons[name]]
    study.second_passes[plan.digest] = None

    def told(found: SecondPass) -> None:
        study.second_passes[plan.digest] = found

    samples, classify = study.samples(), study.classify
    return refit(study.folded, model, samples, names, kept, classify=classify, progress=progress, told=told)


def metrics(study: Study, plan: FactorPlan) -> dict[str, Array]:
    """(out, out) by layer in parts: what squared errors of its output are worth at the model's own, of the channels
    that the plan leaves it; layers that nothing was weighed for are left out."""
    gives, _ = _kept(_narrowings(plan, study.channels if plan.channels else (), study.channel_spaces))
    found = {}
    for layer in plan.projected:
        space, kept = study.spaces[layer.name], gives.get(layer.name)
        if kept:
            found[layer.name] = blended(_left(space, kept)[2])
        elif space.dual is not None:
            found[layer.name] = space.worth
    return found


def apply(
    model: nn.Module,
    plan: FactorPlan,
    spaces: Mapping[str, LayerSpaces],
    *,
    inputs: Mapping[str, LayerSpaces] | None = None,
    channels: Sequence[ChannelSet] = (),
    channel_spaces: Mapping[str, ChannelSpaces] | None = None,
) -> nn.Module:
    """A copy of ``model`` with the plan's channels, each ``project`` layer in the parts of its split.

    Channels come first (see `narrow`); a layer is then split in the spaces of the channels that are left to it (see
    `projections`): of a column split the best layer of its rank on the calibration inputs, centred, in mean square or,
    where the spaces are weighed (see `sensitivity`), at the model's output.

    Args:
        model: the model ``spaces`` was collected from (batch norms folded), left as it is.
        inputs: spaces of what layers take (see `input_spaces`), for the splits that need them.
        channels, channel_spaces: its sets of channels and what they are worth, for a plan that narrows some.

    Raises:
        PlanError: a layer or set that the model has not or that cannot be changed, a split that a layer cannot take, a
            rank out of range, missing spaces.
    """
    reasons = skip_reasons(model)
    narrowings = _narrowings(plan, channels, channel_spaces or {})
    for layer in plan.projected:
        _check(layer, reasons, spaces)
    result = narrow(model, narrowings)
    gives, takes = _kept(narrowings)
    for layer in plan.projected:
        module = result.get_submodule(layer.name)
        assert isinstance(module, nn.Linear | _ConvNd)  # skip_reasons lists no other kind without a reason
        taken, most = (inputs or {}).get(layer.name), max(layer.rank or 0, layer.taken or 0)
        parts = project(
            module,
            layer.how,
            inputs=taken if taken is None else _through(taken, takes.get(layer.name), most),
            outputs=_through(spaces[layer.name], gives.get(layer.name), most),
            name=layer.name,
        )
        put(result, module, parts)
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


def _kept(narrowings: Sequence[Narrowing]) -> tuple[dict[str, list[_Kept]], dict[str, list[_Kept]]]:
    """By layer what is kept of its outputs, and of its inputs where they are channels of the set itself."""
    gives: dict[str, list[_Kept]] = defaultdict(list)
    takes: dict[str, list[_Kept]] = defaultdict(list)
    for each in narrowings:
        for slot in each.channels.producers:
            rows = each.rows(slot)
            assert rows is not None  # only `plain` narrowings have none
            gives[slot.name].append((rows, slot))
        if not each.channels.norms:
            for slot in each.channels.uses:
                takes[slot.name].append((each.take, slot))
    return gives, takes


def _whole(kept: Sequence[_Kept], size: int) -> Array:
    """(kept channels, channels) that a layer gives or takes, in the order that `narrow` leaves them."""
    whole = np.eye(size)
    dropped = []
    for take, slot in kept:
        for places, part in zip(slot.index[:, :, 0], take, strict=True):
            width = len(part)
            whole[places[:width]] = 0.0
            whole[np.ix_(places[:width], places)] = part
            dropped.append(places[width:])
    return np.delete(whole, np.concatenate(dropped), axis=0)


def _through(spaces: LayerSpaces, kept: Sequence[_Kept] | None, most: int) -> LayerSpaces:
    """The spaces of what is kept, ``most`` directions at least."""
    if not kept:
        return spaces
    mean, covariance, metric = _left(spaces, kept)
    values, basis, dual = directions(covariance, metric, rank=min(max(spaces.rank, most), len(mean)))
    worth = None if basis.shape[1] == len(mean) else blended(metric).astype(np.float32)
    return replace(spaces, eigenvalues=values, basis=basis, dual=dual, mean=mean, losses=None, metric=worth)


def _left(spaces: LayerSpaces, kept: Sequence[_Kept]) -> tuple[Array, Array, Array]:
    """Mean, covariance and metric of what is kept: what is dropped is predicted from that, and gradients come back that
    way."""
    take = _whole(kept, len(spaces.mean))
    places = take.argmax(axis=1)
    selected = np.count_nonzero(take) == len(take) and bool((take[np.arange(len(take)), places] == 1.0).all())
    covariance = spaces.covariance
    across = covariance[places] if selected else product(take, covariance)  # (kept, all)
    left = across[:, places] if selected else product(across, take.T)
    inner = torch.from_numpy(left + _RIDGE * max(float(np.trace(left)) / len(left), 1e-300) * np.eye(len(left)))
    back = torch.cholesky_solve(torch.from_numpy(across), torch.linalg.cholesky(inner))
    if spaces.metric is not None:
        return take @ spaces.mean, left, (back @ torch.from_numpy(spaces.worth) @ back.T).numpy()
    dual = spaces.basis if spaces.dual is None else spaces.dual
    seen = back @ torch.from_numpy(dual)
    return take @ spaces.mean, left, (seen @ seen.T).numpy()


def _check(layer: LayerPlan, reasons: Mapping[str, str], spaces: Mapping[str, LayerSpaces]) -> None:
    if layer.name not in reasons:
        raise PlanError(f"the plan names unknown layer {layer.name!r}", hint=nearest(layer.name, reasons))
    if reasons[layer.name]:
        what = f"layer {layer.name!r} cannot be factored: {reasons[layer.name]}"
        raise PlanError(what, hint='set its form to "dense"')
    if layer.name not in spaces:
        raise PlanError(f"layer {layer.name!r}: its spaces were not collected")
