"""Moments of few rows."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from rowcol_edge.factoring.places import Moments


def measured(rows: torch.Tensor) -> Moments:
    """Of (rows, groups, size)."""
    mean = rows.mean(0)
    moved = rows - mean
    return Moments(mean, torch.einsum("ngi,ngj->gij", moved, moved) / len(rows), len(rows))


def drawn(rows: int, size: int, seed: int) -> torch.Tensor:
    return torch.randn(rows, 1, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize(("rows", "rank"), [(12, None), (13, None), (5, 5)])
def test_with_a_row_for_each_direction_they_stay(rows: int, rank: int | None) -> None:
    found = measured(drawn(rows, 12, 0))
    assert found.shrunk(rank) is found


def test_rows_that_fill_fewer_directions_than_they_could_have_shown_all() -> None:
    """A layer that takes what few others give."""
    spread = torch.randn(6, 40, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    found = measured((drawn(15, 6, 0) @ spread).float().double())
    assert found.shrunk() is found
    full = measured((drawn(7, 6, 0) @ spread).float().double())
    assert full.shrunk() is not full


def test_of_fewer_rows_they_come_nearer_to_what_the_rows_were_drawn_from() -> None:
    scale = torch.logspace(0, -1, 40, dtype=torch.float64)
    truth = torch.diag(scale.square())
    for seed in range(5):
        found = measured(drawn(15, 40, seed) * scale)
        now, before = (float((each.covariance[0] - truth).square().sum()) for each in (found.shrunk(), found))
        assert now < before
        assert float(found.shrunk().covariance.diagonal(dim1=1, dim2=2).sum()) == pytest.approx(
            float(found.covariance.diagonal(dim1=1, dim2=2).sum())
        )


def test_the_prior_says_where_what_was_not_seen_may_be() -> None:
    """Of each group by itself, and made only if it is needed."""
    scale = torch.logspace(0, -1, 12, dtype=torch.float64)
    found, weight = measured(drawn(5, 12, 0).repeat(1, 2, 1) * scale), torch.randn(12, 7, dtype=torch.float64)
    prior = weight @ weight.T
    shrunk = found.shrunk(7, lambda: prior)
    for before, after in zip(found.covariance, shrunk.covariance, strict=True):
        (kept, added), rest, *_ = np.linalg.lstsq(
            torch.stack([before.flatten(), prior.flatten()], 1).numpy(), after.flatten().numpy(), rcond=None
        )
        assert 0.0 < kept < 1.0
        assert added == pytest.approx((1.0 - kept) * float(before.trace() / prior.trace()))
        assert float(rest.sum()) == pytest.approx(0.0, abs=1e-20)
    measured(drawn(12, 12, 0)).shrunk(None, lambda: pytest.fail("not needed"))


def test_what_does_not_vary_stays_constant() -> None:
    found = Moments(torch.ones(1, 8), torch.zeros(1, 8, 8, dtype=torch.float64), 3)
    assert bool((found.shrunk().covariance == 0.0).all())
