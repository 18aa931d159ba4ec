"""A small U-Net: three steps down, three up again by transposed convolutions, with short cuts across.

Source: O. Ronneberger, P. Fischer, T. Brox, "U-Net: convolutional networks for biomedical image segmentation",
MICCAI 2015.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

WIDTHS = (8, 16, 32, 64)


class Block(nn.Sequential):
    """Two 3×3 convolutions."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(
            nn.Conv2d(inputs, outputs, 3, padding=1, bias=False),
            nn.BatchNorm2d(outputs),
            nn.ReLU(),
            nn.Conv2d(outputs, outputs, 3, padding=1, bias=False),
            nn.BatchNorm2d(outputs),
            nn.ReLU(),
        )


class UNet(nn.Module):
    """(N, 1, 96, 96) float32 → (N, 1, 96, 96), a logit for "scratch" at each pixel."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.ModuleList(Block(a, b) for a, b in zip((1, *WIDTHS), WIDTHS, strict=False))
        self.pool = nn.MaxPool2d(2)
        steps = list(zip(WIDTHS[:0:-1], WIDTHS[-2::-1], strict=True))
        self.up = nn.ModuleList(nn.ConvTranspose2d(a, b, 2, stride=2) for a, b in steps)
        self.merge = nn.ModuleList(Block(2 * b, b) for _, b in steps)
        self.head = nn.Conv2d(WIDTHS[0], 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        maps: list[Tensor] = []
        for block in self.down:
            x = block(self.pool(x) if maps else x)
            maps.append(x)
        for up, merge, across in zip(self.up, self.merge, maps[-2::-1], strict=True):
            x = merge(torch.cat([across, up(x)], 1))
        return self.head(x)


def build() -> nn.Module:
    """The architecture with random weights."""
    return UNet()
