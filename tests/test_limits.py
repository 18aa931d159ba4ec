"""Plans within limits on parameters and MACs at once."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from rowcol_edge import limits, search
from rowcol_edge.budgets import Budgets
from rowcol_edge.datasets import Split, scan
from rowcol_edge.errors import BudgetError, ModelError
from rowcol_edge.factoring import ranks
from rowcol_edge.factoring.apply import factored
from rowcol_edge.factoring.options import Cost
from rowcol_edge.factoring.plan import FactorPlan
from rowcol_edge.factoring.study import Study, study


class Uneven(nn.Module):
    """MACs lie in the convolutions, parameters in the linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.body = nn.Conv2d(1, 24, 3, padding=1), nn.Conv2d(24, 24, 3, padding=1)
        self.wide, self.head = nn.Linear(24 * 4, 192), nn.Linear(192, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.body(torch.relu(self.stem(x))))
        x = nn.functional.adaptive_avg_pool2d(x, 2).flatten(1)
        logits: torch.Tensor = self.head(torch.relu(self.wide(x)))
        return logits


@pytest.fixture(scope="module")
def known() -> Study:
    torch.manual_seed(0)
    x = np.random.default_rng(0).normal(size=(96, 1, 16, 16)).astype(np.float32)
    data = scan(Split("calibration", "random", lambda: iter([({"x": x}, None)])))
    return study(Uneven().eval(), data, classify=True)


def planned(known: Study, budget: str) -> FactorPlan:
    return limits.cheapest(known, limits.of_budgets(known, Budgets.parse(budget), 4.0), 1, "")


def shares(known: Study, plan: FactorPlan) -> tuple[float, float]:
    return 1 - plan.saved_parameters / known.parameters, 1 - plan.saved_macs / known.macs


@pytest.mark.parametrize("parameters", [0.2, 0.4, 0.7])
@pytest.mark.parametrize("macs", [0.2, 0.4, 0.7])
def test_both_limits_hold_at_little_more_than_the_loss_of_the_tighter_one(
    known: Study, parameters: float, macs: float
) -> None:
    plan = planned(known, f"params<={parameters}x,macs<={macs}x")
    used = shares(known, plan)
    assert used[0] <= parameters
    assert used[1] <= macs
    alone = [planned(known, text).loss or 0.0 for text in (f"params<={parameters}x", f"macs<={macs}x")]
    assert max(alone) * (1 - 1e-9) <= (plan.loss or 0.0) <= sum(alone) * (1 + 1e-9)


@settings(max_examples=25, deadline=None)
@given(
    kinds=st.sets(st.sampled_from(["params", "macs", "size"]), min_size=1),
    share=st.tuples(*[st.floats(0.01, 1.1)] * 3),
    bytes_each=st.sampled_from([0.5, 1.0, 2.0, 4.0]),
    multiple=st.sampled_from([1, 3, 8]),
)
def test_any_limits_hold_together_or_the_one_that_cannot_is_named(
    known: Study, kinds: set[str], share: tuple[float, float, float], bytes_each: float, multiple: int
) -> None:
    dense = {"params": known.parameters, "macs": known.macs, "size": known.parameters * bytes_each}
    most = {kind: int(part * dense[kind]) for kind, part in zip(dense, share, strict=True) if kind in kinds}
    budgets = Budgets.parse(",".join(f"{kind}<={limit}{'B' * (kind == 'size')}" for kind, limit in most.items()))
    found = limits.of_budgets(known, budgets, bytes_each)
    alone = {each.text: within(known, [each], multiple) for each in found}
    plan = within(known, found, multiple)
    if isinstance(plan, str):
        out_of_reach = [text for text, other in alone.items() if isinstance(other, str)]
        named = out_of_reach or list(alone)
        assert plan == f"budget{'s' * (len(named) > 1)} {' and '.join(named)}"
        return
    assert not any(isinstance(other, str) for other in alone.values())
    parameters = sum(part.numel() for part in factored(known, plan).parameters())
    assert parameters == known.parameters - plan.saved_parameters
    used = {"params": parameters, "macs": known.macs - plan.saved_macs, "size": parameters * bytes_each}
    assert {kind for kind, limit in most.items() if used[kind] > limit} == set()
    assert all(layer.rank % multiple == 0 for layer in plan.projected if layer.rank)


