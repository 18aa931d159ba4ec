"""Models and data that are not what one hopes for: handled, or refused with the layer's name."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import nn

from rowcol_edge import models
from rowcol_edge.errors import ModelError, PlanError
from rowcol_edge.factoring.apply import apply
from rowcol_edge.factoring.fold import fold_batchnorm
from rowcol_edge.factoring.graph import trace
from rowcol_edge.factoring.layers import survey
from rowcol_edge.factoring.plan import FactorPlan, LayerPlan
from rowcol_edge.factoring.ranks import plan_by_energy, refresh
from rowcol_edge.factoring.spaces import LayerSpaces, collect

RNG = np.random.default_rng(0)
LAYERS = {
    "conv1d": (nn.Conv1d(3, 6, 3, padding=1, padding_mode="circular"), (5, 3, 8)),
    "conv2d": (nn.Conv2d(3, 6, 3, padding=1, padding_mode="circular"), (5, 3, 8, 6)),
    "convtranspose1d": (nn.ConvTranspose1d(3, 6, 2, stride=2), (5, 3, 8)),
    "convtranspose2d": (nn.ConvTranspose2d(3, 6, 2, stride=2), (5, 3, 4, 6)),
}


def _case(kind: str) -> tuple[nn.Sequential, np.ndarray]:
    layer, shape = LAYERS[kind]
    torch.manual_seed(0)
    layer = copy.deepcopy(layer)
    layer.reset_parameters()
    return nn.Sequential(layer), RNG.normal(2.0, 1.0, shape).astype(np.float32)


def _plan(name: str, rank: int) -> FactorPlan:
    return FactorPlan((LayerPlan(name, "project", rank),))


def _project(model: nn.Module, x: np.ndarray, rank: int) -> tuple[nn.Module, LayerSpaces]:
    spaces = collect(model, [{"input": x}], ["0"], row_space=True)
    return apply(model, _plan("0", rank), spaces), spaces["0"]


def _outputs(model: nn.Module, x: np.ndarray) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.from_numpy(x))


@pytest.mark.parametrize("kind", LAYERS)
def test_zero_weights_and_dead_channels(kind: str) -> None:
    model, x = _case(kind)
    weight, bias = model[0].weight.data, model[0].bias.data
    outputs = weight.transpose(0, 1) if "transpose" in kind else weight
    outputs[[0, 3]] = 0.0
    bias[3] = 0.0
    factored, spaces = _project(model, x, 4)  # four channels live, so nothing is lost
    assert not spaces.constant
    assert np.count_nonzero(spaces.eigenvalues > 1e-9 * spaces.eigenvalues[0]) <= 4
    assert torch.allclose(_outputs(factored, x), _outputs(model, x), atol=1e-5)
    weight.zero_()
    factored, spaces = _project(model, x, 1)
    assert torch.allclose(_outputs(factored, 100 * x), _outputs(model, 100 * x), atol=1e-6)


@pytest.mark.parametrize("kind", ["conv1d", "conv2d"])
def test_constant_activations(kind: str) -> None:
    model, x = _case(kind)
    x = np.full_like(x, 0.3)
    factored, spaces = _project(model, x, 1)
    assert spaces.constant
    assert spaces.row_eigenvalues is not None
    assert not spaces.row_eigenvalues.any()
    assert torch.allclose(_outputs(factored, x), _outputs(model, x), atol=1e-5)
    infos = survey(model, trace(model, {"input": torch.from_numpy(x)}))
    layer = plan_by_energy(infos, {"0": spaces}, 0.9).layers[0]
    assert (layer.form, layer.reason) == ("dense", "its output is constant on the calibration data")


@pytest.mark.parametrize("kind", LAYERS)
def test_one_sample_is_reproduced(kind: str) -> None:
    model, x = _case(kind)
    positions = 1 if kind.startswith("convtranspose") else 3
    x = x[:1, ..., :positions] if x.ndim == 3 else x[:1, :, :1, :positions]
    factored, spaces = _project(model, x, 4)  # at most four positions, so three directions
    assert spaces.samples <= 4
    assert torch.allclose(_outputs(factored, x), _outputs(model, x), atol=1e-5)


@pytest.mark.parametrize("kind", LAYERS)
def test_channels_last_and_half_precision_give_the_same_layer(kind: str) -> None:
    model, x = _case(kind)
    before = _outputs(_project(model, x, 6)[0], x)
    if x.ndim == 4:
        last = copy.deepcopy(model).to(memory_format=torch.channels_last)
        assert last[0].weight.is_contiguous(memory_format=torch.channels_last)
        assert torch.allclose(_outputs(_project(last, x, 6)[0], x), before, atol=1e-5)
    half, _ = _project(model.to(torch.bfloat16), x, 6)
    assert {value.dtype for value in half.state_dict().values()} == {torch.bfloat16}
    with torch.no_grad():
        after = half(torch.from_numpy(x).bfloat16()).float()
    assert float((after - before).norm() / before.norm()) < 0.03


def test_a_whole_model_in_half_precision_and_channels_last() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.ConvTranspose2d(16, 8, 2, stride=2), nn.BatchNorm2d(8)
    ).eval()
    x = RNG.normal(size=(4, 3, 8, 8)).astype(np.float32)
    wanted = _outputs(model, x)
    changed = copy.deepcopy(model).to(torch.bfloat16, memory_format=torch.channels_last)
    plan = FactorPlan((LayerPlan("0", "project", 16), LayerPlan("3", "project", 8)))
    for given, tolerance in ((model, 1e-5), (changed, 0.05)):
        example = {"input": torch.from_numpy(x).to(given[0].weight.dtype)}
        graph = trace(given, example)
        folded = fold_batchnorm(given, graph)
        assert {info.skip for info in survey(folded, graph).values()} == {""}
        factored = apply(folded, plan, collect(folded, [{"input": x}], ["0", "3"]))
        with torch.no_grad():
            got = factored(example["input"]).float()
        assert float((got - wanted).norm() / wanted.norm()) < tolerance


class Word(nn.Module):
    """An embedding tied to the layer that tells the next word, one layer used twice, one never."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(20, 16)
        self.twice = nn.Linear(16, 16)
        self.once = nn.Linear(16, 16)
        self.unused = nn.Conv1d(16, 16, 1)
        self.told = nn.Linear(16, 20, bias=False)
        self.told.weight = self.words.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.twice(torch.relu(self.twice(self.words(ids)))))
        return self.told(torch.relu(self.once(x)))


