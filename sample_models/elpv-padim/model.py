"""PaDiM: how far each patch of a picture is from what good pictures have at its place.

Frozen features (the first eight blocks of EfficientNet-Lite0, stride 16) are projected to `DIRECTIONS` of them; good
cells give every one of the 14×14 places a mean and a covariance, and a patch is judged by its Mahalanobis distance.

Source: T. Defard, A. Setkov, A. Loesch, R. Audigier, "PaDiM: a patch distribution modeling framework for anomaly
detection and localization", ICPR Workshops 2021 (one feature level here, and principal directions instead of random
ones).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

PLACES = 14  # places along each side
DIRECTIONS = 64
CHANNELS = 80  # of the last block
#: kernel, stride, expansion, output channels
BLOCKS = (
    (3, 1, 1, 16), (3, 2, 6, 24), (3, 1, 6, 24), (5, 2, 6, 40), (5, 1, 6, 40), (3, 2, 6, 80), (3, 1, 6, 80),
    (3, 1, 6, 80),
)  # fmt: skip


class Step(nn.Module):
    """Convolution, batch norm and, unless ``linear``, ReLU6.

    At stride 2 zeros go right and below first, as TensorFlow's "SAME" puts them: these weights were trained so.
    """

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1, linear: bool = False):
        super().__init__()
        around = kernel - stride  # zeros on both sides together
        self.pad = (around // 2, around - around // 2) * 2 if stride > 1 else None
        padding = 0 if stride > 1 else around // 2
        self.conv = nn.Conv2d(inputs, outputs, kernel, stride, padding, groups=groups, bias=False)
        self.norm = nn.BatchNorm2d(outputs, eps=1e-3)
        self.act = nn.Identity() if linear else nn.ReLU6()

    def forward(self, x: Tensor) -> Tensor:
        if self.pad is not None:
            x = F.pad(x, self.pad)
        return self.act(self.norm(self.conv(x)))


class Block(nn.Module):
    """Inverted residual."""

    def __init__(self, inputs: int, kernel: int, stride: int, expansion: int, outputs: int) -> None:
        super().__init__()
        width = inputs * expansion
        steps = [] if expansion == 1 else [Step(inputs, width, 1)]
        steps += [Step(width, width, kernel, stride, groups=width), Step(width, outputs, 1, linear=True)]
        self.steps = nn.Sequential(*steps)
        self.residual = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        return x + self.steps(x) if self.residual else self.steps(x)


class Padim(nn.Module):
    """(N, 1, 224, 224) → {"score": one logit for "defective" (N, 1), "heatmap": distances (N, 1, 14, 14)}.

    ``whiten`` has a matrix and a bias for each place, such that the squares of what it gives add up to a squared
    Mahalanobis distance. Buffers: ``range`` is scale and shift that turn the sample's normalisation into the features'
    own; ``decide`` is what is taken from the largest distance, and what divides it.
    """

    def __init__(self) -> None:
        super().__init__()
        channels = (32, *(block[3] for block in BLOCKS))
        blocks = [Block(before, *block) for before, block in zip(channels, BLOCKS, strict=False)]
        self.features = nn.Sequential(Step(1, 32, 3, stride=2), *blocks)
        self.project = nn.Conv2d(CHANNELS, DIRECTIONS, 1)
        everywhere = PLACES**2 * DIRECTIONS
        self.whiten = nn.Conv2d(everywhere, everywhere, 1, groups=PLACES**2)
        self.register_buffer("range", torch.tensor([1.0, 0.0]))
        self.register_buffer("decide", torch.tensor([0.0, 1.0]))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        distances = self.distances(self.project(self.features(x * self.range[0] + self.range[1])))
        score = (distances.amax(1, keepdim=True) - self.decide[0]) / self.decide[1]
        return {"score": score, "heatmap": distances.unflatten(1, (1, PLACES, PLACES))}

    def distances(self, directions: Tensor) -> Tensor:
        """(N, DIRECTIONS, 14, 14) → (N, 196)."""
        places = directions.flatten(2).transpose(1, 2).reshape(-1, PLACES**2 * DIRECTIONS, 1, 1)
        return self.whiten(places).reshape(-1, PLACES**2, DIRECTIONS).square().mean(2).sqrt()


def build() -> nn.Module:
    """The architecture with random features."""
    return Padim()
