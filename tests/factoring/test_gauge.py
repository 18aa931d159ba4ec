"""The gauge between two factors: the float product stays, the int8 one gets better."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from rowcol_edge.errors import DataError, PlanError
from rowcol_edge.factoring.gauge import Gauge, rotation
from rowcol_edge.factoring.settle import GAUGES, settle, settle_model


@st.composite
def pairs(draw: st.DrawFn) -> tuple[nn.Sequential, torch.Tensor]:
    """Two or three layers in double precision, the first latent's channels of very different sizes, and inputs."""
    seed = draw(st.integers(0, 10**6))
    torch.manual_seed(seed)
    rank, bias = draw(st.integers(1, 9)), draw(st.booleans())
    kind = draw(st.sampled_from(["linear", "column", "row", "both", "transposed"]))
    x = torch.randn(6, 8, 7, 6)
    if kind == "linear":
        pair, x = nn.Sequential(nn.Linear(6, rank, bias=bias), nn.Linear(rank, 5)), x.flatten(1, 2)
    elif kind == "column":
        pair = nn.Sequential(nn.Conv2d(8, rank, 3, padding=1, bias=bias), nn.Conv2d(rank, 5, 1))
    elif kind == "row":
        pair = nn.Sequential(nn.Conv2d(8, rank, 1, bias=bias), nn.Conv2d(rank, 5, 3, padding=1))
    elif kind == "both":
        core = nn.Conv2d(rank, 4, 3, stride=2, padding=1, bias=bias)
        pair = nn.Sequential(nn.Conv2d(8, rank, 1, bias=bias), core, nn.Conv2d(4, 5, 1))
    else:
        pair = nn.Sequential(nn.ConvTranspose2d(8, rank, 2, bias=bias), nn.ConvTranspose2d(rank, 5, 3, stride=2))
    with torch.no_grad():
        shape = [1] * pair[0].weight.dim()
        shape[1 if kind == "transposed" else 0] = rank
        pair[0].weight *= torch.logspace(0, -2, rank).view(shape)
    return pair.double(), x.double()


@settings(max_examples=40, deadline=None)
@given(pairs(), st.floats(0, 1), st.sampled_from([None, 0, 7]))
def test_the_float_product_is_the_same_in_any_gauge(
    case: tuple[nn.Sequential, torch.Tensor], alpha: float, seed: int | None
) -> None:
    pair, x = case
    state = copy.deepcopy(pair.state_dict())
    fresh = 3 * x.flip(-1) - 1
    settled, record = settle(pair, x, gauges=[Gauge(alpha, seed)])
    with torch.no_grad():
        before, after = pair(fresh), settled(fresh)
    assert float((after - before).norm()) < 1e-8 * float(before.norm()) + 1e-12
    assert record.chosen == (Gauge(alpha, seed),) * (len(pair) - 1)
    assert all(torch.equal(value, state[name]) for name, value in pair.state_dict().items())


@settings(max_examples=15, deadline=None)
@given(pairs(), st.sampled_from([7, 8]), st.booleans())
def test_the_best_is_chosen_never_worse_than_before_and_as_good_as_it_says(
    case: tuple[nn.Sequential, torch.Tensor], bits: int, weighed: bool
) -> None:
    pair, x = case
    root = np.random.default_rng(0).normal(size=(5, 5))
    how: dict[str, Any] = {"weight_bits": bits, "metric": root @ root.T if weighed else None}
    settled, record = settle(pair, x, **how)
    assert record.error <= record.before
    if len(pair) == 2:
        alone = {gauge: settle(pair, x, gauges=[gauge], **how)[1].error for gauge in GAUGES}
        assert record.error == min(alone.values()) == alone[record.chosen[0]]
    again, same = settle(settled, x, gauges=[None], **how)
    assert same.before == same.error == pytest.approx(record.error, rel=0.02, abs=1e-12)
    assert again is not settled
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), settled.parameters(), strict=True))


