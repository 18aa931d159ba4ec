from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from torch import nn

from rowcol_edge import evaluation, search
from rowcol_edge.budgets import Budgets
from rowcol_edge.datasets import Split, scan
from rowcol_edge.errors import BudgetError
from rowcol_edge.factoring.plan import FactorPlan
from rowcol_edge.factoring.study import Study, study
from rowcol_edge.search import boldest


@pytest.mark.parametrize("count", [1, 2, 3, 8, 25])
def test_bisection_finds_the_last_index_that_holds(count: int) -> None:
    for last in range(count):
        tried: list[int] = []

        def holds(index: int, last: int = last, tried: list[int] = tried) -> bool:
            tried.append(index)
            return index <= last

        assert boldest(holds, count, lambda done, total: None) == last
        assert len(tried) <= max(1, (count - 1).bit_length())
        assert len(set(tried)) == len(tried)


def test_what_is_returned_has_been_seen_to_hold_even_if_quality_is_not_monotone() -> None:
    seen: dict[int, bool] = {}

    def holds(index: int) -> bool:
        seen[index] = index in (1, 2, 6)
        return seen[index]

    found = boldest(holds, 12, lambda done, total: None)
    assert found == 0 or seen[found]


@pytest.fixture(scope="module")
def known() -> Study:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 4))
    x = np.random.default_rng(0).normal(size=(64, 16)).astype(np.float32)
    return study(net.eval(), scan(Split("calibration", "random", lambda: iter([({"input": x}, None)]))), classify=True)


def chosen(
    known: Study, budgets: str, drop: Callable[[float], float], monkeypatch: pytest.MonkeyPatch, precision: str = "fp32"
) -> search.Choice:
    """What is chosen where a model with that share of the parameters loses so many points."""
    monkeypatch.setattr(evaluation, "drop", lambda job, reference, judged: judged.value)

    def judge(module: nn.Module, what: str) -> Any:
        return SimpleNamespace(value=drop(sum(p.numel() for p in module.parameters()) / known.parameters))

    job = SimpleNamespace(
        options=SimpleNamespace(plan=None, energy=None, refit=False),
        model=SimpleNamespace(name="net"), budgets=Budgets.parse(budgets),
    )  # fmt: skip
    reference = cast(evaluation.Judged, SimpleNamespace())
    return search.choose(known, cast(Any, job), 1, precision, reference, judge, lambda what, done, total: None)


def test_budgets_are_not_refused_where_quality_falls_and_rises_again(
    known: Study, monkeypatch: pytest.MonkeyPatch
) -> None:
    def drop(share: float) -> float:
        return 1.0 if 0.12 < share < 0.8 else 0.1

    limit = int(0.11 * known.parameters)
    for budget, precision in (
        (f"params<={limit}", "fp32"), (f"size<={4 * limit}B", "fp32"), (f"size<={limit}B", "int8"),
    ):  # fmt: skip
        found = chosen(known, f"drop<=0.5pp,{budget}", drop, monkeypatch, precision)
        left = known.parameters - found.plans[-1].saved_parameters
        assert left <= limit
        assert drop(left / known.parameters) == 0.1
        assert [t.parameters for t in found.trials] == sorted((t.parameters for t in found.trials), reverse=True)
        assert any(trial.drop == 1.0 for trial in found.trials)


def test_the_least_loss_within_the_limits_is_tried_first(known: Study, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only where costs just meet the limit is the quality kept."""
    found = chosen(
        known, "drop<=0.5pp,params<=0.5x", lambda share: 0.0 if share > 0.97 or 0.45 < share < 0.5 else 2.0, monkeypatch
    )
    left = (known.parameters - found.plans[-1].saved_parameters) / known.parameters
    assert 0.45 < left <= 0.5


def test_what_is_tried_for_quality_is_the_nearer_of_two(known: Study, monkeypatch: pytest.MonkeyPatch) -> None:
    own, seen = search.Ladder.nearer, []

    def nearer(self: search.Ladder, index: int, progress: Any = None) -> FactorPlan:
        found = replace(own(self, index, progress), made_by=f"the nearer of {index}")
        seen.append(index)
        return found

    monkeypatch.setattr(search.Ladder, "nearer", nearer)
    found = chosen(known, "drop<=0.5pp", lambda share: 0.0 if share > 0.5 else 1.0, monkeypatch)
    assert found.plans[-1].made_by == f"the nearer of {len(found.plans) - 1}"
    assert sorted(seen) == sorted(int(trial.made_by.split()[-1]) for trial in found.trials)


def test_budgets_that_exclude_each_other_say_how_far_apart_they_are(
    known: Study, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(BudgetError, match=r"a drop of 3\.00 pp.*boldest plan found that keeps the drop has") as caught:
        chosen(known, "drop<=0.5pp,macs<=0.5x", lambda share: 0.0 if share > 0.9 else 3.0, monkeypatch)
    assert "times macs<=0.5x" in str(caught.value)


def test_a_limit_that_no_plan_meets_is_refused_before_anything_is_tried(
    known: Study, monkeypatch: pytest.MonkeyPatch
) -> None:
    def drop(share: float) -> float:
        raise AssertionError("tried")

    for budget in ("params<=0.001x", "size<=20B"):
        with pytest.raises(BudgetError, match=rf"budget {budget}: .*at the smallest ranks"):
            chosen(known, f"drop<=0.5pp,{budget}", drop, monkeypatch)


def test_the_distance_is_that_of_the_boldest_plan_that_holds_of_those_tried(
    known: Study, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not that of the one where bisection met a drop that a few samples made."""

    def drop(share: float) -> float:
        return 1.0 if share < 0.2 or 0.4 < share < 0.9 else 0.1

    with pytest.raises(BudgetError, match="boldest plan found that keeps the drop has") as caught:
        chosen(known, f"drop<=0.5pp,params<={int(0.15 * known.parameters)}", drop, monkeypatch)
    found = re.search(r"keeps the drop has ([\d,]+) parameters", str(caught.value))
    assert found is not None
    assert int(found.group(1).replace(",", "")) < 0.4 * known.parameters
