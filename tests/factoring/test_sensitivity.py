"""Directions by what the model's output makes of them: their order, and what cutting them off is predicted to cost."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from rowcol_edge.datasets import Split, scan
from rowcol_edge.factoring.apply import apply, factored
from rowcol_edge.factoring.plan import ChannelPlan, FactorPlan, LayerPlan
from rowcol_edge.factoring.spaces import LayerSpaces, collect
from rowcol_edge.factoring.study import study
from tests import weighing


class Clipped(nn.Module):
    """Half of the outputs of `wide` vary most, and never get through the ReLU behind it."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.wide, self.relu, self.head = nn.Linear(16, 24), nn.ReLU(inplace=True), nn.Linear(24, 3)
        with torch.no_grad():
            self.wide.weight[12:] *= 10.0
            self.wide.bias[12:] = -500.0
            self.head.weight *= 3.0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.head(self.relu(self.wide(x)))
        return result


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def both(
    model: nn.Module, samples: Mapping[str, np.ndarray], names: list[str], *, classify: bool = True
) -> tuple[dict[str, LayerSpaces], dict[str, LayerSpaces]]:
    plain = collect(model.eval(), [samples], names)
    return plain, weighing.weighed(model, samples, plain, classify=classify)


def projected(model: nn.Module, name: str, rank: int, spaces: Mapping[str, LayerSpaces]) -> nn.Module:
    return apply(model, FactorPlan((LayerPlan(name, "project", rank),)), spaces)


def divergence(model: nn.Module, other: nn.Module, x: np.ndarray) -> float:
    with torch.inference_mode():
        wanted, got = (net(torch.from_numpy(x)).double().log_softmax(1) for net in (model, other))
    return float((wanted.exp() * (wanted - got)).sum(1).mean())


def test_the_basis_and_its_dual_hold_the_same_covariance() -> None:
    plain, weighed = both(Clipped(), {"x": normal(200, 16)}, ["wide", "head"])
    for name, space in weighed.items():
        before = plain[name]
        assert space.dual is not None
        assert space.losses is not None
        np.testing.assert_allclose(space.dual.T @ space.basis, np.eye(len(space.mean)), atol=1e-6)
        covariance = (before.basis * before.eigenvalues) @ before.basis.T
        np.testing.assert_allclose((space.basis * space.eigenvalues) @ space.basis.T, covariance, atol=1e-6)
        assert space.variance == pytest.approx(before.variance)
        assert np.all(np.diff(space.eigenvalues) <= 1e-9)
        assert np.all(np.diff(space.losses) <= 0)
        assert (len(space.losses), space.losses[-1]) == (len(space.mean) + 1, 0.0)


def test_directions_that_a_relu_clips_are_given_up_first() -> None:
    model, x = Clipped(), normal(200, 16)
    plain, weighed = both(model, {"x": x}, ["wide"])
    unseen = normal(500, 16, seed=1)
    assert divergence(model, projected(model, "wide", 12, weighed), unseen) < 1e-3
    assert divergence(model, projected(model, "wide", 12, plain), unseen) > 1e-2


def test_the_predicted_loss_is_the_divergence_that_follows() -> None:
    model, x = Clipped(), normal(400, 16)
    _, weighed = both(model, {"x": x}, ["wide", "head"])
    for name, rank in (("wide", 11), ("wide", 10), ("head", 2)):
        losses = weighed[name].losses
        assert losses is not None
        found = divergence(model, projected(model, name, rank, weighed), normal(2000, 16, seed=1))
        assert 0.5 < losses[rank] / found < 2.0, (name, rank)


def test_a_model_without_classes_is_judged_by_its_relative_error_about_the_mean() -> None:
    class Two(nn.Module):
        """A map and a number, the map a thousand times as large."""

        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.conv, self.tail = nn.Conv2d(1, 6, 3, padding=1), nn.Conv2d(6, 1, 1)

        def forward(self, picture: torch.Tensor, gain: torch.Tensor) -> dict[str, torch.Tensor]:
            features = torch.tanh(self.conv(picture))
            return {"map": 1000.0 * self.tail(features), "mean": gain * features.mean((1, 2, 3))}

    samples = {"picture": normal(64, 1, 8, 8), "gain": np.abs(normal(64)) + 1.0}
    model = Two()
    _, weighed = both(model, samples, ["conv"], classify=False)
    losses = weighed["conv"].losses
    assert losses is not None
    with torch.inference_mode():
        given = [torch.from_numpy(array) for array in samples.values()]
        for rank in (5, 4):
            pairs = zip(model(*given).values(), projected(model, "conv", rank, weighed)(*given).values(), strict=True)
            found = sum(float(((a - b).norm() / (a - a.mean(0)).norm()) ** 2) / 2 for a, b in pairs)
            assert 0.5 < losses[rank] / found < 2.0, rank


def test_probabilities_are_classes_too() -> None:
    class Answering(Clipped):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x).softmax(1)

    x = {"x": normal(100, 16)}
    (_, logits), (_, shares) = both(Clipped(), x, ["wide"]), both(Answering(), x, ["wide"])
    np.testing.assert_allclose(logits["wide"].losses, shares["wide"].losses, rtol=1e-3, atol=1e-9)


class Rounding(nn.Module):
    def __init__(self, wrap: Callable[[torch.Tensor], Any]) -> None:
        super().__init__()
        self.layer, self.wrap = nn.Linear(8, 6), wrap

    def forward(self, x: torch.Tensor) -> Any:
        return self.wrap(self.layer(x))