def test_a_latent_of_one_loud_channel_is_evened_out() -> None:
    """Its quiet channels carry as much of the output: one scale for all leaves them no bits."""
    torch.manual_seed(0)
    pair = nn.Sequential(nn.Linear(16, 4, bias=False), nn.Linear(4, 16))
    with torch.no_grad():
        pair[0].weight[0] *= 1000.0
        pair[1].weight[:, 0] /= 1000.0
    x = torch.randn(500, 16)
    settled, record = settle(pair, x)
    assert record.before > 100 * record.error
    assert settle(pair, x, gauges=[Gauge(0.5)])[1].error < 0.01 * record.before
    assert settled is not pair


def test_what_all_latent_channels_have_in_common_costs_no_range() -> None:
    """A rotation gives every channel the same share of the mean, so that a zero point takes it out of all of them."""
    torch.manual_seed(0)
    pair, x = nn.Sequential(nn.Linear(16, 8), nn.Linear(8, 16)).double(), torch.randn(500, 16).double()
    with torch.no_grad():
        pair[0].bias[3] = 2.0
        settled, record = settle(pair, x, gauges=[Gauge(0.5, 5)])
        latent = settled[0](x)
    means = latent.mean(0)
    assert float(means.std()) < 0.1 * float(means.mean().abs())
    assert record.error < record.before


def test_both_gauges_of_three_parts_are_chosen_by_the_output_of_all() -> None:
    torch.manual_seed(0)
    core = nn.Conv2d(6, 4, 3, padding=1, bias=False)
    parts, x = nn.Sequential(nn.Conv2d(8, 6, 1, bias=False), core, nn.Conv2d(4, 8, 1)), torch.randn(4, 8, 9, 9)
    with torch.no_grad():
        parts[0].weight[0] *= 100.0
        core.weight[:, 0] /= 100.0
        core.weight[0] *= 100.0
        parts[2].weight[:, 0] /= 100.0
    settled, record = settle(parts, x)
    assert len(record.chosen) == 2
    assert None not in record.chosen
    assert [name for name, _ in settled.named_children()] == ["0", "1", "2"]
    first = settle(parts[:2], x)[1]
    assert record.error < 0.05 * record.before
    assert first.before > 10 * first.error  # the first alone is much of it


def test_the_metric_and_the_bits_count() -> None:
    torch.manual_seed(0)
    pair, x = nn.Sequential(nn.Linear(16, 4, bias=False), nn.Linear(4, 16)), torch.randn(200, 16)
    only = np.zeros((16, 16))
    only[3, 3] = 1.0
    gauges = [Gauge(0.5)]
    whole, first = (settle(pair, x, gauges=gauges, metric=metric)[1].error for metric in (None, only))
    assert whole != first
    seven = settle(pair, x, gauges=gauges, weight_bits=7)[1].error
    assert seven > whole


