"""Folding changes no output."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

from rowcol_edge.datasets import Split, scan
from rowcol_edge.errors import ModelError
from rowcol_edge.factoring.fold import fold_batchnorm
from rowcol_edge.factoring.graph import trace
from rowcol_edge.factoring.study import study


def _random_norms(model: nn.Module) -> nn.Module:
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.2, 3.0)
            if module.affine:
                nn.init.normal_(module.weight)
                nn.init.normal_(module.bias)
    return model.eval()


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_outputs_stay(affine: bool, bias: bool) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(2, 6, 3, bias=bias),
        nn.BatchNorm2d(6, affine=affine),
        nn.ReLU(),
        nn.Conv2d(6, 6, 3, groups=6, bias=bias),
        nn.BatchNorm2d(6, affine=affine),
        nn.Flatten(),
        nn.Linear(6 * 16, 5, bias=bias),
        nn.BatchNorm1d(5, affine=affine),
    )
    _random_norms(model)
    x = torch.randn(4, 2, 8, 8)
    with torch.no_grad():
        before = model(x)
        folded = fold_batchnorm(model, trace(model, {"input": x}))
        after = folded(x)
    assert float((after - before).norm() / before.norm()) < 1e-5
    assert not any(isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d) for module in folded.modules())
    assert isinstance(model[1], nn.BatchNorm2d)
    with torch.no_grad():
        assert torch.equal(model(x), before)


class BiasReader(nn.Module):
    """Reads the bias of a layer beside calling it."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Conv2d(2, 6, 3), nn.BatchNorm2d(6), nn.Conv2d(6, 3, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        pictures: torch.Tensor = self.last(torch.relu(self.norm(self.first(x)))) - self.first.bias.mean()
        return pictures


def _masked() -> nn.Module:
    model = nn.Sequential(nn.Conv2d(2, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 3, 1))
    prune.random_unstructured(model[0], "bias", 0.5)
    return model


def _one_bias() -> nn.Module:
    model = nn.Sequential(nn.Conv2d(2, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 6, 1))
    model[3].bias = model[0].bias
    return model


@pytest.mark.parametrize("made", [BiasReader, _masked, _one_bias])
def test_a_bias_that_is_computed_or_somebody_elses_too_is_left(made: Callable[[], nn.Module]) -> None:
    torch.manual_seed(0)
    model, x = _random_norms(made()), torch.randn(4, 2, 8, 8)
    graph = trace(model, {"input" if isinstance(model, nn.Sequential) else "x": x})
    assert graph.batchnorms == ()
    with torch.no_grad():
        assert torch.allclose(fold_batchnorm(model, graph)(x), model(x), atol=1e-6)


@pytest.mark.parametrize("bias", [True, False])
def test_transposed_and_one_dimensional_convolutions(bias: bool) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv1d(2, 6, 3, bias=bias),
        nn.BatchNorm1d(6),
        nn.ConvTranspose1d(6, 4, 4, stride=2, bias=bias),
        nn.BatchNorm1d(4),
        nn.ReLU(),
        nn.Unflatten(2, (6, 3)),
        nn.ConvTranspose2d(4, 4, 3, stride=2, output_padding=1, bias=bias),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.ConvTranspose2d(4, 4, 2, groups=4, bias=bias),
        nn.BatchNorm2d(4),
    )
    _random_norms(model)
    x = torch.randn(4, 2, 10)
    folded = fold_batchnorm(model, trace(model, {"input": x}))
    with torch.no_grad():
        before, after = model(x), folded(x)
    assert float((after - before).norm() / before.norm()) < 1e-5
    left = [name for name, module in folded.named_modules() if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d)]
    assert left == ["10"]  # behind a grouped transposed convolution


