"""Train sample:italy-power-cnn (half a minute); a killed run goes on where it was.

    python -m pip install -e . torch safetensors
    python -m pip install --no-deps aeon
    python tools/train_italy_power_cnn.py

The epoch is chosen on the selection split; the stored fp16 weights are read back and scored once on the test split.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import train_small
from train_common import shuffled
from train_small import Recipe, Settings, Step


class SeriesRecipe(Recipe):
    """Days, a little scaled and with a little noise."""

    def __init__(self, settings: Settings) -> None:
        super().__init__("italy-power-cnn", settings)
        series, labels = self.data.days()
        rows = self.data.indices("train")
        self.inputs, self.targets = torch.from_numpy(series[rows]), torch.from_numpy(labels[rows])

    def steps(self, epoch: int) -> int:
        return len(self.targets) // self.settings.batch

    def batches(self, epoch: int, generator: torch.Generator) -> Iterator[Step]:
        for pick in shuffled(len(self.targets), self.settings.batch, generator):
            x = self.inputs[pick]
            scale = 0.9 + 0.2 * torch.rand(len(x), 1, 1, generator=generator)
            yield x * scale + 0.1 * torch.randn(x.shape, generator=generator), self.targets[pick]

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(outputs, targets, label_smoothing=0.05)

    def score(self, model: nn.Module, split: str) -> float:
        outputs, labels = self.outputs(model, split)
        return float(np.mean(outputs.argmax(1) == labels))


if __name__ == "__main__":
    train_small.main("italy-power-cnn", "accuracy", SeriesRecipe, __doc__, epochs=40)
