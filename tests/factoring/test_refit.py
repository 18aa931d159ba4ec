"""The second pass: closer on inputs it has not seen, never further away, and nothing else touched."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import rowcol_edge
from rowcol_edge.datasets import Split, scan
from rowcol_edge.factoring import apply, refit, splits
from rowcol_edge.factoring.apply import factored
from rowcol_edge.factoring.layouts import Layout
from rowcol_edge.factoring.plan import ChannelPlan, FactorPlan, LayerPlan
from rowcol_edge.factoring.study import study
from tests.couplings import PICTURE, TOKENS, Encoder, Residual, made

Pair = tuple[int, ...]


def inputs(shape: tuple[int, ...], count: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(count, *shape))


def split(x: np.ndarray) -> Split:
    return scan(Split("calibration", "random", lambda: iter([({"x": x}, None)])))


def divergence(model: nn.Module, other: nn.Module, x: np.ndarray) -> float:
    with torch.inference_mode():
        wanted, got = (net(torch.from_numpy(x)).log_softmax(1) for net in (model, other))
    return float((wanted.exp() * (wanted - got)).sum(1).mean())


class Up(nn.Module):
    """Down and up again: one transposed convolution that can be split and one that stays whole."""

    def __init__(self) -> None:
        super().__init__()
        self.down, self.up = nn.Conv2d(2, 12, 3, stride=2, padding=1), nn.ConvTranspose2d(12, 12, 2, stride=2)
        self.wide, self.head = nn.ConvTranspose2d(12, 6, 3, 2, 1, output_padding=1), nn.Linear(6, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        maps = torch.relu(self.wide(torch.relu(self.up(torch.relu(self.down(x))))))
        return 4.0 * self.head(maps.mean((2, 3)))  # type: ignore[no-any-return]


PLANS = {
    "residual": (Residual, PICTURE, FactorPlan(
        (LayerPlan("second", "project", 4),), channels=(ChannelPlan("first", 5), ChannelPlan("stem", 9)))),
    "encoder": (Encoder, TOKENS, FactorPlan(
        (LayerPlan("attention.output", "project", 5), LayerPlan("contract", "project", 4)),
        channels=(ChannelPlan("expand", 20), ChannelPlan("attention.query", 3), ChannelPlan("attention.value", 5)))),
}  # fmt: skip


@pytest.mark.parametrize("name", PLANS)
def test_the_output_comes_closer_on_unseen_inputs(name: str) -> None:
    kind, shape, plan = PLANS[name]
    known = study(made(kind), split(inputs(shape, 300, 0)), classify=True)
    before = copy.deepcopy(known.folded.state_dict())
    first, second = factored(known, plan), factored(known, replace(plan, refit=True))
    unseen = inputs(shape, 400, 9)
    assert divergence(known.folded, second, unseen) < 0.95 * divergence(known.folded, first, unseen)
    assert [(n, p.shape) for n, p in first.named_parameters()] == [(n, p.shape) for n, p in second.named_parameters()]
    assert all(torch.equal(value, before[key]) for key, value in known.folded.state_dict().items())
    again = factored(known, replace(plan, refit=True))
    assert all(torch.equal(a, b) for a, b in zip(second.parameters(), again.parameters(), strict=True))


def test_a_depthwise_layer_of_which_one_channel_is_left_keeps_its_weights() -> None:
    known = study(made(Residual), split(inputs(PICTURE, 100, 0)), classify=True)
    plan = FactorPlan((), channels=(ChannelPlan("wide", 1),))
    first, second = factored(known, plan), factored(known, replace(plan, refit=True))
    assert first.get_submodule("depthwise").weight.shape == (1, 1, 3, 3)
    assert torch.equal(first.get_submodule("depthwise").weight, second.get_submodule("depthwise").weight)
    assert not torch.equal(first.get_submodule("back").weight, second.get_submodule("back").weight)


class Rows(nn.Module):
    """Filters that see each channel by itself, as samples of their own; (N, 24, 8) → (N, 24, 8)."""

    def __init__(self) -> None:
        super().__init__()
        self.spread, self.each = nn.Linear(8, 48), nn.Conv1d(1, 4, 5, padding=2)
        self.mixed, self.last = nn.Conv1d(4, 1, 5, padding=2), nn.Linear(48, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows = self.spread(x).transpose(1, 2)
        rows = self.mixed(torch.relu(self.each(rows.reshape(-1, 1, rows.shape[2])))).reshape(rows.shape)
        return self.last(rows.transpose(1, 2))  # type: ignore[no-any-return]


def test_layers_that_see_fewer_channels_as_fewer_samples_keep_their_weights() -> None:
    known = study(made(Rows), split(inputs((24, 8), 64, 0)), classify=False)
    plan = FactorPlan((), channels=(ChannelPlan("spread", 20),), refit=True)
    result = factored(known, plan)
    for name in ("each", "mixed"):
        assert torch.equal(result.get_submodule(name).weight, known.folded.get_submodule(name).weight)
    assert result.get_submodule("spread").weight.shape == (20, 8)


class Along(nn.Module):
    """A layer over another axis, of which channels are the positions; (N, 24, 8) → (N, 24, 8)."""

    def __init__(self) -> None:
        super().__init__()
        self.spread, self.along, self.last = nn.Linear(8, 48), nn.Linear(24, 24), nn.Linear(48, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        mixed = torch.relu(self.along(torch.relu(self.spread(x)).transpose(1, 2)))
        return self.last(mixed.transpose(1, 2))  # type: ignore[no-any-return]


@pytest.mark.parametrize("count", [16, 64, 512])
def test_layers_that_see_fewer_channels_as_fewer_positions_keep_their_weights(count: int) -> None:
    known = study(made(Along), split(inputs((24, 8), count, 0)), classify=False)
    plan = FactorPlan((), channels=(ChannelPlan("spread", 20),), refit=True)
    result, told = factored(known, plan), known.second_passes[plan.digest]
    assert torch.equal(result.get_submodule("along").weight, known.folded.get_submodule("along").weight)
    assert told is not None
    assert told.after < 1.1 * told.before  # fitted to other channels it was five times as far away


def test_a_model_that_loses_nothing_is_returned_as_it_was() -> None:
    model = made(Encoder)
    same = copy.deepcopy(model)
    names = ["embed", "expand", "contract"]
    result = refit.refit(model, same, {"x": inputs(TOKENS, 32, 0)}, names, {}, classify=True)
    assert all(torch.equal(a, b) for a, b in zip(result.parameters(), model.parameters(), strict=True))


def test_transposed_convolutions_are_fitted() -> None:
    known = study(made(Up), split(inputs(PICTURE, 300, 0)), classify=True)
    plan = FactorPlan((LayerPlan("up", "project", 5, split="row"),), channels=(ChannelPlan("down", 8),))
    first, second = factored(known, plan), factored(known, replace(plan, refit=True))
    changed = {name for name, value in second.named_parameters() if not torch.equal(value, first.get_parameter(name))}
    assert {"up.expand.weight", "up.expand.bias", "wide.weight"} <= changed
    unseen = inputs(PICTURE, 400, 9)
    assert divergence(known.folded, second, unseen) < 0.95 * divergence(known.folded, first, unseen)


RANGES = {"kernel": (1, 4), "stride": (1, 3), "padding": (0, 2), "dilation": (1, 2), "more": (0, 2)}
PAIRS = {name: st.tuples(st.integers(*ends), st.integers(*ends)) for name, ends in RANGES.items()}
"""For height and width."""


@settings(max_examples=60, deadline=None)
@given(**PAIRS, lone=st.booleans(), each=st.sampled_from([1, 3]))
def test_patches_are_what_a_transposed_convolution_sees(
    kernel: Pair, stride: Pair, padding: Pair, dilation: Pair, more: Pair, lone: bool, each: int
) -> None:
    torch.manual_seed(0)
    more = tuple(min(each, max(pair) - 1) for each, *pair in zip(more, stride, dilation, strict=True))
    kind, shape, axes = (nn.ConvTranspose1d, (3, 2, 7), 1) if lone else (nn.ConvTranspose2d, (3, 2, 7, 5), 2)
    options = [values[:axes] for values in (kernel, stride, padding, more)]
    layer = kind(2, 4, *options, dilation=dilation[:axes]).double()
    x = torch.randn(shape, dtype=torch.float64)
    with torch.no_grad():
        wanted = layer(x).flatten(2).transpose(1, 2).reshape(3 // each, -1, 4)
        fit = refit._Fit("layer", None, 10**6, Layout(each=each))
        got = refit._inputs(layer, x, fit) @ torch.from_numpy(splits.matrix(layer)).T + layer.bias
    torch.testing.assert_close(got, wanted)


@settings(max_examples=40, deadline=None)
@given(
    **{key: PAIRS[key] for key in ("kernel", "stride", "padding", "dilation")},
    mode=st.sampled_from(["zeros", "reflect", "circular"]), lone=st.booleans(), each=st.sampled_from([1, 3]),
)  # fmt: skip
def test_patches_are_what_a_convolution_sees(
    kernel: Pair, stride: Pair, padding: Pair, dilation: Pair, mode: str, lone: bool, each: int
) -> None:
    torch.manual_seed(0)
    kind, shape, axes = (nn.Conv1d, (3, 2, 9), 1) if lone else (nn.Conv2d, (3, 2, 9, 8), 2)
    options = [values[:axes] for values in (kernel, stride, padding, dilation)]
    layer = kind(2, 4, *options, padding_mode=mode).double()
    x = torch.randn(shape, dtype=torch.float64)
    with torch.no_grad():
        wanted = layer(x).flatten(2).transpose(1, 2).reshape(3 // each, -1, 4)
        fit = refit._Fit("layer", None, 10**6, Layout(each=each))
        got = refit._inputs(layer, x, fit) @ layer.weight.flatten(1).T + layer.bias
    torch.testing.assert_close(got, wanted)


def test_what_came_of_it_is_told() -> None:
    model, near, far = made(Encoder), made(Encoder), made(Encoder)
    near.load_state_dict(model.state_dict())
    with torch.no_grad():
        far.expand.weight *= 0.5
    found: list[refit.SecondPass] = []
    for other in (near, far):
        refit.refit(model, other, {"x": inputs(TOKENS, 32, 0)}, ["expand"], {}, classify=True, told=found.append)
    assert [each.kept for each in found] == [False, True]
    assert found[0].before == found[0].after == 0.0
    assert found[1].after < 0.8 * found[1].before
    assert "not kept, as there was nothing to gain: 0.00e+00 → 0.00e+00" in found[0].note
    assert found[1].note.startswith("kept: ")
    assert "not kept, as it does not take away 20% of the loss" in refit.SecondPass(1.0, 0.9).note
    assert "not kept" in refit.SecondPass(float("nan"), 0.5).note
    assert "not kept" in refit.SecondPass(1.0, float("nan")).note


def test_what_could_not_be_judged_is_told_and_made_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs: list[str] = []
    made_by = apply.refit

    def counted(*given: Any, **more: Any) -> nn.Module:
        runs.append("once more")
        return made_by(*given, **more)

    monkeypatch.setattr(apply, "refit", counted)
    np.savez(tmp_path / "x.npz", x=inputs(TOKENS, 3, 0))
    found = rowcol_edge.factor(made(Encoder), calib=tmp_path / "x.npz", budget="params<=0.7x", contract="embed")
    assert found.second_pass.startswith("factored: second pass not made, as ")
    assert runs == ["once more"]


def test_too_few_samples_to_judge_change_nothing() -> None:
    model, other = made(Encoder), made(Encoder)
    with torch.no_grad():
        other.expand.weight *= 0.5
    assert refit.refit(model, other, {"x": inputs(TOKENS, 3, 0)}, ["expand"], {}, classify=True) is other


def test_half_precision_weights_keep_their_type() -> None:
    torch.manual_seed(0)
    model = Encoder().eval().to(torch.bfloat16)
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.expand.weight[:, 3:] = 0.0
    x = inputs(TOKENS, 64, 0).astype(np.float32)
    result = refit.refit(model, other, {"x": x}, ["expand", "contract"], {}, classify=True)
    assert all(parameter.dtype == torch.bfloat16 for parameter in result.parameters())
    tests = torch.from_numpy(inputs(TOKENS, 64, 1)).to(torch.bfloat16)
    with torch.inference_mode():
        errors = [float((net(tests) - model(tests)).float().square().mean()) for net in (other, result)]
    assert errors[1] < errors[0]
