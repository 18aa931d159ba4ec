"""Errors of a tied weight's products are those of its scales."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import nn

from rowcol_edge.factoring.tied_kernels import TiedKernels
from rowcol_edge.factoring.ties import TiedFeedForward


@pytest.fixture
def script(root: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(root / "tools")
    return importlib.import_module("benchmark_tied_scales")


def layers() -> list[tuple[nn.Module, torch.Tensor]]:
    torch.manual_seed(0)
    return [
        (TiedFeedForward(16, 64), torch.randn(8, 5, 16)),
        (TiedKernels(torch.randn(24, 16, 3, 3), nn.ReLU()), torch.randn(8, 16, 6, 6)),
    ]


@pytest.mark.parametrize("number", [0, 1])
def test_uneven_rows_round_less_with_a_scale_each_and_are_undone_in_the_second_product(
    script: ModuleType, number: int
) -> None:
    layer, x = layers()[number]
    with torch.no_grad():
        layer.weight[::2] *= 30.0
        made = {scales: script.errors(script.pair_of(layer), x, x, scales) for scales in script.SCALES}
    assert made["row"]["first"] < made["tensor"]["first"]
    assert all(0.0 < error < 0.05 for errors in made.values() for error in errors.values())


@pytest.mark.parametrize("number", [0, 1])
def test_rows_of_one_range_have_one_scale(script: ModuleType, number: int) -> None:
    layer, x = layers()[number]
    with torch.no_grad():
        layer.weight /= layer.weight.abs().amax(tuple(range(1, layer.weight.dim())), keepdim=True)
        tensor, row = (script.errors(script.pair_of(layer), x, x, scales) for scales in script.SCALES)
    assert tensor == pytest.approx(row, rel=1e-3)
