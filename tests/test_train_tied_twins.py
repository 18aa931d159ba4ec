"""Twins are the dense networks where pairs are one weight already, and train as they do."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from rowcol_edge.errors import ModelError
from rowcol_edge.user_code import import_file

PAIRS = {"fmnist-vit": 3 * 6, "elpv-resnet18": 1}  # that a smoke ties


@pytest.fixture
def script(root: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(root / "tools")
    return importlib.import_module("train_tied_twins")


@pytest.fixture
def twins(script: ModuleType) -> ModuleType:
    return importlib.import_module("tied_twins")


@pytest.fixture
def samples(script: ModuleType) -> ModuleType:
    return importlib.import_module("twin_samples")


@pytest.fixture
def forgetful(root: Path) -> Iterator[None]:
    """Forgets the pictures afterwards: a sample's module is imported once, and other tests say where they lie."""
    yield
    import_file(root / "sample_models" / "fmnist-vit" / "data.py", ModelError).arrays.cache_clear()


def build(root: Path, sample: str) -> Any:
    torch.manual_seed(0)
    return import_file(root / "sample_models" / sample / "model.py", ModelError).build().eval()


def test_a_transformer_that_is_tied_already_calculates_the_same(root: Path, twins: ModuleType) -> None:
    dense = build(root, "fmnist-vit")
    with torch.no_grad():
        for block in dense.blocks:
            block.contract.weight.copy_(block.expand.weight.t())
            block.attention.value.weight.copy_(block.attention.key.weight.t())
            block.attention.output.weight.copy_(block.attention.query.weight.t())
    images = torch.randn(32, 1, 28, 28)
    twin, ties = twins.transformer(dense, images)
    assert len(ties) == 18
    assert max(max(tie.first_error, tie.second_error) for tie in ties.values()) < 1e-4
    with torch.no_grad():
        assert torch.allclose(twin(images), dense(images), atol=1e-4)
    # a block: two matrices of 96×96 and one of 96×384 less, no bias less
    spared = sum(p.numel() for p in dense.parameters()) - sum(p.numel() for p in twin.parameters())
    assert spared == 6 * (2 * 96 * 96 + 96 * 384)


def test_a_residual_network_that_is_tied_already_calculates_the_same(
    root: Path, twins: ModuleType, samples: ModuleType
) -> None:
    dense, names = build(root, "elpv-resnet18"), samples.Cells.blocks[:2]
    with torch.no_grad():
        for name in names:
            block = dense.get_submodule(name)
            block.conv2.weight.copy_(block.conv1.weight.transpose(0, 1))
    images = torch.randn(8, 1, 64, 64)
    twin, ties = twins.residual(dense, images, names)
    assert list(ties) == [f"{name}.conv1, conv2" for name in names]
    with torch.no_grad():
        assert torch.allclose(twin(images), dense(images), atol=1e-4)


def test_every_pair_of_equal_shape_is_tied(root: Path, twins: ModuleType, samples: ModuleType) -> None:
    dense = build(root, "elpv-resnet18")
    alike = [
        name
        for name, block in dense.named_modules()
        if hasattr(block, "conv2") and block.conv1.weight.shape == block.conv2.weight.shape
    ]
    assert list(samples.Cells.blocks) == alike
    twin, _ = twins.residual(dense, None, alike)
    spared = sum(p.numel() for p in dense.parameters()) - sum(p.numel() for p in twin.parameters())
    assert spared == sum(dense.get_submodule(name).conv2.weight.numel() for name in alike)


@pytest.mark.usefixtures("forgetful")
@pytest.mark.parametrize(
    "sample", [pytest.param("fmnist-vit", marks=pytest.mark.system("dataset-fashion-mnist")), "elpv-resnet18"]
)
def test_a_smoke_trains_both_arms_alike_and_a_second_one_goes_on(
    sample: str, script: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["train_tied_twins.py", "--samples", sample, "--smoke", "--cache", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", argv)
    script.main()
    assert "left" in capsys.readouterr().out
    written = tmp_path / "smoke" / "tied_twins.json"
    result = json.loads(written.read_text(encoding="utf-8"))
    starts = result["samples"][sample]["starts"]
    assert set(starts) == {"trained", "scratch"}
    for start, found in starts.items():
        dense, tied = found["dense"], found["tied"]
        assert tied["parameters"] < dense["parameters"]
        assert tied["epochs"] == dense["epochs"] == 1
        assert tied["history"][0]["loss"] != dense["history"][0]["loss"]
        for metric, drop in found["drop_pp"].items():
            assert drop["ci_low"] <= drop["value"] <= drop["ci_high"]
            values = [found[arm]["test"][metric]["value"] for arm in ("dense", "tied")]
            assert drop["value"] == pytest.approx(100 * (values[0] - values[1]), abs=0.02)
        assert len(tied.get("pairs", [])) == (PAIRS[sample] if start == "trained" else 0)
        assert all(0 < pair["first_error"] < 1 and 0 < pair["second_error"] < 1 for pair in tied.get("pairs", []))
    script.main()
    assert "left" not in capsys.readouterr().out  # nothing is trained again
    again = json.loads(written.read_text(encoding="utf-8"))
    assert again["samples"] == result["samples"]


def test_the_result_is_of_these_twins(root: Path, samples: ModuleType) -> None:
    result = json.loads((root / "tools" / "results" / "tied_twins.json").read_text(encoding="utf-8"))
    assert {name: len(sample["starts"]) for name, sample in result["samples"].items()} == dict.fromkeys(PAIRS, 2)
    for name, sample in result["samples"].items():
        assert sample["settings"] == json.loads(json.dumps(asdict(samples.SETTINGS[name])))
        for start, found in sample["starts"].items():
            epochs = sum(count for _, count in samples.SETTINGS[name].budgets[start].phases)
            for arm in ("dense", "tied"):
                scores = [epoch["selection"] for epoch in found[arm]["history"]]
                assert len(scores) == epochs
                assert scores[found[arm]["kept_epoch"] - 1] == max(scores)
