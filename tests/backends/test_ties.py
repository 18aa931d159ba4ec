"""What tool chains make of a tied matrix is found again, whatever they have multiplied into it."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rowcol_edge.backends import ties


def made_of(use: ties.Use, matrix: np.ndarray) -> np.ndarray:
    return use.factors[:, None] * (matrix.T if use.transposed else matrix)


@settings(max_examples=30, deadline=None)
@given(
    st.integers(8, 40),
    st.integers(32, 64),
    st.lists(st.tuples(st.booleans(), st.booleans()), min_size=2, max_size=5),
    st.integers(0, 2**16),
)
def test_every_use_is_found_with_its_factors(rows: int, columns: int, uses: list[tuple[bool, bool]], seed: int) -> None:
    rng = np.random.default_rng(seed)
    rows = max(rows, 1024 // columns + 1)
    w = rng.normal(size=(rows, columns))
    weights = {}
    for number, (transposed, scaled) in enumerate(uses):
        own = w.T if transposed else w
        factors = rng.uniform(0.3, 3, len(own)) * rng.choice([-1, 1], len(own)) if scaled else np.ones(len(own))
        weights[f"w{number}"] = (factors[:, None] * own).astype(np.float32)
    weights["other"] = rng.normal(size=(rows, columns)).astype(np.float32)
    [tie] = ties.find(weights)
    assert set(tie.names) == set(weights) - {"other"}
    for use in tie.uses:
        made = made_of(use, tie.matrix)
        assert np.allclose(made, weights[use.name], rtol=1e-4, atol=1e-6)
    if not any(scaled for _, scaled in uses):
        assert all(use.plain for use in tie.uses)


def test_a_matrix_and_its_transpose_are_one_exactly() -> None:
    w = np.random.default_rng(0).normal(size=(40, 32)).astype(np.float32)
    [tie] = ties.find({"a": w, "b": np.ascontiguousarray(w.T)})
    assert [(use.name, use.transposed, use.plain) for use in tie.uses] == [("a", False, True), ("b", True, True)]
    assert np.array_equal(tie.matrix, w.astype(np.float64))


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