class _Activated(nn.BatchNorm2d):
    """As timm's: it holds what it calls behind itself."""

    def __init__(self, features: int) -> None:
        super().__init__(features)
        self.drop, self.act = nn.Identity(), nn.Hardswish(inplace=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.act(self.drop(super().forward(x)))


class _Cut(nn.BatchNorm2d):
    """It computes what no module of its own does."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(super().forward(x))


class _Turned(_Activated):
    """What it holds comes first."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.BatchNorm2d.forward(self, self.act(self.drop(x)))


def _hooked(features: int) -> nn.Module:
    norm = nn.BatchNorm2d(features)
    norm.register_forward_hook(lambda module, args, output: output.clamp(min=0))
    return norm


def _replaced(features: int) -> nn.Module:
    norm = nn.BatchNorm2d(features)
    norm.forward = lambda x: torch.relu(nn.BatchNorm2d.forward(norm, x))  # type: ignore[method-assign]
    return norm


@pytest.mark.parametrize(
    ("norm", "folds"), [(_Activated, True), (_Cut, False), (_Turned, False), (_hooked, False), (_replaced, False)]
)
def test_what_a_norm_computes_besides_stays(norm: Callable[[int], nn.Module], folds: bool) -> None:
    torch.manual_seed(0)
    model = _random_norms(nn.Sequential(nn.Conv2d(2, 6, 3, bias=False), norm(6), nn.Conv2d(6, 3, 3)))
    x = torch.randn(4, 2, 8, 8)
    graph = trace(model, {"input": x})
    with torch.no_grad():
        before, after = model(x.clone()), fold_batchnorm(model, graph)(x.clone())
    assert len(graph.batchnorms) == folds
    assert float((after - before).norm() / before.norm()) < 1e-5


@pytest.mark.parametrize("name", ["mobilenetv3_small_050", "ghostnet_050"])
def test_norms_of_timm_fold_with_their_activations(name: str) -> None:
    import timm

    torch.manual_seed(0)
    model = _random_norms(timm.create_model(name, num_classes=5))
    x = torch.randn(2, 3, 64, 64)
    graph = trace(model, {"x": x})
    norms = sum(isinstance(module, nn.BatchNorm2d) for module in model.modules())
    with torch.no_grad():
        before, after = model(x), fold_batchnorm(model, graph)(x)
    assert len(graph.batchnorms) == norms
    assert float((after - before).norm() / before.norm()) < 1e-4


class _Asking(nn.Module):
    """Its code reads an attribute of the norm, which nothing that takes its place has."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Conv2d(2, 6, 3), nn.BatchNorm2d(6), nn.Conv2d(6, 3, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(torch.relu(self.norm(self.first(x)))) / self.norm.num_features


def test_a_model_that_asks_its_norms_keeps_them() -> None:
    torch.manual_seed(0)
    model = _random_norms(_Asking())
    inputs = torch.randn(8, 2, 8, 8)
    split = scan(Split("calibration", "random", lambda: iter([({"x": inputs.numpy()}, None)])))
    known = study(model, split, classify=False)
    assert known.graph.batchnorms == ()
    assert isinstance(known.dense.norm, nn.BatchNorm2d)
    assert set(known.spaces) == {"first", "last"}
    with torch.no_grad():
        assert torch.equal(known.dense(inputs), model(inputs))


def test_half_precision_keeps_its_type() -> None:
    model = _random_norms(nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4))).to(torch.bfloat16)
    x = torch.randn(2, 1, 6, 6, dtype=torch.bfloat16)
    folded = fold_batchnorm(model, trace(model, {"input": x}))
    assert folded[0].weight.dtype == torch.bfloat16
    with torch.no_grad():
        assert float((folded(x) - model(x)).float().norm() / model(x).float().norm()) < 0.03


def test_graph_of_another_model() -> None:
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4))
    graph = trace(model, {"input": torch.randn(1, 1, 5, 5)})
    with pytest.raises(ModelError, match="another model"):
        fold_batchnorm(nn.Sequential(nn.Conv2d(1, 4, 3)), graph)
    with pytest.raises(ModelError, match="another model"):
        fold_batchnorm(nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU()), graph)
