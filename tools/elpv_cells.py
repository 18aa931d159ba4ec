"""The ELPV cells as the training scripts see them: soft targets, random views, smaller pictures."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

# thirds of defect probability → target: the experts' doubt is information
SOFT_LABELS = {0: 0.03, 1: 0.25, 2: 0.75, 3: 0.97}


@dataclass(frozen=True)
class Split:
    """Images (N, 1, 224, 224) as the sample's own preprocessing gives them, hard labels and soft targets."""

    inputs: Tensor
    labels: np.ndarray
    targets: Tensor


def read(data: Any, split: str, batches: int | None = None) -> Split:
    """A split, or its first few ``batches``."""
    inputs, labels = zip(*islice(getattr(data, split)(), batches), strict=True)
    found = np.concatenate(labels)
    thirds = [round(data.table()[i][1] * 3) for i in data.indices(split)[: len(found)]]
    return Split(torch.from_numpy(np.concatenate(inputs)), found, torch.tensor([SOFT_LABELS[t] for t in thirds]))


class Views:
    """Random views of preprocessed images: a solar cell has no preferred side, and cameras shift, zoom and fade."""

    def __init__(self, generator: torch.Generator) -> None:
        self.generator = generator

    def uniform(self, low: float, high: float, *shape: int) -> Tensor:
        return torch.rand(*shape, generator=self.generator) * (high - low) + low

    def __call__(self, x: Tensor) -> Tensor:
        x = torch.stack([self.dihedral(image) for image in x])
        some = torch.rand(len(x), generator=self.generator) < 0.6
        if some.any():
            x[some] = self.affine(x[some])
        n = len(x)
        return x * self.uniform(0.85, 1.15, n, 1, 1, 1) + self.uniform(-0.3, 0.3, n, 1, 1, 1)

    def dihedral(self, image: Tensor) -> Tensor:
        which = int(torch.randint(8, (1,), generator=self.generator))
        image = torch.rot90(image, which % 4, (1, 2))
        return image.flip(2) if which >= 4 else image

    def affine(self, x: Tensor) -> Tensor:
        n = len(x)
        angle, zoom = self.uniform(-0.07, 0.07, n), self.uniform(0.88, 1.08, n)
        c, s = torch.cos(angle) * zoom, torch.sin(angle) * zoom
        dx, dy = self.uniform(-0.08, 0.08, n), self.uniform(-0.08, 0.08, n)
        theta = torch.stack([torch.stack([c, -s, dx], 1), torch.stack([s, c, dy], 1)], 1)
        grid = F.affine_grid(theta, list(x.shape), align_corners=False)
        return F.grid_sample(x, grid, padding_mode="reflection", align_corners=False)

    def mix(self, x: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        share = float(self.uniform(0.5, 1.0, 1))
        return share * x + (1 - share) * x.flip(0), share * targets + (1 - share) * targets.flip(0)


def resized(x: Tensor, pixels: int) -> Tensor:
    if pixels == x.shape[-1]:
        return x
    return F.interpolate(x, size=(pixels, pixels), mode="bilinear", antialias=True, align_corners=False)


def fast(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


def fast_module(module: Any) -> Any:
    return module.to(memory_format=torch.channels_last)
