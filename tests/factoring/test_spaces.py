"""Streamed moments against numpy on everything at once."""

from __future__ import annotations

import weakref

import numpy as np
import pytest
import torch
from torch import nn

from rowcol_edge.errors import DataError, ModelError
from rowcol_edge.factoring.places import spread
from rowcol_edge.factoring.spaces import collect, directions, utilised_rank

RNG = np.random.default_rng(0)


def _batches(shape: tuple[int, ...], count: int = 3) -> list[dict[str, np.ndarray]]:
    return [{"input": RNG.normal(5.0, 1.0, shape).astype(np.float32)} for _ in range(count)]


def test_linear_matches_numpy() -> None:
    model = nn.Sequential(nn.Linear(6, 5)).double()
    batches = [{"input": batch["input"].astype(np.float64)} for batch in _batches((4, 3, 6))]
    spaces = collect(model, batches, ["0"], row_space=True)["0"]
    x = np.concatenate([batch["input"].reshape(-1, 6) for batch in batches])
    y = x @ model[0].weight.detach().numpy().T + model[0].bias.detach().numpy()
    covariance = np.cov(y.T, bias=True)
    assert spaces.samples == 36
    np.testing.assert_allclose(spaces.mean, y.mean(axis=0), rtol=1e-12)
    np.testing.assert_allclose((spaces.basis * spaces.eigenvalues) @ spaces.basis.T, covariance, atol=1e-12)
    np.testing.assert_allclose(spaces.basis.T @ spaces.basis, np.eye(5), atol=1e-12)
    assert np.all(np.diff(spaces.eigenvalues) <= 0)
    assert spaces.row_eigenvalues is not None
    np.testing.assert_allclose(spaces.row_eigenvalues, np.linalg.eigvalsh(np.cov(x.T, bias=True))[::-1], atol=1e-12)


def test_convolution_counts_every_position() -> None:
    model = nn.Sequential(nn.Conv2d(2, 4, 3, padding=1))
    batches = _batches((2, 2, 5, 6))
    spaces = collect(model, batches, ["0"], row_space=True)["0"]
    with torch.no_grad():
        y = torch.cat([model(torch.from_numpy(batch["input"])) for batch in batches]).double()
    rows = y.permute(0, 2, 3, 1).reshape(-1, 4).numpy()
    assert spaces.samples == 6 * 30
    np.testing.assert_allclose(spaces.variance, np.trace(np.cov(rows.T, bias=True)), rtol=1e-6)
    assert spaces.row_eigenvalues is not None
    assert spaces.row_eigenvalues.shape == (2,)


def test_large_maps_are_sampled_evenly() -> None:
    model = nn.Sequential(nn.Conv2d(1, 4, 3))
    x = np.cumsum(np.cumsum(RNG.normal(size=(8, 1, 50, 50)), axis=2), axis=3).astype(np.float32)
    full = collect(model, [{"input": x}], ["0"], max_positions=10**6)["0"]
    part = collect(model, [{"input": x}], ["0"], max_positions=200)["0"]
    assert (full.samples, part.samples) == (8 * 48 * 48, 8 * 200)
    np.testing.assert_allclose(part.eigenvalues[0], full.eigenvalues[0], rtol=0.1)


@pytest.mark.parametrize(("positions", "count"), [(12544, 1024), (3136, 1024), (1025, 1024), (7, 1), (100, 10)])
def test_spread_is_distinct_and_covers_columns(positions: int, count: int) -> None:
    indices = spread(positions, count).numpy()
    assert len(set(indices.tolist())) == count
    assert indices.max() < positions
    if positions == 12544:
        assert len(set((indices % 112).tolist())) == 112


def test_model_is_left_as_it_was_also_after_an_error() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Dropout(0.5)).train()
    collect(model, _batches((2, 3)), ["0"])
    assert model.training
    assert not model[0]._forward_hooks
    with pytest.raises(ModelError, match="calibration batch"):
        collect(model, _batches((2, 4)), ["0"])
    assert model[1].training
    assert not model[0]._forward_hooks


