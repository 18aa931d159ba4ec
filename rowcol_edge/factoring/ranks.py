"""Forms, ranks and widths from spectra: by energy, or by a budget at the least predicted loss. Pure numpy."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from rowcol_edge.errors import BudgetError, ConfigError, PlanError
from rowcol_edge.factoring.allocation import Allocator, Widths
from rowcol_edge.factoring.channels import ChannelSet
from rowcol_edge.factoring.costs import Form, LayerInfo, Split
from rowcol_edge.factoring.options import Cost, Option, Options, Spectrum, kept
from rowcol_edge.factoring.plan import ChannelPlan, FactorPlan, LayerPlan, nearest

Array = NDArray[np.float64]

_ROUNDING = 1e-10


def plan_by_energy(
    infos: Mapping[str, LayerInfo],
    spaces: Mapping[str, Spectrum],
    energy: float,
    *,
    rank_multiple: int = 1,
    break_even: float = 1.0,
    model: str = "",
) -> FactorPlan:
    """The smallest rank of a column split, rounded up to ``rank_multiple``, that keeps ``energy`` of each layer's
    centred variance.

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
        needed = int(np.searchsorted(kept(spaces[name].eigenvalues), energy * (1 - 1e-14))) + 1
        rank = -(-min(needed, info.out_features) // rank_multiple) * rank_multiple
        limit = int(info.break_even * break_even)
        if rank > limit:
            layers.append(_dense(info, f"needs rank {rank}, break-even is {limit}"))
        else:
            layers.append(_project(info, Split(Form.COLUMN, rank), spaces, {}))
    return FactorPlan(tuple(layers), rank_multiple, f"energy={energy:.10g}", model)


def parameters(info: LayerInfo, split: Split | None) -> float:
    """Parameters as a cost."""
    return info.split_parameters(split) if split else info.parameters


def macs(info: LayerInfo, split: Split | None) -> float:
    """Multiply-accumulates of one sample as a cost."""
    return info.split_macs(split) if split else info.macs


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
    allowed: float | None = None,
    rank_multiple: int = 1,
    break_even: float = 1.0,
    made_by: str = "",
    model: str = "",
    allocator: Allocator | None = None,
    inputs: Mapping[str, Spectrum] | None = None,
) -> FactorPlan:
    """Brings the whole model's cost from ``total`` down to ``limit`` at the least predicted loss.

    Lagrangian allocation (Everett, Generalized Lagrange multiplier method, 1963): each layer moves along the lower
    convex hull of its (cost, loss) options, always the step with the least loss for what it saves first; the last step
    is then taken back as far as the budget allows. The plan says what it is predicted to lose, and how far that may be
    above the best forms and ranks at its widths.

    Args:
        allowed: what may be spent, where ``limit`` is less of it: the gap is to the best within this.
        allocator: proposes widths of channels; of those the one is taken whose widths, times its factor, and ranks lose
            least in all. It has options of its own, which must be those of the same spaces, multiple and break-even.
        inputs: what layers take, of those for which other forms than `column` are to be thought of.

    Raises:
        ConfigError: options out of range.
        OverBudgetError: below the least that can be reached.
    """
    _check_options(rank_multiple, break_even)
    rows = inputs or {}
    options = Options(spaces, rows, rank_multiple, break_even) if allocator is None else allocator.options
    full = infos if allocator is None else allocator.widths.infos
    proposals = [{}] if allocator is None else allocator.candidates(cost, total, limit)
    best: tuple[float, float, Mapping[str, int], dict[str, _Step]] | None = None
    over: list[OverBudgetError] = []
    for widths in proposals:
        known = full if allocator is None else {name: allocator.widths.info(name, widths) for name in full}
        ladders = {name: _ladder(info, options, cost) for name, info in known.items()}
        saved = sum(
            cost(info, None) - cost(known[name], None) for name, info in full.items() if known[name] is not info
        )
        try:
            chosen, gap = _allocate(ladders, total - saved, limit, limit if allowed is None else allowed)
        except OverBudgetError as error:
            over.append(error)
            continue
        weighed = sum(step.option.loss for step in chosen.values())
        if allocator is not None:
            weighed += allocator.factor * allocator.lost(widths)
        if best is None or weighed < best[0]:
            best = weighed, gap, widths, chosen
    if best is None:
        raise min(over, key=lambda error: error.least)
    _, gap, taken_widths, chosen = best
    lost = sum(step.option.loss for step in chosen.values())
    if allocator is not None:
        lost += allocator.lost(taken_widths)
    taken = {name: step.option.split for name, step in chosen.items()}
    plan = _planned(infos, spaces, rows, taken, taken_widths, None if allocator is None else allocator.widths)
    return replace(plan, loss=lost, gap=gap, rank_multiple=rank_multiple, made_by=made_by, model=model)


