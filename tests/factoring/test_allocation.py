"""Widths beside ranks, against every combination where there are few."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rowcol_edge.errors import PlanError
from rowcol_edge.factoring import ranks
from rowcol_edge.factoring.allocation import Allocator, Widths, step
from rowcol_edge.factoring.channels import ChannelSet, Slot
from rowcol_edge.factoring.costs import Form, LayerInfo, Split
from rowcol_edge.factoring.options import Options
from rowcol_edge.factoring.plan import ChannelPlan, FactorPlan, LayerPlan
from rowcol_edge.factoring.spaces import LayerSpaces


def slot(name: str, size: int, groups: int = 1, taps: int = 1) -> Slot:
    return Slot(name, np.arange(groups * size * taps).reshape(groups, size, taps))


INFOS = {
    "a": LayerInfo("a", "conv2d", 8, 16, (3, 3), positions=25),
    "depthwise": LayerInfo(
        "depthwise", "conv2d", 16, 16, (3, 3), groups=16, positions=25, skip="depthwise convolution"
    ),
    "b": LayerInfo("b", "linear", 16 * 9, 24),
    "c": LayerInfo("c", "linear", 24, 10),
}
SETS = (
    ChannelSet("a", 1, 16, (slot("a", 16),), (slot("depthwise", 16),), (slot("b", 16, taps=9),), loose=2),
    ChannelSet("b", 1, 24, (slot("b", 24),), uses=(slot("c", 24),)),
    ChannelSet("c", 1, 10, (slot("c", 10),), fixed="an output of the model"),
)
TOTAL = sum(info.parameters for info in INFOS.values()) + 2 * 16  # what of the first set is loose


Losses = dict[str, np.ndarray]


def spectra(seed: int) -> tuple[dict[str, LayerSpaces], Losses]:
    """What layers give, and what the widths of sets lose."""
    rng = np.random.default_rng(seed)

    def losses(size: int) -> np.ndarray:
        return np.concatenate([np.sort(rng.exponential(size=size) ** 3)[::-1], [0.0]])

    spaces = {
        name: LayerSpaces(name, np.ones(n := INFOS[name].out_features), np.eye(n), np.zeros(n), 9, losses=losses(n))
        for name in ("a", "b", "c")
    }
    widths = {each.name: losses(each.size) for each in SETS if not each.fixed}
    return spaces, widths


def allocator_of(spaces: dict[str, LayerSpaces], widths: Losses, kind: type[Allocator] = Allocator) -> Allocator:
    return kind(Widths(INFOS, SETS), Options(spaces, {}), widths)


def within(spaces: dict[str, LayerSpaces], limit: int, allocator: Allocator | None = None) -> FactorPlan:
    """The plan of least loss with at most ``limit`` parameters."""
    return ranks.plan_by_cost(INFOS, spaces, ranks.parameters, total=TOTAL, limit=limit, allocator=allocator)


def test_a_width_changes_every_layer_that_it_meets() -> None:
    widths = Widths(INFOS, SETS)
    narrowed = {name: widths.info(name, {"a": 10, "b": 8}) for name in INFOS}
    assert (narrowed["a"].out_features, narrowed["a"].in_features) == (10, 8)
    assert (narrowed["depthwise"].in_features, narrowed["depthwise"].groups) == (10, 10)
    assert narrowed["depthwise"].parameters == 10 * 9 + 10
    assert (narrowed["b"].in_features, narrowed["b"].out_features) == (90, 8)
    assert narrowed["c"].in_features == 8
    assert widths.info("c", {}) is INFOS["c"]
    assert widths.loose({"a": 10}) == 12
    assert widths.layers("a") == ["a", "depthwise", "b", "a: loose"]
    assert widths.info("a: loose", {"a": 10}).parameters == 20


@pytest.mark.parametrize(
    ("size", "multiple", "wanted"), [(512, 16, 16), (64, 16, 8), (32, 16, 4), (10, 16, 1), (7, 1, 1)]
)
def test_small_sets_have_a_choice(size: int, multiple: int, wanted: int) -> None:
    assert step(size, multiple) == wanted


@pytest.mark.parametrize(("multiple", "wanted"), [(8, [16, 8]), (16, [16]), (5, [20, 15, 10, 5])])
def test_what_a_layer_norm_looks_at_keeps_to_the_multiple(multiple: int, wanted: list[int]) -> None:
    """Of 24 channels, which not all of them divide."""
    normed = [replace(each, norms=("norm",)) if each.name == "b" else each for each in SETS]
    assert Widths(INFOS, normed).choices("b", multiple) == [24, *wanted]
    finer = step(24, multiple)
    assert Widths(INFOS, SETS).choices("b", multiple) == [24, *range(23 // finer * finer, 0, -finer)]
    taken = widths_of("b", normed, multiple)
    assert taken
    assert taken <= set(wanted)


@pytest.mark.parametrize(
    ("multiple", "wanted"), [(8, [8, 6, 4, 2]), (16, [14, 12, 10, 8, 6, 4, 2]), (5, [15, 10, 5, 4, 2])]
)
def test_what_a_depthwise_convolution_passes_on_keeps_to_the_multiple(multiple: int, wanted: list[int]) -> None:
    """Of 16 channels, above the first multiple; where what carries them is no convolution it need not."""
    carried = [replace(each, carriers=(slot("norm", 16),)) if each.name == "a" else each for each in SETS]
    assert Widths(INFOS, SETS).choices("a", multiple) == [16, *wanted]
    finer = step(16, multiple)
    assert Widths(INFOS, carried).choices("a", multiple) == [16, *range(15 // finer * finer, 0, -finer)]


def widths_of(name: str, sets: Sequence[ChannelSet], multiple: int) -> set[int]:
    """Those that a set gets for any limit, where it is narrowed."""
    spaces, losses = spectra(1)
    allocator = Allocator(Widths(INFOS, sets), Options(spaces, {}, multiple=multiple), losses)
    limits = np.linspace(0.1, 0.9, 9) * TOTAL
    found = [allocator.candidates(ranks.parameters, TOTAL, limit) for limit in limits]
    return {each[name] for several in found for each in several if name in each}


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 1000), share=st.floats(0.15, 1.0))
def test_plans_keep_the_budget_and_their_own_books(seed: int, share: float) -> None:
    spaces, losses = spectra(seed)
    allocator = allocator_of(spaces, losses)
    plan = within(spaces, int(TOTAL * share), allocator)
    assert TOTAL - plan.saved_parameters <= TOTAL * share
    assert ranks.refresh(plan, INFOS, spaces, SETS) == replace(plan, loss=None, gap=None)
    assert plan.gap is not None
    assert plan.loss is not None
    assert 0.0 <= plan.gap <= plan.loss + 1e-12
    for layer in plan.layers:
        left = Widths(INFOS, SETS).info(layer.name, {each.name: each.width for each in plan.channels})
        wanted = left.split_parameters(Split(Form.COLUMN, layer.rank)) if layer.rank else left.parameters
        assert layer.parameters_after == wanted


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 1000), most=st.integers(1, 10**6))
def test_the_least_that_a_refusal_names_can_be_had(seed: int, most: int) -> None:
    """Also where the cost is a share of a limit, whose sums are not exact."""
    spaces, losses = spectra(seed)

    def share(info: LayerInfo, split: Split | None) -> float:
        return ranks.parameters(info, split) / most

    for cost, whole in ((ranks.parameters, float(TOTAL)), (share, TOTAL / most)):
        allocator = allocator_of(spaces, losses)
        with pytest.raises(ranks.OverBudgetError) as refused:
            ranks.plan_by_cost(INFOS, spaces, cost, total=whole, limit=1e-9, allocator=allocator)
        least = refused.value.least
        plan = ranks.plan_by_cost(INFOS, spaces, cost, total=whole, limit=least, allocator=allocator)
        assert (TOTAL - plan.saved_parameters) / TOTAL == pytest.approx(least / whole, rel=1e-9)


def test_what_a_step_saves_too_much_is_given_back() -> None:
    """A set whose losses make one large step, beside a limit that its widest narrower width keeps."""
    flat = np.where(np.arange(25) < 24, 1e-4, 0.0) + np.where(np.arange(25) < 20, 1e-5, 0.0)
    spaces, _ = spectra(0)
    dear = {name: replace(space, losses=np.full(len(space.eigenvalues) + 1, 1.0)) for name, space in spaces.items()}
    plan = within(dear, TOTAL - 100, allocator_of(dear, {"b": flat}))
    assert [(each.name, each.width) for each in plan.channels] == [("b", 23)]
    assert plan.loss == pytest.approx(1e-4)


@given(seed=st.integers(0, 1000), share=st.floats(0.15, 0.9), power=st.sampled_from([-60, -20, 20]))
def test_only_the_proportions_of_losses_matter(seed: int, share: float, power: int) -> None:
    """Logits of any size, and what is lost beside it."""

    def scaled(losses: np.ndarray | None) -> np.ndarray:
        assert losses is not None
        return np.ldexp(losses, power)

    spaces, losses = spectra(seed)
    plans = [
        ranks.plan_by_cost(
            INFOS, each, ranks.parameters, total=TOTAL, limit=share * TOTAL, allocator=allocator_of(each, widths)
        )
        for each, widths in (
            (spaces, losses),
            (
                {name: replace(space, losses=scaled(space.losses)) for name, space in spaces.items()},
                {name: scaled(each) for name, each in losses.items()},
            ),
        )
    ]
    assert plans[0].channels == plans[1].channels
    assert [(p.name, p.how if p.rank else None) for p in plans[0].layers] == [
        (p.name, p.how if p.rank else None) for p in plans[1].layers
    ]


def test_widths_are_near_the_best_of_every_combination() -> None:
    gaps = []
    for seed in range(8):
        spaces, losses = spectra(seed)
        limit = int(0.4 * TOTAL)

        def value(plan: FactorPlan, losses: Losses = losses, spaces: dict[str, LayerSpaces] = spaces) -> float:
            channels = sum(losses[each.name][each.width] for each in plan.channels)
            of_ranks = sum(spaces[p.name].losses[p.rank or 0] for p in plan.projected)  # type: ignore[index]
            assert channels + of_ranks == pytest.approx(plan.loss)
            return float(channels + of_ranks)

        best = np.inf
        for a, b in itertools.product(range(1, 17), range(1, 25)):
            chosen = {"a": a, "b": b}

            class Fixed(Allocator):
                def candidates(self, *_: object, chosen: dict[str, int] = chosen) -> list[dict[str, int]]:  # type: ignore[override]
                    return [chosen]

            try:
                plan = within(spaces, limit, allocator_of(spaces, losses, Fixed))
            except ranks.BudgetError:
                continue
            best = min(best, value(plan))
        found = within(spaces, limit, allocator_of(spaces, losses))
        gaps.append(value(found) / best)
    assert min(gaps) >= 1.0 - 1e-9
    assert np.median(gaps) < 1.3


def test_channels_go_further_than_ranks_alone() -> None:
    spaces, losses = spectra(3)
    allocator = allocator_of(spaces, losses)
    least = 0.12
    with pytest.raises(ranks.BudgetError):
        within(spaces, int(0.02 * TOTAL))
    plan = within(spaces, int(least * TOTAL), allocator)
    assert plan.channels


@pytest.mark.parametrize(
    ("channels", "message"),
    [
        (ChannelPlan("d", 3), "unknown channels 'd'"),
        (ChannelPlan("a", 17), "1 to 16"),
        (ChannelPlan("c", 4), "an output of the model"),
    ],
)
def test_an_edited_plan_is_checked(channels: ChannelPlan, message: str) -> None:
    spaces, _ = spectra(0)
    with pytest.raises(PlanError, match=message):
        ranks.refresh(FactorPlan((), channels=(channels,)), INFOS, spaces, SETS)


def test_a_rank_must_fit_the_channels_that_are_left() -> None:
    spaces, _ = spectra(0)
    plan = FactorPlan((LayerPlan("b", "project", 12),), channels=(ChannelPlan("b", 8),))
    with pytest.raises(PlanError, match="1 to 8"):
        ranks.refresh(plan, INFOS, spaces, SETS)
