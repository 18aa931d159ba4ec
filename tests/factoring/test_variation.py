"""What outputs vary by, against numpy's variance."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rowcol_edge.factoring.variation import Variation


def varied(*batches: torch.Tensor, samples: int | None = None) -> tuple[float, float]:
    """By sample and by element."""
    found = Variation()
    for batch in batches:
        found.add([batch], len(batch) if samples is None else samples)
    return found.squares()[0], found.means()[0]


@given(
    st.integers(8, 40), st.lists(st.integers(1, 5), max_size=2), st.integers(1, 7), st.floats(-1e5, 1e5),
    st.floats(1.0, 1e3), st.integers(0, 2**31),
)  # fmt: skip
def test_is_the_variance_about_each_elements_mean(
    count: int, shape: list[int], batch: int, offset: float, scale: float, seed: int
) -> None:
    values = np.random.default_rng(seed).normal(size=(count, *shape)) * scale + offset
    found = varied(*torch.from_numpy(values).split(batch))
    each = values.var(axis=0, ddof=1)
    assert found == pytest.approx((each.sum(), each.mean()), rel=1e-6)


@pytest.mark.parametrize(
    ("batches", "samples", "square"),
    [
        ([torch.tensor([[3.0, 5.0]])], 1, 4.0),
        ([torch.tensor([[3.0]])], 1, 9.0),
        ([torch.full((4, 2), 1e5)] * 2, 4, 2e10),
        ([torch.tensor([[1e5], [1e5 + 0.01]])], 2, 1e10),
        ([torch.tensor([1e5, 1e5 + 0.01]).double()], 2, (1e5 + 0.0078125 - 1e5) ** 2 / 2),
        ([torch.tensor([[1e5, 1.0], [1e5 + 0.01, 3.0]])], 2, 2.0),
        ([torch.tensor([1.0, 2.0, 3.0])], 4, 3 / 4),
        ([torch.tensor(2.0), torch.tensor(4.0)], 4, 4 / 8),
        ([torch.ones(4, 2), 2 * torch.ones(4, 3)], 4, 20 / 8 * 4.8 / 19),
        ([torch.zeros(4, 2)], 4, 1e-30),
        ([torch.zeros(0, 2)], 4, 1e-30),
    ],
    ids=[
        "one sample", "one number", "constant", "rounding", "fine steps", "rounding beside", "no samples", "numbers",
        "other shapes", "zeros", "empty",
    ],
)  # fmt: skip
def test_what_has_no_mean_of_each_element_varies_about_that_of_all(
    batches: list[torch.Tensor], samples: int, square: float
) -> None:
    assert varied(*batches, samples=samples)[0] == pytest.approx(square)


@pytest.mark.parametrize("offset", [0.0, 1000.0])
def test_masked_scores_do_not_count(offset: float) -> None:
    """One column is masked always, one in half of the samples."""
    values = torch.tensor([[1.0, -torch.inf, 2.0], [3.0, -torch.inf, 6.0], [1.0, -torch.inf, 0.0], [3.0, 0.0, 0.0]])
    values[:, 1:] = values[:, 1:].masked_fill(torch.tensor([[1, 0], [1, 0], [1, 1], [1, 1]]).bool(), -torch.inf)
    wanted = values[:, 0].var() + values[:2, 2].var() * 2 / 4
    assert varied(values + offset)[0] == pytest.approx(float(wanted))


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_samples_may_be_along_any_axis(axis: int) -> None:
    """One of the others is by chance as long as most batches."""
    values = 3.0 + torch.arange(4.0)[:, None] + torch.randn(11, 4, 5, generator=torch.Generator().manual_seed(0))
    found = varied_along(values, axis)
    each = values.var(0)
    assert found == pytest.approx((float(each.sum()), float(each.mean())), rel=1e-5)


def varied_along(values: torch.Tensor, axis: int) -> tuple[float, float]:
    found = Variation()
    for batch in values.split(4):
        found.add([batch.movedim(0, axis)], len(batch))
    return found.squares()[0], found.means()[0]


def test_outputs_are_told_apart() -> None:
    found = Variation()
    for batch in (torch.tensor([[1.0], [2.0]]), torch.tensor([[3.0], [6.0]])):
        found.add([batch, 10 * batch], len(batch))
    variance = float(np.var([1, 2, 3, 6], ddof=1))
    assert found.squares() == pytest.approx([variance, 100 * variance])


def test_outputs_may_come_and_go() -> None:
    found = Variation()
    one, two = torch.tensor([[1.0], [3.0]]), torch.tensor([[1.0], [5.0]])
    for batch in ([one], [one, two], []):
        found.add(batch, 2)
    assert found.squares() == pytest.approx([4 / 3, 8.0])