def no_dearer(
    plans: Sequence[FactorPlan],
    infos: Mapping[str, LayerInfo],
    spaces: Mapping[str, Spectrum],
    options: Options,
    *,
    allocator: Allocator | None = None,
    inputs: Mapping[str, Spectrum] | None = None,
) -> FactorPlan | None:
    """Of each set the least width in these plans, of each layer the option of least loss that has no more parameters or
    MACs than in any of them; None where a layer has no such option."""
    asked = [{each.name: each.width for each in plan.channels} for plan in plans]
    widths = {
        name: min(each[name] for each in asked if name in each)
        for name in ([] if allocator is None else allocator.widths.sets)
        if any(name in each for each in asked)
    }
    most = [{layer.name: (layer.parameters_after, layer.macs_after) for layer in plan.layers} for plan in plans]
    taken: dict[str, Split | None] = {}
    lost = 0.0 if allocator is None else allocator.lost(widths)
    for name, own in infos.items():
        info = own if allocator is None else allocator.widths.info(name, widths)
        limits = [each.get(name, (own.parameters, own.macs)) for each in most]
        fitting = [
            option
            for option in options.of(info)
            if all(
                parameters(info, option.split) <= weights and macs(info, option.split) <= products
                for weights, products in limits
            )
        ]
        if not fitting:
            return None
        best = min(fitting, key=lambda option: option.loss)
        taken[name], lost = best.split, lost + best.loss
    plan = _planned(infos, spaces, inputs or {}, taken, widths, None if allocator is None else allocator.widths)
    return replace(
        plan, loss=lost, rank_multiple=plans[0].rank_multiple, made_by=plans[0].made_by, model=plans[0].model
    )


