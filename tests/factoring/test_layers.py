"""Costs against real modules, and every reason to leave a layer."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from rowcol_edge.factoring.costs import Form, LayerInfo, Split
from rowcol_edge.factoring.graph import trace
from rowcol_edge.factoring.layers import describe, skip_reasons, survey


class Own(nn.Linear):
    """A linear layer with another meaning."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) + 1


class OwnKernel(nn.Conv2d):
    """A convolution with another kernel than its weight."""

    def _conv_forward(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        return super()._conv_forward(x, weight - weight.mean(), bias)


class Zoo(nn.Module):
    """One layer for each reason."""

    def __init__(self) -> None:
        super().__init__()
        self.good = nn.Linear(16, 16)
        self.shared = nn.Linear(16, 16)
        self.tied_a = nn.Linear(16, 16)
        self.tied_b = nn.Linear(16, 16)
        self.tied_b.weight = self.tied_a.weight
        self.parametrized = nn.utils.parametrizations.weight_norm(nn.Linear(16, 16))
        self.own = Own(16, 16)
        self.borrowed = nn.Linear(16, 16)
        self.read_twice = nn.Linear(16, 16)
        self.never = nn.Linear(16, 16)
        self.tiny = nn.Linear(16, 1)
        self.factored_a = nn.Linear(16, 4)
        self.factored_b = nn.Linear(4, 16)
        self.grouped = nn.Conv2d(4, 8, 1, groups=2)
        self.depthwise = nn.Conv2d(8, 8, 3, groups=8)
        self.signal = nn.Conv1d(8, 8, 1)
        self.wider = nn.ConvTranspose1d(8, 8, 2, stride=2)
        self.resized = nn.ConvTranspose1d(8, 8, 3, stride=2)
        self.volume = nn.Conv3d(8, 8, 1)
        self.kernel = OwnKernel(8, 8, 1)
        self.patched = nn.Linear(16, 16)
        self.patched.forward = lambda x: x
        self.hooked = nn.Linear(16, 16)
        self.hooked.register_forward_hook(lambda module, args, output: output * 2)
        self.broken = nn.Linear(16, 16)
        nn.init.constant_(self.broken.weight, float("nan"))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = F.linear(F.relu(self.good(x)), self.borrowed.weight)
        for layer in (self.shared, self.shared, self.tied_a, self.tied_b, self.parametrized, self.own, self.read_twice):
            y = F.relu(layer(y))
        y = F.relu(y + self.read_twice.weight.sum())
        y = F.relu(self.hooked(self.factored_b(self.factored_a(y)).relu()))
        image = self.depthwise(F.relu(self.grouped(y.reshape(-1, 4, 2, 2))).repeat(1, 1, 2, 2))
        z = self.wider(F.relu(self.signal(F.relu(self.kernel(image)).flatten(2))))
        z = self.resized(F.relu(z), output_size=[2 * z.shape[-1] + 2])
        z = self.volume(F.relu(z)[..., None, None])
        y = self.patched(y)
        return self.tiny(y) + z.mean() + self.broken(y).sum()


def test_every_reason() -> None:
    model = Zoo()
    infos = survey(model, trace(model, {"x": torch.randn(2, 16)}))
    reasons = {name: info.skip for name, info in infos.items()}
    assert [reasons.pop(name) for name in ("good", "signal", "wider")] == ["", "", ""]
    assert reasons.pop("parametrized") == "its weight is parametrized"
    assert reasons == {
        "shared": "shared: called 2 times",
        "tied_a": "its weight is tied to another module",
        "tied_b": "its weight is tied to another module",
        "own": "Own has a forward of its own",
        "borrowed": "its weight is used without calling it",
        "read_twice": "its weight is used without calling it",
        "never": "never called",
        "tiny": "too small to factor",
        "factored_a": "already factored: rank 4 with factored_b",
        "factored_b": "already factored: rank 4 with factored_a",
        "grouped": "grouped convolution (2 groups)",
        "depthwise": "depthwise convolution",
        "resized": "called with an output size beside its input",
        "volume": "Conv3d is not factored",
        "kernel": "OwnKernel has a forward of its own",
        "patched": "Linear has a forward of its own",
        "hooked": "hooks are attached to it",
        "broken": "its weight is not finite floating point",
    }


def test_static_reasons_need_no_run() -> None:
    reasons = skip_reasons(Zoo())
    assert reasons["good"] == reasons["shared"] == reasons["never"] == ""
    assert reasons["own"]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    ("whole", "reduce", "expand", "outputs"),
    [
        (partial(nn.Linear, 20, 12), partial(nn.Linear, 20, 3), nn.Linear(3, 12), 7),
        (partial(nn.Conv1d, 5, 12, 3), partial(nn.Conv1d, 5, 3, 3), nn.Conv1d(3, 12, 1), 7),
        (partial(nn.Conv2d, 5, 12, (3, 2)), partial(nn.Conv2d, 5, 3, (3, 2)), nn.Conv2d(3, 12, 1), 7),
        (partial(nn.ConvTranspose1d, 5, 12, 4), partial(nn.ConvTranspose1d, 5, 3, 4), nn.Conv1d(3, 12, 1), 30),
        (partial(nn.ConvTranspose2d, 5, 12, 2), partial(nn.ConvTranspose2d, 5, 3, 2), nn.Conv2d(3, 12, 1), 28),
    ],
)
def test_costs_match_modules(
    whole: Callable[..., nn.Module], reduce: Callable[..., nn.Module], expand: nn.Module, outputs: int, bias: bool
) -> None:
    module, first = whole(bias=bias), reduce(bias=False)
    info = describe("x", module, positions=7, outputs=outputs)
    assert info.parameters == sum(p.numel() for p in module.parameters())
    assert info.macs == module.weight.numel() * 7
    assert info.split_parameters(Split(Form.COLUMN, 3)) == sum(
        p.numel() for part in (first, expand) for p in part.parameters()
    )
    assert info.split_macs(Split(Form.COLUMN, 3)) == first.weight.numel() * 7 + expand.weight.numel() * outputs


@pytest.mark.parametrize("bias", [True, False])
def test_break_even_is_the_last_rank_that_saves(bias: bool) -> None:
    for inputs, outputs in [(1, 1), (2, 3), (16, 16), (15, 40), (64, 10), (100, 1)]:
        info = LayerInfo("x", "linear", inputs, outputs, bias=bias)
        saving = [
            rank for rank in range(1, outputs + 1) if info.split_parameters(Split(Form.COLUMN, rank)) < info.parameters
        ]
        assert info.break_even == max(saving, default=0)


class Same(nn.Linear):
    """It computes what torch's does, in words of its own."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.weight.T + self.bias


class Scaled(Same):
    """What it holds beside may count some day."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs)
        self.register_buffer("scale", torch.ones(1))


class Padded(nn.Conv2d):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(F.pad(x, (1, 0, 1, 0)))


@pytest.mark.parametrize(
    ("layer", "reason"),
    [
        (Same(16, 16), ""),
        (Scaled(16, 16), "Scaled has a forward of its own"),
        (Own(16, 16), "Own has a forward of its own"),
        (Padded(16, 16, 3), "Padded has a forward of its own"),
    ],
)
def test_a_forward_of_its_own_counts_where_it_computes_something_else(layer: nn.Module, reason: str) -> None:
    assert skip_reasons(nn.Sequential(layer)) == {"0": reason}
