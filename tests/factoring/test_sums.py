"""Running moments against numpy, and where they are looked at."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from rowcol_edge.factoring.places import Moments, Place
from rowcol_edge.factoring.spaces import measure
from rowcol_edge.factoring.sums import Sums

RNG = np.random.default_rng(0)


def moments_of(batches: list[np.ndarray]) -> Moments:
    sums = Sums()
    for batch in batches:
        sums.add(sums.part(torch.from_numpy(batch)))
    return Moments(*sums.moments(), sums.count)


@pytest.mark.parametrize(("rank", "offset", "unit"), [(1, 0.0, 1e-25), (5, 30.0, 1.0), (96, -1e4, 1.0), (5, 0.0, 1e25)])
def test_nothing_is_lost_of_float32_rows(rank: int, offset: float, unit: float) -> None:
    """Means far larger than what varies, features a thousand times as large as others, units whose squares float32
    does not have, few directions in many features."""
    mixed = RNG.normal(size=(3000, rank)) @ RNG.normal(size=(rank, 96))
    rows = ((mixed / mixed.std(0) + offset) * np.geomspace(1, 1e3, 96) * unit).astype(np.float32)
    found = moments_of([part.reshape(-1, 10, 1, 96) for part in (rows[:40], rows[40:2500], rows[2500:])])
    assert found.samples == 3000
    wide = rows.astype(np.float64) - rows.mean(0, dtype=np.float64)
    wanted, sizes = wide.T @ wide / 3000, wide.std(0)
    assert (np.abs(found.covariance[0].numpy() - wanted) < 1e-10 * np.outer(sizes, sizes)).all()
    np.testing.assert_allclose(found.mean[0].numpy(), rows.mean(0, dtype=np.float64), rtol=1e-12, atol=1e-12 * unit)


@pytest.mark.parametrize(("groups", "size"), [(3, 4), (1, 600), (2, 257)])
def test_groups_are_summed_each_by_itself(groups: int, size: int) -> None:
    """Also where they are so wide that they are multiplied a block at a time."""
    rows = RNG.normal(size=(50, groups, size))
    found = moments_of([part.reshape(5, -1, groups, size) for part in (rows[:20], rows[20:])])
    for group in range(groups):
        np.testing.assert_allclose(found.covariance[group].numpy(), np.cov(rows[:, group].T, bias=True), atol=1e-12)


class Reading(nn.Module):
    """Two readers of one tensor, of which the second sees it changed in place; heads; layers that give less and more
    than they take."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.third = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 12, 1), nn.Conv2d(8, 6, 1)
        self.strided, self.down, self.up = nn.Conv2d(8, 16, 1, stride=2), nn.Linear(12, 5), nn.Linear(5, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        self.seen = [x.clone(), self.second(x), self.strided(x)]
        given = self.third(x.relu_())
        self.seen += [x.clone(), given]
        self.seen.append(self.down(self.seen[1].flatten(2).transpose(1, 2)))
        self.seen.append(self.up(self.seen[-1]))
        return self.seen[-1].mean((1, 2)) + given.mean((1, 2, 3))


def heads(groups: int, size: int) -> np.ndarray:
    return np.arange(groups * size).reshape(groups, size, 1)


def test_a_place_says_the_same_wherever_it_is_looked_at() -> None:
    model, batches = Reading(), [RNG.normal(1.0, 1.0, (4, 3, 9, 11)).astype(np.float32) for _ in range(3)]
    whole = Place("second", False, np.arange(8).reshape(1, 8, 1), "whole")
    wanted = {
        Place("first"): 0, whole: 0, Place("second"): 1, Place("strided"): 2, Place("strided", False): 0,
        Place("third", False): 3, Place("third"): 4, Place("down"): 5, Place("up"): 6,
        Place("second", True, heads(3, 4), "heads"): 1, Place("up", True, heads(2, 5), "heads"): 6,
        Place("third", False, heads(4, 2), "pairs"): 3,
    }  # fmt: skip
    found = measure(model, [{"x": batch} for batch in batches], list(wanted), max_positions=10**6)
    seen: list[list[torch.Tensor]] = []
    with torch.no_grad():
        for batch in batches:
            model(torch.from_numpy(batch))
            seen.append(model.seen)
    for place, which in wanted.items():
        values = torch.cat([each[which] for each in seen]).double()
        rows = (values.movedim(1, -1) if values.dim() == 4 else values).flatten(0, -2).numpy()
        groups = [np.arange(rows.shape[1])] if place.channels is None else list(place.channels[:, :, 0])
        mean, covariance = found[place].numpy()
        assert found[place].samples == len(rows)
        for group, index in enumerate(groups):
            np.testing.assert_allclose(mean[group], rows[:, index].mean(0), atol=1e-6)
            np.testing.assert_allclose(covariance[group], np.cov(rows[:, index].T, bias=True), atol=1e-6)
    assert list(found) == list(wanted)
