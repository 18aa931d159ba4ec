"""Tied layers use one matrix both ways; the tie of a pair is the one with the least error."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from rowcol_edge.errors import DataError, ModelError
from rowcol_edge.factoring.ties import TiedAttention, TiedBottleneck, TiedFeedForward, tie_from_dense


def moments(rng: np.random.Generator, size: int, rank: int) -> np.ndarray:
    x = rng.normal(size=(4 * size, rank)) @ rng.normal(size=(rank, size))
    return x.T @ x / len(x)


def loss(w: np.ndarray, first: np.ndarray, second: np.ndarray, c: np.ndarray, d: np.ndarray) -> float:
    a, b = first - w, second - w.T
    return float(np.trace(a @ c @ a.T) + np.trace(b @ d @ b.T))


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 7), st.integers(1, 7), st.integers(1, 7), st.integers(1, 7), st.integers(0, 2**16))
def test_the_tie_is_the_minimiser_and_its_loss_is_the_predicted_one(
    hidden: int, width: int, rank_x: int, rank_h: int, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    first, second = rng.normal(size=(hidden, width)), rng.normal(size=(width, hidden))
    c, d = moments(rng, width, min(rank_x, width)), moments(rng, hidden, min(rank_h, hidden))
    tie = tie_from_dense(first, second, c, d)
    least = loss(tie.weight, first, second, c, d)
    assert tie.loss == pytest.approx(least, rel=1e-6, abs=1e-9)
    # convex: a point whose gradient is zero is the minimiser
    gradient = tie.weight @ c + d @ tie.weight - first @ c - d @ second.T
    assert np.abs(gradient).max() <= 1e-8 * (1 + np.abs(first @ c).max() + np.abs(d @ second.T).max())
    for _ in range(5):
        step = rng.normal(size=first.shape) * 10.0 ** rng.uniform(-3, 0)
        assert loss(tie.weight + step, first, second, c, d) >= least - 1e-9 * (1 + least)


def test_errors_are_those_measured_on_the_inputs() -> None:
    rng = np.random.default_rng(0)
    first, second = rng.normal(size=(6, 4)), rng.normal(size=(4, 6))
    x, h = rng.normal(size=(50, 4)), np.maximum(rng.normal(size=(50, 6)), 0)
    tie = tie_from_dense(first, second, x.T @ x / 50, h.T @ h / 50)
    measured = np.linalg.norm(x @ (first - tie.weight).T) / np.linalg.norm(x @ first.T)
    assert tie.first_error == pytest.approx(measured)
    assert tie.second_error == pytest.approx(
        np.linalg.norm(h @ (second - tie.weight.T).T) / np.linalg.norm(h @ second.T)
    )


def test_a_pair_that_is_tied_already_is_found_without_error() -> None:
    rng = np.random.default_rng(1)
    w = rng.normal(size=(8, 5))
    tie = tie_from_dense(w, w.T, moments(rng, 5, 5), moments(rng, 8, 3))
    assert np.allclose(tie.weight, w)
    assert tie.first_error == pytest.approx(0, abs=1e-7)
    assert tie.second_error == pytest.approx(0, abs=1e-7)


def test_without_data_the_tie_is_the_mean() -> None:
    rng = np.random.default_rng(2)
    first, second = rng.normal(size=(3, 4)), rng.normal(size=(4, 3))
    tie = tie_from_dense(first, second, np.zeros((4, 4)), np.zeros((3, 3)))
    assert np.allclose(tie.weight, (first + second.T) / 2)
    assert tie.loss == 0


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"second": np.zeros((3, 3))}, ModelError, "a pair to tie"),
        ({"inputs": np.zeros((3, 3))}, DataError, "moments of the inputs: expected 4×4, got 3×3"),
        ({"inputs": np.full((4, 4), np.nan)}, DataError, "finite"),
        ({"hidden": np.triu(np.ones((3, 3)))}, DataError, "symmetric"),
        ({"hidden": -np.eye(3)}, DataError, "negative eigenvalue"),
    ],
)
def test_bad_input_is_one_error(change: dict[str, np.ndarray], error: type[Exception], match: str) -> None:
    arguments = {"first": np.zeros((3, 4)), "second": np.zeros((4, 3)), "inputs": np.eye(4), "hidden": np.eye(3)}
    with pytest.raises(error, match=match):
        tie_from_dense(**(arguments | change))


def test_a_feed_forward_from_a_tied_pair_calculates_the_same() -> None:
    torch.manual_seed(0)
    expand, contract = nn.Linear(6, 16), nn.Linear(16, 6)
    with torch.no_grad():
        contract.weight.copy_(expand.weight.t())
    x = torch.randn(2, 40, 6)
    layer, tie = TiedFeedForward.from_dense(expand, contract, x, torch.relu)
    assert sum(p.numel() for p in layer.parameters()) == 6 * 16 + 16 + 6
    assert tie.first_error < 1e-6
    assert torch.allclose(layer(x), contract(torch.relu(expand(x))), atol=1e-5)


def test_a_tie_from_dense_is_nearer_than_either_matrix() -> None:
    torch.manual_seed(0)
    expand, contract, x = nn.Linear(6, 16), nn.Linear(16, 6), torch.randn(400, 6)
    wanted = contract(torch.relu(expand(x)))
    layer, tie = TiedFeedForward.from_dense(expand, contract, x, torch.relu)

    def about(values: torch.Tensor) -> torch.Tensor:
        return values - values.mean(0)

    def error(weight: torch.Tensor) -> float:
        first, second = about(expand(x)), about(wanted)
        hidden = about(torch.relu(expand(x)))
        first = (first - about(x) @ weight.t()).norm() / first.norm()
        second = (second - hidden @ weight).norm() / second.norm()
        return float((first**2 + second**2).detach())

    assert error(layer.weight) == pytest.approx(tie.loss, rel=1e-4)
    assert error(layer.weight) < min(error(expand.weight), error(contract.weight.t()))


def test_attention_from_tied_matrices_calculates_the_same_as_torch() -> None:
    torch.manual_seed(0)
    query, key, value, output = (nn.Linear(8, 8) for _ in range(4))
    with torch.no_grad():
        value.weight.copy_(key.weight.t())
        output.weight.copy_(query.weight.t())
    x = torch.randn(3, 20, 8)
    layer, outer, inner = TiedAttention.from_dense(query, key, value, output, 2, x)
    assert max(outer.first_error, outer.second_error, inner.first_error, inner.second_error) < 1e-6
    assert torch.allclose(layer(x), dense_attention(query, key, value, output)(x, x, x)[0], atol=1e-5)


def dense_attention(query: nn.Linear, key: nn.Linear, value: nn.Linear, output: nn.Linear) -> nn.MultiheadAttention:
    dense = nn.MultiheadAttention(8, 2, batch_first=True)
    with torch.no_grad():
        dense.in_proj_weight.copy_(torch.cat([query.weight, key.weight, value.weight]))
        dense.in_proj_bias.copy_(torch.cat([query.bias, key.bias, value.bias]))
        dense.out_proj.weight.copy_(output.weight)
        dense.out_proj.bias.copy_(output.bias)
    return dense


def test_the_error_of_a_whole_layer_is_told_and_its_mean_is_the_dense_ones() -> None:
    torch.manual_seed(0)
    expand, contract, *four = (nn.Linear(*size) for size in ((8, 16), (16, 8), *[(8, 8)] * 4))
    x = torch.randn(3, 200, 8) + 2.0
    pairs = [
        (*TiedFeedForward.from_dense(expand, contract, x), contract(nn.functional.gelu(expand(x)))),
        (*TiedAttention.from_dense(*four, 2, x)[:2], dense_attention(*four)(x, x, x)[0]),
    ]
    for layer, tie, wanted in pairs:
        apart, wanted = (wanted - layer(x)).detach().flatten(0, 1), wanted.detach()
        centred = wanted.flatten(0, 1) - wanted.mean((0, 1))
        assert float(apart.mean(0).abs().max()) < 1e-5
        assert 0.1 < tie.layer_error < 2.0  # random layers, which nothing ties: it may be worse than a constant
        assert tie.layer_error == pytest.approx(float(apart.norm() / centred.norm()), rel=1e-4)


@pytest.mark.parametrize(
    ("sizes", "width", "words"),
    [
        ([(8, 16), (16, 8)], 9, "layer expand of a tie: expected 9 → 16, got 8 → 16"),
        ([(8, 16), (12, 8)], 8, "layer contract of a tie: expected 16 → 8, got 12 → 8"),
        ([(8, 16), (16, 9)], 8, "layer contract of a tie: expected 16 → 8, got 16 → 9"),
        ([(8, 8), (8, 8), (8, 4), (8, 8)], 8, "layer value of a tie: expected 8 → 8, got 8 → 4"),
    ],
)
def test_layers_that_do_not_belong_together_are_refused(sizes: list[tuple[int, int]], width: int, words: str) -> None:
    layers, x = [nn.Linear(*size) for size in sizes], torch.randn(2, 5, width)
    made = TiedFeedForward.from_dense if len(layers) == 2 else partial(TiedAttention.from_dense, heads=2)
    with pytest.raises(ModelError, match=words):
        made(*layers, inputs=x)


def test_activations_of_ones_own_are_called_as_they_are() -> None:
    torch.manual_seed(0)
    expand, contract, norm, x = nn.Linear(8, 16), nn.Linear(16, 8), nn.LayerNorm(16), torch.randn(40, 8)
    held = nn.ReLU()
    held.scaled = 2 * nn.Parameter(torch.ones(1))  # no leaf: it cannot be copied
    for activation in (lambda h: torch.relu(norm(h)), held):
        layer, tie = TiedFeedForward.from_dense(expand, contract, x, activation)
        apart = (contract(activation(expand(x))) - layer(x)).detach()
        assert tie.layer_error is not None
        assert tie.layer_error > 0.1
        assert float(apart.mean(0).abs().max()) < 1e-5


def test_inputs_that_do_not_vary_lose_nothing() -> None:
    torch.manual_seed(0)
    expand, contract, x = nn.Linear(8, 16), nn.Linear(16, 8), torch.full((7, 8), 0.1)
    layer, tie = TiedFeedForward.from_dense(expand, contract, x)
    assert tie.layer_error == 0.0
    assert torch.allclose(layer(x), contract(nn.functional.gelu(expand(x))), atol=1e-6)
    assert np.abs(tie.weight).max() < 1.0


@pytest.mark.parametrize("x", [torch.randn(0, 5, 8), torch.randn(2, 0, 8), torch.randn(8)])
def test_inputs_without_samples_are_refused(x: torch.Tensor) -> None:
    with pytest.raises(DataError, match="inputs for a tie: expected "):
        TiedAttention.from_dense(*(nn.Linear(8, 8) for _ in range(4)), 2, x)


@pytest.mark.parametrize("x", [torch.ones(3, 5, 8, dtype=torch.int64), torch.ones(3, 5, 8, dtype=torch.float64)])
def test_inputs_of_another_type_than_the_layers_are_refused(x: torch.Tensor) -> None:
    words = f"inputs for a tie: expected float32 on cpu, got {str(x.dtype).removeprefix('torch.')} on cpu"
    with pytest.raises(DataError, match=words):
        TiedFeedForward.from_dense(nn.Linear(8, 16), nn.Linear(16, 8), x)
    with pytest.raises(DataError, match=words):
        TiedAttention.from_dense(*(nn.Linear(8, 8) for _ in range(4)), 2, x)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_what_is_made_from_dense_has_its_type(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    expand, contract, *four = (nn.Linear(*size).to(dtype) for size in ((8, 16), (16, 8), *[(8, 8)] * 4))
    x = torch.randn(2, 10, 8, dtype=dtype)
    for layer in (TiedFeedForward.from_dense(expand, contract, x)[0], TiedAttention.from_dense(*four, 2, x)[0]):
        assert {parameter.dtype for parameter in layer.parameters()} == {dtype}
        assert layer(x).dtype == dtype


def test_heads_that_do_not_divide_the_width_are_refused() -> None:
    with pytest.raises(ModelError, match="heads of a tied attention: expected a divisor of width 8, got 3"):
        TiedAttention.from_dense(*(nn.Linear(8, 8) for _ in range(4)), 3, torch.randn(2, 5, 8))


def test_attention_has_two_matrices_and_no_biases_unless_asked() -> None:
    assert sum(p.numel() for p in TiedAttention(8, 2).parameters()) == 2 * 64
    assert sum(p.numel() for p in TiedAttention(8, 2, bias=True).parameters()) == 2 * 64 + 4 * 8
    with pytest.raises(ModelError, match="divisor of width 8"):
        TiedAttention(8, 3)


def test_a_bottleneck_goes_in_and_out_by_one_matrix() -> None:
    torch.manual_seed(0)
    inner = nn.Conv2d(4, 4, 3, padding=1)
    layer, x = TiedBottleneck(12, 4, inner), torch.randn(2, 12, 5, 5)
    w = layer.weight[:, :, 0, 0]
    reduced = inner(torch.einsum("oc,nchw->nohw", w, x))
    assert torch.allclose(layer(x), torch.einsum("oc,nohw->nchw", w, reduced), atol=1e-5)
    layer(x).sum().backward()
    assert layer.weight.grad is not None
    assert float(layer.weight.grad.abs().sum()) > 0
