"""Models that something else made smaller before: pruned, distilled, or with LoRA weights merged into them."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils import prune

from rowcol_edge import models
from rowcol_edge.datasets import Split, scan
from rowcol_edge.errors import ModelError
from rowcol_edge.factoring.apply import apply
from rowcol_edge.factoring.plan import FactorPlan, LayerPlan
from rowcol_edge.factoring.recover import recover
from rowcol_edge.factoring.study import Study, study


def _net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 12, 3), nn.BatchNorm2d(12), nn.ReLU(), nn.Conv2d(12, 24, 3, stride=2), nn.ReLU(),
        nn.Flatten(), nn.Linear(24 * 4, 32), nn.ReLU(), nn.Linear(32, 4),
    ).eval()  # fmt: skip


def _data() -> Split:
    values = np.random.default_rng(0).normal(size=(64, 1, 8, 8)).astype(np.float32)
    return scan(Split("calibration", "made", lambda: [({"input": values}, None)]))


def _outputs(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.from_numpy(_data().take(64)["input"]))


def _check(model: nn.Module, ranks: dict[str, int]) -> Study:
    """It can be loaded, studied and factored, and all that its layers use is kept at these ranks."""
    loaded = models.load(model).module
    known = study(loaded, _data(), classify=True)
    plan = FactorPlan(tuple(LayerPlan(name, "project", rank) for name, rank in ranks.items()))
    factored = apply(known.folded, plan, known.spaces)
    assert torch.allclose(_outputs(factored), _outputs(model), atol=1e-4)
    return known


def test_channels_that_were_pruned_to_zero_take_no_rank() -> None:
    model = _net()
    for place in ("3", "6"):
        layer = model.get_submodule(place)
        prune.ln_structured(layer, "weight", 0.5, n=2, dim=0)
        prune.remove(layer, "weight")
    known = _check(model, {"3": 12, "6": 16})
    assert {name: info.skip for name, info in known.infos.items() if name in ("3", "6")} == {"3": "", "6": ""}
    full = study(_net(), _data())
    for name, rank in (("3", 12), ("6", 16)):
        assert known.spaces[name].eigenvalues[rank] <= 1e-9 * known.spaces[name].eigenvalues[0]
        assert full.spaces[name].eigenvalues[rank] > 1e-9 * full.spaces[name].eigenvalues[0]


def test_single_weights_that_were_pruned_change_nothing() -> None:
    model = _net()
    prune.l1_unstructured(model[6], "weight", 0.7)
    prune.remove(model[6], "weight")
    assert int((model[6].weight == 0).sum()) == round(0.7 * model[6].weight.numel())
    _check(model, {"6": 32})


def test_masks_that_were_left_in_are_refused_with_what_to_do() -> None:
    model = _net()
    prune.l1_unstructured(model[6], "weight", 0.5)
    with pytest.raises(
        ModelError, match=r"layer '6'.* got a weight that was computed .*prune\.remove\(layer, 'weight'"
    ):
        models.load(model)


def test_a_layer_whose_mask_stayed_is_named_and_left() -> None:
    model = _net()
    prune.l1_unstructured(model[6], "weight", 0.5)
    _outputs(model)  # without gradients torch can copy it
    known = _check(model, {"3": 24})
    assert known.infos["6"].skip == "its weight is parametrized"
    assert known.infos["3"].skip == ""


def test_merged_lora_weights_are_weights() -> None:
    class Adapted(nn.Module):
        """W x + (α/r) B A x"""

        def __init__(self, base: nn.Linear, rank: int) -> None:
            super().__init__()
            self.base = base
            self.down = nn.Linear(base.in_features, rank, bias=False)
            self.up = nn.Linear(rank, base.out_features, bias=False)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.base(x) + 0.5 * self.up(self.down(x))

    adapted = _net()
    adapted[6] = Adapted(adapted[6], 4)
    merged = copy.deepcopy(adapted)
    layer = merged[6]
    with torch.no_grad():
        layer.base.weight += 0.5 * layer.up.weight @ layer.down.weight
    merged[6] = layer.base
    assert torch.allclose(_outputs(merged), _outputs(adapted), atol=1e-5)
    _check(merged, {"3": 24, "6": 32})
    known = _check(adapted, {"6.base": 32})  # one that was not merged works too: its pair is a factored layer already
    assert known.infos["6.down"].skip == known.infos["6.up"].skip.replace("6.down", "6.up")


def test_a_distilled_model_is_factored_and_distilled_again() -> None:
    teacher = _net()
    student = copy.deepcopy(teacher)
    with torch.no_grad():
        student[6].weight *= 0.8
    distilled = recover(student, teacher, _data(), epochs=2).module
    known = _check(distilled, {"3": 24, "6": 32})
    plan = FactorPlan((LayerPlan("6", "project", 4),))
    factored = apply(known.folded, plan, known.spaces)
    again = recover(factored, teacher, _data(), epochs=4)
    assert again.after.distance < again.before.distance
