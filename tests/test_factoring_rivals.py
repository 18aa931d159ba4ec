"""The other ways to factor that tools/benchmark_factoring.py sets beside ours are what they are called."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from rowcol_edge.datasets import Split, scan
from rowcol_edge.factoring import apply
from rowcol_edge.factoring.ranks import OverBudgetError
from rowcol_edge.factoring.study import Study, study

from . import weighing


@pytest.fixture
def rivals(root: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(root / "tools"))
    import factoring_rivals

    return factoring_rivals


@pytest.fixture
def inputs() -> np.ndarray:
    random = np.random.default_rng(0)
    return (random.normal(size=(64, 12)) * np.geomspace(1.0, 0.05, 12) + 0.7).astype(np.float32)


@pytest.fixture
def studied(inputs: np.ndarray) -> Study:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 20), nn.ReLU(), nn.Linear(20, 4))
    return study(model, scan(Split("calibration", "random", lambda: iter([({"input": inputs}, None)]))))


def ways(rivals: ModuleType, studied: Study, inputs: np.ndarray) -> dict[str, tuple[Any, Any]]:
    """(way, spaces) by name."""
    plain = dict(studied.spaces)
    weighed = weighing.weighed(studied.folded, {"input": inputs}, plain, classify=True)
    return {way.name: (way, way.spaces(studied, plain, weighed)) for way in rivals.WAYS}


def test_whitened_directions_are_those_of_the_weight_times_the_root_of_the_inputs(
    rivals: ModuleType, studied: Study, inputs: np.ndarray
) -> None:
    _, spaces = ways(rivals, studied, inputs)["whitened, uniform"]
    wide = inputs.astype(np.float64)
    values, vectors = np.linalg.eigh(wide.T @ wide / len(wide))
    root = vectors * np.sqrt(values) @ vectors.T
    weight = studied.folded.get_submodule("0").weight.detach().double().numpy()
    left, singular, _ = np.linalg.svd(weight @ root)
    np.testing.assert_allclose(spaces["0"].eigenvalues[:12], singular**2, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(np.abs((left[:, :4] * spaces["0"].basis[:, :4]).sum(0)), 1.0, atol=1e-4)


def test_plain_svd_leaves_the_best_weight_and_the_bias(rivals: ModuleType, studied: Study, inputs: np.ndarray) -> None:
    way, spaces = ways(rivals, studied, inputs)["svd, uniform"]
    plan = rivals.plan(way, studied, spaces, "parameters", 0.6)
    rank = next(layer.rank for layer in plan.layers if layer.name == "2")
    factored = apply.apply(studied.folded, plan, spaces).get_submodule("2")
    dense = studied.folded.get_submodule("2")
    left, singular, right = np.linalg.svd(dense.weight.detach().double().numpy())
    made = (factored.expand.weight @ factored.reduce.weight).detach().numpy()
    np.testing.assert_allclose(made, left[:, :rank] * singular[:rank] @ right[:rank], atol=1e-5)
    np.testing.assert_allclose(factored.expand.bias.detach(), dense.bias.detach(), atol=1e-6)


@pytest.mark.parametrize("axis", ["parameters", "macs"])
def test_every_way_keeps_the_budget_and_uses_most_of_it(
    rivals: ModuleType, studied: Study, inputs: np.ndarray, axis: str
) -> None:
    cost = rivals.COSTS[axis]
    total = sum(cost(info, None) for info in studied.infos.values())
    for name, (way, spaces) in ways(rivals, studied, inputs).items():
        plan = rivals.plan(way, studied, spaces, axis, 0.7)
        spent = sum(
            cost(studied.infos[layer.name], layer.how if layer.form == "project" else None) for layer in plan.layers
        )
        assert 0.5 * total < spent <= 0.7 * total, name


def test_uniform_gives_every_layer_its_share(rivals: ModuleType, studied: Study, inputs: np.ndarray) -> None:
    way, spaces = ways(rivals, studied, inputs)["covariance, uniform"]
    plan = rivals.plan(way, studied, spaces, "macs", 0.7)
    for layer in plan.projected:
        info = studied.infos[layer.name]
        assert info.split_macs(layer.how) <= 0.75 * info.macs


def test_a_share_that_nothing_reaches_says_so(rivals: ModuleType, studied: Study, inputs: np.ndarray) -> None:
    for way, spaces in ways(rivals, studied, inputs).values():
        with pytest.raises(OverBudgetError):
            rivals.plan(way, studied, spaces, "parameters", 0.01)


def test_scores(rivals: ModuleType) -> None:
    import benchmark_factoring

    given, got = np.log([[0.5, 0.5], [0.9, 0.1]]), np.log([[0.25, 0.75], [0.9, 0.1]])
    found = benchmark_factoring.scores(got, given, np.array([1, 0]))
    assert found["kl"] == pytest.approx(0.5 * (0.5 * np.log(2.0) + 0.5 * np.log(2.0 / 3.0)))
    assert found["agreement"] == 0.5  # even odds are the first class
    assert (found["accuracy"], found["auroc"]) == (1.0, 1.0)
    assert benchmark_factoring.scores(given, given, None) == {"kl": 0.0, "error": 0.0, "agreement": 1.0}
