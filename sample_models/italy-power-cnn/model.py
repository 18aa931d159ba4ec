"""A small network for short time series: three residual blocks of 1-D convolutions, then the mean over time.

After Z. Wang, W. Yan, T. Oates, "Time series classification from scratch with deep neural networks: a strong baseline",
IJCNN 2017, on a smaller scale.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

LENGTH = 24
WIDTHS = (32, 64, 64)


class Block(nn.Module):
    """Two convolutions over time around a short cut: (N, inputs, T) → (N, outputs, T)."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv1d(inputs, outputs, 5, padding=2, bias=False)
        self.norm1 = nn.BatchNorm1d(outputs)
        self.conv2 = nn.Conv1d(outputs, outputs, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm1d(outputs)
        self.short = nn.Identity() if inputs == outputs else nn.Conv1d(inputs, outputs, 1)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.short(x) + self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x))))))


class SeriesNet(nn.Module):
    """(N, 1, 24) float32 → (N, 2) logits."""

    def __init__(self, classes: int = 2) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*(Block(a, b) for a, b in zip((1, *WIDTHS), WIDTHS, strict=False)))
        self.head = nn.Linear(WIDTHS[-1], classes)

    def forward(self, series: Tensor) -> Tensor:
        return self.head(self.blocks(series).mean(2))


def build() -> nn.Module:
    """The architecture with random weights."""
    return SeriesNet()
