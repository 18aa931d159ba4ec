"""Factors leave a build ready for int8: their gauges are chosen on calibration data, said, and in the files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper

import rowcol_edge
from rowcol_edge import gauges
from rowcol_edge.factoring import settle
from rowcol_edge.factoring.plan import FactorPlan
from rowcol_edge.pipeline import Factored

from .nets import frames, small_net, write_splits

BUDGET = "params<=0.35x"


@pytest.fixture(scope="module")
def net() -> torch.nn.Module:
    return small_net()


@pytest.fixture(scope="module")
def splits(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return write_splits(tmp_path_factory.mktemp("splits"))


def _factor(net: torch.nn.Module, splits: dict[str, str], **options: Any) -> Factored:
    return rowcol_edge.factor(net, budget=BUDGET, calib=splits["calib"], **{"cache": False, **options})


def _unsettled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(settle.settle.__kwdefaults__, "gauges", (None,))
    monkeypatch.setitem(settle.settle_model.__kwdefaults__, "gauges", (None,))


def test_factors_are_settled_and_the_plan_says_how(
    net: torch.nn.Module, splits: dict[str, str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    found = _factor(net, splits, out=tmp_path)
    projected = found.plan.projected
    assert projected
    known = [str(gauge) for gauge in settle.GAUGES[1:]]
    for layer in projected:
        chosen = layer.gauge.split("; ")
        assert len(chosen) == len(list(found.module.get_submodule(layer.name).children())) - 1
        assert set(chosen) <= {*known, "as it was"}
    assert any(layer.gauge != "as it was" for layer in projected)
    assert FactorPlan.read(tmp_path / "plan.toml") == found.plan
    said = {entry["name"]: entry["gauge"] for entry in found.to_dict()["plan"]}
    assert said == {layer.name: layer.gauge or None for layer in found.plan.layers}
    assert _factor(net, splits).plan == found.plan
    _unsettled(monkeypatch)
    before = _factor(net, splits)
    assert before.plan.digest == found.plan.digest
    pictures = torch.from_numpy(frames(20, seed=5)[0])
    with torch.no_grad():
        wanted, got = before.module.eval()(pictures), found.module.eval()(pictures)
    assert float((got - wanted).norm() / wanted.norm()) < 1e-5
    name = projected[0].name
    weights = [each.module.get_submodule(name)[0].weight for each in (before, found)]
    assert not torch.allclose(*weights)


def test_an_int8_build_holds_the_settled_factors(net: torch.nn.Module, splits: dict[str, str], tmp_path: Path) -> None:
    found = _factor(net, splits)
    built = rowcol_edge.build(
        net, out=str(tmp_path), budget=BUDGET, precision="int8", dense=False, calib=splits["calib"]
    )[0]  # fmt: skip
    plan = FactorPlan.read(built.path / "plan.toml")
    assert plan == found.plan
    assert any("gauges of" in note and "weights of 7 bits" in note for note in built.manifest.build["notes"])
    assert found.second_pass.startswith("factored: second pass ")
    assert found.second_pass in built.manifest.build["notes"]
    graph = onnx.load(built.path / built.manifest.arms[0].artifact).graph
    values = {each.name: numpy_helper.to_array(each) for each in graph.initializer}
    checked = 0
    for layer in plan.projected:
        for part, module in found.module.get_submodule(layer.name).named_children():
            name = f"{layer.name}.{part}.weight"
            if f"{name}_quantized" not in values:
                continue  # a linear layer's is stored transposed, under a fused name
            scale = values[f"{name}_scale"].reshape(-1, *[1] * (module.weight.dim() - 1))
            off = np.abs(values[f"{name}_quantized"] * scale - module.weight.detach().numpy())
            assert (off <= 0.51 * scale).all()
            checked += 1
    assert checked >= 2


def test_targets_that_do_not_saturate_are_judged_at_eight_bits(
    net: torch.nn.Module, splits: dict[str, str], tmp_path: Path
) -> None:
    built = rowcol_edge.build(
        net, out=str(tmp_path), budget=BUDGET, target="raspberry-pi-5", dense=False, calib=splits["calib"]
    )[0]  # fmt: skip
    assert any("weights of 8 bits" in note for note in built.manifest.build["notes"])


def test_gauges_are_kept_with_the_files_that_have_them(
    net: torch.nn.Module, splits: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ROWCOL_CACHE", str(tmp_path / "cache"))
    options: dict[str, Any] = {"budget": BUDGET, "dense": False, "calib": splits["calib"]}
    first = rowcol_edge.build(net, out=str(tmp_path / "first"), **options)[0]

    def refuse(*arguments: Any, **more: Any) -> Any:
        raise AssertionError("settled again")

    monkeypatch.setattr(gauges, "settle_model", refuse)
    second = rowcol_edge.build(net, out=str(tmp_path / "second"), **options)[0]
    assert (second.path / "plan.toml").read_text() == (first.path / "plan.toml").read_text()
    assert second.manifest.build["notes"] == first.manifest.build["notes"]
