"""Ranks and widths from spectra: by energy, or by a budget at the least predicted loss. Pure numpy."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from rowcol_edge.errors import BudgetError, ConfigError, PlanError
from rowcol_edge.factoring.allocation import Allocator, Cost, Widths
from rowcol_edge.factoring.channels import ChannelSet
from rowcol_edge.factoring.costs import LayerInfo
from rowcol_edge.factoring.plan import ChannelPlan, FactorPlan, LayerPlan, nearest

Array = NDArray[np.float64]


class Spectrum(Protocol):
    """What ranks need to know of a layer's output (``spaces.LayerSpaces`` is one)."""

    @property
    def eigenvalues(self) -> Array:
        """(out,) descending, ≥ 0."""

    @property
    def constant(self) -> bool:
        """The output does not vary."""

    @property
    def losses(self) -> Array | None:
        """(out + 1,) predicted at the model's output, by rank; None: the share of the variance that is cut off."""


def plan_by_energy(
    infos: Mapping[str, LayerInfo],
    spaces: Mapping[str, Spectrum],
    energy: float,
    *,
    rank_multiple: int = 1,
    break_even: float = 1.0,
    model: str = "",
) -> FactorPlan:
    """The smallest rank, rounded up to ``rank_multiple``, that keeps ``energy`` of each layer's centred variance.

    A layer stays dense where that rank saves too little: above ``break_even`` times its break-even rank (1.0 = no
    parameter saved). A lower energy never gives more parameters. A layer without spaces stays dense.

    Raises:
        ConfigError: energy not in (0, 1], rank_multiple < 1, break_even not in (0, 1].
    """
    if not 0.0 < energy <= 1.0:
        raise ConfigError("energy", expected="above 0, at most 1", got=str(energy))
    _check_options(rank_multiple, break_even)
    layers = []
    for name, info in infos.items():
        reason = _reason(info, spaces.get(name))
        if reason:
            layers.append(_dense(info, reason))
            continue
        kept = _kept(spaces[name].eigenvalues)
        needed = int(np.searchsorted(kept, energy * (1 - 1e-14))) + 1
        rank = -(-min(needed, info.out_features) // rank_multiple) * rank_multiple
        limit = int(info.break_even * break_even)
        if rank > limit:
            layers.append(_dense(info, f"needs rank {rank}, break-even is {limit}"))
        else:
            layers.append(_project(info, rank, kept))
    return FactorPlan(tuple(layers), rank_multiple, f"energy={energy:.10g}", model)


def plan_by_parameters(
    infos: Mapping[str, LayerInfo],
    spaces: Mapping[str, Spectrum],
    *,
    model_parameters: int,
    ratio: float | None = None,
    count: int | None = None,
    rank_multiple: int = 1,
    break_even: float = 1.0,
    model: str = "",
    allocator: Allocator | None = None,
) -> FactorPlan:
    """Meets a parameter budget over the whole model at the least predicted loss (see `plan_by_cost`).

    Args:
        model_parameters: parameters of the whole model, those outside ``infos`` included.
        ratio: budget as a fraction of ``model_parameters``; or
        count: budget as a number of parameters (give one of the two).

    Raises:
        ConfigError: options out of range.
        BudgetError: below the least that can be reached; says by how much.
    """
    budget = _budget(model_parameters, ratio, count)
    try:
        return plan_by_cost(
            infos, spaces, parameters, total=model_parameters, limit=budget, rank_multiple=rank_multiple,
            break_even=break_even, made_by=f"parameters<={budget}", model=model, allocator=allocator,
        )  # fmt: skip
    except OverBudgetError as e:
        least = round(e.least)
        raise BudgetError(
            "the parameter budget cannot be met by factoring",
            expected=f"at most {budget:,} parameters",
            got=f"{least:,} at the smallest ranks, {least - budget:,} too many",
            hint=f"allow at least {least:,}, or a smaller rank multiple",
        ) from e


def parameters(info: LayerInfo, rank: int) -> float:
    """Parameters as a cost."""
    return info.factored_parameters(rank) if rank else info.parameters


def macs(info: LayerInfo, rank: int) -> float:
    """Multiply-accumulates of one sample as a cost."""
    return info.factored_macs(rank) if rank else info.macs


class OverBudgetError(BudgetError):
    """Even the smallest ranks cost more; ``least`` is what they cost."""

    def __init__(self, what: str, least: float) -> None:
        super().__init__(what, expected="a cost that factoring can reach", got=f"at least {least:g}")
        self.least = least


def plan_by_cost(
    infos: Mapping[str, LayerInfo],
    spaces: Mapping[str, Spectrum],
    cost: Cost,
    *,
    total: float,
    limit: float,
    rank_multiple: int = 1,
    break_even: float = 1.0,
    made_by: str = "",
    model: str = "",
    allocator: Allocator | None = None,
) -> FactorPlan:
    """Brings the whole model's cost from ``total`` down to ``limit`` at the least predicted loss.

    Lagrangian allocation (Everett, Generalized Lagrange multiplier method, 1963): each layer moves along the lower
    convex hull of its (cost, loss) options, always the step with the least loss for what it saves first; the last step
    is then taken back as far as the budget allows.

    Args:
        allocator: proposes widths of channels; of those the one is taken whose widths and ranks lose least in all.

    Raises:
        ConfigError: options out of range.
        OverBudgetError: below the least that can be reached.
    """
    _check_options(rank_multiple, break_even)
    proposals = [{}] if allocator is None else allocator.candidates(cost, total, limit)
    best: tuple[float, FactorPlan] | None = None
    over: list[OverBudgetError] = []
    for widths in proposals:
        known = {name: infos[name] if allocator is None else allocator.widths.info(name, widths) for name in infos}
        ladders = {
            name: _ladder(info, spaces[name], cost, rank_multiple, break_even)
            for name, info in known.items()
            if not _reason(info, spaces.get(name))
        }
        saved = sum(cost(infos[name], 0) - cost(known[name], 0) for name in infos if known[name] is not infos[name])
        try:
            chosen = _allocate(ladders, total - saved, limit)
        except OverBudgetError as error:
            over.append(error)
            continue
        lost = sum(option.loss for option in chosen.values())
        if allocator is not None:
            lost += allocator.lost(widths)
        if best is None or lost < best[0]:
            ranks = {name: option.rank for name, option in chosen.items()}
            best = lost, _planned(infos, spaces, ranks, widths, None if allocator is None else allocator.widths)
    if best is None:
        raise min(over, key=lambda error: error.least)
    return replace(best[1], rank_multiple=rank_multiple, made_by=made_by, model=model)


def _planned(
    infos: Mapping[str, LayerInfo],
    spaces: Mapping[str, Spectrum],
    ranks: Mapping[str, int],
    widths: Mapping[str, int],
    channels: Widths | None,
) -> FactorPlan:
    layers = []
    for name, info in infos.items():
        reason = _reason(info, spaces.get(name))
        left = info if channels is None else channels.info(name, widths)
        if ranks.get(name, 0):
            layers.append(_project(info, ranks[name], _kept(spaces[name].eigenvalues), left))
        else:
            layers.append(_dense(info, reason or "the budget does not need it", left))
    return FactorPlan(tuple(layers), channels=_channels(channels, widths))


def _channels(channels: Widths | None, widths: Mapping[str, int]) -> tuple[ChannelPlan, ...]:
    if channels is None:
        return ()
    return tuple(
        ChannelPlan(name, width, channels.sets[name].size, channels.loose({name: width}))
        for name, width in widths.items()
        if width < channels.sets[name].size
    )


def refresh(
    plan: FactorPlan,
    infos: Mapping[str, LayerInfo],
    spaces: Mapping[str, Spectrum],
    sets: Sequence[ChannelSet] = (),
) -> FactorPlan:
    """The plan checked against the model, its derived numbers computed anew; layers it leaves out are added as dense.

    Raises:
        PlanError: an unknown layer or set (with the nearest names), one that must stay as it is, a rank or width out of
            range.
    """
    listed = {layer.name: layer for layer in plan.layers}
    for name in listed:
        if name not in infos:
            raise PlanError(f"the plan names unknown layer {name!r}", hint=nearest(name, infos))
    channels, widths = Widths(infos, sets), _widths(plan, sets)
    layers = []
    for name, info in infos.items():
        layer, left = listed.get(name), channels.info(name, widths)
        if layer is None or layer.form != "project":
            layers.append(_dense(info, info.skip or (layer.reason if layer else "") or "left dense by the plan", left))
            continue
        if info.skip:
            raise PlanError(f"layer {name!r} cannot be factored: {info.skip}", hint='set its form to "dense"')
        rank = layer.rank or 0
        if not 1 <= rank <= left.out_features:
            raise PlanError(f"layer {name!r}: rank", expected=f"1 to {left.out_features}", got=str(rank))
        if name not in spaces:
            raise PlanError(f"layer {name!r}: its spaces were not collected")
        layers.append(_project(info, rank, _kept(spaces[name].eigenvalues), left))
    return replace(plan, layers=tuple(layers), channels=_channels(channels, widths))


def _widths(plan: FactorPlan, sets: Sequence[ChannelSet]) -> dict[str, int]:
    known = {each.name: each for each in sets}
    for each in plan.channels:
        found = known.get(each.name)
        if found is None:
            raise PlanError(f"the plan names unknown channels {each.name!r}", hint=nearest(each.name, known))
        if not 1 <= each.width <= found.size:
            raise PlanError(f"channels {each.name!r}: width", expected=f"1 to {found.size}", got=str(each.width))
        if found.fixed and each.width < found.size:
            what = f"channels {each.name!r} cannot be narrowed: {found.fixed}"
            raise PlanError(what, hint="leave out their table")
    return {each.name: each.width for each in plan.channels}


def _check_options(rank_multiple: int, break_even: float) -> None:
    if rank_multiple < 1:
        raise ConfigError("rank_multiple", expected="a positive integer", got=str(rank_multiple))
    if not 0.0 < break_even <= 1.0:
        raise ConfigError("break_even", expected="above 0, at most 1", got=str(break_even))


def _budget(model_parameters: int, ratio: float | None, count: int | None) -> int:
    if (ratio is None) == (count is None):
        raise ConfigError("parameter budget", expected="a ratio or a count", got=f"ratio {ratio}, count {count}")
    if ratio is not None and not 0.0 < ratio <= 1.0:
        raise ConfigError("parameter ratio", expected="above 0, at most 1", got=str(ratio))
    return int(model_parameters * ratio) if ratio is not None else int(count or 0)


def _reason(info: LayerInfo, spectrum: Spectrum | None) -> str:
    """Why the layer stays dense whatever the rank."""
    if info.skip:
        return info.skip
    if spectrum is None:
        return "its spaces were not collected"
    if spectrum.constant:
        return "its output is constant on the calibration data"
    return ""


def _kept(eigenvalues: Array) -> Array:
    """kept[r − 1] = fraction of the variance in the first r directions (ones for a zero spectrum)."""
    total = float(eigenvalues.sum())
    return np.minimum(np.cumsum(eigenvalues) / total, 1.0) if total > 0.0 else np.ones_like(eigenvalues)


def _dense(info: LayerInfo, reason: str, left: LayerInfo | None = None) -> LayerPlan:
    """``left``: the layer with the channels that are left to it."""
    left = left or info
    narrowed = left is not info
    return LayerPlan(
        name=info.name,
        form="narrow" if narrowed else "dense",
        parameters_before=info.parameters,
        parameters_after=left.parameters,
        macs_before=info.macs,
        macs_after=left.macs,
        reason="" if narrowed else reason,
    )


def _project(info: LayerInfo, rank: int, kept: Array, left: LayerInfo | None = None) -> LayerPlan:
    left = left or info
    return LayerPlan(
        name=info.name,
        form="project",
        rank=rank,
        energy=float(kept[rank - 1]),
        parameters_before=info.parameters,
        parameters_after=left.factored_parameters(rank),
        macs_before=info.macs,
        macs_after=left.factored_macs(rank),
    )


@dataclass(frozen=True, slots=True)
class _Option:
    rank: int  # 0 = dense
    cost: float
    loss: float


def _ladder(info: LayerInfo, spectrum: Spectrum, cost: Cost, multiple: int, break_even: float) -> list[_Option]:
    """Dense, then every allowed rank that costs less, from the largest to the smallest."""
    losses = spectrum.losses
    if losses is None:
        losses = np.concatenate([[1.0], 1.0 - _kept(spectrum.eigenvalues)])
    dense = _Option(0, cost(info, 0), 0.0)
    limit = int(info.break_even * break_even)
    ranks = range(limit // multiple * multiple, 0, -multiple)
    options = [_Option(rank, cost(info, rank), float(losses[rank])) for rank in ranks]
    return [dense, *(option for option in options if option.cost < dense.cost)]


def _hull(options: list[_Option]) -> list[_Option]:
    """Lower convex hull of (cost, loss), cost falling: slopes (loss for what is saved) rise along it."""
    hull: list[_Option] = []
    for option in options:
        while len(hull) > 1 and _slope(hull[-1], option) <= _slope(hull[-2], hull[-1]):
            hull.pop()
        hull.append(option)
    return hull


def _slope(dearer: _Option, cheaper: _Option) -> float:
    return (cheaper.loss - dearer.loss) / (dearer.cost - cheaper.cost)


def _allocate(ladders: Mapping[str, list[_Option]], total: float, limit: float) -> dict[str, _Option]:
    least = total - sum(options[0].cost - options[-1].cost for options in ladders.values())
    if least > limit:
        raise OverBudgetError("the budget cannot be met by factoring", least)
    hulls = {name: _hull(options) for name, options in ladders.items()}
    steps = [
        (_slope(dearer, cheaper), name, dearer, cheaper)
        for name, hull in hulls.items()
        for dearer, cheaper in itertools.pairwise(hull)
    ]
    # Slopes rise along each hull, so a stable sort keeps a layer's steps in order.
    steps.sort(key=lambda step: step[0])
    chosen = {name: options[0] for name, options in ladders.items()}
    for _, name, dearer, cheaper in steps:
        if total <= limit:
            break
        room = limit - (total - dearer.cost)
        between = _between(ladders[name], dearer, cheaper)
        fitting = next((option for option in between if option.cost <= room), cheaper)
        chosen[name] = fitting
        total += fitting.cost - dearer.cost
    return chosen


def _between(options: list[_Option], dearer: _Option, cheaper: _Option) -> list[_Option]:
    """The options from just below ``dearer`` down to ``cheaper``."""
    return [option for option in options if cheaper.cost <= option.cost < dearer.cost]
