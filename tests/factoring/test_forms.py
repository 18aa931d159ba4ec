"""What holds for every kind of layer that can be factored, whatever its shape."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from rowcol_edge.factoring.apply import apply
from rowcol_edge.factoring.costs import Form, Split
from rowcol_edge.factoring.graph import trace
from rowcol_edge.factoring.layers import SUPPORTED, survey
from rowcol_edge.factoring.plan import FactorPlan, LayerPlan
from rowcol_edge.factoring.spaces import LayerSpaces, collect

_AXES = {"conv1d": 1, "conv2d": 2, "convtranspose1d": 1, "convtranspose2d": 2}
_MODES = ("zeros", "reflect", "replicate", "circular")


@st.composite
def _options(draw: st.DrawFn, transposed: bool, axes: int) -> dict[str, Any]:
    def sides(least: int, most: int) -> tuple[int, ...]:
        return tuple(draw(st.integers(least, most)) for _ in range(axes))

    options: dict[str, Any] = {"kernel_size": sides(1, 3), "stride": sides(1, 3), "dilation": sides(1, 2)}
    options["padding"] = sides(0, 1)
    if transposed:
        larger = [max(pair) for pair in zip(options["stride"], options["dilation"], strict=True)]
        options["output_padding"] = tuple(draw(st.integers(0, most - 1)) for most in larger)
    else:
        options["padding_mode"] = draw(st.sampled_from(_MODES))
    return options


@st.composite
def models(draw: st.DrawFn) -> tuple[nn.Module, np.ndarray]:
    """A model of one layer in double precision, and inputs for it."""
    kind = draw(st.sampled_from(sorted(SUPPORTED.values())))
    inputs, outputs, bias = draw(st.integers(1, 5)), draw(st.integers(1, 6)), draw(st.booleans())
    torch.manual_seed(draw(st.integers(0, 10**6)))
    generator = np.random.default_rng(draw(st.integers(0, 10**6)))
    if kind == "linear":
        return nn.Sequential(nn.Linear(inputs, outputs, bias=bias).double()), generator.normal(2, 1, (4, 3, inputs))
    make = next(make for make, name in SUPPORTED.items() if name == kind)
    options = draw(_options(kind.startswith("convtranspose"), _AXES[kind]))
    size = (7, 6)[: _AXES[kind]]
    layer = make(inputs, outputs, bias=bias, **options).double()
    return nn.Sequential(layer), generator.normal(2, 1, (3, inputs, *size))


def _project(model: nn.Module, x: np.ndarray, rank: int) -> tuple[nn.Module, LayerSpaces]:
    spaces = collect(model, [{"input": x}], ["0"])
    return apply(model, FactorPlan((LayerPlan("0", "project", rank),)), spaces), spaces["0"]


def _outputs(model: nn.Module, x: np.ndarray) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.from_numpy(x))


def _features(model: nn.Module) -> int:
    layer = model[0]
    return layer.out_features if isinstance(layer, nn.Linear) else layer.out_channels


@settings(max_examples=40, deadline=None)
@given(models())
def test_full_rank_reproduces_the_layer(case: tuple[nn.Module, np.ndarray]) -> None:
    model, x = case
    factored, _ = _project(model, x, _features(model))
    fresh = 3 * x[..., ::-1].copy() - 1  # not the calibration data
    before, after = _outputs(model, fresh), _outputs(factored, fresh)
    assert after.shape == before.shape
    assert float((after - before).norm()) <= 1e-9 * float(before.norm()) + 1e-12


@settings(max_examples=40, deadline=None)
@given(models())
def test_error_falls_with_the_rank_and_is_the_predicted_one(case: tuple[nn.Module, np.ndarray]) -> None:
    model, x = case
    before = _outputs(model, x)
    channels = -1 if isinstance(model[0], nn.Linear) else 1
    errors = []
    for rank in range(1, _features(model) + 1):
        factored, spaces = _project(model, x, rank)
        errors.append(float(((_outputs(factored, x) - before) ** 2).sum(dim=channels).mean()))
        noise = 1e-12 * (spaces.variance + float(spaces.mean @ spaces.mean))
        assert errors[-1] == pytest.approx(float(spaces.eigenvalues[rank:].sum()), rel=1e-6, abs=noise)
        assert all(later <= earlier * (1 + 1e-9) + noise for earlier, later in itertools.pairwise(errors))


@settings(max_examples=25, deadline=None)
@given(models(), st.integers(1, 6))
def test_the_original_stays_and_the_same_comes_out_again(case: tuple[nn.Module, np.ndarray], rank: int) -> None:
    model, x = case
    rank = min(rank, _features(model))
    state = {name: value.clone() for name, value in model.state_dict().items()}
    generator = torch.get_rng_state()
    first, second = (_project(model, x, rank)[0].state_dict() for _ in range(2))
    assert torch.equal(torch.get_rng_state(), generator)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert list(first) == list(second)
    assert all(torch.equal(value, second[name]) for name, value in first.items())


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.Linear(9, 8), (2, 3, 9)),
        (nn.Conv1d(5, 8, 3, stride=2), (2, 5, 12)),
        (nn.Conv2d(5, 8, 3, padding=1), (2, 5, 6, 7)),
        (nn.ConvTranspose1d(9, 8, 4, stride=3, output_padding=1), (2, 9, 5)),
        (nn.ConvTranspose2d(9, 8, 3, stride=2), (2, 9, 4, 5)),
    ],
)
def test_costs_are_those_of_the_layers_that_are_made(layer: nn.Module, shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(layer), torch.randn(shape)
    info = survey(model, trace(model, {"input": x}))["0"]
    assert info.skip == ""
    factored, _ = _project(model, x.numpy(), 2)
    parts = survey(factored, trace(factored, {"input": x})).values()
    assert [part.skip for part in parts] == [
        "already factored: rank 2 with 0.expand",
        "already factored: rank 2 with 0.reduce",
    ]
    assert info.split_parameters(Split(Form.COLUMN, 2)) == sum(part.parameters for part in parts)
    assert info.split_macs(Split(Form.COLUMN, 2)) == sum(part.macs for part in parts)


def test_a_single_sample_without_a_batch_axis() -> None:
    torch.manual_seed(0)
    for layer, shape in ((nn.Conv1d(3, 6, 2), (3, 9)), (nn.ConvTranspose2d(3, 6, 2, stride=2), (3, 4, 5))):
        model, x = nn.Sequential(layer).double(), torch.randn(shape, dtype=torch.float64).numpy()
        alone = collect(model, [{"input": x}], ["0"], row_space=True)["0"]
        batched = collect(model, [{"input": x[None]}], ["0"], row_space=True)["0"]
        assert alone.row_eigenvalues is not None
        assert batched.row_eigenvalues is not None
        np.testing.assert_allclose(alone.eigenvalues, batched.eigenvalues, rtol=1e-9)
        np.testing.assert_allclose(alone.row_eigenvalues, batched.row_eigenvalues, rtol=1e-9)
        assert len(alone.row_eigenvalues) == 3
