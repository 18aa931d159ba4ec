"""The sizes that HaLViT published, and the samples that have them."""

from __future__ import annotations

import pytest
import torch

from rowcol_edge import models, samples
from rowcol_edge.config import make
from rowcol_edge.errors import DataError
from rowcol_edge.factoring import halvit
from rowcol_edge.job import prepare

COUNTS = {"tiny": 11_119_720, "small": 43_029_928, "resnet50": 15_515_176}


def count(model: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("name", COUNTS)
def test_counts_are_the_published_ones(name: str) -> None:
    model = models.load(f"sample:halvit-{name}").module
    assert count(model) == COUNTS[name]
    millions = {"tiny": "11.1", "small": "43.0", "resnet50": "15.515"}[name]
    assert f"{count(model) / 1e6:.{len(millions.partition('.')[2])}f}" == millions


def test_the_resnet_without_its_classifier() -> None:
    assert count(halvit.resnet50(classes=0)) == 13_466_176


@pytest.mark.parametrize("name", ["tiny", "resnet50"])
def test_they_give_finite_logits_and_the_same_weights_every_time(name: str) -> None:
    first, second = (models.load(f"sample:halvit-{name}") for _ in range(2))
    assert first.digest == second.digest
    assert first.sample is not None
    assert not first.sample.trained
    with torch.no_grad():
        logits = first.module(torch.randn(1, 3, 224, 224))
    assert logits.shape == (1, 1000)
    assert torch.isfinite(logits).all()


def test_gradients_reach_every_parameter() -> None:
    model = halvit.VisionTransformer(width=32, hidden=64, heads=2, depth=2, classes=5, image=32)
    model(torch.randn(2, 3, 32, 32)).square().sum().backward()
    missing = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum()]
    assert missing == []


def test_a_build_without_data_says_that_there_is_none() -> None:
    with pytest.raises(DataError, match="sample:halvit-tiny is an architecture alone, with random weights and no data"):
        prepare(make({"model": "sample:halvit-tiny", "target": ["generic-x86"]}))


def test_the_list_of_samples_has_them() -> None:
    assert {f"halvit-{name}" for name in COUNTS} <= set(samples.available())
    assert samples.load("fmnist-vit").alone == ""
