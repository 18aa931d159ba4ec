"""Models that return several tensors, nested ones, infinities, or something that no gradient comes from."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import rowcol_edge
from rowcol_edge import models
from rowcol_edge.calling import tensors
from rowcol_edge.errors import WeightsError
from rowcol_edge.factoring.outcomes import Departure
from rowcol_edge.factoring.plan import FactorPlan
from rowcol_edge.factoring.sensitivity import Objective

INF = float("inf")


class Forked(nn.Module):
    """A trunk and two heads, each behind a layer of its own."""

    def __init__(self, wrap: Callable[[nn.Module, torch.Tensor], Any]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.trunk, self.first, self.second = nn.Linear(8, 64), nn.Linear(64, 64), nn.Linear(64, 64)
        self.head, self.other = nn.Linear(64, 6), nn.Linear(64, 4)
        self.wrap = wrap

    def forward(self, x: torch.Tensor) -> Any:
        return self.wrap(self, F.relu(self.trunk(x)))

    def classes(self, y: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.head(F.relu(self.first(y)))
        return found

    def boxes(self, y: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.other(F.relu(self.second(y)))
        return found


class Attending(nn.Module):
    """With a causal mask of infinities among its buffers."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.enter, self.query, self.key, self.value = (nn.Linear(8, 32), *(nn.Linear(32, 32) for _ in range(3)))
        self.head = nn.Linear(32, 6)
        self.register_buffer("mask", nn.Transformer.generate_square_subsequent_mask(12))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.enter(x)
        shares = (self.query(x) @ self.key(x).transpose(1, 2) * 32**-0.5 + self.mask).softmax(-1)
        found: torch.Tensor = self.head((x + shares @ self.value(x)).mean(1))
        return found


def factored(
    model: nn.Module, x: np.ndarray, tmp_path: Path, budget: str | None = "params<=0.7x"
) -> tuple[Any, nn.Module]:
    np.savez(tmp_path / "x.npz", allow_pickle=False, x=x)
    result = rowcol_edge.factor(model, calib=tmp_path / "x.npz", budget=budget, out=tmp_path / "out")
    return result, torch.export.load(tmp_path / "out" / "model.pt2").module()


def normal(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).normal(size=shape).astype(np.float32)


def departure(batches: Sequence[tuple[Sequence[torch.Tensor], Sequence[torch.Tensor]]], *, classify: bool) -> float:
    found = Departure(classify=classify)
    for wanted, got in batches:
        found.add(wanted, got, torch.ones(len(wanted[0]), dtype=torch.bool))
    return found.value


def forms(result: Any) -> dict[str, str]:
    return {layer.name: layer.form for layer in result.plan.layers}


def forms_and_ranks(plan: FactorPlan) -> set[tuple[str, str, int]]:
    return {(layer.name, layer.form, layer.rank) for layer in plan.layers}


@pytest.mark.parametrize(
    "wrap",
    [lambda m, y: (m.classes(y), m.boxes(y)), lambda m, y: {"classes": m.classes(y), "more": [{"boxes": m.boxes(y)}]}],
    ids=["flat", "nested"],
)
def test_every_output_counts(wrap: Callable[[nn.Module, torch.Tensor], Any], tmp_path: Path) -> None:
    model = Forked(wrap).eval()
    x = normal(1024, 8)
    result, small = factored(model, x, tmp_path, budget="params<=0.45x")
    with torch.no_grad():
        wanted, got = ([y.double() for y in tensors(each(torch.from_numpy(x)))] for each in (model, small))
    assert len(wanted) == len(got) == 2
    measured = departure([(wanted, got)], classify=True)
    assert result.plan.loss / 4 < measured < 4 * result.plan.loss


@pytest.mark.parametrize(
    "boxes",
    [lambda m, y: m.boxes(y).argmax(1), lambda m, y: m.boxes(y).detach(), torch.no_grad()(lambda m, y: m.boxes(y))],
    ids=["integers", "detached", "without gradients"],
)
def test_what_no_gradient_comes_from_keeps_its_channels(
    boxes: Callable[[nn.Module, torch.Tensor], torch.Tensor], tmp_path: Path
) -> None:
    model = Forked(lambda m, y: (m.classes(y), boxes(m, y))).eval()
    x = normal(256, 8)
    result, small = factored(model, x, tmp_path)
    assert {each.name for each in result.plan.channels} == {"first"}  # neither trunk nor second
    assert forms(result)["second"] == "dense"
    with torch.no_grad():
        wanted, got = (each(torch.from_numpy(x))[1] for each in (model, small))
    torch.testing.assert_close(got, wanted)