def within(known: Study, found: Sequence[limits.Limit], multiple: int) -> FactorPlan | str:
    """The plan, or what its error says cannot be met."""
    try:
        return limits.cheapest(known, found, multiple, "")
    except BudgetError as error:
        return error.what


def test_neither_limit_alone_would_keep_the_other(known: Study) -> None:
    assert shares(known, planned(known, "params<=0.2x"))[1] > 0.2
    assert shares(known, planned(known, "macs<=0.2x"))[0] > 0.2


def test_within_two_limits_widths_count_as_much_as_in_the_search(known: Study, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the two ways to a plan within both."""
    found = limits.of_budgets(known, Budgets.parse("params<=0.2x,macs<=0.2x"), 4.0)
    allocator = known.allocator(1, 1.0)
    assert allocator is not None
    one, other = (limits.cheapest(known, found, 1, "", factor=factor) for factor in (1.0, 100.0))
    (first, widths), (second, less) = (
        (made.loss or 0.0, allocator.lost({each.name: each.width for each in made.channels})) for made in (one, other)
    )
    assert (first < second, widths > less) == (True, True)
    monkeypatch.setattr(ranks, "no_dearer", lambda *_, **__: one)
    monkeypatch.setattr(limits, "_mixed", lambda *_: (other, 1.0))
    turns = 1.0 + (second - first) / (widths - less)
    for factor, wanted in ((0.9 * turns, one), (1.1 * turns, other)):
        assert limits.cheapest(known, found, 1, "", factor=factor) is wanted


def test_the_tighter_of_parameters_and_bytes_counts(known: Study) -> None:
    small = known.parameters * 4 * 0.3 / 1e6
    for text in (f"params<=0.5x,size<={small:.6f}MB", f"params<=0.3x,size<={2 * small:.6f}MB"):
        assert shares(known, planned(known, text))[0] <= 0.3


@pytest.mark.parametrize("kind", ["params", "macs"])
def test_a_limit_that_cannot_be_met_is_named_with_the_gap(known: Study, kind: str) -> None:
    other = "macs" if kind == "params" else "params"
    with pytest.raises(BudgetError, match=rf"budget {kind}<=0.001x: expected at most .* too many"):
        planned(known, f"{other}<=0.9x,{kind}<=0.001x")


def test_two_limits_that_cannot_be_met_are_both_named(known: Study) -> None:
    with pytest.raises(BudgetError) as refused:
        planned(known, "params<=1,macs<=2")
    error = refused.value
    assert error.what == "budgets params<=1 and macs<=2"
    assert error.expected == "at most 1 parameters and at most 2 macs"
    assert error.got.count("too many") == 2
    assert re.search(r"allow at least [\d,]+ parameters and [\d,]+ macs", error.hint)


def test_the_least_parameters_that_a_refusal_names_can_be_had(known: Study) -> None:
    with pytest.raises(BudgetError) as refused:
        planned(known, "params<=1")
    least = int(refused.value.hint.split("allow at least ")[1].split()[0].replace(",", ""))
    assert known.parameters - planned(known, f"params<={least}").saved_parameters == least


def test_a_limit_of_bytes_is_told_in_bytes(known: Study) -> None:
    with pytest.raises(BudgetError) as refused:
        planned(known, "size<=8B")
    error = refused.value
    assert error.expected == "at most 2 parameters (8 bytes)"
    [(least, size)] = re.findall(r"allow at least ([\d,]+) parameters \(([\d,]+) bytes\)", error.hint)
    assert size.replace(",", "") == str(4 * int(least.replace(",", "")))
    assert error.got.startswith(f"{least} parameters ({size} bytes), ")
    planned(known, f"size<={size.replace(',', '')}B")


class Grouped(nn.Module):
    """Nothing but a grouped convolution and an embedding, which no form takes."""

    def __init__(self) -> None:
        super().__init__()
        self.mixed, self.shift = nn.Conv2d(4, 4, 3, groups=2), nn.Embedding(8, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        moved: torch.Tensor = self.mixed(x) + self.shift(torch.zeros(1, dtype=torch.long))
        return moved


class Bare(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(x)


def studied(module: nn.Module) -> Study:
    x = np.random.default_rng(0).normal(size=(8, 4, 8, 8)).astype(np.float32)
    return study(module, scan(Split("calibration", "random", lambda: iter([({"x": x}, None)]))), classify=False)


@pytest.mark.parametrize("budget", ["params<=0.5x", "macs<=0.5x", "drop<=1pp,params<=0.5x", "params<=20"])
def test_a_model_of_which_nothing_can_be_factored_is_refused_with_the_reason(budget: str) -> None:
    with pytest.raises(
        ModelError,
        match=r"expected layers that can be factored, got none: all of its .* stay – left as they are: mixed \(76",
    ):
        limits.check(studied(Grouped()), Budgets.parse(budget))


@pytest.mark.parametrize("budget", ["", "drop<=1pp", "params<=1x", "macs<=1G", "size<=1MB"])
def test_what_such_a_model_meets_as_it_is_may_be_asked_of_it(budget: str) -> None:
    limits.check(studied(Grouped()), Budgets.parse(budget))


@pytest.mark.parametrize("budget", ["", "drop<=1pp", "params<=0.5x", "macs<=1G"])
def test_a_model_without_parameters_is_refused(budget: str) -> None:
    with pytest.raises(ModelError, match="no parameters at all"):
        limits.check(studied(Bare()), Budgets.parse(budget))


def test_less_than_one_parameter_is_a_budget_that_cannot_be_met(known: Study) -> None:
    with pytest.raises(BudgetError, match=r"budget params<=0\.000001x: expected at most 1 parameters"):
        planned(known, "params<=0.000001x")


def test_limits_that_hold_only_one_by_one_are_both_named(known: Study, monkeypatch: pytest.MonkeyPatch) -> None:
    """Plans whose savings miss one limit or the other whatever the mixture."""
    honest = limits.ranks.plan_by_cost

    def one_sided(infos: object, spaces: object, cost: Cost, **options: Any) -> FactorPlan:
        first = known.infos["wide"]  # weighs parameters, hardly any MACs
        plan = honest(infos, spaces, cost, **options)
        heavy = cost(first, None) > cost(known.infos["body"], None)
        return replace(plan, layers=tuple(one for one in plan.layers if (one.name in ("wide", "head")) == heavy))

    monkeypatch.setattr(limits.ranks, "plan_by_cost", one_sided)
    monkeypatch.setattr(limits.ranks, "no_dearer", lambda *_, **__: None)
    with pytest.raises(BudgetError, match=r"budgets params<=0\.3x and macs<=0\.3x.* times one of them"):
        planned(known, "params<=0.3x,macs<=0.3x")


def test_a_file_that_is_too_large_is_made_smaller_within_the_other_limit(known: Study) -> None:
    budgets = Budgets.parse("size<=1MB,macs<=0.5x")
    plan = replace(planned(known, "size<=1MB,macs<=0.5x"), refit=True)
    less = search.smaller(known, plan, 4.0 * 1000, "fp32", budgets)
    assert less.saved_parameters >= plan.saved_parameters + 1000
    assert shares(known, less)[1] <= 0.5
    assert less.refit


def test_plans_that_are_tried_for_quality_go_along_what_is_limited_beside_it(known: Study) -> None:
    """At the same share of the limited cost, the ladder for it loses no more than that for the mean of both."""
    both = search.Ladder(known, 1, "").plans
    for kind, place in (("params", 0), ("size", 0), ("macs", 1)):
        along = search.Ladder(known, 1, "", [kind]).plans
        for plan in both[1::6]:
            share = shares(known, plan)[place]
            losses = [each.loss or 0.0 for each in along if shares(known, each)[place] >= share]
            assert losses[-1] <= (plan.loss or 0.0) * 1.001
