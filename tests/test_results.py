"""What published results have to keep; that the README shows them as they are is another test."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture
def results(root: Path) -> Path:
    return root / "tools" / "results"


def read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def test_tied_files_hold_their_matrices_once(results: Path) -> None:
    rows = read(results / "ties.json")["rows"]
    models, precisions = {row["model"] for row in rows}, {row["precision"] for row in rows}
    assert models == {"halvit-tiny", "halvit-small", "halvit-resnet50"}
    assert precisions == {"fp32", "int8"}
    assert len(rows) == 3 * 2 * 3  # every runtime
    for row in rows:
        tied = row["arms"]["tied"]
        assert tied["size_bytes"] <= 1.03 * tied["unique_bytes"], (row["model"], row["runtime"], row["precision"])


def test_factoring_large_models_keeps_its_bounds(results: Path) -> None:
    models = read(results / "factoring-cost.json")["models"]
    assert set(models) == {"resnet50", "deit_small"}
    for found in models.values():
        assert found["images"] == 256
        assert found["once"]["peak_bytes"] <= 3e9
        assert found["twice"]["seconds"] <= 240
        assert found["stages"]["allocation"]["seconds"] <= 2


def test_no_other_way_to_factor_is_nearer_to_the_original(results: Path) -> None:
    models = read(results / "factoring.json")["models"]
    assert len(models) == 5
    for name, model in models.items():
        cells = {(row["axis"], row["share"]): {} for row in model["rows"]}
        for row in model["rows"]:
            cells[row["axis"], row["share"]][row["way"]] = row.get("kl", float("inf"))
        assert len(cells) == 12
        for cell, found in cells.items():
            rivals = [kl for way, kl in found.items() if not way.startswith("ours")]
            assert len(rivals) == 4
            assert min(found["ours"], found["ours, project only"]) < min(rivals), (name, cell)
