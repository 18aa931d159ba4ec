"""The plan file: round trip, edits, refusals."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from rowcol_edge.errors import PlanError
from rowcol_edge.factoring.plan import FactorPlan, LayerPlan

PLAN = FactorPlan(
    layers=(
        LayerPlan("conv1", "project", 16, 0.9991, 1000, 600, 50000, 30000),
        LayerPlan("fc", "dense", None, 1.0, 20, 20, 20, 20, reason="too small to factor"),
    ),
    rank_multiple=16,
    made_by="energy=0.999",
    model="sample:elpv-resnet18",
)


def test_round_trip(tmp_path: Path) -> None:
    path = tmp_path / "plan.toml"
    PLAN.write(path)
    assert FactorPlan.read(path) == PLAN
    text = path.read_text(encoding="utf-8")
    assert text.startswith("# Factor plan")
    assert text.count("[[layers]]") == 2
    assert [file.name for file in tmp_path.iterdir()] == ["plan.toml"]


def test_edit_by_hand() -> None:
    text = PLAN.to_toml().replace("rank = 16", "rank = 24").replace("energy = 1.0", "energy = 1")
    edited = FactorPlan.from_toml(text)
    assert edited.projected[0].rank == 24
    assert edited.digest != PLAN.digest
    dense = FactorPlan.from_toml(PLAN.to_toml().replace('"project"', '"dense"'))
    assert dense.projected == ()
    assert dense.layers[0].rank is None


def test_splits_are_read_again_and_count_as_decisions() -> None:
    layers = (
        LayerPlan("conv1", "project", 16, split="both", taken=8),
        LayerPlan("conv2", "project", 16, split="row"),
        LayerPlan("conv3", "project", 16, energy=None, split="spatial", across_first=True),
    )
    plan = FactorPlan(layers, recovered=3, loss=0.25, gap=0.125, note="too few data")
    assert FactorPlan.from_toml(plan.to_toml()) == plan
    digests = {replace(plan, layers=(replace(layers[0], **change), *layers[1:])).digest
               for change in ({}, {"taken": 9}, {"split": "row", "taken": None}, {"rank": 17})}  # fmt: skip
    assert len(digests) == 4
    older = plan.to_toml().replace("schema = 3", "schema = 1").replace('split = "row"\n', "")
    assert FactorPlan.from_toml(older).layers[1].split == "column"


def test_digest_is_of_decisions_only() -> None:
    relabelled = replace(PLAN, made_by="edited", layers=tuple(reversed(PLAN.layers)))
    assert relabelled.digest == PLAN.digest
    assert len(PLAN.digest) == 64
    assert PLAN.saved_parameters == 400


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("schema = 3", "schema = 9", "expected 1 to 3, got 9"),
        ("rank = 16", "rnak = 16", "did you mean 'rank'"),
        ("rank = 16", "rank = 0", "at least 1"),
        ("rank = 16", "rank = true", "expected int, got True"),
        ("rank = 16", "rank = 1.5", "expected int"),
        ('split = "column"', 'split = "colum"', "did you mean 'column'"),
        ('split = "column"', 'split = "both"', "expected a rank for both, else none, got None"),
        ('split = "column"', 'split = "row"\ntaken = 3', "expected a rank for both, else none, got 3"),
        ('split = "column"', 'split = "row"\nacross_first = true', "expected a spatial split"),
        ('"project"', '"projct"', "did you mean 'project'"),
        ("rank_multiple = 16", "rank_multiple = 0", "positive integer"),
        ("rank_multiple = 16", "rank_multpile = 16", "did you mean 'rank_multiple'"),
        ('name = "fc"', 'name = "conv1"', "twice"),
        ('name = "fc"\n', "", "without a name"),
        ("schema = 3", "schema =", "expected TOML"),
        ("[[layers]]", "[layers]", "TOML"),
    ],
)
def test_refusals(old: str, new: str, message: str) -> None:
    text = PLAN.to_toml()
    assert old in text
    with pytest.raises(PlanError, match=message):
        FactorPlan.from_toml(text.replace(old, new))


def test_unreadable_and_unwritable(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="a readable plan file"):
        FactorPlan.read(tmp_path / "none.toml")
    with pytest.raises(PlanError, match="cannot write plan"):
        PLAN.write(tmp_path / "no" / "folder.toml")
    with pytest.raises(PlanError, match="expected \\[\\[layers\\]\\]"):
        FactorPlan.from_toml("schema = 1\nlayers = 3\n")