@pytest.mark.parametrize("raised", [AssertionError, KeyError, AttributeError, ZeroDivisionError])
def test_whatever_the_models_code_raises_is_told_with_the_batch(raised: type[Exception]) -> None:
    class Loud(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.only = nn.Linear(3, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            result: torch.Tensor = self.only(x)
            if x.shape[0] == 5:
                raise raised("too loud")
            return result

    model = Loud()
    with pytest.raises(ModelError, match=r"calibration batch.*\(5, 3\).*too loud"):
        collect(model, [*_batches((2, 3)), *_batches((5, 3))], ["only"])
    assert not model.only._forward_hooks


def test_several_inputs_and_progress() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 4)

        def forward(self, a: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
            return self.layer(a) * ids

    seen: list[tuple[str, int, int]] = []
    batches = [{"ids": np.arange(2)[:, None], "a": np.ones((2, 3))}] * 2  # float64 and int64 inputs
    spaces = collect(Two(), batches, ["layer"], progress=lambda *report: seen.append(report))
    assert seen == [("calibration", 1, 2), ("calibration", 2, 2), ("spectra", 1, 1)]
    assert spaces["layer"].constant


def test_no_activation_is_held_after_its_batch() -> None:
    class Watched(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(6, 5), nn.Linear(5, 7)
            self.given: list[weakref.ref[np.ndarray]] = []
            self.held: list[int] = []

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.held.append(sum(earlier() is not None for earlier in self.given))
            between = torch.relu(self.a(x)).numpy().copy()  # a tensor on it, and any view of that, keeps it alive
            self.given.append(weakref.ref(between))
            return self.b(torch.from_numpy(between))

    model = Watched()
    batches = np.random.default_rng(0).normal(size=(10, 4, 6)).astype(np.float32)
    found = collect(model, [{"x": batch} for batch in batches], ["a", "b"], row_space=True)
    assert found["b"].samples == 40
    assert model.held == [0] * 10
    assert not any(batch() is not None for batch in model.given)


def test_bad_data() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    with pytest.raises(DataError, match="at least one batch"):
        collect(model, [], ["0"])
    with pytest.raises(DataError, match="input 'input'"):
        collect(model, [{"input": np.full((1, 3), np.nan, np.float32)}], ["0"])
    with pytest.raises(DataError, match="expected numbers"):
        collect(model, [{"input": np.array(["a"])}], ["0"])
    nn.init.constant_(model[1].weight, float("inf"))
    with pytest.raises(DataError, match="layer '1'"):
        collect(model, _batches((2, 3)), ["0", "1"])
    with pytest.raises(ModelError, match="no layer 'x'"):
        collect(model, _batches((2, 3)), ["x"])
    with pytest.raises(ModelError, match="expected one of Linear, Conv1d, Conv2d"):
        collect(model, _batches((2, 3)), [""])


def test_layer_that_is_never_reached() -> None:
    model = nn.Sequential(nn.Linear(3, 3))
    model.spare = nn.Linear(3, 3)
    model.forward = model[0].forward
    with pytest.raises(DataError, match="'spare' was not reached"):
        collect(model, _batches((2, 3)), ["spare"])


def test_fused_encoder_path_is_seen_through() -> None:
    model = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()
    with torch.no_grad():
        spaces = collect(model, [{"src": RNG.normal(size=(2, 4, 8))}], ["linear1", "linear2"])
    assert spaces["linear1"].samples == 8
    assert torch.backends.mha.get_fastpath_enabled()


def test_utilised_rank() -> None:
    assert utilised_rank(np.array([9.0, 0.9, 0.1]), 0.9) == 1
    assert utilised_rank(np.array([9.0, 0.9, 0.1]), 0.99) == 2
    assert utilised_rank(np.array([9.0, 0.9, 0.1]), 1.0) == 3
    assert utilised_rank(np.zeros(3)) == 0


@pytest.mark.parametrize("rank", [1, 7, 20])
def test_directions_within_a_small_range_are_those_of_all(rank: int) -> None:
    root, metric = RNG.normal(size=(40, rank)), np.cov(RNG.normal(size=(40, 90)))
    covariance = root @ np.diag(np.geomspace(1, 1e-4, rank)) @ root.T
    wanted, found = directions(covariance, metric), directions(covariance, metric, rank=rank)
    np.testing.assert_allclose(found[0], wanted[0], rtol=1e-6, atol=1e-9)
    assert found[1].shape == (40, rank)
    for values, basis, dual in (wanted, found):
        count = basis.shape[1]
        np.testing.assert_allclose((basis * values[:count]) @ basis.T, covariance, atol=1e-9)
        np.testing.assert_allclose(dual.T @ basis, np.eye(count), atol=1e-9)
    np.testing.assert_allclose(found[1][:, :rank], wanted[1][:, :rank], atol=1e-5)


def test_a_metric_that_rounding_made_indefinite_has_directions() -> None:
    metric = np.diag([1.0, 1.0, -0.02])
    values, basis, dual = directions(np.eye(3), metric)
    assert np.isfinite(basis).all()
    assert (values >= 0).all()
    np.testing.assert_allclose(dual.T @ basis, np.eye(3), atol=1e-6)
