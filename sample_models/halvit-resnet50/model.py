"""The network for ImageNet's 1,000 classes, with the same random weights every time."""

from __future__ import annotations

import torch

from rowcol_edge.factoring import halvit


def build() -> torch.nn.Module:
    """(N, 3, 224, 224) float32 → (N, 1000) logits."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return halvit.resnet50()
