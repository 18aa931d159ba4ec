"""Calibration data that are too few to trust a plan."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from rowcol_edge import job, limits
from rowcol_edge.config import make
from rowcol_edge.datasets import Split, scan
from rowcol_edge.factoring import ranks, thin
from rowcol_edge.factoring.plan import ChannelPlan, FactorPlan
from rowcol_edge.factoring.study import Study, study


class Mixed(nn.Module):
    """Convolutions with 64 positions a sample, linear layers with one."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1)
        self.wide, self.deep, self.head = nn.Linear(64, 48), nn.Linear(48, 48), nn.Linear(48, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.second(torch.relu(self.first(x))))
        x = nn.functional.adaptive_avg_pool2d(x, 2).flatten(1)
        logits: torch.Tensor = self.head(torch.tanh(self.deep(torch.tanh(self.wide(x)))))
        return logits


def known(samples: int) -> Study:
    x = np.random.default_rng(0).normal(size=(samples, 3, 8, 8)).astype(np.float32)
    data = scan(Split("calibration", "random", lambda: iter([({"x": x}, None)])))
    return study(Mixed().eval(), data, classify=True)


def halved(found: Study) -> FactorPlan:
    return limits.cheapest(found, [limits.of_parameters(found, found.parameters // 2, "params<=0.5x")], 1, "")


def of(x: np.ndarray, net: nn.Module | None = None) -> Study:
    data = scan(Split("calibration", "given", lambda: iter([({"x": x}, None)])))
    return study(net or Mixed().eval(), data, classify=True)


def pictures(count: int) -> np.ndarray:
    return np.random.default_rng(0).normal(size=(count, 3, 8, 8)).astype(np.float32)


@pytest.mark.parametrize(("different", "times"), [(1, 48), (2, 24), (3, 16)])
def test_samples_that_are_there_again_are_none_to_judge(different: int, times: int) -> None:
    found = of(np.repeat(pictures(different), times, axis=0))
    said = thin.told(found, halved(found))
    assert f"fewer than 4 different samples ({different} of 48) leave none to judge" in said
    assert f"wide ({different} of 48)" in said


def test_pictures_without_content_are_told() -> None:
    found = of(np.zeros((48, 3, 8, 8), np.float32))
    plan = replace(ranks.plan_by_energy(found.infos, found.spaces, 0.5), channels=(ChannelPlan("first", 1, 16),))
    assert "fewer than 4 different samples (1 of 48)" in thin.told(found, plan)


def test_rows_of_samples_that_are_there_twice_count_once() -> None:
    once, twice = of(pictures(40)), of(np.tile(pictures(40), (2, 1, 1, 1)))
    assert "wide (30 of 48)" in thin.told(once, halved(once))
    assert "wide (30 of 48)" in thin.told(twice, halved(twice))


class Deaf(nn.Module):
    """What it takes is too small to reach the head."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.wide, self.head = nn.Linear(12, 32), nn.Linear(32, 4)
        self.wide.bias.data.fill_(-100.0)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.head(torch.relu(self.wide(x.flatten(1))))
        return logits


def test_an_output_that_does_not_vary_is_told() -> None:
    x = np.random.default_rng(0).normal(size=(200, 12)).astype(np.float32)
    for scale, varies in ((1.0, False), (100.0, True)):
        found = of(scale * x, Deaf().eval())
        plan = ranks.plan_by_energy(found.infos, found.spaces, 0.5)
        assert plan.changes
        assert found.varies is varies
        assert ("the model's output is the same for all samples" in thin.told(found, plan)) is not varies


@pytest.mark.parametrize(("samples", "enough"), [(1, False), (3, False), (4, True), (200, True)])
def test_fewer_than_four_samples_leave_none_to_judge(samples: int, enough: bool) -> None:
    found = known(samples)
    assert ("none to judge" in thin.told(found, halved(found))) is not enough


def test_layers_that_cannot_be_filled_are_named_the_thinnest_first() -> None:
    found = known(8)  # two of them judge
    said = thin.told(found, ranks.plan_by_energy(found.infos, found.spaces, 0.5))
    assert "directions in 2 layer(s): wide (6 of 48), deep (6 of 48)." in said  # six rows fill those of four classes


def test_more_layers_than_are_named_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(thin, "_NAMED", 1)
    found = known(8)
    assert "wide (6 of 48) and 1 more" in thin.told(found, ranks.plan_by_energy(found.infos, found.spaces, 0.5))


def test_what_a_split_of_rows_takes_counts_too() -> None:
    found = known(8)
    space = found.input_spaces["second"]
    few = {**found.input_spaces, "second": replace(space, samples=15)}
    plan = ranks.plan_by_energy(found.infos, {"second": found.spaces["second"]}, 0.1)
    assert plan.projected
    assert thin.told(found, plan) == ""
    assert "second (15 of 16)" in thin.told(replace(found, input_spaces=few), plan)


def test_layers_that_stay_need_no_data() -> None:
    found = known(1)
    assert thin.told(found, ranks.plan_by_energy(found.infos, found.spaces, 1.0, break_even=0.01)) == ""


@pytest.mark.parametrize("samples", [80, 200])
def test_enough_data_are_passed_without_a_word(samples: int) -> None:
    found = known(samples)
    plan = halved(found)
    assert plan.changes
    assert thin.told(found, plan) == ""


def test_the_data_of_a_sample_are_enough() -> None:
    work = job.prepare(make({"model": "sample:fmnist-vit"}))
    found = study(work.model.module, work.calibration, classify=True)
    plan = halved(found)
    assert {layer.name for layer in plan.layers if layer.form != "dense"} > {"blocks.0.expand", "blocks.0.contract"}
    assert thin.told(found, plan) == ""
