"""What counts for a plan's choice is what the models do."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import nn

from rowcol_edge import limits, search
from rowcol_edge.budgets import Budgets
from rowcol_edge.datasets import Split, scan
from rowcol_edge.errors import BudgetError
from rowcol_edge.factoring import apply, balance, ranks
from rowcol_edge.factoring.allocation import Allocator, Widths
from rowcol_edge.factoring.apply import factored
from rowcol_edge.factoring.balance import FACTORS, nearer
from rowcol_edge.factoring.options import Options
from rowcol_edge.factoring.outcomes import outcome
from rowcol_edge.factoring.plan import ChannelPlan, FactorPlan
from rowcol_edge.factoring.study import Study, study
from tests.factoring.test_allocation import INFOS, SETS, TOTAL, spectra
from tests.nets import frames, small_net


@pytest.fixture(scope="module")
def known() -> Study:
    pictures, _ = frames(64, seed=1)
    return study(
        small_net(), scan(Split("calibration", "frames", lambda: iter([({"x": pictures}, None)]))), classify=True
    )


def plan(known: Study, width: int) -> FactorPlan:
    [body] = [each for each in known.channels if each.name == "body"]
    asked = FactorPlan((), channels=(ChannelPlan("body", width, body.size),))
    return ranks.refresh(asked, known.infos, known.spaces, known.channels, known.input_spaces)


def by_factor(plans: dict[float, FactorPlan]) -> Callable[[float], FactorPlan]:
    def make(factor: float) -> FactorPlan:
        if factor not in plans:
            raise BudgetError("budget params<=0.1x")
        return plans[factor]

    return make


def test_the_plan_of_the_nearer_model_is_taken_whatever_was_predicted(known: Study) -> None:
    narrow, wide = plan(known, 4), plan(known, 56)
    for order, said in (((narrow, wide), ", widths counted 1.5 times"), ((wide, narrow), "")):
        found = nearer(known, by_factor(dict(zip(FACTORS, order, strict=True))))
        assert (found.digest, found.made_by) == (wide.digest, wide.made_by + said)


def test_the_model_that_was_tried_is_not_made_again(known: Study, monkeypatch: pytest.MonkeyPatch) -> None:
    narrow, wide = (replace(plan(known, width), refit=False) for width in (4, 56))
    fresh, sample = factored(known, wide), known.trial_samples
    known.keep("another", fresh)
    for order in ((narrow, wide), (wide, narrow)):
        found = nearer(known, by_factor(dict(zip(FACTORS, order, strict=True))))
        with monkeypatch.context() as patched:
            patched.setattr(apply, "apply", None)  # nothing is made any more
            model = factored(known, found)
        for wanted, got in zip(outcome(fresh, sample), outcome(model, sample), strict=True):
            torch.testing.assert_close(got, wanted)
        assert not known.tried  # handed out once
        assert list(known.made) == ["another"]  # a search may still ask for it
    refitted = factored(known, replace(wide, refit=True))
    assert nearer(known, by_factor(dict(zip(FACTORS, (narrow, replace(wide, refit=True)), strict=True)))).refit
    monkeypatch.setattr(apply, "apply", None)
    for wanted, got in zip(
        outcome(refitted, sample), outcome(factored(known, replace(wide, refit=True)), sample), strict=True
    ):
        torch.testing.assert_close(got, wanted)


def test_plans_are_tried_on_a_few_samples_at_a_time(known: Study) -> None:
    plans, sizes = dict(zip(FACTORS, (plan(known, 4), plan(known, 56)), strict=True)), list[int]()
    assert known.channel_spaces  # measured at the first look: not to be counted below, whichever test is the first
    hook = known.folded.register_forward_pre_hook(lambda _, args: sizes.append(len(args[0])))
    nearer(known, by_factor(plans))
    hook.remove()
    assert sizes[:16] == [4] * 16  # the original on the 64 inputs that so small a network is tried on
    assert max(sizes) == 4


def test_how_much_widths_count_reaches_every_way_to_make_a_plan(known: Study) -> None:
    both = limits.of_budgets(known, Budgets.parse("params<=0.4x,macs<=0.5x"), 4.0)
    ladder = search.Ladder(known, 1, "")
    for make in (
        partial(limits.cheapest, known, both[:1], 1, ""), partial(limits.cheapest, known, both, 1, ""),
        partial(ladder._plan, 0.3),
    ):  # fmt: skip
        allocator = known.allocator(1, 1.0)
        assert allocator is not None
        lost = [allocator.lost({e.name: e.width for e in make(factor).channels}) for factor in (0.01, 100.0)]
        assert lost[1] < lost[0]


def test_the_first_stays_unless_the_other_is_clearly_nearer(known: Study, monkeypatch: pytest.MonkeyPatch) -> None:
    plans = dict(zip(FACTORS, (plan(known, 24), plan(known, 32)), strict=True))
    inf = float("inf")
    for found, wanted in (
        ([1.0, 0.86], 24), ([1.0, 0.84], 32), ([0.0, 0.0], 24), ([1.0, inf], 24), ([inf, 1.0], 32), ([inf, inf], 24),
    ):  # fmt: skip
        losses = iter(found)
        monkeypatch.setattr(balance, "_lost", lambda *_, losses=losses: next(losses))
        assert [each.width for each in nearer(known, by_factor(plans)).channels] == [wanted]


def test_a_model_that_gives_no_numbers_is_not_the_nearer_one(known: Study, monkeypatch: pytest.MonkeyPatch) -> None:
    plans, apply = dict(zip(FACTORS, (plan(known, 4), plan(known, 56)), strict=True)), balance.factored

    for spoiled, wanted in ((56, 4), (4, 56)):

        def broken(study: Study, asked: FactorPlan, spoiled: int = spoiled) -> nn.Module:
            model = apply(study, asked)
            if asked.channels[0].width == spoiled:
                model.register_forward_hook(lambda _, args, output: output * float("nan"))
            return model

        monkeypatch.setattr(balance, "factored", broken)
        assert [each.width for each in nearer(known, by_factor(plans)).channels] == [wanted]


def test_what_only_the_other_factor_cannot_reach_is_left_out(known: Study) -> None:
    assert nearer(known, by_factor({FACTORS[0]: plan(known, 4)})) == plan(known, 4)
    with pytest.raises(BudgetError):
        nearer(known, by_factor({FACTORS[1]: plan(known, 40)}))


def test_without_widths_there_is_nothing_to_try(known: Study) -> None:
    asked = []

    def make(factor: float) -> FactorPlan:
        asked.append(factor)
        return FactorPlan(())

    assert nearer(known, make) == FactorPlan(())
    assert asked == [1.0]


@pytest.mark.parametrize("seed", range(4))
def test_the_dearer_widths_are_the_less_is_lost_by_them(seed: int) -> None:
    spaces, losses = spectra(seed)
    lost = []
    for factor in (1.0, 4.0, 100.0):
        allocator = Allocator(Widths(INFOS, SETS), Options(spaces, {}), losses, factor)
        found = ranks.plan_by_cost(INFOS, spaces, ranks.parameters, total=TOTAL, limit=0.5 * TOTAL, allocator=allocator)
        widths = {each.name: each.width for each in found.channels}
        predicted = sum(float(losses[name][width]) for name, width in widths.items())
        assert allocator.lost(widths) == pytest.approx(predicted)
        ranked = sum(float(spaces[layer.name].losses[layer.rank]) for layer in found.projected)  # type: ignore[index]
        assert found.loss == pytest.approx(predicted + ranked)
        lost.append(predicted)
    assert lost == sorted(lost, reverse=True)
