"""1-D convolutions on the raw waveform, down to 50 steps a second, then the mean over time.

After W. Dai, C. Dai, S. Qu, J. Li, S. Das, "Very deep convolutional neural networks for raw waveforms", ICASSP 2017,
with residual blocks, on a smaller scale.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

RATE = 8000  # samples a second, and samples of an input
STEM = 32
WIDTHS = (64, 96, 128, 128)


class Block(nn.Module):
    """Half as many steps: (N, inputs, T) → (N, outputs, T / 2)."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv1d(inputs, outputs, 3, stride=2, padding=1, bias=False)
        self.norm1 = nn.BatchNorm1d(outputs)
        self.conv2 = nn.Conv1d(outputs, outputs, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm1d(outputs)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm1(self.conv1(x)))
        return F.relu(x + self.norm2(self.conv2(x)))


class SpeechNet(nn.Module):
    """(N, 1, 8000) float32, a second of speech → (N, 5) logits."""

    def __init__(self, classes: int = 5) -> None:
        super().__init__()
        self.stem = nn.Conv1d(1, STEM, 80, stride=10, padding=35, bias=False)
        self.norm = nn.BatchNorm1d(STEM)
        self.blocks = nn.Sequential(*(Block(a, b) for a, b in zip((STEM, *WIDTHS), WIDTHS, strict=False)))
        self.head = nn.Linear(WIDTHS[-1], classes)

    def forward(self, sound: Tensor) -> Tensor:
        return self.head(self.blocks(F.relu(self.norm(self.stem(sound)))).mean(2))


def build() -> nn.Module:
    """The architecture with random weights."""
    return SpeechNet()
