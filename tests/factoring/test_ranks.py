"""Rank choice: properties over random spectra, and the exact optimum on small cases."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rowcol_edge.errors import ConfigError, PlanError
from rowcol_edge.factoring.costs import Form, LayerInfo, Split
from rowcol_edge.factoring.options import Cost
from rowcol_edge.factoring.plan import FactorPlan, LayerPlan
from rowcol_edge.factoring.ranks import OverBudgetError, macs, parameters, plan_by_cost, plan_by_energy, refresh


@dataclass
class Spectrum:
    eigenvalues: np.ndarray
    constant: bool = False
    losses: np.ndarray | None = None


def _case(seed: int, sizes: tuple[tuple[int, int], ...]) -> tuple[dict[str, LayerInfo], dict[str, Spectrum]]:
    rng = np.random.default_rng(seed)
    infos = {f"l{i}": LayerInfo(f"l{i}", "linear", a, b) for i, (a, b) in enumerate(sizes)}
    spaces = {
        name: Spectrum(np.sort(rng.exponential(size=info.out_features) ** 4)[::-1] * rng.exponential() * 100)
        for name, info in infos.items()
    }
    return infos, spaces


SIZES = ((40, 32), (16, 64), (64, 24), (30, 30))


def _after(plan: FactorPlan) -> int:
    return sum(layer.parameters_after for layer in plan.layers)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 9), st.floats(0.05, 1.0), st.floats(0.05, 1.0))
def test_energy_is_kept_and_monotone(seed: int, multiple: int, first: float, second: float) -> None:
    infos, spaces = _case(seed, SIZES)
    low, high = sorted((first, second))
    plans = [plan_by_energy(infos, spaces, energy, rank_multiple=multiple) for energy in (low, high)]
    assert _after(plans[0]) <= _after(plans[1])
    for plan, energy in zip(plans, (low, high), strict=True):
        for layer in plan.projected:
            assert layer.rank is not None
            assert layer.rank % multiple == 0
            assert layer.energy >= energy - 1e-12
            assert layer.parameters_after < layer.parameters_before


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 5), st.floats(0.4, 1.0), st.floats(0.4, 1.0))
def test_budget_is_met_and_loss_monotone(seed: int, multiple: int, first: float, second: float) -> None:
    infos, spaces = _case(seed, SIZES)
    total = sum(info.parameters for info in infos.values()) + 123
    losses = []
    for ratio in sorted((first, second)):
        plan = plan_by_cost(infos, spaces, parameters, total=total, limit=int(total * ratio), rank_multiple=multiple)
        assert total - plan.saved_parameters <= int(total * ratio)
        losses.append(sum(1 - layer.energy for layer in plan.layers))
    assert losses[1] <= losses[0] + 1e-12


def test_budget_is_near_the_exhaustive_optimum() -> None:
    infos, spaces = _case(3, ((12, 10), (8, 14)))
    total = sum(info.parameters for info in infos.values())
    for ratio in (0.4, 0.6, 0.8, 0.95):
        plan = plan_by_cost(infos, spaces, parameters, total=total, limit=int(total * ratio))
        loss = sum(1 - layer.energy for layer in plan.layers)
        choices = []
        for name, info in infos.items():
            kept = np.cumsum(spaces[name].eigenvalues) / spaces[name].eigenvalues.sum()
            options = [
                (info.split_parameters(Split(Form.COLUMN, r)), 1 - kept[r - 1]) for r in range(1, info.break_even + 1)
            ]
            choices.append([(info.parameters, 0.0), *options])
        best = min(
            sum(loss for _, loss in combination)
            for combination in itertools.product(*choices)
            if sum(size for size, _ in combination) <= total * ratio
        )
        assert best - 1e-12 <= loss <= best + 0.05
        assert plan.loss == pytest.approx(loss)
        assert plan.gap is not None
        assert loss - plan.gap <= best + 1e-12  # the bound holds


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6), st.floats(0.4, 0.95), st.floats(0.8, 1.0))
def test_the_gap_is_to_the_best_within_all_that_is_allowed(seed: int, ratio: float, part: float) -> None:
    infos, spaces = _case(seed, SIZES)
    total = sum(info.parameters for info in infos.values())
    allowed = int(total * ratio)
    whole, less = (
        plan_by_cost(infos, spaces, parameters, total=total, limit=max(limit, int(0.35 * total)), allowed=allowed)
        for limit in (allowed, int(allowed * part))
    )
    for plan in (whole, less):
        assert plan.loss is not None
        assert plan.gap is not None
    assert (less.loss or 0.0) - (less.gap or 0.0) <= (whole.loss or 0.0) + 1e-12


def _with_losses(spectrum: Spectrum, scale: float) -> Spectrum:
    cut = np.concatenate([[spectrum.eigenvalues.sum()], spectrum.eigenvalues.sum() - np.cumsum(spectrum.eigenvalues)])
    return replace(spectrum, losses=scale * np.maximum(cut, 0.0) / spectrum.eigenvalues.sum())


def test_a_full_budget_changes_nothing_and_a_loss_protects() -> None:
    infos, spaces = _case(1, SIZES)
    total = sum(info.parameters for info in infos.values())
    assert plan_by_cost(infos, spaces, parameters, total=total, limit=total).projected == ()
    plain = plan_by_cost(infos, spaces, parameters, total=total, limit=int(total * 0.6))
    dear = {name: _with_losses(spectrum, 100.0 if name == "l0" else 1.0) for name, spectrum in spaces.items()}
    guarded = plan_by_cost(infos, dear, parameters, total=total, limit=int(total * 0.6))
    energy = {plan: {layer.name: layer.energy for layer in plan.layers}["l0"] for plan in (plain, guarded)}
    assert energy[guarded] > energy[plain]


# thousandths: limits are held to ten digits, as costs may be sums of shares
_SHARES = st.integers(300, 1000).map(lambda share: share / 1000)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10**6), _SHARES, _SHARES)
def test_any_cost_is_met_and_more_of_it_loses_no_more(seed: int, first: float, second: float) -> None:
    infos, spaces = _case(seed, SIZES)
    infos = {name: replace(info, positions=7 * i + 1) for i, (name, info) in enumerate(infos.items())}
    spaces = {name: _with_losses(spectrum, 10.0**i) for i, (name, spectrum) in enumerate(spaces.items())}
    total = float(sum(info.macs for info in infos.values()))
    losses = []
    for share in sorted((first, second)):
        plan = plan_by_cost(infos, spaces, macs, total=total, limit=share * total, made_by="macs")
        assert sum(layer.macs_after for layer in plan.layers) <= share * total
        losses.append(sum(spaces[p.name].losses[p.rank] for p in plan.projected))  # type: ignore[index]
    assert losses[1] <= losses[0] + 1e-12


@pytest.mark.parametrize(
    ("cost", "dense", "smallest"),
    [(parameters, LayerInfo.parameters, LayerInfo.split_parameters), (macs, LayerInfo.macs, LayerInfo.split_macs)],
)
def test_a_cost_out_of_reach_says_what_can_be_reached(
    cost: Cost, dense: property, smallest: Callable[..., int]
) -> None:
    infos, spaces = _case(1, SIZES)
    total = sum(dense.__get__(info) for info in infos.values())
    least = sum(smallest(info, Split(Form.COLUMN, 1)) for info in infos.values())
    assert plan_by_cost(infos, spaces, cost, total=total, limit=least).projected
    with pytest.raises(OverBudgetError) as raised:
        plan_by_cost(infos, spaces, cost, total=total, limit=least - 1)
    assert raised.value.least == least


def test_reasons_to_stay_dense() -> None:
    infos, spaces = _case(1, SIZES)
    infos["l0"] = replace(infos["l0"], skip="depthwise convolution")
    spaces["l1"].constant = True
    del spaces["l2"]
    reasons = [layer.reason for layer in plan_by_energy(infos, spaces, 1.0).layers]
    assert reasons[:3] == [
        "depthwise convolution",
        "its output is constant on the calibration data",
        "its spaces were not collected",
    ]
    assert reasons[3] == "needs rank 30, break-even is 14"
    stricter = plan_by_energy(infos, spaces, 0.9, break_even=0.2)
    assert all((layer.rank or 0) <= 0.2 * infos[layer.name].break_even for layer in stricter.projected)


def test_refresh_recomputes_and_checks() -> None:
    infos, spaces = _case(1, SIZES)
    edited = FactorPlan((LayerPlan("l1", "project", 5), LayerPlan("l0", "dense")), made_by="edited")
    fresh = refresh(edited, infos, spaces)
    assert [layer.name for layer in fresh.layers] == list(infos)
    by_name = {layer.name: layer for layer in fresh.layers}
    assert by_name["l1"].parameters_after == infos["l1"].split_parameters(Split(Form.COLUMN, 5))
    assert 0.0 < by_name["l1"].energy < 1.0
    assert by_name["l2"].reason == "left dense by the plan"
    assert fresh.digest == edited.digest
    for layer, message in [
        (LayerPlan("l22", "project", 5), "did you mean 'l2'"),
        (LayerPlan("l1", "project", 65), "expected 1 to 64, got 65"),
    ]:
        with pytest.raises(PlanError, match=message):
            refresh(FactorPlan((layer,)), infos, spaces)
    infos["l1"] = replace(infos["l1"], skip="never called")
    with pytest.raises(PlanError, match="never called"):
        refresh(edited, infos, spaces)


def test_options_are_checked() -> None:
    infos, spaces = _case(1, SIZES)
    for options in (
        {"energy": 0.0},
        {"energy": 1.1},
        {"energy": 0.5, "rank_multiple": 0},
        {"energy": 0.5, "break_even": 2},
    ):
        with pytest.raises(ConfigError):
            plan_by_energy(infos, spaces, **options)
    for options in ({"rank_multiple": 0}, {"break_even": 2}):
        with pytest.raises(ConfigError):
            plan_by_cost(infos, spaces, parameters, total=10**4, limit=10**3, **options)
