"""Equalisation changes no output and evens out the channels between two layers."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize, prune

from rowcol_edge.errors import ModelError
from rowcol_edge.factoring.equalize import equalize
from rowcol_edge.factoring.graph import Coupling, trace

from ..nets import uneven_net


class Residual(nn.Module):
    """Of four consecutive pairs only a → b is coupled: b is read twice, c ends in a ReLU6, d in a mean."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.d = (nn.Conv2d(4, 4, 3, padding=1) for _ in range(4))
        self.head = nn.Linear(4, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.b(torch.relu(self.a(x)))
        x = self.d(nn.functional.relu6(self.c(x) + x))
        return self.head(torch.relu(x).mean((2, 3)))


def test_a_residual_another_nonlinearity_and_a_mean_do_not_couple() -> None:
    graph = trace(Residual(), {"x": torch.randn(1, 4, 8, 8)})
    assert graph.couplings == (Coupling("a", "b"),)


def test_a_weight_that_is_used_twice_does_not_couple() -> None:
    shared = nn.Linear(4, 4)
    assert trace(nn.Sequential(shared, nn.ReLU(), shared), {"input": torch.randn(2, 4)}).couplings == ()


class Doubling(nn.Module):
    def forward(self, bias: torch.Tensor) -> torch.Tensor:
        return 2.0 * bias


@pytest.mark.parametrize("way", ["parametrized", "masked", "of two layers"])
def test_a_bias_that_is_computed_or_somebody_elses_too_stays(way: str) -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), nn.Tanh()), torch.randn(16, 6)
    assert trace(model, {"input": x}).couplings == (Coupling("0", "2"),)
    if way == "parametrized":
        parametrize.register_parametrization(model[0], "bias", Doubling())
    elif way == "masked":
        prune.l1_unstructured(model[0], "bias", 4)
    else:
        model[0].bias = model[2].bias
    graph = trace(model, {"input": x})
    assert graph.couplings == ()
    with torch.no_grad():
        assert torch.allclose(equalize(model, graph)(x), model(x), atol=1e-6)


def test_outputs_stay_and_ranges_meet() -> None:
    model = uneven_net()
    x = torch.randn(6, 1, 16, 16)
    graph = trace(model, {"x": x[:1]})
    assert graph.couplings == (Coupling("first", "depthwise"), Coupling("depthwise", "last"))
    equal = equalize(model, graph)
    with torch.inference_mode():
        assert torch.allclose(equal(x), model(x), rtol=1e-4, atol=1e-5)
    after = [equal.get_submodule(name).weight.detach() for name in ("first", "depthwise", "last")]
    before, middle, behind = (
        after[0].abs().amax((1, 2, 3)),
        after[1].abs().amax((1, 2, 3)),
        after[2].abs().amax((0, 2, 3)),
    )
    assert torch.allclose(before, middle, rtol=0.01)
    assert torch.allclose(middle, behind, rtol=0.01)


def test_the_callers_model_and_unused_channels_stay() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    with torch.no_grad():
        model[0].weight[1] = 0.0
        model[2].weight[:, 2] = 0.0
    before = {key: value.clone() for key, value in model.state_dict().items()}
    equal = equalize(model, trace(model, {"input": torch.randn(2, 3)}))
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert torch.equal(equal[2].weight[:, 1], model[2].weight[:, 1])
    assert all(torch.isfinite(value).all() for value in equal.state_dict().values())
    x = torch.randn(5, 3)
    assert torch.allclose(equal(x), model(x), atol=1e-5)


def test_a_graph_of_another_model_is_refused() -> None:
    graph = trace(uneven_net(), {"x": torch.randn(1, 1, 16, 16)})
    with pytest.raises(ModelError, match="another model"):
        equalize(nn.Linear(2, 2), graph)


def test_parts_in_a_gauge_of_their_own_keep_it() -> None:
    """Not so the channels between them and the layers around."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(3, 4), nn.ReLU(), nn.Sequential(nn.Linear(4, 2, bias=False), nn.Linear(2, 5)), nn.ReLU(),
        nn.Linear(5, 2),
    )  # fmt: skip
    graph = trace(model, {"input": torch.randn(2, 3)})
    assert Coupling("2.0", "2.1") in graph.couplings
    free, kept = equalize(model, graph), equalize(model, graph, ["2"])
    x = torch.randn(5, 3)
    with torch.no_grad():
        before, after = model[2][0](model[1](model[0](x))), kept[2][0](kept[1](kept[0](x)))
        assert torch.allclose(after, before, atol=1e-5)
        assert not torch.allclose(free[2][0](free[1](free[0](x))), before, atol=1e-3)
        assert torch.allclose(kept(x), model(x), atol=1e-5)
    assert not torch.equal(kept[0].weight, model[0].weight)
    assert not torch.equal(kept[4].weight, model[4].weight)
