"""What tool chains make of a tied matrix is found again, whatever they have multiplied into it."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rowcol_edge.backends import ties


def scaled(factors: np.ndarray, weight: np.ndarray) -> np.ndarray:
    return factors.reshape(-1, *[1] * (weight.ndim - 1)) * weight


def made_of(use: ties.Use, weight: np.ndarray) -> np.ndarray:
    return scaled(use.factors, weight.swapaxes(0, 1) if use.transposed else weight)


@settings(max_examples=30, deadline=None)
@given(
    st.integers(8, 40),
    st.integers(32, 64),
    st.sampled_from([(), (3,), (3, 3), (1, 5)]),
    st.lists(st.tuples(st.booleans(), st.booleans()), min_size=2, max_size=5),
    st.integers(0, 2**16),
)
def test_every_use_is_found_with_its_factors(
    rows: int, columns: int, kernel: tuple[int, ...], uses: list[tuple[bool, bool]], seed: int
) -> None:
    rng = np.random.default_rng(seed)
    rows = max(rows, 1024 // columns + 1)
    w = rng.normal(size=(rows, columns, *kernel))
    weights = {}
    for number, (transposed, multiplied) in enumerate(uses):
        own = w.swapaxes(0, 1) if transposed else w
        factors = rng.uniform(0.3, 3, len(own)) * rng.choice([-1, 1], len(own)) if multiplied else np.ones(len(own))
        weights[f"w{number}"] = scaled(factors, own).astype(np.float32)
    weights["other"] = rng.normal(size=w.shape).astype(np.float32)
    [tie] = ties.find(weights)
    assert set(tie.names) == set(weights) - {"other"}
    for use in tie.uses:
        made = made_of(use, tie.weight)
        assert np.allclose(made, weights[use.name], rtol=1e-4, atol=1e-6)
    if not any(multiplied for _, multiplied in uses):
        assert all(use.plain for use in tie.uses)


def test_a_matrix_and_its_transpose_are_one_exactly() -> None:
    w = np.random.default_rng(0).normal(size=(40, 32)).astype(np.float32)
    [tie] = ties.find({"a": w, "b": np.ascontiguousarray(w.T)})
    assert [(use.name, use.transposed, use.plain) for use in tie.uses] == [("a", False, True), ("b", True, True)]
    assert np.array_equal(tie.weight, w.astype(np.float64))


def test_scaled_columns_are_no_tie() -> None:
    rng = np.random.default_rng(0)
    w = rng.normal(size=(40, 32))
    assert ties.find({"a": w, "b": w * rng.uniform(0.5, 2, 32)}) == ()


def test_small_or_nearly_equal_matrices_are_no_tie() -> None:
    rng = np.random.default_rng(0)
    w = rng.normal(size=(40, 32))
    assert ties.find({"a": w, "b": w + 1e-3 * rng.normal(size=w.shape)}) == ()
    assert ties.find({"a": np.ones((4, 400)), "b": np.ones((4, 400))}) == ()


def test_zeros_must_be_in_the_same_places() -> None:
    rng = np.random.default_rng(0)
    w = rng.normal(size=(40, 32))
    w[3] = 0.0
    w[:, 5] = 0.0
    [tie] = ties.find({"a": w, "b": w.T * rng.uniform(0.5, 2, (32, 1))})
    assert len(tie.uses) == 2
    pruned = w.copy()
    pruned[7, 9] = 0.0
    assert ties.find({"a": w, "b": pruned}) == ()


def test_a_kernel_is_tied_tap_by_tap() -> None:
    rng = np.random.default_rng(0)
    w = rng.normal(size=(40, 32, 3, 3))
    flipped, turned = w[..., ::-1, :], w.swapaxes(0, 1)
    assert ties.find({"a": w, "b": flipped}) == ()
    assert ties.find({"a": w, "b": turned.swapaxes(2, 3)}) == ()
    assert ties.find({"a": w, "b": turned * rng.uniform(0.5, 2, (3, 3))}) == ()
    w[:, :, 1, 1] = 0.0
    w[7] = 0.0
    [tie] = ties.find({"a": w, "b": scaled(rng.uniform(0.5, 2, 32), turned)})
    assert [use.transposed for use in tie.uses] == [False, True]


def test_a_1x1_kernel_is_the_matrix_of_a_linear_layer() -> None:
    w = np.random.default_rng(0).normal(size=(40, 32))
    kernels = {"a": w, "b": w[:, :, None, None], "c": w[:, :, None]}
    [tie] = ties.find({name: ties.compact(kernel) for name, kernel in kernels.items()})
    assert tie.names == ("a", "b", "c")
    assert ties.compact(np.zeros((4, 5, 3, 1))).shape == (4, 5, 3, 1)


@pytest.mark.parametrize("limit", [127, 64])
def test_numbers_are_those_of_both_orientations(limit: int) -> None:
    w = np.random.default_rng(0).normal(size=(40, 32))
    tie = ties.Tie(w, ())
    numbers, scale = tie.quantized(limit)
    assert numbers.dtype == np.int8
    assert np.abs(numbers.astype(int)).max() == limit
    assert np.abs(numbers * scale - w).max() <= scale / 2 + 1e-12
    turned, same = ties.Tie(w.T, ()).quantized(limit)
    assert np.array_equal(turned, numbers.T)
    assert same == scale