def test_rotations_are_orthogonal_and_those_of_their_seed() -> None:
    for size in (1, 2, 17):
        np.testing.assert_allclose(rotation(size, 0) @ rotation(size, 0).T, np.eye(size), atol=1e-12)
        np.testing.assert_array_equal(rotation(size, 3), rotation(size, 3))
    assert not np.allclose(rotation(4, 0), rotation(4, 1))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Sequential(nn.Conv2d(1, 4, 3, bias=False), nn.Conv2d(4, 8, 1))
        self.second = nn.Sequential(nn.Linear(8, 3, bias=False), nn.Linear(3, 8))
        self.idle = nn.Sequential(nn.Linear(8, 3, bias=False), nn.Linear(3, 8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.second(torch.relu(self.first(x)).mean((2, 3)))
        return result


def test_a_model_keeps_its_outputs_and_the_original_its_weights() -> None:
    model = Net().to(memory_format=torch.channels_last).train()
    state = copy.deepcopy(model.state_dict())
    x = np.random.default_rng(0).normal(size=(8, 1, 9, 9)).astype(np.float32)
    seen: list[Any] = []
    made, found = settle_model(
        model, ["first", "second"], {"x": x}, progress=lambda *progress: seen.append(progress), gauges=GAUGES[1:]
    )
    assert list(found) == ["first", "second"]
    assert seen == [("gauge", 1, 2), ("gauge", 2, 2)]
    with torch.no_grad():
        before, after = (net.eval()(torch.from_numpy(x)) for net in (copy.deepcopy(model), made))
    assert float((after - before).norm() / before.norm()) < 1e-5
    assert model.training
    assert not any(module._forward_pre_hooks for net in (model, made) for module in net.modules())
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert [name for name, _ in made.named_parameters()] == [name for name, _ in model.named_parameters()]
    assert not all(torch.equal(value, state[name]) for name, value in made.state_dict().items())
    again, _ = settle_model(model, ["first", "second"], {"x": x}, gauges=GAUGES[1:])
    assert all(torch.equal(value, made.state_dict()[name]) for name, value in again.state_dict().items())


def test_half_precision_stays_half_precision() -> None:
    torch.manual_seed(0)
    pair, x = nn.Sequential(nn.Linear(16, 4, bias=False), nn.Linear(4, 16)).to(torch.bfloat16), torch.randn(200, 16)
    settled, _ = settle(pair.eval(), x, gauges=[Gauge(0.5, 0)])
    assert {p.dtype for p in settled.parameters()} == {torch.bfloat16}
    assert not settled.training
    with torch.no_grad():
        before, after = (net(x.to(torch.bfloat16)).float() for net in (pair, settled))
    assert float((after - before).norm() / before.norm()) < 0.03


def test_latents_that_are_idle_or_constant_are_turned_without_harm() -> None:
    torch.manual_seed(0)
    pair, x = nn.Sequential(nn.Linear(6, 4, bias=False), nn.Linear(4, 5)).double(), torch.randn(50, 6).double()
    with torch.no_grad():
        pair[0].weight[1] = 0.0
        pair[1].weight[:, 2] = 0.0
    for inputs in (x, torch.zeros_like(x), x[:1]):
        for gauge in GAUGES[1:]:
            settled, record = settle(pair, inputs, gauges=[gauge])
            assert np.isfinite(record.error)
            with torch.no_grad():
                assert float((settled(x) - pair(x)).norm() / pair(x).norm()) < 1e-4


@pytest.mark.parametrize(
    "pair",
    [
        nn.Sequential(nn.Linear(4, 2)),
        nn.Sequential(nn.Linear(4, 2), nn.ReLU()),
        nn.Sequential(nn.Linear(4, 2), nn.Linear(3, 4)),
        nn.Sequential(nn.Linear(4, 2), nn.ReLU(), nn.Linear(2, 4)),
        nn.Sequential(nn.Conv1d(4, 2, 1), nn.Linear(2, 4)),
        nn.Sequential(nn.Conv1d(4, 2, 1), nn.Conv1d(2, 4, 1, groups=2)),
    ],
)
def test_what_is_no_pair_is_refused(pair: nn.Sequential) -> None:
    with pytest.raises(PlanError, match=r"two or three l|without groups that multiply"):
        settle(pair, torch.randn(3, 4))


def test_bad_inputs_are_refused() -> None:
    pair = nn.Sequential(nn.Linear(4, 2), nn.Linear(2, 4))
    for inputs in (torch.full((3, 4), float("nan")), torch.zeros(0, 4)):
        with pytest.raises(DataError, match="finite samples"):
            settle(pair, inputs)
    with pytest.raises(PlanError, match="at least one"):
        settle(pair, torch.randn(3, 4), gauges=[])
    x = {"x": np.zeros((2, 1, 9, 9), np.float32)}
    with pytest.raises(DataError, match="'idle' was not reached"):
        settle_model(Net(), ["idle"], x)
    with pytest.raises(PlanError, match="no layer 'nix'"):
        settle_model(Net(), ["nix"], x)
    with pytest.raises(PlanError, match=r"layer 'second\.0'"):
        settle_model(Net(), ["second.0"], x)
