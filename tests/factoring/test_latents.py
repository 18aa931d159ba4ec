"""What a spatial split is predicted to cost at the model's output."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from rowcol_edge.errors import PlanError
from rowcol_edge.factoring.costs import Form, Split
from rowcol_edge.factoring.latents import spatial_losses
from rowcol_edge.factoring.projections import project
from rowcol_edge.factoring.spaces import LayerSpaces, collect
from tests import weighing


class Net(nn.Module):
    """A padded convolution, one that is not, and what cannot be split along its sides."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.padded, self.inner = nn.Conv2d(2, 6, 3, padding=1), nn.Conv2d(6, 5, (2, 3), stride=(1, 2))
        self.flat, self.head = nn.Conv2d(5, 6, 1), nn.Linear(6, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        maps = torch.tanh(self.flat(torch.relu(self.inner(torch.relu(self.padded(x))))))
        result: torch.Tensor = 3.0 * self.head(maps.mean((2, 3)))
        return result


NAMES = ["padded", "inner", "flat", "head"]


def smooth(count: int, seed: int = 0) -> np.ndarray:
    """Pictures whose neighbouring pixels are alike."""
    x = np.random.default_rng(seed).normal(size=(count, 2, 12, 12)) + 0.5
    for axis in (2, 3):
        x = x + np.roll(x, 1, axis) + np.roll(x, 2, axis)
    return (x / 3).astype(np.float32)


def measured(model: nn.Module, x: np.ndarray) -> tuple[dict[str, LayerSpaces], dict[str, LayerSpaces]]:
    taken = weighing.taken(model, [{"x": x}], NAMES)
    return taken, weighing.weighed(model, {"x": x}, collect(model, [{"x": x}], NAMES), classify=True)


def divergence(model: nn.Module, other: nn.Module, x: np.ndarray) -> float:
    with torch.inference_mode():
        wanted, got = (net(torch.from_numpy(x)).double().log_softmax(1) for net in (model, other))
    return float((wanted.exp() * (wanted - got)).sum(1).mean())


class Partly(nn.Module):
    """A layer and a little of the difference to what stands in for it."""

    def __init__(self, layer: nn.Module, other: nn.Module, share: float) -> None:
        super().__init__()
        self.layer, self.other, self.share = layer, other, share

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.layer(x)
        return result + self.share * (self.other(x) - result)


@pytest.mark.parametrize("across", [False, True])
def test_the_predicted_loss_is_the_divergence_that_follows_to_first_order(across: bool) -> None:
    """Of whole splits the divergence is up to five times less here: the nonlinearities behind swallow some of it."""
    model, x, fresh, share = Net(), smooth(600), smooth(1500, seed=1).astype(np.float64), 0.03
    taken, given = measured(model, x)
    found = spatial_losses(model, {"x": x}, taken, given, across_first=across, classify=True)
    assert list(found) == ["padded", "inner"]
    for name, losses in found.items():
        assert losses[-1] == 0.0
        assert np.all(np.diff(losses) <= 0)
        worst = 0.0  # losses never fall with a channel less, divergences may
        for rank in range(len(losses) - 2, 0, -1):
            other = Net().double()
            layer: Any = other.get_submodule(name)
            split = Split(Form.SPATIAL, rank, across_first=across)
            made = project(layer, split, inputs=taken[name], outputs=given[name])
            other.set_submodule(name, Partly(layer, made, share))
            worst = max(worst, divergence(Net().double(), other, fresh) / share**2)
            assert 0.6 < losses[rank] / worst < 1.5, (name, rank)


def test_the_predicted_loss_counts_the_border() -> None:
    """Pictures that hardly vary about a mean: a single channel is wrong nearly at the border only."""
    model, share = Net(), 0.03
    x, fresh = (0.2 * smooth(count, seed) + 2.0 for count, seed in ((300, 0), (800, 1)))
    taken, given = measured(model, x)
    losses = spatial_losses(model, {"x": x}, taken, given, across_first=True, classify=True)["padded"]
    other = Net().double()
    split = Split(Form.SPATIAL, 1, across_first=True)
    made = project(other.padded, split, inputs=taken["padded"], outputs=given["padded"])
    other.set_submodule("padded", Partly(other.padded, made, share))
    assert 0.6 < losses[1] / (divergence(Net().double(), other, fresh.astype(np.float64)) / share**2) < 1.5


def test_the_model_stays_as_it_was_and_the_same_comes_out_again() -> None:
    model, x = Net().train(), smooth(20)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    taken, given = measured(model, x)
    first, second = (spatial_losses(model, {"x": x}, taken, given, across_first=False, classify=True) for _ in range(2))
    for name, losses in first.items():
        np.testing.assert_array_equal(losses, second[name])
    assert model.training
    assert not any(module._forward_hooks for module in model.modules())
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def test_nothing_to_split_and_no_way_back_give_nothing() -> None:
    class Cut(Net):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x).detach()

    model, x = Cut(), smooth(8)
    taken, given = measured(model, x)
    assert spatial_losses(model, {"x": x}, taken, given, across_first=False, classify=True) == {}
    flat = {"flat": taken["flat"]}
    assert spatial_losses(Net(), {"x": x}, flat, given, across_first=False, classify=True) == {}


def test_a_layer_that_no_gradient_reaches_is_left_out() -> None:
    """What it loses is not known, and not nothing."""

    class Cut(Net):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            maps = torch.tanh(self.flat(torch.relu(self.inner(torch.relu(self.padded(x)).detach()))))
            result: torch.Tensor = self.head(maps.mean((2, 3)))
            return result

    model, x = Cut(), smooth(8)
    taken, given = measured(model, x)
    found = spatial_losses(model, {"x": x}, taken, given, across_first=False, classify=True)
    assert list(found) == ["inner"]
    assert found["inner"][0] > 0.0


def test_what_is_no_layer_is_refused_by_name() -> None:
    model = nn.Sequential(nn.Conv2d(2, 3, 3), nn.ReLU())
    space = LayerSpaces("1", np.ones(2), np.eye(2), np.zeros(2), 1)
    with pytest.raises(PlanError, match=r"layer '1'.*ReLU"):
        spatial_losses(model, {"x": smooth(4)}, {"1": space}, {}, across_first=False, classify=False)