def test_a_mask_of_infinities_is_no_broken_weight(tmp_path: Path) -> None:
    model, x = Attending().eval(), normal(128, 12, 8)
    result, small = factored(model, x, tmp_path)
    assert "narrow" in forms(result).values()
    with torch.no_grad():
        wanted, got = (each(torch.from_numpy(x)) for each in (model, small))
    assert float((wanted - got).norm() / wanted.norm()) < 0.05


@pytest.mark.parametrize(("key", "value"), [("1.running_var", INF), ("1.running_mean", -INF), ("0.bias", INF)])
def test_infinite_weights_and_statistics_are_refused(key: str, value: float) -> None:
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3)).eval()
    model.state_dict()[key][1] = value
    with pytest.raises(WeightsError, match=rf"{key}: expected finite values, got 1 NaN or Inf out of 3"):
        models.load(model)


def test_a_mask_that_holds_no_number_is_refused() -> None:
    model = Attending()
    model.mask[0, 1] = float("nan")
    with pytest.raises(WeightsError, match="mask"):
        models.load(model)


def test_classes_that_are_masked_are_as_if_they_were_not_there(tmp_path: Path) -> None:
    """Their scores are minus infinity in both."""

    def only_three(m: nn.Module, y: torch.Tensor) -> torch.Tensor:
        return m.classes(y).masked_fill(torch.arange(6) > 2, -INF)

    model, x = Forked(only_three).eval(), normal(256, 8)
    result, small = factored(model, x, tmp_path)
    assert {each.name for each in result.plan.channels} & {"trunk", "first"}
    with torch.no_grad():
        wanted, got = (each(torch.from_numpy(x)) for each in (model, small))
    assert torch.equal(wanted.isinf(), got.isinf())
    assert float((wanted - got)[:, :3].norm() / wanted[:, :3].norm()) < 0.3


@pytest.mark.parametrize("classify", [False, True])
@pytest.mark.parametrize("parts", [[4, 4, 2], [3, 7], [1, 9]])
def test_batches_lose_what_all_of_them_at_once_lose(parts: list[int], classify: bool) -> None:
    wanted, moves = ([torch.from_numpy(normal(10, *s)).double() for s in ((4,), (3, 2))] for _ in range(2))
    got = [a + 0.1 * b.flip(0) for a, b in zip(wanted, moves, strict=True)]
    starts = np.cumsum([0, *parts])
    batches = [([y[i:j] for y in wanted], [y[i:j] for y in got]) for i, j in itertools.pairwise(starts)]
    once = departure([(wanted, got)], classify=classify)
    assert once > 0.0
    assert departure(batches, classify=classify) == pytest.approx(once)


def test_losses_of_masked_scores_are_finite() -> None:
    scores = torch.from_numpy(normal(20, 4)).double()
    masked, moved = scores.clone(), scores + 0.1 * torch.arange(4)
    masked[:, 3] = moved[:, 3] = -INF
    own = departure([([scores[:, :3]], [moved[:, :3]])], classify=True)
    assert departure([([masked], [moved])], classify=True) == pytest.approx(own)
    assert 0.0 < departure([([masked], [moved])], classify=False) < INF
    leaf = scores.clone().requires_grad_()
    Objective(classify=False)(leaf.masked_fill(torch.arange(4) > 2, -INF), 20).backward()
    assert leaf.grad is not None
    assert leaf.grad.isfinite().all()
    assert leaf.grad[:, :3].any()


