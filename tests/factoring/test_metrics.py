"""Gradients where they arrive, against autograd, and what is worked out from those of another place."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from rowcol_edge.factoring.metrics import Gradients, Metrics
from rowcol_edge.factoring.places import Place
from rowcol_edge.factoring.sensitivity import Losses, Objective, stream


class Branching(nn.Module):
    """Two layers read one tensor that is then changed in place, as what both give is."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.third = nn.Conv2d(2, 8, 3), nn.Conv2d(8, 4, 1, stride=2), nn.Conv2d(8, 4, 1)
        self.head = nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        strided, straight = self.second(x), self.third(x)
        x.relu_()
        kept = straight.relu_().mean((2, 3)) + strided.tanh_().mean((2, 3)) + x[:, :4].mean((2, 3))
        result: torch.Tensor = self.head(kept)
        return result


PICTURES = np.random.default_rng(0).normal(size=(12, 2, 7, 7)).astype(np.float32)
CHUNKS = [{"x": PICTURES[:5]}, {"x": PICTURES[5:]}]
EVERY = np.arange(8).reshape(1, 8, 1)
PAIRS, TAPS = np.array([[[3], [1]], [[0], [7]]]), np.arange(8).reshape(1, 4, 2)


def streamed(model: nn.Module, watched: dict[Place, Gradients]) -> None:
    stream(model, CHUNKS, watched, Objective(classify=True), lambda: None)


def by_hand(model: Branching) -> dict[str, torch.Tensor]:
    """(samples · positions, features) of the gradients that come back to `first`'s output through one reader alone, and
    of those behind it."""
    objective = Objective(classify=True)
    found: dict[str, list[torch.Tensor]] = {}
    for chunk in CHUNKS:
        x = model.first(torch.from_numpy(chunk["x"])).detach()
        taken = {name: x.clone().requires_grad_() for name in ("second", "third", "rest")}
        given = {name: getattr(model, name)(taken[name]) for name in ("second", "third")}
        kept = given["third"].relu().mean((2, 3)) + given["second"].tanh().mean((2, 3))
        kept = kept + taken["rest"].relu()[:, :4].mean((2, 3))
        wanted = [*taken.values(), *given.values()]
        for name, gradient in zip(
            ("second", "third", "rest", "behind second", "behind third"),
            torch.autograd.grad(objective(model.head(kept), len(kept)), wanted),
            strict=True,
        ):
            found.setdefault(name, []).append(gradient.movedim(1, -1).flatten(0, 2).double())
    return {name: torch.cat(parts) for name, parts in found.items()}


@pytest.mark.parametrize("reader", ["second", "third"])
def test_what_comes_back_through_a_reader_follows_from_what_arrives_behind_it(reader: str) -> None:
    model = Branching()
    wanted = by_hand(model)
    places = [Place(reader), Place(reader, False, EVERY, "all"), Place(reader, False, PAIRS, "pairs")]
    places.append(Place(reader, False, TAPS, "taps"))
    metrics = Metrics(model, places)
    assert list(metrics.watched) == [places[0]]
    streamed(model, metrics.watched)
    direct: dict[Place, Gradients] = {place: Gradients() for place in places}
    streamed(model, direct)
    behind, through = wanted[f"behind {reader}"], wanted[reader]
    np.testing.assert_allclose(metrics[places[0]][0], behind.T @ behind / 12, rtol=1e-4, atol=1e-9)
    np.testing.assert_allclose(metrics[places[1]][0], through.T @ through / 12, rtol=1e-4, atol=1e-9)
    for place in places:
        np.testing.assert_allclose(metrics[place], direct[place].mean(), rtol=1e-4, atol=1e-9)


def test_a_reader_by_itself_is_watched() -> None:
    place = Place("third", False, EVERY, "all")
    metrics = Metrics(model := Branching(), [place])
    assert list(metrics.watched) == [place]
    streamed(model, metrics.watched)
    through = by_hand(model)["third"]
    np.testing.assert_allclose(metrics[place][0], through.T @ through / 12, rtol=1e-4, atol=1e-9)


def test_many_positions_count_for_all() -> None:
    """Of a map that is alike everywhere a part says what all of it does."""
    some, every = Gradients(), torch.ones(3, 1000, 1, 2)
    some.add(None, every)
    some.flush(3)
    np.testing.assert_allclose(some.mean(), np.full((1, 2, 2), 1000.0))


def test_losses_are_the_same_from_both_sides_of_a_layer() -> None:
    model, rng = Branching(), np.random.default_rng(1)
    mean, basis, dual = rng.normal(size=(1, 8)), rng.normal(size=(1, 8, 8)), rng.normal(size=(1, 8, 8))
    matrix = model.third.weight.detach().flatten(1).double().numpy()
    found = []
    for known in (None, matrix):
        losses = Losses()
        frame = losses.at(mean, basis, dual, known)
        assert frame.behind is (known is not None)
        stream(model, CHUNKS, {Place("third", False, EVERY, "all"): frame}, Objective(classify=True), lambda: None)
        found.append(losses.by_rank())
    np.testing.assert_allclose(found[0], found[1], rtol=1e-4)
    assert found[0][0] > 0.0


@pytest.mark.parametrize("positions", [1, 3, 200])
def test_losses_are_what_the_directions_add_at_all_positions(positions: int) -> None:
    """However gradients, values and directions are multiplied."""
    rng = np.random.default_rng(positions)
    values, gradients = rng.normal(size=(2, 5, positions, 2, 6)).astype(np.float32)
    mean, (basis, dual) = rng.normal(size=(2, 6)), rng.normal(size=(2, 2, 6, 4))
    losses = Losses()
    frame = losses.at(mean, basis, dual)
    frame.add(frame.see(torch.from_numpy(values)), torch.from_numpy(gradients))
    frame.flush(5)
    parts = np.einsum("npgi,gik,npgj,gjk->nk", gradients, basis, values - mean, dual)
    cut = 0.5 * np.square([parts[:, rank:].sum(1) for rank in range(5)]).mean(1)
    wanted = np.maximum.accumulate(cut[::-1])[::-1]  # more directions never lose more
    np.testing.assert_allclose(losses.by_rank(), wanted, rtol=1e-3, atol=1e-6)
