"""Layers are replaced wherever they are."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

from rowcol_edge.datasets import Split, scan
from rowcol_edge.factoring import fold, graph
from rowcol_edge.factoring.apply import factored
from rowcol_edge.factoring.plan import FactorPlan, LayerPlan
from rowcol_edge.factoring.study import study

X = np.random.default_rng(0).normal(size=(64, 16))


def calibration() -> Split:
    return scan(Split("calibration", "random", lambda: iter([({"x": X}, None)])))


def outputs(model: nn.Module, x: np.ndarray = X) -> np.ndarray:
    with torch.inference_mode():
        return np.asarray(model(torch.from_numpy(x)).numpy())


class TwoNames(nn.Module):
    """Layers that the code calls by the second of two names."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(16, 32), nn.BatchNorm1d(32), nn.Linear(32, 16)
        self.whole = nn.Sequential(self.first, self.norm, nn.ReLU(), self.last)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.whole(x)  # type: ignore[no-any-return]


def two_names() -> nn.Module:
    torch.manual_seed(0)
    model = TwoNames().double()
    for _ in range(3):
        model(torch.randn(64, 16, dtype=torch.float64) + 1)
    return model.eval()


def test_a_layer_of_two_names_is_replaced_under_both() -> None:
    model = two_names()
    known = study(model, calibration())
    np.testing.assert_allclose(outputs(known.folded), outputs(model), atol=1e-12)
    assert not any(info.skip for info in known.infos.values())
    result = factored(known, FactorPlan((LayerPlan("first", "project", 4),)))
    assert result.first is result.whole[0]
    assert sum(p.numel() for p in result.parameters()) < known.parameters
    assert np.abs(outputs(result) - outputs(model)).max() > 1e-3


def test_a_batch_norm_of_two_names_is_folded_under_both() -> None:
    model = two_names()
    traced = graph.trace(model, {"x": torch.from_numpy(X[:2])})
    assert [pair.norm for pair in traced.batchnorms] == ["norm"]
    folded = fold.fold_batchnorm(model, traced)
    np.testing.assert_allclose(outputs(folded), outputs(model), atol=1e-12)
    assert not any(isinstance(module, nn.BatchNorm1d) for module in folded.modules())