def _planned(
    infos: Mapping[str, LayerInfo],
    spaces: Mapping[str, Spectrum],
    inputs: Mapping[str, Spectrum],
    chosen: Mapping[str, Split | None],
    widths: Mapping[str, int],
    channels: Widths | None,
) -> FactorPlan:
    layers = []
    for name, info in infos.items():
        reason = _reason(info, spaces.get(name))
        left = info if channels is None else channels.info(name, widths)
        if split := chosen.get(name):
            layers.append(_project(info, split, spaces, inputs, left))
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
    inputs: Mapping[str, Spectrum] | None = None,
) -> FactorPlan:
    """The plan checked against the model, its derived numbers computed anew; layers it leaves out are added as dense.

    Raises:
        PlanError: an unknown layer or set (with the nearest names), one that must stay as it is, a split that the layer
            cannot take, a rank or width out of range.
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
        left.check(layer.how)
        if name not in spaces:
            raise PlanError(f"layer {name!r}: its spaces were not collected")
        if layer.how.form in (Form.ROW, Form.BOTH) and name not in (inputs or {}):
            hint = "of a single matrix row and column splits are one" if not info.kernel else ""
            raise PlanError(f"layer {name!r}: the spaces of its input were not collected", hint=hint)
        layers.append(_project(info, layer.how, spaces, inputs or {}, left))
    # what it is predicted to lose is known of the plan as it was made
    return replace(plan, layers=tuple(layers), channels=_channels(channels, widths), loss=None, gap=None, note="")


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


def _reason(info: LayerInfo, spectrum: Spectrum | None) -> str:
    """Why the layer stays dense whatever the rank."""
    if info.skip:
        return info.skip
    if spectrum is None:
        return "its spaces were not collected"
    if spectrum.constant:
        return "its output is constant on the calibration data"
    return ""


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


def _project(
    info: LayerInfo,
    split: Split,
    spaces: Mapping[str, Spectrum],
    inputs: Mapping[str, Spectrum],
    left: LayerInfo | None = None,
) -> LayerPlan:
    left = left or info
    return LayerPlan(
        name=info.name,
        form="project",
        split=str(split.form),
        rank=split.rank,
        taken=split.taken,
        across_first=split.across_first,
        energy=_energy(split, spaces.get(info.name), inputs.get(info.name)),
        parameters_before=info.parameters,
        parameters_after=left.split_parameters(split),
        macs_before=info.macs,
        macs_after=left.split_macs(split),
    )


def _energy(split: Split, output: Spectrum | None, taken: Spectrum | None) -> float | None:
    """Share kept of what the spaces that are cut down are worth; None where that is not known."""
    cut = {
        Form.COLUMN: [(output, split.rank)],
        Form.ROW: [(taken, split.rank)],
        Form.BOTH: [(output, split.rank), (taken, split.taken or 0)],
    }.get(split.form, [(None, 0)])
    shares = [None if spectrum is None else float(kept(spectrum.eigenvalues)[rank - 1]) for spectrum, rank in cut]
    return None if None in shares else float(np.prod([share for share in shares if share is not None]))


@dataclass(frozen=True, slots=True)
class _Step:
    """An option at its cost."""

    option: Option
    cost: float

    @property
    def loss(self) -> float:
        return self.option.loss


def _ladder(info: LayerInfo, options: Options, cost: Cost) -> list[_Step]:
    """Dense, then what costs less, each step of more loss than the one before."""
    steps = [_Step(option, cost(info, option.split)) for option in options.of(info)]
    dense, rest = steps[0], sorted(steps[1:], key=lambda step: (step.cost, step.loss))
    found: list[_Step] = []
    for step in rest:
        if step.cost < dense.cost and (not found or step.loss < found[-1].loss):
            found.append(step)
    return [dense, *reversed(found)]


def _hull(ladder: list[_Step]) -> list[_Step]:
    """Lower convex hull of (cost, loss), cost falling: slopes (loss for what is saved) rise along it."""
    hull: list[_Step] = []
    for step in ladder:
        while len(hull) > 1 and _slope(hull[-1], step) <= _slope(hull[-2], hull[-1]):
            hull.pop()
        hull.append(step)
    return hull


def _slope(dearer: _Step, cheaper: _Step) -> float:
    return (cheaper.loss - dearer.loss) / (dearer.cost - cheaper.cost)


def _allocate(
    ladders: Mapping[str, list[_Step]], total: float, limit: float, allowed: float
) -> tuple[dict[str, _Step], float]:
    """A step of each layer within ``limit``, and how much more than the least that any choice within ``allowed`` can
    lose they may lose together.

    That least is bounded by Lagrange duality: ``Σ min (loss + λ cost) − λ · allowed`` for any price λ ≥ 0, here that
    of the last step taken.
    """
    limit *= 1.0 + _ROUNDING  # sums of shares are no whole numbers, even where what they count is
    least = total - sum(ladder[0].cost - ladder[-1].cost for ladder in ladders.values())
    if least > limit:
        raise OverBudgetError("the budget cannot be met by factoring", least)
    hulls = {name: _hull(ladder) for name, ladder in ladders.items()}
    steps = [
        (_slope(dearer, cheaper), name, dearer, cheaper)
        for name, hull in hulls.items()
        for dearer, cheaper in itertools.pairwise(hull)
    ]
    # Slopes rise along each hull, so a stable sort keeps a layer's steps in order.
    steps.sort(key=lambda step: step[0])
    chosen = {name: ladder[0] for name, ladder in ladders.items()}
    fixed = total - sum(step.cost for step in chosen.values())
    price = 0.0
    for slope, name, dearer, cheaper in steps:
        if total <= limit:
            break
        room = limit - (total - dearer.cost)
        between = _between(ladders[name], dearer, cheaper)
        fitting = next((step for step in between if step.cost <= room), cheaper)
        chosen[name] = fitting
        total += fitting.cost - dearer.cost
        price = slope
    lost = sum(step.loss for step in chosen.values())
    bound = sum(min(step.loss + price * step.cost for step in hull) for hull in hulls.values()) + price * (
        fixed - allowed * (1.0 + _ROUNDING)
    )
    return chosen, max(0.0, lost - bound)


def _between(ladder: list[_Step], dearer: _Step, cheaper: _Step) -> list[_Step]:
    """The steps from just below ``dearer`` down to ``cheaper``."""
    return [step for step in ladder if cheaper.cost <= step.cost < dearer.cost]
