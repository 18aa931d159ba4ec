"""Channels chosen for what they explain, beside every other choice where there are few."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rowcol_edge.factoring import pivots


def moments(size: int, rank: int, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    root = rng.normal(size=(size, rank)) * np.geomspace(1, 0.05, size)[:, None]
    return np.asarray(root @ root.T)


def lost(second: np.ndarray, metric: np.ndarray, kept: list[int]) -> float:
    """tr(F (C − C_K C_KK⁺ C_Kᵀ))."""
    part = second[:, kept]
    rest = second - part @ np.linalg.pinv(second[np.ix_(kept, kept)]) @ part.T
    return float(np.trace(metric @ rest))


@settings(max_examples=40, deadline=None)
@given(size=st.integers(1, 70), rank=st.integers(1, 70), seed=st.integers(0, 99), readers=st.integers(1, 3))
def test_every_channel_comes_once_whatever_the_rank(size: int, rank: int, seed: int, readers: int) -> None:
    seconds = [moments(size, min(rank, size), seed + i) for i in range(readers)]
    metrics = [moments(size, size, seed + 50 + i) for i in range(readers)]
    order = pivots.order(seconds, metrics)
    assert sorted(order.tolist()) == list(range(size))


@pytest.mark.parametrize("seed", range(6))
def test_three_of_nine_are_near_the_best_of_all(seed: int) -> None:
    second, metric = moments(9, 9, seed), moments(9, 5, seed + 100)
    every = sorted(lost(second, metric, list(kept)) for kept in itertools.combinations(range(9), 3))
    found = lost(second, metric, pivots.order([second], [metric])[:3].tolist())
    assert found <= every[len(every) // 10]


def test_the_metric_decides_what_is_wanted() -> None:
    second, metric = np.diag([9.0, 4.0, 1.0, 0.5]), np.diag([0.0, 0.0, 1.0, 5.0])
    assert pivots.order([second], [metric])[:2].tolist() == [3, 2]
    assert pivots.order([second], [np.eye(4)])[:2].tolist() == [0, 1]


def test_what_two_readers_want_is_added_up() -> None:
    first, second = np.diag([3.0, 0.0, 2.0]), np.diag([0.0, 1.0, 2.0])
    assert pivots.order([first, second], [np.eye(3)] * 2)[0] == 2


@settings(max_examples=30, deadline=None)
@given(size=st.integers(1, 40), rank=st.integers(1, 40), seed=st.integers(0, 99), width=st.integers(1, 40))
def test_innovations_predict_as_least_squares_does(size: int, rank: int, seed: int, width: int) -> None:
    second = moments(size, min(rank, size), seed)
    order = np.random.default_rng(seed).permutation(size)
    basis, dual = pivots.innovations(second, order, 1e-9)
    np.testing.assert_allclose(dual.T @ basis, np.eye(size), atol=1e-6)
    kept = order[: min(width, size)]
    predicted = basis[:, : len(kept)] @ np.linalg.inv(basis[kept, : len(kept)])
    ridge = 1e-9 * np.trace(second) / size * np.eye(size)
    wanted = (second + ridge)[:, kept] @ np.linalg.inv((second + ridge)[np.ix_(kept, kept)])
    np.testing.assert_allclose(predicted, wanted, atol=1e-4 * max(1.0, np.abs(wanted).max()))


def test_no_variance_at_all_is_no_reason_to_fail() -> None:
    nothing = np.zeros((5, 5))
    assert sorted(pivots.order([nothing], [np.eye(5)]).tolist()) == [0, 1, 2, 3, 4]
    basis, dual = pivots.innovations(nothing, np.arange(5), 1e-6)
    np.testing.assert_allclose(dual.T @ basis, np.eye(5))