def test_an_offset_hides_no_difference(tmp_path: Path) -> None:
    """The code divides by the root of a width; half of the channels are copies of the others."""

    class Pressure(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.first, self.second, self.head = nn.Linear(8, 64), nn.Linear(64, 64), nn.Linear(64, 1)
            with torch.no_grad():
                self.second.weight[32:], self.second.bias[32:] = self.second.weight[:32], self.second.bias[:32]
                self.head.weight.mul_(60)
                self.head.bias.fill_(101_325)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = F.relu(self.second(F.relu(self.first(x))))
            found: torch.Tensor = self.head(y / y.shape[-1] ** 0.5)
            return found

    model, x = Pressure().eval(), normal(256, 8)
    result, small = factored(model, x, tmp_path, budget="params<=0.7x")
    assert "second" not in {each.name for each in result.plan.channels}
    with torch.no_grad():
        wanted, got = (each(torch.from_numpy(x)) for each in (model, small))
    assert float((wanted - got).norm() / (wanted - wanted.mean()).norm()) < 0.2


@pytest.mark.parametrize("beside", [False, True], ids=["alone", "beside another output"])
def test_an_offset_of_the_answers_changes_no_plan(beside: bool, tmp_path: Path) -> None:
    """A pressure around 100,000 Pa, by the plan that is taken where nothing says how much may be lost."""

    class Pressure(nn.Module):
        def __init__(self, offset: float) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.first, self.second, self.head = nn.Linear(8, 64), nn.Linear(64, 64), nn.Linear(64, 1)
            self.other, self.offset = nn.Linear(64, 4), offset

        def forward(self, x: torch.Tensor) -> Any:
            y = F.relu(self.second(F.relu(self.first(x))))
            found = self.head(y).double() + self.offset  # which single precision would round
            return (found, self.other(y)) if beside else found

    x, found = normal(256, 8), {}
    for offset in (0.0, 1e5, 1e8):
        folder = tmp_path / str(offset)
        folder.mkdir()
        model = Pressure(offset).eval()
        result, small = factored(model, x, folder, budget=None)
        with torch.no_grad():
            wanted, got = ([y.double() for y in tensors(each(torch.from_numpy(x)))] for each in (model, small))
        measured = departure([(wanted, got)], classify=False)
        assert measured < 20 * max(result.plan.loss, 1e-4)
        found[offset] = result.plan
    assert found[0.0].layers
    for offset in (1e5, 1e8):
        assert {(e.name, e.width) for e in found[0.0].channels} == {(e.name, e.width) for e in found[offset].channels}
        assert forms_and_ranks(found[0.0]) == forms_and_ranks(found[offset])
        assert found[offset].loss == pytest.approx(found[0.0].loss, rel=1e-3)


@pytest.mark.parametrize("count", [11, 12, 13, 17])
@pytest.mark.parametrize(
    ("wrap", "contract"),
    [(lambda m, y: m.classes(y).squeeze(), "classify"), (lambda m, y: list(m.classes(y).unbind(0)), "embed")],
    ids=["squeezed", "a tensor for each sample"],
)
def test_shapes_and_numbers_of_outputs_may_hang_on_the_batch(
    wrap: Callable[[nn.Module, torch.Tensor], Any], contract: str, count: int, tmp_path: Path
) -> None:
    """Chunks of samples that end in a single one among them."""
    model, x = Forked(wrap).eval(), normal(count, 8)
    np.savez(tmp_path / "x.npz", x=x)
    result = rowcol_edge.factor(model, calib=tmp_path / "x.npz", budget="params<=0.7x", contract=contract)
    assert result.plan.loss is not None
    assert 0.0 < result.plan.loss < INF


def test_an_offset_of_scores_that_a_mask_hides_at_times_changes_no_loss(tmp_path: Path) -> None:
    x, losses = normal(64, 8), []
    np.savez(tmp_path / "x.npz", x=x)
    for offset in (0.0, 1000.0):

        def masked(m: nn.Module, y: torch.Tensor, offset: float = offset) -> torch.Tensor:
            found: torch.Tensor = (m.classes(y).double() + offset).masked_fill(y[:, :6] > 0.5, -INF)
            return found

        model = Forked(masked).eval()
        result = rowcol_edge.factor(model, calib=tmp_path / "x.npz", budget="params<=0.7x", contract="embed")
        losses.append(result.plan.loss)
    assert losses[0] > 1e-4
    assert losses[1] == pytest.approx(losses[0], rel=1e-2)


@pytest.mark.parametrize("empty", [nn.Parameter(torch.zeros(0, 8)), torch.zeros(0)], ids=["parameter", "buffer"])
def test_what_is_empty_is_in_nobodys_way(empty: torch.Tensor, tmp_path: Path) -> None:
    model = Forked(lambda m, y: m.classes(y)).eval()
    if isinstance(empty, nn.Parameter):
        model.register_parameter("empty", empty)
    else:
        model.register_buffer("empty", empty)
    result, _ = factored(model, normal(256, 8), tmp_path)
    assert result.parameters_after < result.parameters_before
