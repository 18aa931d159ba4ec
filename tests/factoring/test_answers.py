"""What errors of a classifier's own scores are worth, without a way back through it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from rowcol_edge.datasets import Split, scan
from rowcol_edge.factoring.answers import Answers, given_by
from rowcol_edge.factoring.apply import apply
from rowcol_edge.factoring.plan import FactorPlan, LayerPlan
from rowcol_edge.factoring.spaces import blended
from rowcol_edge.factoring.study import study


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def test_the_fisher_matrix_is_the_mean_over_all_classes_weighed_with_their_probability() -> None:
    scores = torch.from_numpy(normal(6, 4)).double().requires_grad_()
    logs = scores.log_softmax(1)
    wanted = torch.zeros(4, 4, dtype=torch.float64)
    for drawn in range(4):
        [gradients] = torch.autograd.grad(logs[:, drawn].sum(), scores, retain_graph=True)
        wanted += torch.einsum("n,ni,nj->ij", logs[:, drawn].exp().detach(), gradients, gradients) / 6
    answers = Answers()
    for batch in scores.detach().split(4):
        answers.see((batch,))
    np.testing.assert_allclose(answers.fisher(), wanted.numpy(), atol=1e-12)


class Net(nn.Module):
    def __init__(self, end: Callable[[torch.Tensor], Any]) -> None:
        super().__init__()
        self.first, self.last, self.end = nn.Linear(5, 8), nn.Linear(8, 3), end

    def forward(self, x: torch.Tensor) -> Any:
        return self.end(self.last(torch.relu(self.first(x))))


@pytest.mark.parametrize(
    ("end", "found"),
    [
        (lambda scores: scores, "last"),
        (lambda scores: {"logits": scores}, "last"),
        (lambda scores: scores.softmax(1), None),
        (lambda scores: scores.relu_(), None),
        (lambda scores: (scores, scores.exp()), None),
        (lambda scores: scores[:, None], None),
    ],
)
def test_only_a_layer_whose_output_is_all_that_the_model_gives_is_known(
    end: Callable[[torch.Tensor], Any], found: str | None
) -> None:
    model = Net(end).eval()
    assert given_by(model, {"x": normal(2, 5)}, ["first", "last"]) == found
    assert not any(module._forward_hooks for module in model.modules())


def few(count: int, size: int, *, seed: int = 0) -> Split:
    return scan(Split("calibration", "few", lambda: iter([({"x": normal(count, size, seed=seed)}, None)])))


def test_scores_are_weighed_by_all_samples_and_classes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not by the one class that is drawn for each of a few samples."""

    def metric() -> np.ndarray:
        torch.manual_seed(0)
        dual = study(Net(lambda scores: scores).eval(), few(200, 5), classify=True).spaces["last"].dual
        assert dual is not None
        return np.asarray(dual @ dual.T)

    exact = metric()
    monkeypatch.setattr("rowcol_edge.factoring.answers.given_by", lambda model, sample, names: None)
    drawn = metric()
    shares = np.random.default_rng(0).normal(size=3)
    assert abs(float(shares @ drawn @ shares) / float(shares @ exact @ shares) - 1.0) < 0.5
    assert not np.allclose(exact, drawn, rtol=1e-3)
    torch.manual_seed(0)
    model, answers = Net(lambda scores: scores).eval(), Answers()
    with torch.no_grad():
        answers.see(model(torch.from_numpy(normal(200, 5))))
    np.testing.assert_allclose(exact, blended(answers.fisher()), rtol=0.2, atol=0.01 * float(np.trace(exact)))


@pytest.mark.parametrize("frozen", [False, True])
def test_a_model_of_which_only_the_head_is_looked_at_is_weighed(frozen: bool) -> None:
    """A linear probe, or a backbone that keeps no gradients."""

    class Probe(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.head = (nn.Linear(12, 12) if frozen else nn.Identity()), nn.Linear(12, 9)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            with torch.set_grad_enabled(torch.is_grad_enabled() and not frozen):
                x = self.body(x)
            result: torch.Tensor = self.head(x)
            return result

    found = study(Probe().eval(), few(100, 12), classify=True)
    assert found.spaces["head"].losses is not None
    assert found.spaces["head"].dual is not None
    assert found.without_gradients == ""


class Wide(nn.Module):
    """More features than there are calibration samples, and as many classes."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body, self.head = nn.Sequential(nn.Linear(32, 200), nn.GELU()), nn.Linear(200, 150)
        with torch.no_grad():
            self.head.weight *= torch.logspace(0, -1.5, 200) * 6.0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.head(self.body(x))
        return result


def test_what_few_samples_did_not_show_of_a_wide_classifier_is_not_given_away(monkeypatch: pytest.MonkeyPatch) -> None:
    def lost(rank: int) -> float:
        model = Wide().eval()
        found = study(model, few(64, 32), classify=True)
        made = apply(found.folded, FactorPlan((LayerPlan("head", "project", rank),)), found.spaces)
        unseen = torch.from_numpy(normal(2000, 32, seed=1))
        with torch.no_grad():
            wanted, got = (net(unseen).double().log_softmax(1) for net in (model, made))
        return float((wanted.exp() * (wanted - got)).sum(1).mean())

    now = [lost(rank) for rank in (40, 80, 110)]
    monkeypatch.setattr("rowcol_edge.factoring.places.Moments.shrunk", lambda self, rank=None, prior=None: self)
    bare = [lost(rank) for rank in (40, 80, 110)]
    monkeypatch.setattr("rowcol_edge.factoring.projections._unseen", lambda left, most, least: left[:, :0])
    shown = [lost(rank) for rank in (40, 80, 110)]  # nothing beyond the 63 directions that 64 samples showed
    for held in (now, bare):
        assert all(a < 0.8 * b for a, b in zip(held[1:], shown[1:], strict=True)), (now, bare, shown)
    assert all(a < b for a, b in zip(now, bare, strict=True)), (now, bare)


def test_a_classifier_that_takes_few_directions_is_cut_to_these_without_loss() -> None:
    """Fewer samples than features, but more than directions."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 120, bias=False), nn.Linear(120, 90)).eval()
    found = study(model, few(64, 8), classify=True)
    made = apply(found.folded, FactorPlan((LayerPlan("3", "project", 16),)), found.spaces)
    unseen = torch.from_numpy(normal(500, 8, seed=1))
    with torch.no_grad():
        wanted, got = (net(unseen).double().log_softmax(1) for net in (model, made))
    assert float((wanted.exp() * (wanted - got)).sum(1).mean()) < 1e-9
