"""Samples are told apart wherever a model lays them: the same network has the same losses and second pass."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from rowcol_edge.datasets import Split, scan
from rowcol_edge.factoring import layouts
from rowcol_edge.factoring.apply import factored
from rowcol_edge.factoring.layouts import Layout
from rowcol_edge.factoring.plan import FactorPlan, LayerPlan
from rowcol_edge.factoring.study import Study, study

TOKENS = 6


class Mixed(nn.Module):
    """Tokens that one network sees alone, with samples along the first axis, behind the tokens, or flattened into it;
    what the class token gets has no sample at all."""

    def __init__(self, layout: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layout = layout
        self.inside, self.middle, self.head = nn.Linear(8, 32), nn.Linear(32, 32), nn.Linear(32, 5)
        self.token, self.start = nn.Linear(4, 32), nn.Parameter(torch.randn(1, 4))
        with torch.no_grad():
            self.head.weight.mul_(8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        samples = len(x)
        if self.layout == "tokens first":
            x = x.transpose(0, 1)
        elif self.layout == "flattened":
            x = x.flatten(0, 1)
        x = torch.relu(self.middle(torch.relu(self.inside(x) + self.token(self.start))))
        x = x.reshape(samples, TOKENS, -1) if self.layout == "flattened" else x
        return self.head(x.mean(0 if self.layout == "tokens first" else 1))


KINDS = {
    "samples first": Layout(positions=TOKENS), "tokens first": Layout(axis=1, positions=TOKENS),
    "flattened": Layout(each=TOKENS, positions=TOKENS),
}  # fmt: skip


def x(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(count, TOKENS, 8)).astype(np.float32)


def known(kind: str) -> Study:
    split = Split("calibration", "random", lambda: iter([({"x": part}, None) for part in np.split(x(96), 12)]))
    return study(Mixed(kind).eval(), scan(split), classify=True)


@pytest.mark.parametrize("kind", KINDS)
def test_samples_are_found(kind: str) -> None:
    found = layouts.find(Mixed(kind).eval(), {"x": x(4)}, ["inside", "middle", "head", "token"])
    assert found == {"inside": KINDS[kind], "middle": KINDS[kind], "head": Layout()}


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "samples first"])
def test_losses_and_the_second_pass_are_those_of_samples_first(kind: str) -> None:
    first, other = known("samples first"), known(kind)
    for name in ("inside", "middle", "head"):
        wanted, got = first.spaces[name].losses, other.spaces[name].losses
        assert wanted is not None
        assert got is not None
        assert wanted[0] > 0.0
        np.testing.assert_allclose(got, wanted, rtol=1e-3, atol=1e-6 * wanted[0])
    plan = FactorPlan((LayerPlan("inside", "project", 2), LayerPlan("middle", "project", 3)), refit=True)
    fresh = torch.from_numpy(x(200, seed=9))
    with torch.inference_mode():
        dense, once, twice = (
            model(fresh) for model in (other.folded, factored(other, replace(plan, refit=False)), factored(other, plan))
        )
        wanted_twice = factored(first, plan)(fresh)
    assert float((twice - dense).square().sum()) < 0.9 * float((once - dense).square().sum())
    np.testing.assert_allclose(twice.numpy(), wanted_twice.numpy(), atol=0.02 * float(dense.abs().max()))


def test_a_model_that_takes_no_other_number_of_samples_is_not_asked() -> None:
    class Fixed(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x.reshape(8, -1))

    model = nn.Sequential(Fixed(4, 2))
    assert layouts.find(model, {"x": np.zeros((8, 4), np.float32)}, ["0"]) == {}
    assert layouts.find(nn.Sequential(nn.Linear(4, 2)), {"x": np.zeros((2, 4), np.float32)}, ["0"]) == {}


class Answering(nn.Module):
    """The same answers in another form."""

    def __init__(self, form: str) -> None:
        super().__init__()
        self.mixed, self.form = Mixed("samples first"), form

    def forward(self, x: torch.Tensor) -> torch.Tensor | tuple[torch.Tensor, ...]:
        answers = self.mixed(x)
        if self.form == "samples last":
            return answers.T
        return answers if self.form == "alone" else (self.mixed.token.bias.square().mean(), answers)


@pytest.mark.parametrize("form", ["alone", "samples last", "behind a number"])
def test_samples_need_not_be_along_the_first_axis_of_what_comes_first(form: str) -> None:
    split = Split("calibration", "random", lambda: iter([({"x": part}, None) for part in np.split(x(96), 12)]))
    plain, other = (study(Answering(each).eval(), scan(split), classify=False) for each in ("alone", form))
    for name in ("mixed.inside", "mixed.middle", "mixed.head"):
        wanted, got = plain.spaces[name].losses, other.spaces[name].losses
        assert wanted is not None
        assert got is not None
        assert got[0] > 0.0
        assert 0.1 < got[0] / wanted[0] < 10.0  # signs are drawn for each entry, in the order of the output
    plan = FactorPlan((LayerPlan("mixed.inside", "project", 2), LayerPlan("mixed.middle", "project", 3)), refit=True)
    fresh = torch.from_numpy(x(200, seed=9))
    with torch.inference_mode():
        dense, once, twice = (
            model.mixed(fresh)
            for model in (other.folded, factored(other, replace(plan, refit=False)), factored(other, plan))
        )
    assert float((twice - dense).square().sum()) < 0.9 * float((once - dense).square().sum())
