"""The recipe's own steps; its figures are those of a whole run, in tools/results/recipe_prune.json."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from types import ModuleType

import pytest
import torch

from rowcol_edge import config, job
from rowcol_edge.datasets import Split
from rowcol_edge.export.parity import torch_run


@pytest.fixture
def recipe(root: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(root / "tools")
    return importlib.import_module("recipe_prune")


def test_half_of_the_hidden_units_go_and_the_model_can_be_factored(recipe: ModuleType) -> None:
    work = job.prepare(config.make({"model": "sample:fmnist-vit"}))
    before = {name: value.clone() for name, value in work.model.module.state_dict().items()}
    pruned = recipe.prune(work.model.module, work, 0.5)
    assert all(torch.equal(value, before[name]) for name, value in work.model.module.state_dict().items())
    assert [block.expand.out_features for block in pruned.blocks] == [192] * 6
    assert {layer.in_features for block in pruned.blocks for layer in (block.expand, block.attention.query)} == {96}
    known = recipe.studied(pruned, work, job.silent)
    made, parameters, macs = recipe.factored(known, 200_000, job.silent)
    assert parameters == sum(parameter.numel() for parameter in made.parameters()) <= 200_000
    assert macs < known.macs
    feeds = work.calibration.take(4)
    (outputs,) = torch_run(made)(feeds).values()
    assert outputs.shape == (4, 10)


def test_without_the_training_images_the_last_rows_are_left_out(
    recipe: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    work = job.prepare(config.make({"model": "sample:fmnist-vit"}))
    monkeypatch.setenv("FASHION_MNIST", str(tmp_path))
    found: Split | None = recipe.unlabelled(work)
    assert found is None
    assert "without more images" in capsys.readouterr().err


def test_the_result_is_of_this_recipe(root: Path) -> None:
    rows = json.loads((root / "tools" / "results" / "recipe_prune.json").read_text(encoding="utf-8"))["rows"]
    costs = {row["step"]: (row["parameters"], row["macs"]) for row in rows}
    assert list(costs)[:4] == ["dense", "pruned", "pruned, factored", "pruned, factored, distilled"]
    assert costs["pruned, factored"] == costs["pruned, factored, distilled"]  # distilling changes weights only
    assert costs["dense"] > costs["pruned"] > costs["pruned, factored"]
    best = {row["step"]: row["recovered"] for row in rows if "recovered" in row}
    for step, recovered in best.items():
        scores = [epoch["score"] for epoch in recovered["history"]]
        assert scores[recovered["best_epoch"]] == max(scores), step
