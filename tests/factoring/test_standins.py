"""Layers that the model's code does more with than call them stay, and the others are replaced wherever they are."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from rowcol_edge.datasets import Split, scan
from rowcol_edge.errors import PlanError
from rowcol_edge.factoring import fold, graph, ranks, standins
from rowcol_edge.factoring.apply import factored
from rowcol_edge.factoring.plan import FactorPlan, LayerPlan
from rowcol_edge.factoring.study import study

NAMES = ("plain", "typed", "sized", "checked", "switched", "listed", "looked_up", "last")
X = np.random.default_rng(0).normal(size=(64, 16))


class Curious(nn.Module):
    """A layer for each way to look at one."""

    def __init__(self) -> None:
        super().__init__()
        for name in NAMES:
            self.add_module(name, nn.Linear(16, 16))
        self.held = [self.listed]
        self.runs = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.runs += 1
        x = F.relu(self.plain(x)).to(self.typed.weight.dtype)  # as T5 does
        x = F.relu(self.typed(x))
        x = F.relu(self.sized(x)[:, : self.sized.out_features])
        if not isinstance(self.checked, nn.Linear):
            raise TypeError("a linear layer")
        x = F.relu(self.checked(x))
        x = F.relu(self.switched(x)) if isinstance(self.switched, nn.Linear) else 2 * F.relu(self.switched(x))
        x = F.relu(self.held[0](x))
        x = F.relu(self.looked_up(x)) + 0 * self.get_parameter("looked_up.bias")
        return self.last(x)  # type: ignore[no-any-return]


def curious() -> Curious:
    torch.manual_seed(0)
    return Curious().double().eval()


def calibration() -> Split:
    return scan(Split("calibration", "random", lambda: iter([({"x": X}, None)])))


def outputs(model: nn.Module, x: np.ndarray = X) -> np.ndarray:
    with torch.inference_mode():
        return np.asarray(model(torch.from_numpy(x)).numpy())


def test_layers_that_are_looked_at_stay_with_the_reason() -> None:
    model = curious()
    before, modules = copy.deepcopy(model.state_dict()), dict(model.named_modules())
    model.train()
    assert standins.refused(model, NAMES, {"x": torch.from_numpy(X[:2])}) == {
        "typed": "the model's code reads its weight",
        "sized": "the model's code reads its out_features",
        "checked": "the model's code takes nothing else in its place",
        "switched": "the model's code takes nothing else in its place",
        "listed": "the model's code calls it by a reference that nothing else can be put in",
        "looked_up": "the model's code reads its bias",
    }
    assert dict(model.named_modules()) == modules
    assert all(module.training for module in modules.values())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_two_runs_are_enough_where_code_only_reads() -> None:
    model = curious()
    found = standins.refused(model, ["plain", "typed", "sized", "last"], {"x": torch.from_numpy(X[:2])})
    assert (set(found), model.runs) == ({"typed", "sized"}, 2)
    assert standins.refused(model, [], {"x": torch.from_numpy(X[:2])}) == {}


def test_a_model_with_noise_is_compared_at_equal_noise() -> None:
    class Noisy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(16, 16), nn.Linear(16, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.last(F.relu(self.first(x)) + torch.randn(16))  # type: ignore[no-any-return]

    model = Noisy()
    state = torch.get_rng_state()
    assert standins.refused(model, ["first", "last"], {"x": torch.from_numpy(X[:2]).float()}) == {}
    assert torch.equal(torch.get_rng_state(), state)


def test_what_is_left_to_a_plan_runs() -> None:
    known = study(curious(), calibration())
    free = [name for name, info in known.infos.items() if not info.skip]
    assert free == ["plain", "last"] == list(known.spaces)
    plan = FactorPlan(tuple(LayerPlan(name, "project", 8) for name in free))
    assert outputs(factored(known, plan)).shape == (64, 16)
    wrong = FactorPlan((LayerPlan("typed", "project", 4),))
    with pytest.raises(PlanError, match="'typed' cannot be factored: the model's code reads its weight"):
        ranks.refresh(wrong, known.infos, known.spaces)


class TwoNames(nn.Module):
    """Layers that the code calls by the second of two names."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(16, 32), nn.BatchNorm1d(32), nn.Linear(32, 16)
        self.whole = nn.Sequential(self.first, self.norm, nn.ReLU(), self.last)
        self.norms = [self.norm]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.whole(x)  # type: ignore[no-any-return]


def two_names(kind: type[nn.Module] = TwoNames) -> nn.Module:
    torch.manual_seed(0)
    model = kind().double()
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


def test_a_batch_norm_is_folded_wherever_the_code_finds_it() -> None:
    class Listed(TwoNames):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.last(F.relu(self.norms[0](self.first(x))))  # type: ignore[no-any-return]

    for model in (two_names(), two_names(Listed)):
        traced = graph.trace(model, {"x": torch.from_numpy(X[:2])})
        assert [pair.norm for pair in traced.batchnorms] == ["norm"]
        folded = fold.fold_batchnorm(model, traced)
        np.testing.assert_allclose(outputs(folded), outputs(model), atol=1e-12)
        assert not any(isinstance(module, nn.BatchNorm1d) for module in folded.modules())
