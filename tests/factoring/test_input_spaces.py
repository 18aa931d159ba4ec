"""The row space of real inputs, and what cutting it down is predicted to cost at the model's output."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from rowcol_edge.errors import DataError, ModelError
from rowcol_edge.factoring.costs import Form, Split
from rowcol_edge.factoring.projections import project
from rowcol_edge.factoring.spaces import LayerSpaces
from tests import weighing


class Net(nn.Module):
    """Two convolutions that read the same map (one pads), and a linear layer called by keyword."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.padded, self.inner = nn.Conv2d(6, 5, 3, padding=1), nn.Conv2d(6, 5, 3)
        self.head = nn.Linear(5, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        first, second = torch.relu(self.padded(x)), torch.tanh(self.inner(x))
        result: torch.Tensor = self.head(input=first.mean((2, 3)) + 4.0 * second.mean((2, 3)))
        return result


def pictures(count: int, seed: int = 0) -> np.ndarray:
    """Channels that depend on each other, with means of their own."""
    rng = np.random.default_rng(seed)
    mixed = np.einsum("nchw,cd->ndhw", rng.normal(size=(count, 6, 6, 5)), np.random.default_rng(9).normal(size=(6, 6)))
    return (mixed + np.arange(6).reshape(1, 6, 1, 1)).astype(np.float32)


NAMES = ["padded", "inner", "head"]


def test_moments_are_those_of_what_a_layer_takes() -> None:
    x = pictures(20)
    found = weighing.taken(Net(), [{"x": x[:13]}, {"x": x[13:]}], NAMES, max_positions=10**6)
    rows = np.moveaxis(x, 1, -1).reshape(-1, 6).astype(np.float64)
    mean, covariance = rows.mean(0), np.cov(rows.T, bias=True)
    share = (1 - 2 / 18) * (1 - 2 / 15)  # of 3 · 6 and 3 · 5 taps along the axes two read the border
    for name, wanted in (
        ("inner", covariance),
        ("padded", covariance + (1 - share) / share * np.outer(mean, mean)),
    ):
        space = found[name]
        np.testing.assert_allclose((space.basis * space.eigenvalues) @ space.basis.T, wanted, rtol=1e-9, atol=1e-9)
        np.testing.assert_allclose(space.basis.T @ space.basis, np.eye(6), atol=1e-12)
        np.testing.assert_allclose(space.mean, mean, rtol=1e-9)
        assert np.all(np.diff(space.eigenvalues) <= 0)
        assert space.samples == len(rows)
    assert len(found["head"].mean) == 5


def test_of_a_transposed_convolution_moments_are_about_zero() -> None:
    x = pictures(20)
    model = nn.Sequential(nn.ConvTranspose2d(6, 4, 3, stride=2))
    space = weighing.taken(model, [{"input": x}], ["0"], max_positions=10**6)["0"]
    rows = np.moveaxis(x, 1, -1).reshape(-1, 6).astype(np.float64)
    wanted = rows.T @ rows / len(rows)
    np.testing.assert_allclose((space.basis * space.eigenvalues) @ space.basis.T, wanted, rtol=1e-9, atol=1e-9)
    assert not space.mean.any()


def weighed(model: nn.Module, x: np.ndarray, *, classify: bool = True) -> dict[str, LayerSpaces]:
    plain = weighing.taken(model, [{"x": x}], NAMES)
    return weighing.weighed_inputs(model, {"x": x}, plain, classify=classify)


def test_the_gradient_is_the_one_through_the_layer_alone() -> None:
    """What the model's output makes of an input through one layer: Wᵀ g, with g the gradient at its output."""
    model, x = Net().double(), pictures(8)
    plain = weighing.taken(model, [{"x": x}], ["inner"])
    seen: list[torch.Tensor] = []
    handle = model.inner.register_full_backward_hook(lambda module, taken, given: seen.append(given[0]))
    found = weighing.weighed_inputs(model, {"x": x}, plain, classify=False)["inner"]
    handle.remove()
    total = torch.zeros(6, 6, dtype=torch.float64)
    samples = 0
    for gradient in seen[: len(seen) // 2]:  # the first half is for the directions
        back = nn.functional.conv_transpose2d(gradient, model.inner.weight.detach()).movedim(1, -1).reshape(-1, 6)
        total += back.T @ back
        samples += len(gradient)
    wanted = (total / samples).numpy()
    wanted = 0.99 * wanted + 0.01 * np.trace(wanted) / 6 * np.eye(6)
    assert found.dual is not None
    np.testing.assert_allclose(found.dual @ found.dual.T, wanted, rtol=1e-4, atol=1e-5 * np.trace(wanted))


def divergence(model: nn.Module, other: nn.Module, x: np.ndarray) -> float:
    with torch.inference_mode():
        wanted, got = (net(torch.from_numpy(x)).double().log_softmax(1) for net in (model, other))
    return float((wanted.exp() * (wanted - got)).sum(1).mean())


@pytest.mark.parametrize(("name", "rank"), [("padded", 5), ("inner", 5), ("inner", 4), ("head", 2)])
def test_the_predicted_loss_is_the_divergence_that_follows(name: str, rank: int) -> None:
    model, x = Net(), pictures(600)
    space = weighed(model, x)[name]
    assert space.losses is not None
    factored = Net()
    layer: Any = factored.get_submodule(name)
    factored.set_submodule(name, _Keyword(project(layer, Split(Form.ROW, rank), inputs=space)))
    found = divergence(model, factored, pictures(2000, seed=1))
    assert 0.5 < space.losses[rank] / found < 2.0


def test_the_predicted_loss_counts_the_border() -> None:
    """Nothing but the mean is lost, and that is wrong at the border only."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(6, 5, 3, padding=1), nn.Flatten(), nn.Linear(150, 3)).double()
    x = np.random.default_rng(0).normal(size=(200, 6, 6, 5)) * np.array([3, 3, 3, 3, 3, 0.0]).reshape(6, 1, 1)
    x[:, 5] = 1.0
    plain = weighing.taken(model, [{"input": x}], ["0"])
    space = weighing.weighed_inputs(model, {"input": x}, plain, classify=True)["0"]
    direction = np.abs(space.basis[5]).argmax()
    assert direction == 5  # it is worth least
    assert space.losses is not None
    layer: Any = model[0]
    other = nn.Sequential(project(layer, Split(Form.ROW, 5), inputs=space), *model[1:])
    found = divergence(model, other, x)
    assert found > 1e-6
    assert 0.7 < space.losses[5] / found < 1.4
    assert model[0].padding == (1, 1)


class _Keyword(nn.Module):
    """Takes its input by the name that the linear layer has for it."""

    def __init__(self, parts: nn.Module) -> None:
        super().__init__()
        self.parts = parts

    def forward(self, input: torch.Tensor) -> Any:  # noqa: A002, the name of torch's own
        return self.parts(input)


def test_it_is_deterministic_and_leaves_the_model_as_it_was() -> None:
    model, x = Net().train(), pictures(30)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    first, second = weighed(model, x), weighed(model, x)
    for name in NAMES:
        np.testing.assert_array_equal(first[name].basis, second[name].basis)
        np.testing.assert_array_equal(first[name].losses, second[name].losses)
    assert model.training
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def test_without_a_way_back_the_spaces_stay_as_they_are() -> None:
    class Rounding(Net):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x).round().detach()

    plain = weighing.taken(Rounding(), [{"x": pictures(10)}], NAMES)
    assert weighing.weighed_inputs(Rounding(), {"x": pictures(10)}, plain, classify=True) == plain


def test_bad_data_is_refused_with_the_layers_name() -> None:
    model = Net()
    with pytest.raises(DataError, match="at least one batch"):
        weighing.taken(model, [], NAMES)
    with pytest.raises(ModelError, match="no layer 'nix'"):
        weighing.taken(model, [{"x": pictures(2)}], ["nix"])
    with pytest.raises(ModelError, match="fails on a calibration batch"):
        weighing.taken(model, [{"x": pictures(2)[:, :3]}], NAMES)
    model.unused = nn.Linear(3, 3)
    with pytest.raises(DataError, match="'unused' was not reached"):
        weighing.taken(model, [{"x": pictures(2)}], ["unused"])
    with torch.no_grad():
        model.padded.bias[0] = float("nan")
    with pytest.raises(DataError, match="input of layer 'head' holds NaN"):
        weighing.taken(model, [{"x": pictures(2)}], NAMES)