@pytest.mark.parametrize(
    "wrap", [lambda y: y.detach(), lambda y: y.argmax(1), lambda y: torch.special.zeta(y.abs() + 2.0, y.abs() + 1.0)]
)
def test_without_a_way_back_the_spaces_stay_as_they_are(wrap: Callable[[torch.Tensor], Any]) -> None:
    """Detached, not a number that changes little by little, or an operator that torch has no derivative of."""
    plain, weighed = both(Rounding(wrap), {"x": normal(20, 8)}, ["layer"], classify=False)
    assert weighed == plain


def test_it_is_deterministic_and_leaves_the_model_as_it_was() -> None:
    model, x = Clipped().train(), {"x": normal(50, 16)}
    model.head.weight.requires_grad_(False)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    plain = collect(model, [x], ["wide", "head"])
    first, second = (weighing.weighed(model, x, plain, classify=True) for _ in range(2))
    for name in first:
        np.testing.assert_array_equal(first[name].basis, second[name].basis)
        np.testing.assert_array_equal(first[name].losses, second[name].losses)
    assert model.training
    assert [parameter.requires_grad for parameter in model.parameters()] == [True, True, False, True]
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any(module._forward_hooks for module in model.modules())
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def test_one_sample_is_enough_to_have_an_order() -> None:
    _, weighed = both(Clipped(), {"x": normal(1, 16)}, ["head"])
    assert weighed["head"].losses is not None
    assert np.isfinite(weighed["head"].losses).all()


def test_a_layer_that_no_gradient_reaches_is_not_given_away() -> None:
    """Its output counts all the same: what it loses is not known, and not nothing."""

    class Cut(Clipped):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            result: torch.Tensor = self.head(self.relu(self.wide(x)).detach())
            return result

    plain, weighed = both(Cut(), {"x": normal(60, 16)}, ["wide", "head"])
    assert weighed["wide"] is plain["wide"]
    assert weighed["head"].losses is not None


class Gated(nn.Module):
    """Each class has a feature of its own that gets through the ReLU; a third varies most and never does."""

    def __init__(self) -> None:
        super().__init__()
        self.wide, self.relu, self.head = nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 2)
        with torch.no_grad():
            self.wide.weight.copy_(torch.diag(torch.tensor([1.0, 1.0, 3.0])))
            self.wide.bias.copy_(torch.tensor([0.0, 0.0, -50.0]))
            self.head.weight.copy_(torch.tensor([[1.0, -1.0, 0.0], [-1.0, 1.0, 0.0]]))
            self.head.bias.zero_()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.head(self.relu(self.wide(x)))
        return result


def test_samples_sorted_by_class_are_in_both_halves() -> None:
    rng = np.random.default_rng(0)
    own, other, idle = rng.uniform(0.1, 1.0, 800), rng.uniform(-1.0, -0.1, 800), rng.normal(size=800)
    first, second = np.stack([own, other, idle], 1), np.stack([other, own, idle], 1)
    x = np.concatenate([first, second]).astype(np.float32)
    model = Gated()
    lost = []
    for samples in (x, x[rng.permutation(len(x))]):
        _, weighed = both(model, {"x": samples}, ["wide"])
        lost.append(divergence(model, projected(model, "wide", 2, weighed), x))
    assert lost[0] < 1.5 * lost[1]


def test_a_reader_with_zero_weights_does_not_hold_the_channels_of_others() -> None:
    class Ignoring(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.wide, self.head, self.dead = nn.Linear(8, 12), nn.Linear(12, 3), nn.Linear(12, 3)
            nn.init.zeros_(self.dead.weight)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            hidden = torch.relu(self.wide(x))
            logits: torch.Tensor = self.head(hidden) + self.dead(hidden)
            return logits

    data = scan(Split("calibration", "random", lambda: iter([({"x": normal(200, 8)}, None)])))
    known = study(Ignoring(), data, classify=True)
    assert [each.name for each in known.channels if not each.fixed] == ["wide"]
    losses = known.channel_spaces["wide"].losses
    assert np.isfinite(losses).all()
    assert losses[4] > losses[10] > losses[12] == 0.0
    narrowed = factored(known, FactorPlan((), channels=(ChannelPlan("wide", 11),)))
    x = torch.from_numpy(normal(50, 8, seed=3))
    with torch.inference_mode():
        lost = (narrowed(x) - known.folded(x)).norm() / known.folded(x).norm()
    assert float(lost) < 0.25


@pytest.mark.parametrize("positions", [12, 256])  # of the latter linear layers are calculated in another way
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("checkpointed", [True, False])
def test_layers_are_weighed_whatever_their_model_does_in_place_or_again(
    positions: int, bias: bool, checkpointed: bool
) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.wide, self.relu, self.back = (
                nn.Linear(96, 256, bias=bias),
                nn.ReLU(True),
                nn.Linear(256, 96, bias=bias),
            )
            self.head = nn.Linear(96, 10)

        def block(self, x: torch.Tensor) -> torch.Tensor:
            given: torch.Tensor = self.back(self.relu(self.wide(x)))
            given += 1.0
            return given

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            again = checkpointed and torch.is_grad_enabled()
            given = checkpoint(self.block, x, use_reentrant=False) if again else self.block(x)
            result: torch.Tensor = self.head(given.mean(1))
            return result

    _, weighed = both(Net(), {"x": normal(16, positions, 96)}, ["wide", "back", "head"])
    for space in weighed.values():
        assert space.dual is not None
        assert space.losses is not None
        assert space.losses[0] > 0.0
