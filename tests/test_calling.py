"""Kernels channels last: the same numbers, and the model as it was afterwards. Calls: seen, or refused by name."""

from __future__ import annotations

import contextlib

import pytest
import torch
from torch import nn

from rowcol_edge import calling
from rowcol_edge.errors import ModelError
from rowcol_edge.factoring import graph

EXAMPLE = {"x": torch.randn(2, 3, 9, 9, generator=torch.Generator().manual_seed(0))}


class Net(nn.Module):
    def __init__(self, *, viewed: bool) -> None:
        super().__init__()
        self.viewed = viewed
        self.conv, self.shared = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3)
        self.place = nn.Parameter(torch.zeros(1, 8, 3, 3))
        self.head = nn.Linear(8 * 49, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.shared(self.conv(x)) + self.place.view(1, -1).mean()
        flat = x.view(len(x), -1) if self.viewed else x.flatten(1)
        result: torch.Tensor = self.head(flat)
        return result


def last(weight: torch.Tensor) -> bool:
    return weight.is_contiguous(memory_format=torch.channels_last) and not weight.is_contiguous()


@pytest.mark.parametrize("viewed", [False, True])
def test_it_runs_where_the_model_runs_so_and_is_left_as_it_was(viewed: bool) -> None:
    model = Net(viewed=viewed).eval()
    wanted = model(**EXAMPLE)
    before = {name: (value, value.stride()) for name, value in model.state_dict().items()}
    with calling.channels_last(model, EXAMPLE):
        assert last(model.conv.weight) is not viewed
        assert model.place.is_contiguous()
        torch.testing.assert_close(model(**EXAMPLE), wanted)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name][0])
        assert value.stride() == before[name][1]


def test_an_error_inside_leaves_it_as_it_was() -> None:
    model = Net(viewed=False)
    with contextlib.suppress(KeyError), calling.channels_last(model, EXAMPLE):
        assert last(model.conv.weight)
        raise KeyError
    assert model.conv.weight.is_contiguous()


class Judging(nn.Module):
    """Its forward is in inference mode."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    @torch.inference_mode()
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.inner(x)
        return result


class JudgingLayer(nn.Linear):
    @torch.inference_mode()
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x)


@pytest.mark.parametrize(
    ("model", "says"),
    [
        (Judging(nn.Linear(9, 2)), "the model: .*one under torch.inference_mode.* – take it out of the forward"),
        (nn.Sequential(nn.ReLU(), Judging(Judging(nn.Linear(9, 2)))), "module '1': .*torch.inference_mode"),
        (nn.Sequential(nn.ReLU(), JudgingLayer(9, 2)), "module '1': .*torch.inference_mode"),
    ],
)
def test_a_forward_in_inference_mode_is_refused_by_name(model: nn.Module, says: str) -> None:
    with pytest.raises(ModelError, match=says):
        graph.trace(model, EXAMPLE)
    with torch.inference_mode(), calling.watching(model) as calls:  # the mode of who calls is no fault of the model
        model(EXAMPLE["x"])
    assert calls.counts[""] == 1
