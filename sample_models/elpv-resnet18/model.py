"""ResNet-18 for one grey channel and two classes (good, defective)."""

from __future__ import annotations

import torch
from torchvision.models import resnet18


def build() -> torch.nn.Module:
    """The architecture with random weights: (N, 1, 224, 224) float32 → (N, 2) logits."""
    model = resnet18(weights=None, num_classes=2)
    model.conv1 = torch.nn.Conv2d(1, 64, kernel_size=7, stride=2, padding=3, bias=False)
    return model