def test_tied_embeddings_shared_and_unused_layers_are_named() -> None:
    torch.manual_seed(0)
    model, ids = Word().eval(), RNG.integers(0, 20, (6, 5))
    infos = survey(model, trace(model, {"ids": torch.from_numpy(ids)}))
    assert {name: info.skip for name, info in infos.items()} == {
        "twice": "shared: called 2 times",
        "once": "",
        "unused": "never called",
        "told": "its weight is tied to another module",
    }
    spaces = collect(model, [{"ids": ids}], ["once"])
    for name in ("twice", "unused", "told"):
        with pytest.raises(PlanError, match=f"layer '{name}' cannot be factored"):
            refresh(_plan(name, 2), infos, spaces)
    with pytest.raises(PlanError, match="layer 'told' cannot be factored: its weight is tied"):
        apply(model, _plan("told", 2), spaces)
    factored = apply(model, _plan("once", 16), spaces)
    assert factored.told.weight is factored.words.weight
    with torch.no_grad():
        assert torch.allclose(factored(torch.from_numpy(ids)), model(torch.from_numpy(ids)), atol=1e-5)


@pytest.mark.parametrize("norm", [nn.utils.parametrizations.weight_norm, nn.utils.parametrizations.spectral_norm])
def test_a_parametrized_layer_is_left_and_keeps_working(norm: object) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(norm(nn.Conv1d(3, 8, 3)), nn.ReLU(), nn.Conv1d(8, 8, 3)).eval()  # type: ignore[operator]
    x = RNG.normal(size=(4, 3, 9)).astype(np.float32)
    loaded = models.load(model).module
    graph = trace(loaded, {"input": torch.from_numpy(x)})
    infos = survey(loaded, graph)
    assert {name: info.skip for name, info in infos.items()} == {"0": "its weight is parametrized", "2": ""}
    spaces = collect(loaded, [{"input": x}], ["2"])
    factored = apply(fold_batchnorm(loaded, graph), _plan("2", 8), spaces)
    assert torch.allclose(_outputs(factored, x), _outputs(model, x), atol=1e-5)


@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated:FutureWarning")
def test_a_weight_computed_in_a_hook_is_refused_by_name() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.utils.weight_norm(nn.Conv1d(4, 4, 3)))
    with pytest.raises(
        ModelError, match=r"layer '1'.* got a weight that was computed from others – .*remove_weight_norm"
    ):
        models.load(model)
    nn.utils.remove_weight_norm(model[1])
    assert models.load(model).module[1].weight.shape == (4, 4, 3)


def test_a_layer_that_is_called_by_keyword_is_measured() -> None:
    class Keyword(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv1d(3, 6, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.conv(input=x)

    torch.manual_seed(0)
    model, x = Keyword(), RNG.normal(size=(4, 3, 9)).astype(np.float32)
    spaces = collect(model, [{"x": x}], ["conv"], row_space=True)
    assert spaces["conv"].row_eigenvalues is not None
    factored = apply(model, _plan("conv", 6), spaces)
    assert torch.allclose(_outputs(factored, x), _outputs(model, x), atol=1e-5)
